"""Deep Shrink at work: forward hooks that shrink what enters a block of the U-Net, and enlarge it where skips join."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from torch import nn

from library.settings.deep_shrink import DeepShrink

_FIRST = "conv_in"  # where nothing of full size is left to join at the end


class Shrinker:
    """Shrinks features in the U-Net while it is `attached`, as planned for each step.

    Args:
        settings: where and when.
        points: see `Family.shrink_points`.
        timesteps: of the steps that are run.
    """

    def __init__(self, settings: DeepShrink, points: Sequence[str], timesteps: Sequence[float]) -> None:
        self._ratio, self._points = settings.ratio, points
        self._depths = [settings.depth(timestep) for timestep in timesteps]
        self._depth: int | None = None
        self._latent_size = (0, 0)

    def begin_step(self, index: int) -> None:
        """Say which step the U-Net's next evaluations belong to."""
        self._depth = self._depths[index]

    @contextmanager
    def attached(self, unet: UNet2DConditionModel, *encoders: nn.Module) -> Iterator[None]:
        """Hook into the U-Net, and into `encoders` built like it, for the length of the block."""
        with ExitStack() as stack:
            for depth in {depth for depth in self._depths if depth is not None}:
                for model in (unet, *encoders):
                    point = model.get_submodule(self._points[depth])
                    stack.callback(point.register_forward_pre_hook(self._shrink(depth), with_kwargs=True).remove)
                    # what ControlNets add to the first features is as large as these
                    if self._points[depth] == _FIRST and (hint := getattr(model, "controlnet_cond_embedding", None)):
                        stack.callback(hint.register_forward_hook(self._shrink_hint(depth)).remove)
                if self._points[depth] == _FIRST:
                    stack.callback(unet.register_forward_pre_hook(self._note_size).remove)
                    last = unet.get_submodule("conv_norm_out")
                    stack.callback(last.register_forward_pre_hook(self._enlarge_last).remove)
            if any(depth is not None for depth in self._depths):
                for block in unet.get_submodule("up_blocks").children():
                    for handle in _follow_skips(block):
                        stack.callback(handle.remove)
            yield

    def _shrink(self, depth: int) -> Callable:
        def hook(block: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
            if depth != self._depth:
                return None
            if "hidden_states" in kwargs:
                return args, kwargs | {"hidden_states": self._smaller(kwargs["hidden_states"])}
            return (self._smaller(args[0]), *args[1:]), kwargs

        return hook

    def _shrink_hint(self, depth: int) -> Callable:
        return lambda _hint, _args, features: self._smaller(features) if depth == self._depth else features

    def _note_size(self, _unet: nn.Module, args: tuple) -> None:
        self._latent_size = tuple(args[0].shape[-2:])

    def _enlarge_last(self, _norm: nn.Module, args: tuple) -> tuple:
        return (_to_size(args[0], self._latent_size),)

    def _smaller(self, features: torch.Tensor) -> torch.Tensor:
        return _interpolate(features, scale_factor=self._ratio)


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
