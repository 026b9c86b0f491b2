"""Sweeps: every prompt in every combination of some values, with the same seeds, so that they can be compared."""

import math
import re
from argparse import ArgumentTypeError
from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

from library import values
from library.errors import InputError
from library.plan.job import SweepCell
from library.plan.job_files import COLUMNS
from library.plan.prompt_lines import OPTION_START, PROMPT_OPTIONS, PromptOption
from library.plan.sources import SourceLine
from library.settings.options import Options
from library.settings.other_names import IN_LINES, meant_option

MAX_AXES = 3  # rows, columns and sheets
# by the names that prompt lines, job files and the command line have for them; None is text of the prompt
_NAMES: dict[str, PromptOption | None] = {
    **{name.lower(): PROMPT_OPTIONS[line] for name, line in IN_LINES.items()},
    **COLUMNS,
}
_SEED, _STRENGTH, _FILE_NAME = (PROMPT_OPTIONS[name] for name in "dtf")


@dataclass(frozen=True)
class Axis:
    """One `--sweep NAME=VALUE,VALUE`.

    Args:
        name: as it is shown.
        option: of prompt lines that it sets; None where it replaces text of the prompt.
        values: as they were written; where it replaces text, that text is the first of them.
        written: the whole of it.
    """

    name: str
    option: PromptOption | None
    values: tuple[str, ...]
    written: str

    def __str__(self) -> str:
        return self.written

    @property
    def key(self) -> str:
        """What no two axes may have in common: the option, or the text that is replaced."""
        return f"--{self.option.name}" if self.option else self.values[0]

    def changes(self, line: SourceLine) -> bool:
        """Whether its values make a difference to a prompt line."""
        return self.option is not None or self.values[0] in _prompt_of(line)[0]


@dataclass(frozen=True)
class Sweep:
    """All axes of a run; without any, each prompt is drawn as it is."""

    axes: tuple[Axis, ...] = ()

    def lines(self, line: SourceLine) -> Iterator[SourceLine]:
        """A prompt line in every combination, the last axis fastest; one without a replaced text does without it."""
        axes = [axis for axis in self.axes if axis.changes(line)]
        _check_own_options(line, axes)
        for chosen in product(*(axis.values for axis in axes)):
            said = tuple((axis.name, value) for axis, value in zip(axes, chosen))
            yield replace(_combined(line, axes, chosen), cell=SweepCell(line.text.strip(), said))

    def combinations(self, line: SourceLine) -> int:
        """How many combinations a prompt line is drawn in."""
        return math.prod(len(axis.values) for axis in self.axes if axis.changes(line))

    def check(self, lines: Sequence[SourceLine]) -> None:
        """Refuse to replace a text that is in none of a run's prompts.

        Raises:
            InputError: naming it.
        """
        for axis in self.axes:
            if lines and not any(map(axis.changes, lines)):
                problem = (
                    f"{axis.values[0]!r} is in no prompt; write it as it stands in one, with its upper and lower case"
                )
                raise InputError(f"--sweep {axis}", problem)

    def describe(self) -> str:
        """How many combinations there are of what: `3 scale x 2 sampler`."""
        return " x ".join(f"{len(axis.values)} {axis.name}" for axis in self.axes)


NO_SWEEP = Sweep()


def from_options(options: Options) -> Sweep:
    """The axes of a run.

    Raises:
        InputError: for too many axes, two of one thing, a strength of nothing, and seeds that would be drawn again.
    """
    axes: list[Axis] = options.sweep or []
    if len(axes) > MAX_AXES:
        problem = f"{len(axes)} axes; give at most {MAX_AXES}: rows, columns and sheets"
        raise InputError("--sweep", problem)
    for place, axis in enumerate(axes):
        if (before := next((each for each in axes[:place] if each.key == axis.key), None)) is not None:
            raise InputError(f"--sweep {axis}", f"is about the same as --sweep {before}; put the values into one")
    for axis in axes:
        if axis.option is _STRENGTH and options.image_path is None and options.highres_fix_scale is None:
            problem = "changes nothing without --image_path and without Highres. fix; give one of them"
            raise InputError(f"--sweep {axis}", problem)
    repeated = [name for name in ("images_per_prompt", "n_iter") if (getattr(options, name) or 1) > 1]
    for axis in axes if repeated else ():
        if axis.option is _SEED:
            problem = f"with --{repeated[0]} draws the pictures of each seed again; leave one of them out"
            raise InputError(f"--sweep {axis}", problem)
    shared = Counter(axis.name for axis in axes)
    return Sweep(tuple(replace(a, name=f"{a.name} ({a.values[0]})") if shared[a.name] > 1 else a for a in axes))


# ---------------------------------------------------------------------------------------------------------------------
# An axis as it is written


def axis(text: str) -> Axis:
    """Convert `NAME=VALUE,VALUE`, or `prompt=OLD:NEW|NEW`; in double quotes a value may hold what parts them."""
    name, equals, rest = text.partition("=")
    name = name.strip()
    if not equals or not name:
        example = "for instance scale=4,7.5,12, and in quotes where it has spaces"
        raise ArgumentTypeError(f"is no axis; write NAME=VALUE,VALUE, {example}")
    option = _option(name)
    said = _texts(rest) if option is None else _split(rest, ",")
    if option is _SEED:
        said = [str(seed) for each in said for seed in _seeds(each)]
    known: set[Hashable] = set()
    for value in said:
        meant = value if option is None else _converted(option, value)
        if meant in known:
            raise ArgumentTypeError(f"{value!r} is there twice; keep one of them")
        known.add(meant)
    return Axis(name, option, tuple(said), text.strip())


def _option(name: str) -> PromptOption | None:
    plain = name.lower().replace("-", "_")
    if plain not in _NAMES:
        known = ["prompt", *(each for each in IN_LINES if each != "file_name")]
        option = meant_option(name, known)
        hint = f"did you mean {option}?" if option else f"known are {', '.join(known)}"
        raise ArgumentTypeError(f"{name!r} is nothing that a prompt line can set; {hint}")
    if _NAMES[plain] is _FILE_NAME:
        raise ArgumentTypeError("names of files change no picture; sweep something else")
    return _NAMES[plain]


def _converted(option: PromptOption, value: str) -> Hashable:
    """A value as it counts."""
    if OPTION_START.search(value):
        raise ArgumentTypeError(f"{value!r} would begin another option; take the hyphens out, or sweep that option")
    try:
        converted = option.convert(value)
    except ArgumentTypeError as problem:
        raise ArgumentTypeError(f"{value!r}: {problem}") from None
    assert isinstance(converted, Hashable)  # settings of jobs are
    return converted


def _seeds(value: str) -> tuple[int, ...]:
    """A seed, or those from one to another."""
    try:
        return values.seeds(value)
    except ArgumentTypeError as problem:
        raise ArgumentTypeError(f"{value!r}: {problem}") from None


def _texts(text: str) -> list[str]:
    """The text that is replaced, and those that take its place."""
    old, rest = _first(text, ":")
    if rest is None:
        raise ArgumentTypeError("replaces text of the prompt; write prompt=OLD:NEW, or prompt=OLD:NEW|NEW")
    said = [old, *_split(rest, "|")]
    for value in said:
        if value.count("{") != value.count("}") and rest.count("{") == rest.count("}"):
            raise ArgumentTypeError(f'{value!r} is one part of a choice; write it in double quotes: "{{a|b}}"')
        if OPTION_START.search(value):
            raise ArgumentTypeError(f"{value!r} would begin an option; sweep that by its name")
    return said


def _split(text: str, mark: str) -> list[str]:
    """The values between marks; a quoted one may be empty."""
    found, rest = [], text
    while rest is not None:
        value, rest = _first(rest, mark)
        found.append(value)
    return found


def _first(text: str, mark: str) -> tuple[str, str | None]:
    """The value up to a mark, and what is after that; None where there is no such mark."""
    if quoted := re.match(rf'\s*"((?:[^"]|"")*)"\s*(?:({re.escape(mark)})|$)', text):
        return quoted[1].replace('""', '"'), text[quoted.end() :] if quoted[2] else None
    value, found, rest = text.partition(mark)
    if not value.strip():
        raise ArgumentTypeError(f'has a value that is empty; write one beside each "{mark}" (an empty text is "")')
    if value.lstrip().startswith('"'):
        problem = 'has text after a quoted value, or quotes left open; within quotes "" is a quote'
        raise ArgumentTypeError(f'{problem}: "a ""b"" c"')
    return value.strip(), rest if found else None


# ---------------------------------------------------------------------------------------------------------------------
# Prompt lines in combinations


def _prompt_of(line: SourceLine) -> tuple[str, str]:
    """A line's prompt as it was written, and the rest of the line."""
    first = None if line.parsed else OPTION_START.search(line.text)
    end = first.start() if first else len(line.text)
    return line.text[:end], line.text[end:]


def _check_own_options(line: SourceLine, axes: Sequence[Axis]) -> None:
    """Refuse a line that sets what is swept: neither of the two would be expected to give way."""
    named = {name.lower() for name in re.findall(r"(?:^|(?<=\s))--(\S+)", _prompt_of(line)[1])}
    for axis in axes:
        if axis.option is not None and axis.option.name in named:
            problem = f"the line sets it, and so does --sweep {axis}; take one of them out"
            raise InputError(f"--{axis.option.name}", problem, line.where)


def _combined(line: SourceLine, axes: Sequence[Axis], chosen: Sequence[str]) -> SourceLine:
    """A prompt line with the values of one combination, written as a line that says them."""
    texts = {axis.values[0]: value for axis, value in zip(axes, chosen) if axis.option is None}
    options = [(axis.option, value) for axis, value in zip(axes, chosen) if axis.option is not None]
    before, rest = _prompt_of(line)
    prompt = _replaced(before, texts)
    text = " ".join([f"{prompt}{rest}".rstrip(), *(f"--{option.name} {value}" for option, value in options)])
    moved = len(prompt) - len(before)  # cells of a job file's row that stand behind its prompt
    cells = tuple(replace(cell, start=cell.start + moved) if cell.start else cell for cell in line.cells)
    parsed = line.parsed
    if parsed is not None:
        settings = {option.sets: option.convert(value) for option, value in options}
        parsed = replace(parsed, prompt=_replaced(parsed.prompt, texts), settings={**parsed.settings, **settings})
    return replace(line, text=text, parsed=parsed, cells=cells)


def _replaced(text: str, texts: dict[str, str]) -> str:
    """A text with others in place of some, none of them looked at again."""
    if not texts:
        return text
    longest_first = sorted(texts, key=len, reverse=True)
    return re.sub("|".join(map(re.escape, longest_first)), lambda match: texts[match[0]], text)
