"""The parts of a run: those of an earlier one as they were planned then, and after them the lines that are new."""

import logging
import random
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from library.errors import InputError
from library.files.model_files import ModelFiles
from library.plan.all_jobs import count_pictures, plan_jobs
from library.plan.job import Job
from library.plan.job_maker import JobMaker, NameFile
from library.plan.run_record import NameOf, Part, RunRecord, compared_options, fingerprints, jobs_digest, line_key
from library.plan.seeds import SeedSource
from library.plan.sources import SourceLine
from library.settings.options import Options
from library.settings.repeats import Repeats
from library.values import MAX_SEED
from library.version import versions

logger = logging.getLogger(__name__)


def plan_parts(
    lines: Sequence[SourceLine],
    maker: JobMaker,
    seed: int,
    name_file: NameFile,
    repeats: Repeats,
    folder: Path,
    earlier: RunRecord | None,
) -> tuple[list[Job], list[Part]]:
    """Plan the parts of an earlier run as they were, and after them the lines that are new.

    Args:
        lines: all prompt lines.
        maker: makes the jobs.
        seed: of the first part; each later one has the next.
        name_file: names the pictures of a new part.
        repeats: how many pictures a line gives.
        folder: where the pictures of earlier parts are.
        earlier: the run that this one goes on with.

    Raises:
        InputError: for a fault in a line.
    """
    begun = earlier.parts if earlier else ()
    name_of = earlier.paths.name if earlier else str
    usual = {"sampler": maker.defaults.sampler, "schedule": maker.defaults.schedule}
    jobs: list[Job] = []
    parts: list[Part] = []
    counts = (repeats.images_per_prompt, repeats.iterations, maker.wildcards, maker.sweep)
    maker.sweep.check(lines)
    of_all = count_pictures(lines, *counts)
    if earlier:
        _check_wildcards(earlier, maker.wildcards.files)
    for number, group in enumerate(_split_lines(begun, lines, name_of)):
        if not group:
            continue
        part = begun[number] if number < len(begun) else None
        part_seed = part.seed if part else (seed + number) % (MAX_SEED + 1)
        pictures = of_all if len(group) == len(lines) else count_pictures(group, *counts)
        seeds = SeedSource(part_seed, pictures, same_in_iteration=repeats.same_seed_in_iteration)
        names = _given_names(folder, part) if part else name_file
        shuffle = random.Random(part_seed) if repeats.shuffle else None
        planned = plan_jobs(group, maker, seeds, names, repeats.iterations, shuffle)
        digest = jobs_digest(planned, name_of, usual)
        if part and digest != part.jobs:
            _refuse_more_wildcards(earlier, maker.wildcards.files)
            raise InputError("--resume", "this version of the program plans the run otherwise; give another --outdir")
        jobs += planned
        keys = tuple(line_key(line, name_of) for line in group)
        parts.append(Part(part_seed, keys, tuple(job.file.name for job in planned), digest))
    return jobs, parts


def _check_wildcards(run: RunRecord, files: Sequence[Path]) -> None:
    """Refuse to go on with a run whose wildcards are other ones now, as what they give is."""
    for file, mark in fingerprints(files).items():
        if run.files.get(run.paths.name(Path(file)), mark) != mark:
            raise InputError(file, _CHANGED)


def _refuse_more_wildcards(run: RunRecord | None, files: Sequence[Path]) -> None:
    """Refuse wildcards that a run has not had, where its pictures are other ones now."""
    if run and (added := [file for file in files if run.paths.name(file) not in run.files]):
        raise InputError(str(added[0]), _ADDED)


def _split_lines(begun: Sequence[Part], lines: Sequence[SourceLine], name_of: NameOf) -> list[list[SourceLine]]:
    """The prompt lines of each part of a run, and after them those that are new."""
    places: dict[str, list[SourceLine]] = {}
    for line in lines:
        places.setdefault(line_key(line, name_of), []).append(line)
    parts = [[places[text].pop(0) for text in part.lines] for part in begun]
    left = {id(line) for waiting in places.values() for line in waiting}
    return [*parts, [line for line in lines if id(line) in left]]


def _given_names(folder: Path, part: Part) -> NameFile:
    """Names the pictures of a part as it did before."""
    files: Iterator[str] = iter(part.files)
    return lambda seed, source, said: folder / next(files, "more than before")


def make_record(
    options: Options,
    model: ModelFiles,
    pictures: Sequence[Path],
    parts: Sequence[Part],
    earlier: RunRecord | None,
    named_in_lines: Sequence[Path] = (),
) -> RunRecord:
    """The record of a run, which has to fit the earlier one that it goes on with; of a loop it holds no more than that.

    Args:
        options: the run's.
        model: that it draws with.
        pictures: that it draws from.
        parts: that it is planned in.
        earlier: the run that it goes on with.
        named_in_lines: files of the wildcards and networks that its lines name; lines that are added may name more.

    Raises:
        InputError: when the model, or a file that it draws with, is not the one of the earlier run.
    """
    if not parts:
        return RunRecord(model=model.name, options=compared_options(options), files={}, parts=())
    paths = [*options.files(), *pictures, *named_in_lines]
    weights = {
        f"{_OF_MODEL}{name}{f', {number}' if number > 1 else ''})": file
        for name, component in model.parts.items()
        for number, file in enumerate(component.weights.files, 1)
    }
    marks = fingerprints([*weights.values(), *paths])
    files = {name: marks[str(path)] for name, path in weights.items()} | {str(path): marks[str(path)] for path in paths}
    if earlier is None:
        return RunRecord(model=model.name, options=compared_options(options), files=files, parts=tuple(parts))
    names = {earlier.paths.name(path): str(path) for path in named_in_lines}
    _check_files(earlier, files, model.name, may_be_new=names)
    added = {name: files[path] for name, path in names.items() if name not in earlier.files}
    return replace(earlier, parts=tuple(parts), files={**earlier.files, **added})


_ADVICE = "give another --outdir for a new run"
_CHANGED = f"has changed since the run to resume was begun; put it back, or {_ADVICE}"
_ADDED = f"is no part of the run to resume; leave it out, or {_ADVICE}"
_OF_MODEL = "--ckpt ("  # how the names of a model's weights begin among a run's files


def _weights(files: Mapping[str, str]) -> dict[str, str]:
    return {name: mark for name, mark in files.items() if name.startswith(_OF_MODEL)}


def _check_files(run: RunRecord, files: Mapping[str, str], model: str, may_be_new: Container[str]) -> None:
    """Refuse to go on with a run whose weights or pictures are other ones now.

    Raises:
        InputError: naming the first.
    """
    now = versions()
    if other := [name for name, version in run.versions.items() if now.get(name, version) != version]:
        logger.warning("--resume: the run was begun with another version of %s; pictures may differ", ", ".join(other))
    files = {path if path.startswith(_OF_MODEL) else run.paths.name(Path(path)): mark for path, mark in files.items()}
    if model != run.model and _weights(files) != _weights(run.files):  # of equal weights it is another name alone
        raise InputError("--ckpt", f"is {model!r}, the run to resume has {run.model!r}; give the same, or {_ADVICE}")
    for path, before in run.files.items():
        if path not in files:
            raise InputError(path, f"is part of the run to resume and not there now; put it back, or {_ADVICE}")
        if files[path] != before:
            raise InputError(path, _CHANGED)
    if added := [path for path in files if path not in run.files and path not in may_be_new]:
        raise InputError(added[0], _ADDED)
