"""What a run has made, to look at: contact sheets and a web page beside the pictures."""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from library.files.picture_files import save_whole
from library.plan.earlier_runs import finished, read_runs
from library.plan.file_names import sheet_name
from library.plan.run_plan import RunPlan
from library.results.contact_sheet import Sheet, draw_sheet, sheets_by_prompt, sheets_by_seed, sheets_of_sweep
from library.results.made_picture import MadePicture
from library.results.metadata import RunFacts, shown_settings
from library.results.sweep_tables import sweep_tables
from library.results.web_page import Command, make_page
from library.settings.options import Said
from library.texts import readable


def show_results(plan: RunPlan, facts: RunFacts, said: Said) -> Iterator[Path]:
    """Make what was asked for of a run's contact sheets and page; gives their files.

    Args:
        plan: the run.
        facts: what metadata says of it.
        said: those of its options that make one of its pictures again.

    A sheet or page that is there already is left, and the page of an earlier part of the run replaced.

    Raises:
        EnvironmentFault: when the folder or the disk does not take them.
    """
    if not plan.output.sheets and not plan.output.page:
        return
    pictures = made_pictures(plan, facts)
    if plan.output.sheets:
        for sheet in _sheets(plan, pictures):
            yield _save(draw_sheet(sheet), plan.output.folder / sheet_name(sheet.pictures[0].file.stem))
    if plan.output.page and pictures:
        mark = f"gen_img_diffusers.py, run {plan.record.run}"
        title = f"{plan.output.folder.resolve().name}, {plan.record.started[:10]}"
        tables = list(sweep_tables(pictures, plan.sweep)) if plan.sweep.axes else []
        page = make_page(pictures, title, Command(said, plan.defaults, plan.model.family.size_px), mark, tables)
        yield _save(readable(page).encode(), plan.output.folder / "index.html", replace_if=mark.encode())


def _sheets(plan: RunPlan, pictures: Sequence[MadePicture]) -> Iterator[Sheet]:
    if plan.sweep.axes:
        return sheets_of_sweep(pictures, plan.sweep)
    return sheets_by_seed(pictures) if plan.repeats.same_seed_in_iteration else sheets_by_prompt(pictures)


def made_pictures(plan: RunPlan, facts: RunFacts) -> list[MadePicture]:
    """The pictures of a run that stand, in the order of the plan."""
    known = next((run for run in read_runs(plan.output.folder) if run.record.run == plan.record.run), None)
    places = finished(known, plan.output.folder, plan.jobs) if known else {}
    made = sorted(places.items())
    return [MadePicture(plan.jobs[place], file, shown_settings(plan.jobs[place], facts)) for place, file in made]


def _save(content: bytes, file: Path, replace_if: bytes | None = None) -> Path:
    """Save a file over nothing but an equal one, or one that holds a mark."""
    with suppress(OSError):
        before = file.read_bytes()
        if before == content:
            return file
        if replace_if is not None and replace_if in before:
            file.unlink()
    return save_whole(content, file)
