"""diffusers ships no types; see the stub of the package."""

import torch

def randn_tensor(
    shape: tuple[int, ...], generator: list[torch.Generator] | None, device: torch.device, dtype: torch.dtype
) -> torch.Tensor: ...
