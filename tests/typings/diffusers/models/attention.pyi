"""diffusers ships no types; see the stub of the package."""

import torch

class BasicTransformerBlock(torch.nn.Module): ...
