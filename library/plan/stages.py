"""Highres. fix's stages: the jobs that a picture is drawn by, one after the other."""

from dataclasses import replace

from library.plan.file_names import first_stage_name
from library.plan.job import Job
from library.settings.highres import HighresFix
from library.values import PIXELS_PER_CELL

_ALIGNMENT_PX = 32


def stages(job: Job, highres: HighresFix | None) -> tuple[Job, ...]:
    """The jobs that a picture is drawn by, one after the other; the last one gives the picture.

    With Highres. fix they are the small picture, then the job itself on the enlargement, with noise of its own.
    """
    if highres is None:
        return (job,)
    first = replace(
        job,
        width=first_side(job.width, highres.scale),
        height=first_side(job.height, highres.scale),
        steps=len(job.timesteps) or highres.steps,
        sizes=job.sizes.scaled(highres.scale),
        upscale=1.0,
        stage=1,
        file=job.file.with_name(first_stage_name(job.file.name)),
    )
    second = replace(job, seed=job.seed + 1, stage=2, control_net=highres.control_net, steps_before=first.steps_run)
    return first, second


def first_side(side: int, scale: float) -> int:
    """A side of the first stage, as sd-scripts rounds it down: to a multiple of 32 pixels, a smaller one to cells."""
    scaled = int(side * scale + 0.5)
    return scaled // _ALIGNMENT_PX * _ALIGNMENT_PX or max(scaled // PIXELS_PER_CELL, 1) * PIXELS_PER_CELL
