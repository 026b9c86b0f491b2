"""What a run came to: counts, and the pictures that failed as a prompt file for another try."""

import time
from collections.abc import Iterable, Sequence
from datetime import datetime
from pathlib import Path

from tqdm import tqdm

from library import console
from library.errors import EnvironmentFault
from library.files.picture_files import save_whole
from library.plan.job import Job
from library.plan.line_text import prompt_line
from library.plan.prompt_lines import one_line
from library.plan.run_plan import RunPlan
from library.texts import readable, shell_word


class Tally:
    """Counts the pictures of a run as they are made.

    Args:
        plan: the run.
    """

    def __init__(self, plan: RunPlan) -> None:
        self._planned = len(plan.jobs) - len(plan.done)
        self._present = len(plan.done)
        self.drawn = 0  # by this process, not all of them saved yet
        self.made_elsewhere = 0  # by other processes
        self.failed: list[Job] = []
        self._made: set[Path] = set()  # as planned
        self._started: float | None = None

    def start(self) -> None:
        """Begin to take the time."""
        self._started = time.monotonic()

    @property
    def started(self) -> bool:
        """Whether time is being taken."""
        return self._started is not None

    def fail(self, job: Job, problem: str) -> None:
        """Say that a picture failed, and why, and list it."""
        self.failed.append(job)
        say_failed(job, problem)

    @property
    def made(self) -> int:
        """How many this process has finished."""
        return len(self._made)

    def count_made(self, job: Job) -> None:
        """Count a finished picture, if it is no first stage's."""
        if job.stage != 1:
            self._made.add(job.file)

    def missing(self, jobs: Iterable[Job]) -> list[Job]:
        """Those of the jobs whose pictures this process has not finished."""
        return [job for job in jobs if job.file not in self._made]

    @property
    def left(self) -> int:
        """How many were neither made nor failed."""
        return self._planned - self.made - self.made_elsewhere - len(self.failed)

    def summary(self) -> str:
        """The counts in one line."""
        made = self.made + self.made_elsewhere
        seconds = time.monotonic() - self._started if self._started is not None else 0.0
        each = f" ({seconds / made:.2f} s each)" if made else ""
        parts = [f"{_pictures(made)} made in {tqdm.format_interval(seconds)}{each}"]
        if self._present:
            parts.append(f"{self._present} there before")
        if self.failed:
            parts.append(f"{len(self.failed)} failed")
        if self.left:
            parts.append(f"{self.left} not made")
        return ", ".join(parts)


def say_failed(job: Job, problem: str) -> None:
    """Say that a picture failed, and why."""
    console.error(f"{job.described}: {problem}")


def _pictures(count: int) -> str:
    return f"{count} picture{'' if count == 1 else 's'}"


def save_failed(plan: RunPlan, failed: Sequence[Job]) -> Path | None:
    """Write the failed pictures' lines as a file for `--from_file`; None when the folder does not take it."""
    lines = ["# Pictures that failed; --resume tries them again, or the same command with --from_file and this file"]
    for job in failed:
        if job.source is not None:
            mask = f" --mask_path {shell_word(str(job.mask))}" if job.mask and not plan.masks.from_alpha else ""
            lines.append(one_line(f"# --image_path {shell_word(str(job.source))}{mask}"))
        lines.append(prompt_line(job, plan.defaults, plan.model.family.size_px))
    name = f"failed_{datetime.now():%Y%m%d%H%M%S}.txt"
    try:
        return save_whole(readable("\n".join(lines) + "\n").encode(), plan.output.folder / name)
    except EnvironmentFault:
        return None
