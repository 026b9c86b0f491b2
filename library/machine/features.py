"""Features between a model's layers in less memory, with the same numbers."""

import torch
from diffusers import AutoencoderKL
from diffusers.models.resnet import ResnetBlock2D, Upsample2D
from torch import nn

from library.machine import malloc
from library.machine.vae_slices import SlicedResnetBlock

_LARGE_BYTES = 16 << 20  # of features from which on the time to give memory back does not count


def overwrite_activations(vae: AutoencoderKL) -> None:
    """Let activations overwrite their inputs, which are what a normalisation gives and nothing else reads."""
    for module in vae.modules():
        if isinstance(module, nn.SiLU):
            module.inplace = True


def give_back_between(model: nn.Module) -> None:
    """Let the system have unused memory, on a CPU, before each part of a model whose input is large.

    From part to part features have other sizes, and find no place where those of the one before were.
    """
    for module in model.modules():
        if isinstance(module, ResnetBlock2D | SlicedResnetBlock | Upsample2D):
            module.register_forward_pre_hook(_give_back)


def _give_back(part: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
    if inputs[0].nbytes >= _LARGE_BYTES:
        malloc.give_back()
