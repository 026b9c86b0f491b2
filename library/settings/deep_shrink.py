"""Deep Shrink (Kohya): in the early steps the U-Net's deeper blocks work on smaller features, which keeps large
pictures in one piece. Its settings.
"""

from dataclasses import dataclass

from library import values
from library.files.families import FAMILIES, Family
from library.settings.options import Options

MAX_DEPTH = max(family.deepest_shrink for family in FAMILIES)
USUAL_DEPTH = 3  # where a prompt line shrinks that sets only the other options


@dataclass(frozen=True, slots=True, kw_only=True)
class DeepShrink:
    """Where and when features are shrunk; without `depth_1` they are not.

    What enters the U-Net at `depth_1` (see `Family.shrink_points`) is shrunk by `ratio` while the timestep is at least
    `timesteps_1`, then what enters it at `depth_2` while it is at least `timesteps_2`.
    """

    depth_1: int | None = None
    timesteps_1: int = 650
    depth_2: int | None = None
    timesteps_2: int = 650
    ratio: float = 0.5

    def depth(self, timestep: float) -> int | None:
        """The depth that is shrunk at, at a timestep; None for none."""
        if self.depth_1 is None:
            return None
        if timestep >= self.timesteps_1:
            return self.depth_1
        return self.depth_2 if timestep >= self.timesteps_2 else None

    def check(self, height: int, width: int, family: Family) -> str | None:
        """Why these settings cannot work on latents of this size, and what would; None when they can."""
        for depth in (self.depth_1, self.depth_2):
            if depth is None:
                continue
            if depth > family.deepest_shrink:
                return f"has depths 0 to {family.deepest_shrink} with {family.name}; use one of them, not {depth}"
            if int(-(-min(height, width) // 2 ** family.shrink_level(depth)) * self.ratio) < 1:
                return "leaves nothing of a picture this small; use a smaller depth or a larger ratio"
        return None


def depth_or_none(text: str) -> int | None:
    """Convert a depth, or `none` for a prompt line that does without."""
    return None if text.strip().lower() == "none" else values.whole_number(0, MAX_DEPTH)(text)


timesteps = values.whole_number(0, 1000)
ratio = values.number(0, 1, above=True)


def from_options(options: Options) -> DeepShrink:
    """What the options say of it; a line's options may say otherwise."""
    said = {
        "depth_1": options.ds_depth_1,
        "timesteps_1": options.ds_timesteps_1,
        "depth_2": options.ds_depth_2,
        "timesteps_2": options.ds_timesteps_2,
        "ratio": options.ds_ratio,
    }
    return DeepShrink(**{name: value for name, value in said.items() if value is not None})
