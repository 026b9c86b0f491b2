"""The loop: ask for prompt lines, draw them, show the pictures."""

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
    while (line := ask_for_line(keyboard.maker.syntax)) is not None:
        try:
            count_pictures([line], plan.repeats.images_per_prompt, plan.repeats.iterations, keyboard.maker.wildcards)
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
    """Ask for a prompt line until there is one; None at the end of the input."""
    while True:
        try:
            line = typed_line(input("Type prompt: "), "the prompt", syntax)
        except (EOFError, RuntimeError):  # RuntimeError: standard input is closed
            print()
            return None
        except InputError as problem:
            console.error(problem)
            continue
        if line.text:
            return line
