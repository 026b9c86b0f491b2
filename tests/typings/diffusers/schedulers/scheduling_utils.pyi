"""diffusers ships no types; see the stub of the package."""

import torch

class SchedulerOutput:
    prev_sample: torch.Tensor
