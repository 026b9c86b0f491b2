"""The jobs of all lines of a run: counted, and made."""

import random
from collections.abc import Callable, Sequence
from typing import TypeVar

from library.errors import InputError, InputErrors
from library.plan.job import Job
from library.plan.job_maker import JobMaker, NameFile, dynamic_prompt, pictures_of
from library.plan.seeds import SeedSource
from library.plan.sources import SourceLine
from library.plan.sweep import NO_SWEEP, Sweep
from library.plan.wildcards import Wildcards

MAX_JOBS = 1_000_000  # in one run; far beyond a night's work, far below what fills the memory
Thing = TypeVar("Thing")


def count_pictures(
    lines: Sequence[SourceLine],
    images_per_prompt: int | None,
    iterations: int,
    wildcards: Wildcards | None = None,
    sweep: Sweep = NO_SWEEP,
) -> int:
    """How many pictures a run makes of its lines, in one combination of its sweep.

    Raises:
        InputError: for a fault in a line's dynamic prompt, and for more than `MAX_JOBS`.
    """

    named = wildcards or Wildcards()

    def count(line: SourceLine) -> int:
        if line.parsed is not None:
            return images_per_prompt or 1
        dynamic = dynamic_prompt(line, named)
        return dynamic.count() if dynamic.enumerated else pictures_of(line.text, images_per_prompt)

    counts = _for_all(lines, count)
    pictures = iterations * sum(each * sweep.combinations(line) for line, each in zip(lines, counts))
    if pictures > MAX_JOBS:
        raise InputError(
            f"--n_iter {iterations}, --images_per_prompt {images_per_prompt or 1}{', --sweep' * bool(sweep.axes)}",
            f"{pictures:,} pictures, more than {MAX_JOBS:,} in one run; make several runs",
        )
    return iterations * sum(counts)


def plan_jobs(
    lines: Sequence[SourceLine],
    maker: JobMaker,
    seeds: SeedSource,
    name_file: NameFile,
    iterations: int,
    shuffle: random.Random | None = None,
) -> list[Job]:
    """The jobs of a run, in the order of its pictures: iteration by iteration, line by line.

    Args:
        lines: the prompt lines.
        maker: makes jobs of them.
        seeds: for lines that name none.
        name_file: names the pictures.
        iterations: how often all lines are gone through.
        shuffle: mixes the lines anew for each iteration; None leaves their order.
    """
    jobs: list[Job] = []
    for _ in range(iterations):
        seeds.start_iteration()
        order = list(lines)
        if shuffle is not None:
            shuffle.shuffle(order)
        for made in _for_all(order, lambda line: list(maker.jobs(line, seeds, name_file))):
            jobs += made
    return jobs


def _for_all(lines: Sequence[SourceLine], work: Callable[[SourceLine], Thing]) -> list[Thing]:
    """What `work` gives for each line; its refusals are raised together, after all lines have been looked at."""
    results: list[Thing] = []
    problems: list[InputError] = []
    for line in lines:
        try:
            results.append(work(line))
        except InputError as problem:
            problems.append(problem)
    if problems:
        problems = list({str(problem): problem for problem in problems}.values())  # lines share files of wildcards
        raise problems[0] if len(problems) == 1 else InputErrors(problems)
    return results
