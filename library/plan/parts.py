"""Planning a run so that it can be gone on with, and going on with one. Knows no torch."""

import argparse
import logging
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from library.errors import InputError
from library.files.model_files import ModelFiles
from library.plan.jobs import Job, JobMaker, SeedSource, SourceLine, count_pictures, plan_jobs
from library.plan.run_record import (
    Part,
    RunRecord,
    check_files,
    choose_run,
    compared_options,
    fingerprints,
    jobs_digest,
    line_key,
    option_files,
    split_lines,
)
from library.run.manifest import KnownRun, read_runs
from library.values import MAX_SEED

logger = logging.getLogger(__name__)


def find_run(options: argparse.Namespace, lines: Sequence[SourceLine]) -> KnownRun | None:
    """The run in the output folder that `--resume` goes on with; None when nothing was made yet.

    Raises:
        InputError: when these options and lines go on with none of them, or a process is at work on it.
    """
    runs = read_runs(options.outdir)
    if not runs:
        logger.warning("--resume: %s holds no run yet; beginning one", options.outdir)
        return None
    chosen = choose_run([run.record for run in runs], compared_options(options), lines)
    known = next(run for run in runs if run.record is chosen)
    if known.active:
        raise InputError("--resume", f"a process is still at work on this run in {options.outdir}; wait until it ends")
    return known


def shared_run(plan: Mapping[str, object]) -> KnownRun:
    """The run that the first of several processes has planned."""
    places = {int(place): name for place, name in plan["done"].items()}
    return KnownRun(RunRecord.from_json(plan["record"]), places=places)


def plan_parts(
    options: argparse.Namespace,
    lines: Sequence[SourceLine],
    maker: JobMaker,
    seed: int,
    earlier: RunRecord | None,
) -> tuple[list[Job], list[Part]]:
    """Plan the parts of an earlier run as they were, and after them the lines that are new.

    Raises:
        InputError: for a fault in a line.
    """
    begun = earlier.parts if earlier else ()
    groups = split_lines(begun, lines)
    jobs: list[Job] = []
    parts: list[Part] = []
    fresh_names = maker.name_file
    count_pictures(lines, options.images_per_prompt, options.n_iter)
    for number, group in enumerate(groups):
        if not group:
            continue
        part = begun[number] if number < len(begun) else None
        part_seed = part.seed if part else (seed + number) % (MAX_SEED + 1)
        pictures = count_pictures(group, options.images_per_prompt, options.n_iter)
        maker.seeds = SeedSource(part_seed, pictures, same_in_iteration=options.iter_same_seed)
        maker.name_file = _given_names(options.outdir, part) if part else fresh_names
        shuffle = random.Random(part_seed) if options.shuffle_prompts else None
        planned = plan_jobs(group, maker, options.n_iter, shuffle)
        digest = jobs_digest(planned)
        if part and digest != part.jobs:
            raise InputError("--resume", "this version of the program plans the run otherwise; give another --outdir")
        jobs += planned
        parts.append(Part(part_seed, tuple(map(line_key, group)), tuple(job.file.name for job in planned), digest))
    return jobs, parts


def _given_names(folder: Path, part: Part) -> Callable[[int, Path | None], Path]:
    """Names the pictures of a part as it did before."""
    files = iter(part.files)
    return lambda seed, source: folder / next(files, "more than before")


def make_record(
    options: argparse.Namespace,
    model: ModelFiles,
    pictures: Sequence[Path],
    parts: Sequence[Part],
    earlier: RunRecord | None,
) -> RunRecord | None:
    """The record of a run, which has to fit the earlier one that it goes on with; None when nothing is planned.

    Raises:
        InputError: when the model, or a file that it draws with, is not the one of the earlier run.
    """
    if not parts:
        return None
    paths = [*option_files(options), *pictures]
    weights = {f"--ckpt ({part})": getattr(model, part).weights.path for part in ("unet", "vae", "text_encoder")}
    marks = fingerprints([*weights.values(), *paths])
    files = {name: marks[str(path)] for name, path in weights.items()} | {str(path): marks[str(path)] for path in paths}
    if earlier is None:
        return RunRecord(model=model.name, options=compared_options(options), files=files, parts=tuple(parts))
    check_files(earlier, files, model.name)
    return replace(earlier, parts=tuple(parts))
