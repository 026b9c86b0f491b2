"""Diffusers' schedulers that work up to their order from step to step, begun at the first step that is run.

With a picture to start from, only the last steps of a schedule are run. Diffusers' PNDM then lays its Runge-Kutta start
out over the first steps of the whole schedule, and its LMS reckons with steps that were never made
(https://github.com/huggingface/diffusers/issues/5630).
"""

import numpy as np
import torch
from diffusers import LMSDiscreteScheduler, PNDMScheduler
from diffusers.schedulers.scheduling_lms_discrete import LMSDiscreteSchedulerOutput
from diffusers.schedulers.scheduling_utils import SchedulerOutput

_RUNGE_KUTTA_STEPS = 3  # what the linear multistep method of order 4 needs before it


class LatePNDM(PNDMScheduler):
    """PNDM (Liu et al. 2022, https://arxiv.org/abs/2202.09778) whose Runge-Kutta start is laid out over the steps run.

    Made with `skip_prk_steps`, so that diffusers' multistep method takes fewer predictions than four to begin with, as
    runs of three steps and less need it.
    """

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Set the whole schedule."""
        super().set_timesteps(num_inference_steps, device)
        self.begin_at(0)

    def begin_at(self, first: int) -> None:
        """Leave out so many of the first steps; to be called after `set_timesteps`."""
        steps = self._timesteps[: len(self._timesteps) - first]  # from picture to noise
        warm = min(_RUNGE_KUTTA_STEPS, len(steps) - 1)
        half = self.config.num_train_timesteps // self.num_inference_steps // 2
        # of each Runge-Kutta step: its beginning, twice its middle, its end, which is the next one's beginning
        pairs = zip(steps[::-1][:warm], steps[::-1][1:])
        self.prk_timesteps = np.array(
            [t for begin, end in pairs for t in (begin, end + half, end + half, end)], np.int64
        )
        self.plms_timesteps = steps[: len(steps) - warm][::-1].copy()
        self.timesteps = torch.from_numpy(np.concatenate([self.prk_timesteps, self.plms_timesteps]).astype(np.int64))

    def step(
        self, model_output: torch.Tensor, timestep: torch.Tensor, sample: torch.Tensor, return_dict: bool = True
    ) -> SchedulerOutput | tuple:
        """One evaluation's part of a step."""
        step = self.step_prk if self.counter < len(self.prk_timesteps) else self.step_plms
        return step(model_output, timestep, sample, return_dict)


class LateLMS(LMSDiscreteScheduler):
    """LMS whose order grows with the steps that were made."""

    def step(
        self,
        model_output: torch.Tensor,
        timestep: torch.Tensor,
        sample: torch.Tensor,
        order: int = 4,
        return_dict: bool = True,
    ) -> LMSDiscreteSchedulerOutput | tuple:
        """One step."""
        return super().step(model_output, timestep, sample, min(order, len(self.derivatives) + 1), return_dict)
