"""Deep Shrink (Kohya): in the early steps the U-Net's deeper blocks work on smaller features, which keeps large
pictures in one piece. Settings, and the forward hooks that do it; at module level it knows no torch.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from library import values

if TYPE_CHECKING:
    import torch
    from diffusers import UNet2DConditionModel
    from torch import nn

MAX_DEPTH = 3  # the U-Nets of SD 1.x and 2.x have four down blocks
USUAL_DEPTH = 3  # where a prompt line shrinks that sets only the other options


@dataclass(frozen=True, slots=True, kw_only=True)
class DeepShrink:
    """Where and when features are shrunk; without `depth_1` they are not.

    What enters down block `depth_1` is shrunk by `ratio` while the timestep is at least `timesteps_1`, then what enters
    block `depth_2` while it is at least `timesteps_2`.
    """

    depth_1: int | None = None
    timesteps_1: int = 650
    depth_2: int | None = None
    timesteps_2: int = 650
    ratio: float = 0.5

    def depth(self, timestep: float) -> int | None:
        """The down block whose input is shrunk at a timestep, if any."""
        if self.depth_1 is None:
            return None
        if timestep >= self.timesteps_1:
            return self.depth_1
        return self.depth_2 if timestep >= self.timesteps_2 else None

    def check(self, height: int, width: int) -> str | None:
        """Why these settings cannot work on latents of this size, and what would; None when they can."""
        for depth in (self.depth_1, self.depth_2):
            if depth is not None and int(-(-min(height, width) // 2**depth) * self.ratio) < 1:
                return "leaves nothing of a picture this small; use a smaller depth or a larger ratio"
        return None


def depth_or_none(text: str) -> int | None:
    """Convert a depth, or `none` for a prompt line that does without."""
    return None if text.strip().lower() == "none" else values.whole_number(0, MAX_DEPTH)(text)


timesteps = values.whole_number(0, 1000)
ratio = values.number(0, 1, above=True)

# ---------------------------------------------------------------------------------------------------------------------
# Hooks


class Shrinker:
    """Shrinks features in the U-Net while it is `attached`, as planned for each step.

    Args:
        settings: where and when.
        timesteps: of the steps that are run.
    """

    def __init__(self, settings: DeepShrink, timesteps: Sequence[float]) -> None:
        self._ratio = settings.ratio
        self._depths = [settings.depth(timestep) for timestep in timesteps]
        self._depth: int | None = None

    def begin_step(self, index: int) -> None:
        """Say which step the U-Net's next evaluations belong to."""
        self._depth = self._depths[index]

    @contextmanager
    def attached(self, unet: "UNet2DConditionModel", *encoders: "nn.Module") -> Iterator[None]:
        """Hook into the U-Net, and into the down blocks of `encoders` built like it, for the length of the block."""
        with ExitStack() as stack:
            if any(depth is not None for depth in self._depths):
                for model in (unet, *encoders):
                    for depth, block in enumerate(model.down_blocks):
                        stack.callback(block.register_forward_pre_hook(self._shrink(depth), with_kwargs=True).remove)
                for block in unet.up_blocks:
                    for handle in _follow_skips(block):
                        stack.callback(handle.remove)
            yield

    def _shrink(self, depth: int) -> Callable:
        def hook(block: "nn.Module", args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
            if depth != self._depth:
                return None
            features = kwargs["hidden_states"]
            return args, kwargs | {"hidden_states": _interpolate(features, scale_factor=self._ratio)}

        return hook


def _follow_skips(block: "nn.Module") -> list:
    """Let an up block's features take on the size of each skip connection before they are joined; returns handles.

    The block joins its skips, the last one first, to its input and then to the output of each layer but the last.
    """
    sizes: list[tuple[int, int]] = []

    def enter(_block: "nn.Module", args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        sizes[:] = [tuple(skip.shape[-2:]) for skip in reversed(kwargs["res_hidden_states_tuple"])]
        return args, kwargs | {"hidden_states": _to_size(kwargs["hidden_states"], sizes[0])}

    def leave(place: int) -> Callable:
        def hook(_layer: "nn.Module", _args: tuple, output: "torch.Tensor | tuple") -> "torch.Tensor | tuple":
            if isinstance(output, tuple):
                return _to_size(output[0], sizes[place]), *output[1:]
            return _to_size(output, sizes[place])

        return hook

    layers = list(getattr(block, "attentions", block.resnets))
    handles = [layer.register_forward_hook(leave(place)) for place, layer in enumerate(layers[:-1], start=1)]
    return [block.register_forward_pre_hook(enter, with_kwargs=True), *handles]


def _to_size(features: "torch.Tensor", size: tuple[int, int]) -> "torch.Tensor":
    return features if tuple(features.shape[-2:]) == size else _interpolate(features, size=size)


def _interpolate(features: "torch.Tensor", **how: object) -> "torch.Tensor":
    """Bicubic resizing in float32: not every device has it in narrower types."""
    import torch.nn.functional as F

    return F.interpolate(features.float(), mode="bicubic", align_corners=False, **how).to(features.dtype)
