"""diffusers ships no types; see the stub of the package."""

from collections.abc import Callable

import torch
from diffusers import _Module

class Attention(_Module):
    heads: int
    to_q: torch.nn.Linear
    to_k: torch.nn.Linear
    to_v: torch.nn.Linear
    to_out: torch.nn.ModuleList
    processor: Callable[..., torch.Tensor]
