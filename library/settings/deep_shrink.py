"""Deep Shrink (Kohya): in the early steps the U-Net's deeper blocks work on smaller features, which keeps large
pictures in one piece. Its settings.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from library import values
from library.files.families import FAMILIES
from library.settings.options import Options

MAX_DEPTH = max(len(family.shrink_points(family.config("unet"))) for family in FAMILIES) - 1
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

    def check(self, height: int, width: int, points: Sequence[str]) -> str | None:
        """Why these settings cannot work, and what would; None when they can.

        Args:
            height: of the latents, in cells.
            width: likewise.
            points: the model's, see `Family.shrink_points`.
        """
        for depth in (self.depth_1, self.depth_2):
            if depth is None:
                continue
            if depth >= len(points):
                return f"has depths 0 to {len(points) - 1} with this model; use one of them, not {depth}"
            level = re.match(r"down_blocks\.(\d+)", points[depth])  # so often the U-Net has halved what enters there
            if int(-(-min(height, width) // 2 ** int(level[1] if level else 0)) * self.ratio) < 1:
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
