"""diffusers ships no types; see the stub of the package."""

import torch

class Transformer2DModel(torch.nn.Module): ...
