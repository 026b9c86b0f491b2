"""The loop: ask for prompt lines, draw them, show the pictures."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Protocol

from library import console
from library.errors import InputError
from library.plan.job import Job
from library.plan.run_plan import Keyboard, RunPlan
from library.plan.sources import SourceLine, typed_line
from library.results.writer import PictureWriter
from library.run import preview
from library.run.commands import Session, is_command
from library.run.report import say_failed
from library.run.runs import BatchDrawer, MakeBar, Painter, Pictures

if TYPE_CHECKING:
    import numpy as np


class Watched(Painter, Protocol):
    """A painter that can be watched."""

    def watch(self, every: int, show: "Callable[[np.ndarray], None]") -> None:
        """From now on show what a batch's pictures look like by then, at every so many steps.

        They are (B, h, w, 3) uint8 RGB, small, in the order of the batch.
        """


class _InWindow:
    """A painter that tells a window which pictures it begins."""

    def __init__(self, painter: Painter, window: preview.Window) -> None:
        self._painter, self._window = painter, window

    @property
    def works_ahead(self) -> bool:
        """See `Painter`."""
        return self._painter.works_ahead

    def begin(self, jobs: Sequence[Job], make_bar: MakeBar) -> Callable[[], Pictures]:
        """See `Painter`."""
        self._window.begin(jobs)
        return self._painter.begin(jobs, lambda timesteps: self._window.steps(make_bar(timesteps)))


def run_interactive(plan: RunPlan, painter: Watched, writer: PictureWriter, keyboard: Keyboard) -> None:
    """Ask for prompt lines and draw them until the input ends."""
    with suppress(ImportError):
        import readline  # noqa: F401  # gives input() its history
    window = preview.Window() if plan.preview and preview.can_show() else None
    if window and plan.options.preview_every:
        painter.watch(plan.options.preview_every, window.come)
    session, progress = Session(plan, keyboard), console.Progress(None)
    ending = "Ctrl-Z and Enter end" if sys.platform == "win32" else "Ctrl-D ends"
    console.say(f"a prompt and Enter draw a picture; {ending} the loop, as do exit and quit; :help tells more")
    while (line := ask_for_line(session, keyboard.maker.syntax)) is not None:
        try:
            jobs = session.jobs(line)
        except InputError as problem:
            console.error(problem)
            continue
        console.say(f"seed: {', '.join(str(job.seed) for job in jobs)}")
        with _opened(window, jobs):
            drawer = BatchDrawer(
                _InWindow(painter, window) if window else painter, plan.batch_key, say_failed, progress.steps
            )
            for drawn in drawer.draw(plan.batches(jobs)):
                for job, picture in drawn:
                    writer.write(picture, job)
                    if window and job.stage != 1:
                        window.finish(job, picture)
            writer.wait()


@contextmanager
def _opened(window: preview.Window | None, jobs: Sequence[Job]) -> Iterator[None]:
    """A block whose pictures stand in a window, if there is one, until the user has seen them."""
    if window is None:
        yield
        return
    window.open(jobs, jobs[0].prompt)
    try:
        yield
        window.wait()
    finally:
        window.close()


def ask_for_line(session: Session, syntax: str) -> SourceLine | None:
    """Ask for a prompt line until there is one; None at the end of the input, or where the user wants to leave."""
    leaving = False  # whether the question is if the user wants to
    while True:
        try:
            typed = _ask("Leave? (y/n) " if leaving else "Type prompt: ")
        except (EOFError, RuntimeError):  # RuntimeError: standard input is closed
            print(file=sys.stderr)
            return None
        word = typed.strip().lower()
        if leaving and word in ("y", "yes", *_WORDS_TO_LEAVE):
            return None
        was_asked, leaving = leaving, word in _WORDS_TO_LEAVE
        if leaving or (was_asked and word in ("n", "no")):
            continue
        if is_command(typed):
            session.obey(typed)
            continue
        try:
            line = typed_line(typed, "the prompt", syntax)
        except InputError as problem:
            console.error(problem)
            continue
        if line.text:
            return line


_WORDS_TO_LEAVE = ("exit", "quit", "q", ":q", ":exit", ":quit", "exit()", "quit()")


def _ask(question: str) -> str:
    """A line that is typed in. The question goes to standard error where standard output is for others to read."""
    if sys.stdin is not None and sys.stdin.isatty() and sys.stdout.isatty():
        return input(question)  # which knows how to edit the line after it
    print(question, end="", file=sys.stderr, flush=True)
    return input()
