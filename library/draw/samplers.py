"""The samplers at work: the diffusers schedulers behind their names, and the noise that each picture draws."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from diffusers import SchedulerMixin

from library.draw import schedulers
from library.draw.gradual_latent import GrowingEulerAncestral
from library.draw.schedulers import ChurnedEuler, LatePNDM
from library.draw.step_noise import never_wait
from library.files.prediction import TRAINING_SCHEDULE
from library.plan.job import Job
from library.settings.noise_schedule import NoiseSchedule
from library.settings.samplers import NOISE_LEVELS, OWN, SAMPLERS, Sampler


def begin_schedule(job: Job, noise: NoiseSchedule) -> SchedulerMixin:
    """Make a job's scheduler, with the timesteps of all of its steps set."""
    scheduler = make_scheduler(
        SAMPLERS[job.sampler],
        noise,
        job.schedule,
        growing=job.gradual_latent.timesteps is not None,
        s_churn=job.s_churn,
    )
    wanted: dict[str, Any] = {"timesteps": list(job.timesteps)} if job.timesteps else {"num_inference_steps": job.steps}
    scheduler.set_timesteps(**wanted)
    return scheduler


def make_scheduler(
    sampler: Sampler, noise: NoiseSchedule, schedule: str = OWN, *, growing: bool = False, s_churn: float = 0.0
) -> SchedulerMixin:
    """Make the sampler's diffusers scheduler, fresh: schedulers keep state from step to step.

    Args:
        sampler: which.
        noise: that the model was trained with.
        schedule: what it is to go through.
        growing: for Gradual Latent; the sampler is euler_a then.
        s_churn: noise to stir in; above 0 the sampler is euler.
    """
    arguments = {**TRAINING_SCHEDULE, **sampler.arguments, "prediction_type": noise.prediction_type}
    if schedule in NOISE_LEVELS:
        arguments |= {f"use_{name}_sigmas": name == schedule for name in NOISE_LEVELS}
    elif spacing := noise.spacing_for(sampler, schedule):
        arguments["timestep_spacing"] = spacing
    if noise.zero_snr_for(sampler):
        arguments["rescale_betas_zero_snr"] = True
    own = GrowingEulerAncestral if growing else getattr(schedulers, sampler.scheduler, None)
    scheduler_class = own or getattr(diffusers, sampler.scheduler)
    with warnings.catch_warnings():
        # DPM-Solver is announced to go in diffusers 1.0; requirements.txt pins an earlier version
        warnings.filterwarnings("ignore", ".*algorithm_types", FutureWarning)
        made = ChurnedEuler(s_churn, **arguments) if s_churn else scheduler_class(**arguments)
    never_wait(made)
    return made


def run_from(scheduler: SchedulerMixin, left_out: int) -> torch.Tensor:
    """Set a scheduler, whose timesteps are set, to begin after so many steps; gives the timesteps that are run."""
    if isinstance(scheduler, LatePNDM):
        scheduler.begin_at(left_out)
        return scheduler.timesteps
    first = left_out * scheduler.order
    if set_begin_index := getattr(scheduler, "set_begin_index", None):
        set_begin_index(first)
    return scheduler.timesteps[first:]


def add_noise(
    scheduler: SchedulerMixin, clean: torch.Tensor, noise: torch.Tensor, timestep: torch.Tensor
) -> torch.Tensor:
    """Clean latents (B, C, h, w) with the noise of a timestep, (1), of the scheduler's run.

    How much there is of both is told on the CPU, where schedulers look numbers up: no device is waited for, and
    diffusers moves none of its tables.
    """
    one, zero = torch.ones(()), torch.zeros(())
    of_clean, of_noise = (scheduler.add_noise(*parts, timestep).item() for parts in ((one, zero), (zero, one)))
    return of_clean * clean + of_noise * noise


def steps_of(scheduler: SchedulerMixin, timesteps: Sequence[float] | torch.Tensor) -> list[int]:
    """For each evaluation of a run which of its steps it belongs to, from 0.

    Args:
        scheduler: set to the run by `run_from`.
        timesteps: that are run, as `run_from` gives them.
    """
    if isinstance(scheduler, LatePNDM):
        return scheduler.steps_of_evaluations()
    return [place // scheduler.order for place in range(len(timesteps))]


@dataclass(frozen=True)
class Noise:
    """The noise of a batch of pictures that know nothing of each other."""

    start: torch.Tensor  # start latents (B, channels, latent height, latent width), float32 on the CPU
    source: torch.Tensor  # what img2img adds to the encoded source pictures, likewise
    step_arguments: dict[str, object]  # what the scheduler's steps are called with for their noise


def draws_noise(job: Job) -> bool:
    """Whether a job's steps add noise."""
    return SAMPLERS[job.sampler].draws_noise or bool(job.eta) or job.s_churn > 0


def draw_noise(seeds: Sequence[int], shape: tuple[int, int, int], job: Job) -> Noise:
    """Draw the noise of a batch of pictures.

    Each picture's noise comes from a CPU generator of its own, in float32, so that a seed means the same noise on every
    device, in every precision and at every place in a batch. The order is that of sd-scripts: the start latent, noises
    set aside for the sampler, the noise for img2img, and then those that the sampler's steps draw themselves.

    Args:
        seeds: one for each picture.
        shape: (channels, latent height, latent width).
        job: one of the batch, for its sampler, its steps and whether it is img2img.
    """

    def draw() -> torch.Tensor:
        return torch.stack([torch.randn(shape, generator=generator) for generator in generators])

    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    start = source = draw()
    if draws_noise(job) or job.is_img2img:
        for _ in range(job.steps * SAMPLERS[job.sampler].reserved_noises):
            draw()
    if job.is_img2img:
        source = draw()
    # each picture's own generator draws the noise of its steps, one step after the other
    arguments: dict[str, object] = {"generator": generators} if draws_noise(job) else {}
    if job.eta is not None:
        arguments["eta"] = job.eta
    return Noise(start, source, arguments)
