"""What draws on a node: an actor of Ray that loads the pipeline once, then draws batches and encodes their pictures."""

import importlib
import logging
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import ray

from library import console
from library.fleet import inputs
from library.fleet.inputs import Place
from library.plan.job import Job
from library.plan.run_plan import RunPlan
from library.plan.stages import stages
from library.results.metadata import run_facts
from library.results.writer import encoded
from library.run.runs import BatchDrawer, Painter
from library.version import versions

if TYPE_CHECKING:
    from ray import ObjectRef

LoadPipeline = Callable[[RunPlan], Painter]
Message = tuple[int, str]  # a level of `logging`, and the text


@dataclass(frozen=True)
class Order:
    """What all workers of a run are told when they begin."""

    run: str  # its id
    module: str  # of the function that loads the pipeline
    function: str
    plan: bytes  # see `inputs.pack_plan`
    files: Mapping[Place, str]  # that the run reads, and their fingerprints
    folder: str  # that relative paths in arguments of modules begin at


@dataclass(frozen=True)
class Look:
    """What a node is found to be."""

    node: str  # Ray's id of it
    wrong: Mapping[Place, str]  # with files
    versions: Mapping[str, str]


@dataclass
class Outcome:
    """What came of a batch, by the names of its pictures' files."""

    left: int  # pictures that are neither drawn nor failed
    pictures: list[tuple[str, bytes]] = field(default_factory=list)  # with the content of each
    failed: list[tuple[str, str]] = field(default_factory=list)  # and why
    beside: list[tuple[str, bytes]] = field(default_factory=list)  # other files, as guides that are saved


@dataclass
class Answer:
    """What a call of a worker comes to."""

    messages: list[Message]  # for the driver to say
    done: dict[int, Outcome] = field(default_factory=dict)  # batches, by their numbers


def look(files: Mapping[Place, str]) -> Look:
    """Look at the node that this is called on."""
    return Look(ray.get_runtime_context().get_node_id(), inputs.lacking(files), versions())


class Worker:
    """Draws on one device of a node."""

    def __init__(self) -> None:
        self._order: Order
        self._sent: Path | None = None
        self._begun: dict[int, Outcome] = {}  # batches, by their numbers
        self._batch_of: dict[str, int] = {}  # of the pictures that are being drawn, by the names of their files

    @ray.method(max_task_retries=-1)  # also while Ray starts it again
    def look(self, order: Order) -> Look:
        """Take the run's order, and look at this worker's node before anything is loaded."""
        self._order = order
        return look(order.files)

    def load(self, sent: Mapping[Place, list["ObjectRef"]]) -> Answer:
        """Load the pipeline, once the files that the node lacks have been received.

        Raises:
            ProgramError: when it cannot be loaded on this node.
        """
        order = self._order
        with console.messages(logging.WARNING, heard := _Heard()):
            if sent:
                self._sent = inputs.sent_folder(order.run)
                inputs.receive(self._sent, sent, order.files)
            with suppress(OSError):  # then nothing relative was meant
                os.chdir(order.folder)
            plan: RunPlan = inputs.unpack(order.plan, self._sent)
            load: LoadPipeline = getattr(importlib.import_module(order.module), order.function)
            self._facts, self._quality = run_facts(plan), plan.output.quality
            self._drawer = BatchDrawer(load(plan), plan.batch_key, self._fail, iter)
            self._highres = plan.highres
        return Answer(heard.messages)

    def draw(self, number: int | None, jobs: bytes = b"") -> Answer:
        """Begin a batch; gives those that are done by then, which may be earlier ones where the device works ahead.

        Args:
            number: of the batch; None to wait for what was begun.
            jobs: its jobs, packed.
        """
        with console.messages(logging.WARNING, heard := _Heard()), tempfile.TemporaryDirectory() as beside:
            if number is None:
                drawing = self._drawer.finish()
            else:
                drawing = self._drawer.begin(self._note(number, inputs.unpack(jobs, self._sent), Path(beside)))
            for pictures in drawing:
                for job, pixels in pictures:
                    outcome = self._outcome(job)
                    if (content := encoded(pixels, job, self._facts, self._quality)) is not None:
                        outcome.pictures.append((job.file.name, content))
                    outcome.left -= job.stage != 1
            if number is not None:  # what is saved while a batch is begun is its own
                files = sorted(Path(beside).iterdir())
                self._begun[number].beside += [(file.name, file.read_bytes()) for file in files]
        done = {each: outcome for each, outcome in self._begun.items() if not outcome.left}
        self._begun = {each: outcome for each, outcome in self._begun.items() if outcome.left}
        self._batch_of = {name: each for name, each in self._batch_of.items() if each in self._begun}
        return Answer(heard.messages, done)

    def _note(self, number: int, jobs: Sequence[Job], folder: Path) -> list[Job]:
        """A batch's jobs, in a folder of its own."""
        here = [replace(job, file=folder / job.file.name) for job in jobs]
        self._begun[number] = Outcome(len(here))
        self._batch_of.update({stage.file.name: number for job in here for stage in stages(job, self._highres)})
        return here

    def _outcome(self, job: Job) -> Outcome:
        return self._begun[self._batch_of[job.file.name]]

    def _fail(self, job: Job, problem: str) -> None:
        outcome = self._outcome(job)
        outcome.failed.append((job.file.name, problem))
        outcome.left -= 1


class _Heard(logging.Handler):
    """Notes messages, for the driver to say."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[Message] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Note one."""
        self.messages.append((record.levelno, record.getMessage()))
