"""The size of the feature map that attention is in: its tokens alone would not tell 2 × 8 from 4 × 4."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import nn


@contextmanager
def followed(note: Callable[[tuple[int, int]], None], *models: nn.Module) -> Iterator[None]:
    """A block in which a function is told height and width whenever models come to attention."""

    def hook(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        height, width = inputs[0].shape[-2:]
        note((height, width))

    with ExitStack() as stack:
        for model in models:
            for module in model.modules():
                if isinstance(module, Transformer2DModel):
                    stack.callback(module.register_forward_pre_hook(hook).remove)
        yield
