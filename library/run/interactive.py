"""The loop: ask for prompt lines, draw them, show the pictures."""

from contextlib import suppress
from typing import TYPE_CHECKING

from library import console
from library.errors import InputError
from library.plan.jobs import JobMaker, SourceLine, count_pictures, group_into_batches, plan_jobs
from library.plan.planning import RunPlan, typed_line
from library.run import preview
from library.run.runs import BatchDrawer, Painter

if TYPE_CHECKING:
    from library.results.output import PictureWriter


def run_interactive(plan: RunPlan, painter: Painter, writer: "PictureWriter", maker: JobMaker) -> None:
    """Ask for prompt lines and draw them until the input ends."""
    with suppress(ImportError):
        import readline  # noqa: F401  # gives input() its history
    show_pictures = plan.preview and preview.can_show()
    progress = console.Progress(None)
    while (line := ask_for_line()) is not None:
        try:
            count_pictures([line], plan.images_per_prompt, plan.iterations)
            jobs = plan_jobs([line], maker, plan.iterations)
        except InputError as problem:
            console.error(problem)
            continue
        console.say(f"seed: {', '.join(str(job.seed) for job in jobs)}")
        pictures = []
        drawer = BatchDrawer(painter, [], progress.steps)
        for drawn in drawer.draw(group_into_batches(jobs, plan.batch_size, painter.batch_key)):
            for job, picture in drawn:
                writer.write(picture, job)
                if job.stage != 1:
                    pictures.append(picture)
        writer.wait()
        if show_pictures and pictures:
            preview.show(pictures, jobs[0].prompt)


def ask_for_line() -> SourceLine | None:
    """Ask for a prompt line until there is one; None at the end of the input."""
    while True:
        try:
            line = typed_line(input("Type prompt: "), "the prompt")
        except (EOFError, RuntimeError):  # RuntimeError: standard input is closed
            print()
            return None
        except InputError as problem:
            console.error(problem)
            continue
        if line.text:
            return line
