"""A VAE's features in less memory, with the same numbers: nothing takes more while a picture is decoded."""

import torch
from diffusers import AutoencoderKL
from diffusers.models.resnet import Upsample2D
from torch import nn

from library.machine import malloc

_LARGE_BYTES = 16 << 20  # of features, from which on the time to give memory back does not count


def overwrite_activations(vae: AutoencoderKL) -> None:
    """Let activations overwrite their inputs, which are what a normalisation gives and nothing else reads."""
    for module in vae.modules():
        if isinstance(module, nn.SiLU):
            module.inplace = True


def give_back_before_growing(vae: AutoencoderKL) -> None:
    """Let the system have unused memory, on a CPU, before large features are enlarged: what follows fits no hole."""
    for module in vae.decoder.modules():
        if isinstance(module, Upsample2D):
            module.register_forward_pre_hook(_give_back)


def _give_back(part: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
    if inputs[0].nbytes >= _LARGE_BYTES:
        malloc.give_back()
