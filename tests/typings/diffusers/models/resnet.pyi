"""diffusers ships no types; see the stub of the package."""

import torch
from diffusers import _Module

class ResnetBlock2D(_Module):
    norm1: torch.nn.GroupNorm
    conv1: torch.nn.Conv2d
    norm2: torch.nn.GroupNorm
    conv2: torch.nn.Conv2d
    conv_shortcut: torch.nn.Conv2d | None

class Upsample2D(_Module): ...
