"""Diffusers' schedulers that do something otherwise.

With a picture to start from, only the last steps of a schedule are run. Diffusers' PNDM then lays its Runge-Kutta start
out over the first steps of the whole schedule, and its LMS reckons with steps that were never made
(https://github.com/huggingface/diffusers/issues/5630); here they begin at the first step that is run.
"""

from collections.abc import Callable, Mapping
from functools import reduce
from typing import Any

import numpy as np
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    SASolverScheduler,
    UniPCMultistepScheduler,
)
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteSchedulerOutput
from diffusers.schedulers.scheduling_lms_discrete import LMSDiscreteSchedulerOutput
from diffusers.schedulers.scheduling_utils import SchedulerOutput

from library.draw.step_noise import step_noise

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

    def steps_of_evaluations(self) -> list[int]:
        """For each evaluation which step it belongs to, from 0."""
        warm = len(self.prk_timesteps) // 4
        return [*(place // 4 for place in range(4 * warm)), *range(warm, warm + len(self.plms_timesteps))]

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


class ChurnedEuler(EulerDiscreteScheduler):
    """Euler with noise stirred in before each step (Karras et al. 2022, https://arxiv.org/abs/2206.00364, algorithm 2).

    Diffusers' own `s_churn` adds the noise after the model has looked, which is another method. Here each step
    ends with the noise for the next one, and the model is told the level that this makes; the first step begins at the
    highest level anyway.

    Args:
        s_churn: the paper's S_churn.
        config: diffusers' own arguments.
    """

    def __init__(self, s_churn: float, **config: Any) -> None:
        super().__init__(**config)
        self._s_churn = s_churn

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: list[int] | None = None,
    ) -> None:
        """Set the schedule, and raise its levels by the noise to be added."""
        super().set_timesteps(num_inference_steps, device, timesteps=timesteps)
        trained = ((1 - self.alphas_cumprod) / self.alphas_cumprod) ** 0.5
        gamma = min(self._s_churn / len(self.timesteps), 2**0.5 - 1)
        self._aims = self.sigmas
        self.sigmas = torch.maximum(self._aims, torch.minimum(self._aims * (1 + gamma), trained[-1]))
        levels = self.sigmas[:-1].numpy()
        self.timesteps = torch.from_numpy(np.interp(np.log(levels), trained.log().numpy(), np.arange(len(trained))))
        self.timesteps = self.timesteps.to(torch.float32)

    def step(
        self,
        model_output: torch.Tensor,
        timestep: torch.Tensor,
        sample: torch.Tensor,
        *,
        generator: list[torch.Generator] | None = None,
    ) -> EulerDiscreteSchedulerOutput:
        """One step, and the noise for the next."""
        following = self.step_index + 1  # set by `scale_model_input`
        raised, aim = self.sigmas[following].clone(), self._aims[following]
        self.sigmas[following] = aim
        output = super().step(model_output, timestep, sample)
        self.sigmas[following] = raised
        if raised > aim:
            shape, device, dtype = sample.shape, sample.device, sample.dtype
            noise = step_noise(shape, generator=generator, device=device, dtype=dtype)
            output.prev_sample = output.prev_sample + noise * (raised**2 - aim**2) ** 0.5
        return output


class SASolver(SASolverScheduler):
    """SA-Solver that adds noise to pictures by the levels that its steps go through, not by whole timesteps."""

    def add_noise(self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Noise for the step that is next, as diffusers' other multistep solvers have it."""
        return DPMSolverMultistepScheduler.add_noise(self, original_samples, noise, timesteps)


class UniPC(UniPCMultistepScheduler):
    """UniPC (Zhao et al. 2023, https://arxiv.org/abs/2302.04867) whose weights are worked out on the CPU.

    Its steps are sums of the latents and of predictions, by weights that follow from the noise levels. Diffusers sends
    these to the device at each step, and solves a small system there, which a GPU is waited for.
    """

    def multistep_uni_p_bh_update(
        self, model_output: torch.Tensor, *, sample: torch.Tensor, order: int
    ) -> torch.Tensor:
        """The predictor."""
        update = super().multistep_uni_p_bh_update
        return self._weighted(update, {"model_output": model_output, "sample": sample}, order)

    def multistep_uni_c_bh_update(
        self, this_model_output: torch.Tensor, *, last_sample: torch.Tensor, this_sample: torch.Tensor, order: int
    ) -> torch.Tensor:
        """The corrector."""
        tensors = {"this_model_output": this_model_output, "last_sample": last_sample, "this_sample": this_sample}
        return self._weighted(super().multistep_uni_c_bh_update, tensors, order)

    def _weighted(
        self, update: Callable[..., torch.Tensor], tensors: Mapping[str, torch.Tensor], order: int
    ) -> torch.Tensor:
        """What an update makes of tensors and of the predictions before: its weights are what it makes of units."""
        outputs, made = self.model_outputs, [each for each in self.model_outputs if each is not None]
        parts = [*tensors.values(), *made]
        units = list(torch.eye(len(parts)).view(len(parts), 1, -1, 1, 1))  # (1, parts, 1, 1) each
        try:
            self.model_outputs = [*outputs[: len(outputs) - len(made)], *units[len(tensors) :]]
            weights = update(**dict(zip(tensors, units)), order=order).flatten().tolist()
        finally:
            self.model_outputs = outputs
        return reduce(torch.add, [weight * part for weight, part in zip(weights, parts) if weight])
