"""The samplers: their names, the diffusers schedulers behind them, and the noise each picture draws.

Known here without torch or diffusers being imported, so that a wrong name is refused at once.
"""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from diffusers import SchedulerMixin

    from library.plan.jobs import Job

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
    steps: tuple[int, int] = (1, 1000)  # fewest and most it can do
    reserved_noises: int = 1  # for each step, noises that are drawn and set aside before the sampler begins
    highest_scale: float = math.inf  # of guidance that makes sense with it


_OFFSET = {"steps_offset": 1}

SAMPLERS = {
    sampler.name: sampler
    for sampler in (
        Sampler("ddim", "DDIMScheduler", "DDIM", {"clip_sample": False} | _OFFSET, steps=(1, 999)),
        Sampler("pndm", "PNDMScheduler", "PLMS", {"skip_prk_steps": False} | _OFFSET, steps=(4, 999)),
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
        # Latent consistency models (Luo et al. 2023, https://arxiv.org/abs/2310.04378): distilled from 50 DDIM steps
        # and with guidance in them already
        Sampler("lcm", "LCMScheduler", "LCM", draws_noise=True, steps=(1, 50), highest_scale=2.0),
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


def make_scheduler(sampler: Sampler, prediction_type: str, *, growing: bool = False) -> "SchedulerMixin":
    """Make the sampler's diffusers scheduler, fresh: schedulers keep state from step to step.

    Args:
        sampler: which.
        prediction_type: what the model predicts, as diffusers names it.
        growing: for Gradual Latent; the sampler is euler_a then.
    """
    import diffusers

    scheduler_class = getattr(diffusers, sampler.scheduler)
    if growing:
        from library.draw.gradual_latent import GrowingEulerAncestral as scheduler_class
    with warnings.catch_warnings():
        # DPM-Solver is announced to go in diffusers 1.0; requirements.txt pins an earlier version
        warnings.filterwarnings("ignore", ".*algorithm_types", FutureWarning)
        return scheduler_class(**_TRAINING_SCHEDULE, **sampler.arguments, prediction_type=prediction_type)


@dataclass(frozen=True)
class Noise:
    """The noise of a batch of pictures that know nothing of each other."""

    start: "torch.Tensor"  # start latents (B, channels, latent height, latent width), float32 on the CPU
    source: "torch.Tensor"  # what img2img adds to the encoded source pictures, likewise
    generators: list["torch.Generator"]  # one for each picture, for the noise of the sampler's steps


def draw_noise(seeds: Sequence[int], shape: tuple[int, int, int], sampler: Sampler, job: "Job") -> Noise:
    """Draw the noise of a batch of pictures.

    Each picture's noise comes from a CPU generator of its own, in float32, so that a seed means the same noise on every
    device, in every precision and at every place in a batch. The order is that of sd-scripts: the start latent, noises
    set aside for the sampler, the noise for img2img, and then those that the sampler's steps draw themselves.

    Args:
        seeds: one for each picture.
        shape: (channels, latent height, latent width).
        sampler: tells how many noises are set aside for a step.
        job: one of the batch, for its steps and whether it is img2img.
    """
    import torch

    def draw() -> torch.Tensor:
        return torch.stack([torch.randn(shape, generator=generator) for generator in generators])

    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    start = source = draw()
    if sampler.draws_noise or job.is_img2img:
        for _ in range(job.steps * sampler.reserved_noises):
            draw()
    if job.is_img2img:
        source = draw()
    return Noise(start, source, generators)
