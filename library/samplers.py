"""The samplers: their names, the diffusers schedulers behind them, and the noise each picture draws.

Known here without torch or diffusers being imported, so that a wrong name is refused at once.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from diffusers import SchedulerMixin

# The schedule that SD 1.x and 2.x were trained with (Rombach et al. 2022, https://arxiv.org/abs/2112.10752)
_TRAINING_SCHEDULE = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
}


@dataclass(frozen=True)
class Sampler:
    """One entry of the table of samplers."""

    name: str
    scheduler: str  # class name in diffusers
    a1111_name: str  # what AUTOMATIC1111's web UI calls it, for its metadata
    arguments: dict[str, object] = field(default_factory=dict)
    draws_noise: bool = False  # whether its steps add noise, drawn from each picture's generator
    reserved_noises: int = 1  # for each step, noises that are drawn and set aside before the sampler begins


_OFFSET = {"steps_offset": 1}

SAMPLERS = {
    sampler.name: sampler
    for sampler in (
        Sampler("ddim", "DDIMScheduler", "DDIM", {"clip_sample": False} | _OFFSET),
        Sampler("pndm", "PNDMScheduler", "PLMS", {"skip_prk_steps": False} | _OFFSET),
        Sampler("lms", "LMSDiscreteScheduler", "LMS", _OFFSET),
        Sampler("euler", "EulerDiscreteScheduler", "Euler", _OFFSET),
        Sampler("euler_a", "EulerAncestralDiscreteScheduler", "Euler a", _OFFSET, draws_noise=True),
        Sampler("heun", "HeunDiscreteScheduler", "Heun", _OFFSET),
        Sampler("dpm_2", "KDPM2DiscreteScheduler", "DPM2", _OFFSET),
        Sampler("dpm_2_a", "KDPM2AncestralDiscreteScheduler", "DPM2 a", _OFFSET, draws_noise=True, reserved_noises=2),
        Sampler(
            "dpmsolver",
            "DPMSolverMultistepScheduler",
            "DPM-Solver",
            {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"} | _OFFSET,
        ),
        Sampler("dpmsolver++", "DPMSolverMultistepScheduler", "DPM++ 2M", {"algorithm_type": "dpmsolver++"} | _OFFSET),
        Sampler("dpmsingle", "DPMSolverSinglestepScheduler", "DPM++ 2S"),
    )
}
SECOND_NAMES = {
    "k_lms": "lms",
    "k_euler": "euler",
    "k_euler_a": "euler_a",
    "k_dpm_2": "dpm_2",
    "k_dpm_2_a": "dpm_2_a",
    "dpmsolver+++": "dpmsolver++",
}


def make_scheduler(sampler: Sampler, prediction_type: str) -> "SchedulerMixin":
    """Make the sampler's diffusers scheduler, fresh: schedulers keep state from step to step."""
    import diffusers

    scheduler_class = getattr(diffusers, sampler.scheduler)
    with warnings.catch_warnings():
        # DPM-Solver is announced to go in diffusers 1.0; requirements.txt pins an earlier version
        warnings.filterwarnings("ignore", ".*algorithm_types", FutureWarning)
        return scheduler_class(**_TRAINING_SCHEDULE, **sampler.arguments, prediction_type=prediction_type)


def start_noise(
    seeds: Sequence[int], shape: tuple[int, int, int], sampler: Sampler, steps: int
) -> tuple["torch.Tensor", list["torch.Generator"]]:
    """Draw the start latents of pictures that know nothing of each other.

    Each picture's noise comes from a CPU generator of its own, in float32, so that a seed means the same noise on every
    device, in every precision and at every place in a batch. The order is that of sd-scripts: the start latent, noises
    set aside for the sampler, and then those that the sampler's steps draw themselves.

    Args:
        seeds: one for each picture.
        shape: (channels, latent height, latent width).
        sampler: tells how many noises are set aside.
        steps: sampling steps.

    Returns:
        The noise (B, channels, latent height, latent width), float32 on the CPU, and the generators to go on with.
    """
    import torch

    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    noise = torch.stack([torch.randn(shape, generator=generator) for generator in generators])
    if sampler.draws_noise:
        for generator in generators:
            torch.randn((steps * sampler.reserved_noises, *shape), generator=generator)
    return noise, generators
