"""Going through the batches of a run, and what may happen meanwhile: too little memory, damage, interruption."""

import logging
import signal
import threading
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from types import FrameType
from typing import TYPE_CHECKING, Any, Protocol

from library import console
from library.errors import EnvironmentFault, InputError, Interrupted
from library.machine.devices import Result, try_to_run
from library.plan.job import Job
from library.plan.run_plan import RunPlan
from library.results.writer import PictureWriter
from library.run.processes import Team
from library.run.report import Tally

if TYPE_CHECKING:
    import numpy as np

logger = logging.getLogger(__name__)

# So many single pictures in a row for which the memory does not suffice are no accident
_HOPELESS = 3


Pictures = Sequence[tuple[Job, "np.ndarray | None"]]
MakeBar = Callable[[Iterable], Iterable]


class Painter(Protocol):
    """What draws batches: the pipeline."""

    @property
    def works_ahead(self) -> bool:
        """Whether the next batch may be begun before this one's pictures are there."""

    def begin(self, jobs: Sequence[Job], make_bar: MakeBar) -> Callable[[], Pictures]:
        """Begin a batch; gives what waits for its pictures.

        These are each job with its picture, None where there were no finite numbers; and before them first stages'.
        """


@dataclass
class Begun:
    """A batch that was begun: what waits for its pictures, or what is wrong with it, or neither for lack of memory."""

    jobs: Sequence[Job]
    finish: Callable[[], Pictures] | None
    problem: str | None


class BatchDrawer:
    """Draws batches whatever happens: what fails is narrowed down to single pictures, and these are listed.

    A batch that does not fit into memory is halved, and batches of its kind are made no larger from then on. A picture
    that fails by itself leaves the others of its batch alone. An error that is neither is raised, not tried again.

    Args:
        painter: draws.
        key: what the jobs of a batch have in common, see `RunPlan.batch_key`.
        fail: is told of a job whose picture failed, and why.
        make_bar: shows the steps of a batch.
    """

    def __init__(
        self, painter: Painter, key: Callable[[Job], Hashable], fail: Callable[[Job, str], None], make_bar: MakeBar
    ) -> None:
        self._painter = painter
        self._key = key
        self._tell_failed = fail
        self._make_bar = make_bar
        self._ahead: list[Begun] = []  # whose pictures are still to come
        self._fitting: dict[Hashable, int] = {}  # batch sizes that memory suffices for, where found wanting
        self._hopeless = 0  # single pictures in a row that memory did not suffice for

    def draw(self, batches: Iterable[Sequence[Job]]) -> "Iterator[list[tuple[Job, np.ndarray]]]":
        """Draw batches of jobs with equal keys; gives the pictures that succeed together, first stages' among them.

        Where the painter works ahead they are waited for when the next batch has been begun.

        Raises:
            EnvironmentFault: when memory does not suffice for one picture after the other.
        """
        for batch in batches:
            yield from self.begin(batch)
        yield from self.finish()

    def begin(self, batch: Sequence[Job]) -> "Iterator[list[tuple[Job, np.ndarray]]]":
        """Begin one batch, as part of what `draw` does; gives what is done by then, which may be an earlier one's."""
        size = self._fitting.get(self._key(batch[0]), len(batch)) if self._fitting else len(batch)
        for start in range(0, len(batch), size):
            self._ahead.append(self._begin(batch[start : start + size]))
            if len(self._ahead) > self._painter.works_ahead:
                yield from self._finish(self._ahead.pop(0))

    def finish(self) -> "Iterator[list[tuple[Job, np.ndarray]]]":
        """Wait for the batches that were begun."""
        while self._ahead:
            yield from self._finish(self._ahead.pop(0))

    def _begin(self, jobs: Sequence[Job]) -> Begun:
        logger.debug("drawing %s", ", ".join(job.file.name for job in jobs))
        return Begun(jobs, *self._attempt(lambda: self._painter.begin(jobs, self._make_bar)))

    def _finish(self, begun: Begun) -> "Iterator[list[tuple[Job, np.ndarray]]]":
        jobs, problem, pictures = begun.jobs, begun.problem, None
        if begun.finish is not None:
            pictures, problem = self._attempt(begun.finish)
            begun.finish = None  # it holds what it took of the device's memory
        if pictures is not None:
            self._hopeless = 0
            yield list(self._finite(pictures))
        elif len(jobs) > 1:
            half = (len(jobs) + 1) // 2
            if problem is None:
                self._fitting[self._key(jobs[0])] = half
                logger.warning("out of memory; drawing %d at a time instead of %d", half, len(jobs))
            for part in (jobs[:half], jobs[half:]):
                yield from self._finish(self._begin(part))
        else:
            self._fail(jobs[0], problem)

    def _attempt(self, work: Callable[[], Result]) -> tuple[Result | None, str | None]:
        """What the work gives, or what is wrong with one of its jobs, or neither for lack of memory."""
        try:
            return try_to_run(work), None
        except InputError as problem:  # a picture that has been damaged or taken away since it was checked
            return None, str(problem)

    def _finite(self, pictures: Pictures) -> "Iterator[tuple[Job, np.ndarray]]":
        for job, picture in pictures:
            if picture is not None:
                yield job, picture
            elif job.stage != 1:
                self._tell_failed(job, "the model gave NaN or infinite values, not saved; try --bf16 or float32")

    def _fail(self, job: Job, problem: str | None) -> None:
        self._tell_failed(job, problem or "out of memory; give a smaller --W and --H, or --vae_slices, or --bf16")
        self._hopeless = self._hopeless + 1 if problem is None else 0
        if self._hopeless == _HOPELESS:
            raise EnvironmentFault(
                f"{job.width} x {job.height} pixels",
                f"out of memory {_HOPELESS} times in a row; make room on the device",
            )


class Interruptions:
    """Ctrl-C and SIGTERM while batches are drawn: the first lets the batch in hand be finished, the second does not.

    Use as a context manager; `until_asked` ends the batches, `check` raises after that.
    """

    _SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self._asked: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Interruptions":
        if threading.current_thread() is threading.main_thread():
            for number in self._SIGNALS:
                if signal.getsignal(number) not in (signal.SIG_IGN, None):  # as in the background of a shell script
                    self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self._asked is not None:
            raise Interrupted(number)
        self._asked = number
        console.say("finishing the batch in hand; once more stops at once")

    @property
    def asked(self) -> bool:
        """Whether one has been asked for."""
        return self._asked is not None

    def until_asked(self, batches: Iterable[Sequence[Job]]) -> Iterator[Sequence[Job]]:
        """The batches until an interruption is asked for."""
        return takewhile(lambda _: not self.asked, batches)

    def check(self) -> None:
        """Raise `Interrupted` when it has been asked for."""
        if self._asked is not None:
            raise Interrupted(self._asked)


def share(batches: Sequence[Sequence[Job]], team: Team) -> Sequence[Sequence[Job]]:
    """Every N-th batch, so that dear ones are spread; where pictures guide one another, the first process has all."""
    if any(job.follows is not None for batch in batches for job in batch):
        return batches if team.is_first else []
    return batches[team.rank :: team.size]


Drawn = Iterator[Sequence[tuple[Job, "np.ndarray | bytes"]]]  # pixels, or what `encoded` makes of them
Draw = Callable[[Sequence[Sequence[Job]], Interruptions, console.Progress], Drawn]


def run_jobs(plan: RunPlan, draw: Draw, writer: PictureWriter, tally: Tally, team: Team) -> None:
    """Make this process's share of the pictures, in batches filled from the whole run; the first one waits for all.

    Args:
        plan: of all processes.
        draw: draws batches until an interruption is asked for, showing progress, and gives pictures as they come.
        writer: is handed the pictures.
        tally: counts.
        team: the processes.

    Raises:
        EnvironmentFault: when the machine does not let the run go on.
        Interrupted: after Ctrl-C or SIGTERM.
    """
    to_do = plan.to_do
    batches = share(plan.batches(to_do), team)
    progress = console.Progress(len(to_do))
    tally.start()

    def look_around() -> None:
        interruptions.check()
        progress.reached(tally.drawn + sum(team.told("made")))

    try:
        with Interruptions() as interruptions:
            for pictures in draw(batches, interruptions, progress):
                for job, picture in pictures:
                    writer.write(picture, job)
                    tally.drawn += job.stage != 1
                team.tell("made", tally.drawn)
                progress.reached(tally.drawn + sum(team.told("made")))
            interruptions.check()
            writer.wait()
            missing = tally.missing(job for batch in batches for job in batch)
            team.tell("failed", [job.file.name for job in missing])
            team.wait(look_around)
            names = {name for each in team.told("failed") for name in each}
            tally.failed = [*missing, *(job for job in to_do if job.file.name in names)]
            progress.reached(tally.drawn + sum(team.told("made")))
    finally:
        progress.close()
