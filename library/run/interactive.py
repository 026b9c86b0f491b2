"""The loop: ask for prompt lines, draw them, show the pictures."""

import sys
from contextlib import suppress

from library import console
from library.errors import InputError
from library.plan.job_maker import count_pictures, plan_jobs
from library.plan.run_plan import Keyboard, RunPlan
from library.plan.sources import SourceLine, typed_line
from library.results.writer import PictureWriter
from library.run import preview
from library.run.runs import BatchDrawer, Painter


def run_interactive(plan: RunPlan, painter: Painter, writer: PictureWriter, keyboard: Keyboard) -> None:
    """Ask for prompt lines and draw them until the input ends."""
    with suppress(ImportError):
        import readline  # noqa: F401  # gives input() its history
    show_pictures = plan.preview and preview.can_show()
    progress = console.Progress(None)
    ending = "Ctrl-Z and Enter end" if sys.platform == "win32" else "Ctrl-D ends"
    console.say(f"a prompt and Enter draw a picture; {ending} the loop, as do exit and quit")
    while (line := ask_for_line(keyboard.maker.syntax)) is not None:
        try:
            maker, repeats = keyboard.maker, plan.repeats
            maker.sweep.check([line])
            count_pictures([line], repeats.images_per_prompt, repeats.iterations, maker.wildcards, maker.sweep)
            jobs = plan_jobs([line], keyboard.maker, keyboard.seeds, keyboard.name_file, plan.repeats.iterations)
        except InputError as problem:
            console.error(problem)
            continue
        console.say(f"seed: {', '.join(str(job.seed) for job in jobs)}")
        pictures = []
        drawer = BatchDrawer(painter, plan.batch_key, [], progress.steps)
        for drawn in drawer.draw(plan.batches(jobs)):
            for job, picture in drawn:
                writer.write(picture, job)
                if job.stage != 1:
                    pictures.append(picture)
        writer.wait()
        if show_pictures and pictures:
            preview.show(pictures, jobs[0].prompt)


def ask_for_line(syntax: str) -> SourceLine | None:
    """Ask for a prompt line until there is one; None at the end of the input, or where the user wants to leave."""
    leaving = False  # whether the question is if the user wants to
    while True:
        try:
            line = typed_line(_ask("Leave? (y/n) " if leaving else "Type prompt: "), "the prompt", syntax)
        except (EOFError, RuntimeError):  # RuntimeError: standard input is closed
            print(file=sys.stderr)
            return None
        except InputError as problem:
            console.error(problem)
            continue
        word = line.text.strip().lower()
        if leaving and word in ("y", "yes", *_WORDS_TO_LEAVE):
            return None
        was_asked, leaving = leaving, word in _WORDS_TO_LEAVE
        if leaving or (was_asked and word in ("n", "no")):
            continue
        if line.text:
            return line


_WORDS_TO_LEAVE = ("exit", "quit", "q", ":q", "exit()", "quit()")


def _ask(question: str) -> str:
    """A line that is typed in. The question goes to standard error where standard output is for others to read."""
    if sys.stdin is not None and sys.stdin.isatty() and sys.stdout.isatty():
        return input(question)  # which knows how to edit the line after it
    print(question, end="", file=sys.stderr, flush=True)
    return input()
