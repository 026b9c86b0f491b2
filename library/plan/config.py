"""Options in TOML files, and the options of a run as such a file."""

import argparse
import os
import re
import tomllib
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from library.errors import InputError
from library.files.globs import advice_on
from library.files.picture_files import save_whole
from library.settings.options import OptionParser, Options, Said
from library.settings.other_names import is_same_thing, meant_option
from library.texts import readable


def with_config(argv: Sequence[str], parser: OptionParser) -> list[str]:
    """The command line with the options of its `--config` file before its own, which win.

    Raises:
        InputError: when the file cannot be read, or names an option that does not exist or is of another kind.
    """
    said = parser.said(argv)
    if "config" not in said:
        return list(argv)
    path = str(said["config"])
    known = [name for name, option in parser.table.items() if option.use.in_config]
    # of alternatives, one on the command line takes the place of a file's other
    taken = {parser.table[name].alternative for name in said} - {""}
    from_file: list[str] = []
    content = _read_text(path)
    for name, value in _parse(content, path).items():
        where = _place_of(name, content)
        if name not in known:
            option = meant_option(name, known)
            hint = f"; did you mean {option}?" if option else "; see --help for all options"
            if option and is_same_thing(name, option):
                hint = f"; here it is {option}"
            raise InputError(f"--config {path}", f"{name!r} is no option{hint}", where)
        if name not in said and parser.table[name].alternative not in taken:
            from_file += _as_arguments(parser.action(name), value, f"--config {path}", where)
    return [*from_file, *argv]


def _read_text(path: str) -> str:
    try:
        return Path(path).expanduser().read_text(encoding="utf-8-sig")
    except (OSError, RuntimeError, ValueError) as problem:
        reason = getattr(problem, "strerror", None) or problem
        raise InputError(f"--config {path}", f"cannot be read: {reason}; {advice_on(Path(path))}") from None


def _parse(content: str, path: str) -> dict[str, object]:
    try:
        return tomllib.loads(content)
    except tomllib.TOMLDecodeError as problem:
        reason, _, where = str(problem).removesuffix(")").partition(" (at ")
        number = re.match(r"line (\d+)", where)
        line = content.splitlines()[int(number[1]) - 1] if number and int(number[1]) <= content.count("\n") + 1 else ""
        raise InputError(f"--config {path}", f"is no TOML ({reason}); {_advice(line, reason)}", where) from None


def _advice(line: str, reason: str) -> str:
    """What to write in place of a line that is no TOML."""
    pair = re.fullmatch(r"\s*([\w-]+)\s*=\s*([^\s\"'\[{#][^\"'#]*?)\s*(?:#.*)?", line)
    if pair and pair[2].lower() in ("true", "false", "yes", "no", "on", "off"):
        return f"write {pair[1]} = {'true' if pair[2].lower() in ('true', 'yes', 'on') else 'false'}"
    if "overwrite" in reason:
        return "a name may stand there once; take the others out"
    if "\\" in line and '"' in line:
        return "a \\ stands in single quotes: 'C:\\models'"
    if re.search(r"=\s*([\"'])(?:(?!\1).)*$", line):
        return "end the text with the quotes that it begins with"
    if pair and not re.fullmatch(r"true|false|[-+0-9.eE_]+", pair[2]):
        return f"texts stand in quotes: {pair[1]} = '{pair[2]}'"
    return "write lines like steps = 20"


def _place_of(name: str, content: str) -> str:
    """The line of an option, as far as it is written plainly."""
    lines = content.splitlines()
    key = re.compile(rf"\s*[\"']?{re.escape(name)}[\"']?\s*(?:[.=]|\])|\s*\[+\s*{re.escape(name)}\s*\]")
    return next((f"line {number}" for number, line in enumerate(lines, 1) if key.match(line)), "")


def _as_arguments(action: argparse.Action, value: object, subject: str, where: str) -> list[str]:
    """A TOML value as it would stand on the command line."""
    name = action.option_strings[0]
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise InputError(subject, f"{action.dest} = {value!r}: is on or off; write true or false", where)
        return [name] if value else []
    values = value if isinstance(value, list) else [value]
    written = [os.fsdecode(str(each).encode()) for each in values]  # as the shell gives names, whatever the locale
    if any(isinstance(each, bool | dict | list) or not isinstance(each, str | int | float) for each in values):
        raise InputError(subject, f"{action.dest} = {value!r}: takes a text or a number; write one", where)
    for each in written:
        try:
            if callable(action.type):
                action.type(each)
        except argparse.ArgumentTypeError as problem:
            raise InputError(subject, str(problem), where) from None
    if isinstance(value, list):
        if action.nargs is None:
            raise InputError(subject, f"{action.dest} = {value!r}: takes one value; write one", where)
        return [name, *written]
    return [f"{name}={written[0]}"]


def keep_settings(folder: Path, options: Options) -> None:
    """Write the settings of a run as `settings.toml` beside its pictures, unless they are there already.

    Raises:
        EnvironmentFault: when the folder or the disk does not take them.
    """
    content = readable(settings_toml(options.kept())).encode()
    for file in folder.glob("settings*.toml"):
        with suppress(OSError):
            if file.read_bytes() == content:
                return
    save_whole(content, folder / "settings.toml")


def settings_toml(kept: Said) -> str:
    """The settings of a run, those that are kept, as a file for `--config`."""
    lines = ["# The settings of a run of gen_img_diffusers.py, for its option --config"]
    for name, value in kept.items():
        text = f"[{', '.join(map(_toml, value))}]" if isinstance(value, list) else _toml(value)
        lines.append(f"{name} = {text}")
    return "\n".join(lines) + "\n"


def _toml(value: str | bool) -> str:
    """A value in TOML: numbers that read back as they were written are numbers."""
    if isinstance(value, bool):
        return str(value).lower()
    for number in (int, float):
        if re.fullmatch(r"-?[0-9.]+", value) and str(_or_none(number, value)) == value:
            return value
    escaped = re.sub(r'[\x00-\x1f\x7f"\\]', lambda match: f"\\u{ord(match[0]):04X}", value)
    return f'"{escaped}"'


def _or_none(number: type, text: str) -> object:
    try:
        return number(text)
    except ValueError:
        return None
