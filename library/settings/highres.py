"""Highres. fix: a small picture first, then img2img on its enlargement. Settings and stages; knows no torch."""

import importlib.util
import re
from argparse import ArgumentTypeError
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from library.console import others_at_work
from library.errors import InputError
from library.values import PIXELS_PER_CELL

if TYPE_CHECKING:
    from library.plan.jobs import Job


DEFAULT_FIRST_STEPS = 28


@dataclass(frozen=True)
class UpscalerSpec:
    """A module with `create_upscaler(**arguments)`, which enlarges the first stage's picture to latents."""

    module: str
    arguments: tuple[tuple[str, str], ...] = ()

    @property
    def subject(self) -> str:
        """What error messages call it."""
        return f"--highres_fix_upscaler {self.module}"


@dataclass(frozen=True, kw_only=True)
class HighresFix:
    """How a run's pictures are drawn in two stages."""

    scale: float  # of the first stage's sides
    steps: int  # of the first stage
    save_first: bool
    enlarge_latents: bool  # bilinearly, instead of the picture by LANCZOS
    upscaler: UpscalerSpec | None = None  # instead of either
    control_net: bool = True  # whether ControlNets steer the second stage too

    @property
    def needs_pictures(self) -> bool:
        """Whether the first stage's latents have to be decoded."""
        return self.save_first or self.upscaler is not None or not self.enlarge_latents

    @property
    def method(self) -> str:
        """The way of enlarging, for the picture's metadata."""
        if self.upscaler is not None:
            return self.upscaler.module
        return "Latent (bilinear)" if self.enlarge_latents else "Lanczos"

    def stages(self, job: "Job") -> tuple["Job", "Job"]:
        """The job's two stages: the small picture, then the job itself on the enlargement, with noise of its own."""
        first = replace(
            job,
            width=self._first_side(job.width),
            height=self._first_side(job.height),
            steps=self.steps,
            stage=1,
            guide_size=(job.width, job.height),
            file=job.file.with_name(first_stage_name(job.file.name)),
        )
        return first, replace(job, seed=job.seed + 1, stage=2, control_net=self.control_net)

    def _first_side(self, side: int) -> int:
        return max(int(side * self.scale + 0.5) // PIXELS_PER_CELL * PIXELS_PER_CELL, PIXELS_PER_CELL)


def stages(job: "Job", highres: HighresFix | None) -> tuple["Job", ...]:
    """The jobs that a picture is drawn by, one after the other; the last one gives the picture."""
    return (job,) if highres is None else highres.stages(job)


def first_stage_name(name: str) -> str:
    """The name of the first stage's picture: `im_0…` for `im_1…`."""
    return re.sub(r"^(im_(?:\d{14}_)?)1", r"\g<1>0", name)


def upscaler_arguments(text: str) -> tuple[tuple[str, str], ...]:
    """Convert `key=value;key=value`; a value may hold `=`."""
    pairs = []
    for part in filter(None, (part.strip() for part in text.split(";"))):
        key, equals, value = part.partition("=")
        if not equals or not key.isidentifier():
            raise ArgumentTypeError(f"{part!r} is not KEY=VALUE; write KEY=VALUE;KEY=VALUE")
        pairs.append((key, value))
    return tuple(pairs)


def check_upscaler(spec: UpscalerSpec) -> None:
    """Refuse an upscaler that is not there, and one whose weights are not, before anything is loaded.

    Raises:
        InputError: naming the module or the file.
    """
    try:
        with others_at_work():
            found = importlib.util.find_spec(spec.module) is not None
    except Exception:  # whatever the packages that it is in raise
        found = False
    if not found:
        raise InputError(spec.subject, "no such Python module; the one that comes along is tools.latent_upscaler")
    weights = dict(spec.arguments).get("weights")
    if weights is not None and not Path(weights).expanduser().is_file():
        raise InputError("--highres_fix_upscaler_args", f"no such file: weights={weights}; check the path")
