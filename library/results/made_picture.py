"""A picture of a run, for what is shown of it."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from library.plan.job import Job


@dataclass(frozen=True)
class MadePicture:
    """A picture of a run and the file it became."""

    job: Job
    file: Path
    settings: Mapping[str, str]  # to show, by name
