"""What a run came to: counts, and the pictures that failed as a prompt file for another try."""

import time
from collections import Counter
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from tqdm import tqdm

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
        self._to_do = plan.to_do
        self._id = plan.record.job_id
        self._present = len(plan.done)
        self.drawn = 0  # by this process, not all of them saved yet
        self.made_elsewhere = 0  # by other processes
        self.failed: list[Job] = []
        self._made: list[str] = []  # ids of the jobs
        self._started: float | None = None

    def start(self) -> None:
        """Begin to take the time."""
        self._started = time.monotonic()

    def count_made(self, job: Job) -> None:
        """Count a finished picture, if it is no first stage's."""
        if job.stage != 1:
            self._made.append(self._id(job))

    def list_missing(self, made_elsewhere: Sequence[str]) -> None:
        """List all that was not made as failed, given the ids of the jobs that other processes have made."""
        made = Counter([*self._made, *made_elsewhere])
        self.failed = []
        for job in self._to_do:
            job_made = made[self._id(job)] > 0
            made[self._id(job)] -= job_made
            if not job_made:
                self.failed.append(job)

    def summary(self) -> str:
        """The counts in one line."""
        made = len(self._made) + self.made_elsewhere
        seconds = time.monotonic() - self._started if self._started is not None else 0.0
        each = f" ({seconds / made:.2f} s each)" if made else ""
        parts = [f"{_pictures(made)} made in {tqdm.format_interval(seconds)}{each}"]
        if self._present:
            parts.append(f"{self._present} there before")
        if self.failed:
            parts.append(f"{len(self.failed)} failed")
        if left := len(self._to_do) - made - len(self.failed):
            parts.append(f"{left} not made")
        return ", ".join(parts)


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
