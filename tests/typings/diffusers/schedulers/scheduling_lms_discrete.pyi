"""diffusers ships no types; see the stub of the package."""

import torch

class LMSDiscreteSchedulerOutput:
    prev_sample: torch.Tensor
    pred_original_sample: torch.Tensor | None
    def __init__(self, prev_sample: torch.Tensor, pred_original_sample: torch.Tensor | None = ...) -> None: ...
