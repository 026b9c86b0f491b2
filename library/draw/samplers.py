"""The samplers at work: the diffusers schedulers behind their names, and the noise that each picture draws."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import diffusers
import torch
from diffusers import SchedulerMixin

from library.draw import schedulers
from library.draw.gradual_latent import GrowingEulerAncestral
from library.draw.schedulers import LatePNDM
from library.files.prediction import TRAINING_SCHEDULE
from library.plan.job import Job
from library.settings.noise_schedule import NoiseSchedule
from library.settings.samplers import Sampler


def make_scheduler(sampler: Sampler, schedule: NoiseSchedule, *, growing: bool = False) -> SchedulerMixin:
    """Make the sampler's diffusers scheduler, fresh: schedulers keep state from step to step.

    Args:
        sampler: which.
        schedule: what it is to go through.
        growing: for Gradual Latent; the sampler is euler_a then.
    """
    arguments = {**TRAINING_SCHEDULE, **sampler.arguments, "prediction_type": schedule.prediction_type}
    if spacing := schedule.spacing_for(sampler):
        arguments["timestep_spacing"] = spacing
    if schedule.zero_snr:
        arguments["rescale_betas_zero_snr"] = True
    own = GrowingEulerAncestral if growing else getattr(schedulers, sampler.scheduler, None)
    scheduler_class = own or getattr(diffusers, sampler.scheduler)
    with warnings.catch_warnings():
        # DPM-Solver is announced to go in diffusers 1.0; requirements.txt pins an earlier version
        warnings.filterwarnings("ignore", ".*algorithm_types", FutureWarning)
        return scheduler_class(**arguments)


def run_from(scheduler: SchedulerMixin, left_out: int) -> torch.Tensor:
    """Set a scheduler, whose timesteps are set, to begin after so many steps; gives the timesteps that are run."""
    if isinstance(scheduler, LatePNDM):
        scheduler.begin_at(left_out)
        return scheduler.timesteps
    first = left_out * scheduler.order
    if set_begin_index := getattr(scheduler, "set_begin_index", None):
        set_begin_index(first)
    return scheduler.timesteps[first:]


@dataclass(frozen=True)
class Noise:
    """The noise of a batch of pictures that know nothing of each other."""

    start: torch.Tensor  # start latents (B, channels, latent height, latent width), float32 on the CPU
    source: torch.Tensor  # what img2img adds to the encoded source pictures, likewise
    generators: list[torch.Generator]  # one for each picture, for the noise of the sampler's steps


def draw_noise(seeds: Sequence[int], shape: tuple[int, int, int], sampler: Sampler, job: Job) -> Noise:
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
