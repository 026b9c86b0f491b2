"""Highres. fix's stages: the jobs that a picture is drawn by, one after the other."""

import re
from dataclasses import replace

from library.plan.job import Job
from library.settings.highres import HighresFix
from library.values import PIXELS_PER_CELL


def stages(job: Job, highres: HighresFix | None) -> tuple[Job, ...]:
    """The jobs that a picture is drawn by, one after the other; the last one gives the picture.

    With Highres. fix they are the small picture, then the job itself on the enlargement, with noise of its own.
    """
    if highres is None:
        return (job,)
    first = replace(
        job,
        width=_first_side(job.width, highres.scale),
        height=_first_side(job.height, highres.scale),
        steps=highres.steps,
        stage=1,
        guide_size=(job.width, job.height),
        file=job.file.with_name(first_stage_name(job.file.name)),
    )
    return first, replace(job, seed=job.seed + 1, stage=2, control_net=highres.control_net)


def _first_side(side: int, scale: float) -> int:
    return max(int(side * scale + 0.5) // PIXELS_PER_CELL * PIXELS_PER_CELL, PIXELS_PER_CELL)


def first_stage_name(name: str) -> str:
    """The name of the first stage's picture: `im_0…` for `im_1…`."""
    return re.sub(r"^(im_(?:\d{14}_)?)1", r"\g<1>0", name)
