"""A plan shown before anything is drawn: as a table for people, as JSON lines for programs."""

from collections.abc import Iterator, Sequence

from library.console import one_line
from library.plan.job import Job
from library.plan.line_text import prompt_line
from library.plan.picture_facts import picture_facts, to_json
from library.plan.run_plan import RunPlan

_PROMPT_CHARACTERS = 60  # of a prompt in the table


def show_plan(plan: RunPlan, batches: Sequence[Sequence[Job]]) -> Iterator[str]:
    """The lines that tell what a run would do, its pictures drawn in these batches."""
    batch_of = {id(job): number for number, batch in enumerate(batches, 1) for job in batch}
    if plan.output.as_json:
        for place, job in enumerate(plan.jobs):
            state = {"batch": batch_of.get(id(job)), "done": place in plan.done}
            yield to_json(picture_facts(plan, job) | state)
        return
    swept = [axis.name for axis in plan.sweep.axes if axis.name not in ("steps", "scale")]
    rows = [("file", "size", "steps", "scale", *map(one_line, swept), "batch", "prompt")]
    for job in plan.jobs:
        size, batch = "{}x{}".format(*job.file_size), str(batch_of.get(id(job), "done"))
        values = dict(job.cell.values) if job.cell else {}
        of_axes = [_short(values.get(name, "")) for name in swept]
        settings = (size, str(job.steps_run), f"{job.guidance_scale:g}", *of_axes)
        rows.append((one_line(job.file.name), *settings, batch, _short(job.prompt)))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)]
    for row in rows:
        yield "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths)), row[-1]]).rstrip()
    if plan.options.from_pictures:
        yield ""
        yield from (one_line(prompt_line(job, plan.defaults, plan.model.family.size_px)) for job in plan.jobs)


def summary(plan: RunPlan, batches: Sequence[Sequence[Job]] | None = None) -> str:
    """The plan in one line: pictures, and where the batches are known how full they are."""
    count = len(plan.to_do)
    text = f"{count} picture{'' if count == 1 else 's'} to make"
    if plan.sweep.axes:
        text += f" ({plan.sweep.describe()})"
    if plan.done:
        text += f", {len(plan.done)} there already"
    sizes = sorted({job.file_size for job in plan.to_do})
    if sizes:
        shown = ", ".join(f"{width}x{height}" for width, height in sizes[:3])
        text += f", {shown}{' ...' if len(sizes) > 3 else ''}"
    if batches:
        filled = count / (len(batches) * plan.computing.batch_size)
        text += f", {len(batches)} batch{'' if len(batches) == 1 else 'es'}, {filled:.0%} of their places filled"
    return f"{text}, to {plan.output.folder}"


def _short(text: str) -> str:
    text = one_line(text)
    return text if len(text) <= _PROMPT_CHARACTERS else text[: _PROMPT_CHARACTERS - 1] + "…"
