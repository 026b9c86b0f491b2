"""Job files: a picture's settings a row, in CSV with a header or as JSON objects, one a line.

A row becomes the prompt line that says the same, so that there is one reading of both.
"""

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from library.errors import InputError, InputErrors
from library.files.text_files import LINE_END
from library.plan.prompt_lines import OPTION_START, PROMPT_OPTIONS, Cell, PromptOption, one_line, place_of
from library.settings.other_names import IN_LINES, is_same_thing, meant_option, nearest
from library.texts import is_text

_PROMPT = "prompt"
# by the names of options in lines, and by the names of what they set; None is the prompt itself
COLUMNS: dict[str, PromptOption | None] = {
    _PROMPT: None,
    **{option.sets: option for option in PROMPT_OPTIONS.values() if "." not in option.sets},
    "seed": PROMPT_OPTIONS["d"],
    **PROMPT_OPTIONS,
}


@dataclass(frozen=True, slots=True)
class JobRow:
    """A row as a prompt line, its file and line, and where its cells are in the prompt line."""

    text: str
    where: str
    cells: tuple[Cell, ...]


def is_job_file(path: str) -> bool:
    """Whether a file holds rows, by its ending."""
    return Path(path).suffix.lower() in _READERS


def read_rows(text: str, path: str, clean: Callable[[str], str] = str) -> list[JobRow]:
    """The rows of a job file.

    Args:
        text: what the file holds.
        path: its path, whose ending tells its kind.
        clean: takes out of a cell what is not meant to be read.

    Raises:
        InputError: for what is no CSV or JSON, an unknown column, one that is given twice, and a value of a wrong type.
    """
    rows: list[JobRow] = []
    problems: list[InputError] = []
    for row in _READERS[Path(path).suffix.lower()](text, path):
        try:
            rows.append(_as_line(*row, clean))
        except InputError as problem:
            problems.append(problem)
    if problems:
        raise problems[0] if len(problems) == 1 else InputErrors(problems)
    return rows


_Row = tuple[str, Iterable[tuple[str, object]]]  # its place, and its cells: their columns and what they hold


def _as_line(where: str, row: Iterable[tuple[str, object]], clean: Callable[[str], str]) -> JobRow:
    """A row as a prompt line: the prompt, then the options in the order of `PROMPT_OPTIONS`."""
    said: dict[str, tuple[str, str]] = {}  # by option: the column, and the text of the cell
    for column, value in row:
        option = _option(column, where)
        name = option.name if option else ""
        if name in said:
            raise InputError(column, f"says the same as {said[name][0]}; keep one of them", where)
        said[name] = (column, _cell_text(column, value, option, where, clean))
    text, cells = "", []
    for name in ("", *PROMPT_OPTIONS):
        column, value = said.get(name, ("", ""))
        if value:
            cells.append(Cell(len(text), column, name))
            text += f" --{name} {value}" if name else value
    if not text:
        raise InputError("the row", "says nothing; give it a prompt, or take it out", where)
    return JobRow(text, where, tuple(cells))


def _option(column: str, where: str) -> PromptOption | None:
    name = column.lower()
    if name not in COLUMNS:
        option = meant_option(name, IN_LINES)
        is_it = option and (is_same_thing(name, option) or name == option.lower())
        column_meant = IN_LINES[option] if option and is_it else nearest(name, COLUMNS)
        hint = f"did you mean {column_meant}?" if column_meant else f"known are {', '.join(COLUMNS)}"
        raise InputError(column[:60] or "a column without a name", f"no such column; {hint}", where)
    return COLUMNS[name]


def _cell_text(column: str, value: object, option: PromptOption | None, where: str, clean: Callable[[str], str]) -> str:
    """What a cell says, as it would be written in a line; empty where it says nothing."""
    place = place_of(where, 0, (Cell(0, column, ""),))
    text = one_line(clean(_as_written(value, option, place)))
    if not is_text(text) or "\0" in text:
        raise InputError(column, "holds what is no text (NUL, half a character); leave it out", place)
    if option is not None and OPTION_START.search(text):
        raise InputError(text[:60], "would begin another option; give that a column of its own", place)
    if text.rfind("{") > text.rfind("}"):  # another cell's brace is not its end
        raise InputError("{", "is never closed; add the } after the last variant", place)
    return text


# ---------------------------------------------------------------------------------------------------------------------
# CSV (RFC 4180)


def _csv_rows(text: str, path: str) -> Iterator[_Row]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header: list[str] | None = None
    line = 1
    try:
        for cells in reader:
            where, line = f"{path}:{line}", reader.line_num + 1
            if not any(cell.strip() for cell in cells):
                continue
            if header is None:
                header = [cell.strip() for cell in cells]
                _check_header(header, where)
            elif len(cells) != len(header):
                problem = f"has {len(cells)} cells, the header {len(header)}; put texts with commas in double quotes"
                raise InputError("the row", problem, where)
            else:
                yield where, zip(header, cells)
    except csv.Error as problem:
        raise InputError(f"{path}:{line}", f"is no CSV ({problem}); mend the row") from None


def _check_header(header: list[str], where: str) -> None:
    if len(header) == 1 and any(mark in header[0] for mark in ";\t"):
        raise InputError(header[0][:60], "is one column; put commas between columns", where)
    columns: dict[PromptOption | None, str] = {}
    for column in header:
        option = _option(column, where)
        if option in columns:
            raise InputError(column, f"is the same column as {columns[option]}; keep one of them", where)
        columns[option] = column
    if None not in columns:
        raise InputError("the header", f"has no column {_PROMPT}; the first row holds the columns' names", where)


# ---------------------------------------------------------------------------------------------------------------------
# JSON


class _Number(str):
    """A number of JSON as it was written, so that no digit of it changes."""


_KINDS: dict[type, str] = {_Number: "a number", bool: "true or false", list: "a list", dict: "an object"}


class _Unusable(ValueError):
    """What JSON has and a row cannot hold."""


def _json_rows(text: str, path: str) -> Iterator[_Row]:
    for number, line in enumerate(LINE_END.split(text), start=1):
        if line.strip():
            yield f"{path}:{number}", _json_row(line, f"{path}:{number}")


def _json_row(line: str, where: str) -> Iterator[tuple[str, object]]:
    """The cells of an object."""
    try:
        row = json.loads(
            line, parse_int=_Number, parse_float=_Number, parse_constant=_no_constant, object_pairs_hook=_object
        )
    except _Unusable as problem:
        raise InputError("the row", str(problem), where) from None
    except json.JSONDecodeError as problem:
        reason = f"is no JSON ({problem.msg}, column {problem.colno}); write one object a line"
        raise InputError("the row", reason, where) from None
    except (ValueError, RecursionError):
        raise InputError("the row", "is no JSON that can be read; write one object a line", where) from None
    if not isinstance(row, dict):
        raise InputError("the row", 'is no JSON object; write {"prompt": "…"}', where)
    yield from row.items()


def _no_constant(name: str) -> object:
    raise _Unusable(f"holds {name}, which is no number; write one, or null")


def _object(pairs: list[tuple[str, object]]) -> Mapping[str, object]:
    names = [name for name, _ in pairs]
    if twice := next((name for place, name in enumerate(names) if name in names[:place]), None):
        raise _Unusable(f"holds {twice!r} twice; keep one of them")
    return dict(pairs)


def _as_written(value: object, option: PromptOption | None, place: str) -> str:
    """A cell's value as it would be written in a line.

    Raises:
        InputError: for one of a type that the option cannot have.
    """
    is_words = option is None or option.metavar in ("TEXT", "NAME")
    if value is None:
        return ""
    if isinstance(value, str) and not (is_words and isinstance(value, _Number)):
        return value
    if isinstance(value, list) and value and option is not None and "," in option.metavar:
        words = [_as_item(each) for each in value]
        if None not in words:
            return ",".join(filter(None, words))
    wanted = "a text" if is_words else "a number, a list or a text" if "," in option.metavar else "a number or a text"
    kind = "an empty list" if value == [] else _KINDS[type(value)]
    raise InputError(
        (value if isinstance(value, _Number) else json.dumps(value))[:60], f"is {kind}; write {wanted}", place
    )


def _as_item(value: object) -> str | None:
    """A value in a list; None where it cannot be in one."""
    if isinstance(value, bool):
        return str(int(value))
    return value.strip() or None if isinstance(value, str) else None


_READERS = {".csv": _csv_rows, ".jsonl": _json_rows}
