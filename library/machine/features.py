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


def give_back_around_growing(vae: AutoencoderKL) -> None:
    """Let the system have unused memory, on a CPU, before and after large features are enlarged.

    What follows is larger than the holes that what came before has left.
    """
    for module in vae.decoder.modules():
        if isinstance(module, Upsample2D):
            module.register_forward_pre_hook(lambda module, inputs: _give_back(inputs[0]))
            module.register_forward_hook(lambda module, inputs, output: _give_back(output))


def _give_back(features: torch.Tensor) -> None:
    if features.nbytes >= _LARGE_BYTES:
        malloc.give_back()
