"""diffusers ships no types; see the stub of the package."""

import torch

class EulerDiscreteSchedulerOutput:
    prev_sample: torch.Tensor
    pred_original_sample: torch.Tensor | None
