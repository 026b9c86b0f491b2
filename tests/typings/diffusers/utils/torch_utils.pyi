"""diffusers ships no types; see the stub of the package."""

import torch

def randn_tensor(
    shape: tuple[int, ...],
    generator: list[torch.Generator] | torch.Generator | None,
    device: torch.device,
    dtype: torch.dtype | None,
    layout: torch.layout | None = None,
) -> torch.Tensor: ...
