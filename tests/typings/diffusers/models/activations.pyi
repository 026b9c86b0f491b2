"""diffusers ships no types; see the stub of the package."""

import torch

class GEGLU(torch.nn.Module): ...
