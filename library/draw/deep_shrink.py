"""Deep Shrink at work: forward hooks that shrink what enters a block of the U-Net, and enlarge it where skips join."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from torch import nn

from library.settings.deep_shrink import DeepShrink


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
    def attached(self, unet: UNet2DConditionModel, *encoders: nn.Module) -> Iterator[None]:
        """Hook into the U-Net, and into the down blocks of `encoders` built like it, for the length of the block."""
        with ExitStack() as stack:
            if any(depth is not None for depth in self._depths):
                for model in (unet, *encoders):
                    for depth, block in enumerate(model.get_submodule("down_blocks").children()):
                        stack.callback(block.register_forward_pre_hook(self._shrink(depth), with_kwargs=True).remove)
                for block in unet.get_submodule("up_blocks").children():
                    for handle in _follow_skips(block):
                        stack.callback(handle.remove)
            yield

    def _shrink(self, depth: int) -> Callable:
        def hook(block: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
            if depth != self._depth:
                return None
            features = kwargs["hidden_states"]
            return args, kwargs | {"hidden_states": _interpolate(features, scale_factor=self._ratio)}

        return hook


def _follow_skips(block: nn.Module) -> list:
    """Let an up block's features take on the size of each skip connection before they are joined; returns handles.

    The block joins its skips, the last one first, to its input and then to the output of each layer but the last.
    """
    sizes: list[tuple[int, int]] = []

    def enter(_block: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        sizes[:] = [tuple(skip.shape[-2:]) for skip in reversed(kwargs["res_hidden_states_tuple"])]
        return args, kwargs | {"hidden_states": _to_size(kwargs["hidden_states"], sizes[0])}

    def leave(place: int) -> Callable:
        def hook(_layer: nn.Module, _args: tuple, output: torch.Tensor | tuple) -> torch.Tensor | tuple:
            if isinstance(output, tuple):
                return _to_size(output[0], sizes[place]), *output[1:]
            return _to_size(output, sizes[place])

        return hook

    children = dict(block.named_children())
    layers = list((children.get("attentions") or children["resnets"]).children())
    handles = [layer.register_forward_hook(leave(place)) for place, layer in enumerate(layers[:-1], start=1)]
    return [block.register_forward_pre_hook(enter, with_kwargs=True), *handles]


def _to_size(features: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    return features if tuple(features.shape[-2:]) == size else _interpolate(features, size=size)


def _interpolate(
    features: torch.Tensor, size: tuple[int, int] | None = None, scale_factor: float | None = None
) -> torch.Tensor:
    """Bicubic resizing in float32, to a size or by a factor: not every device has it in narrower types."""
    return F.interpolate(features.float(), size, scale_factor, mode="bicubic", align_corners=False).to(features.dtype)
