"""Options in TOML files, and the options of a run as such a file. Knows no torch."""

import argparse
import re
import tomllib
from collections.abc import Sequence
from contextlib import suppress
from difflib import get_close_matches
from pathlib import Path
from typing import NoReturn

from library.errors import InputError
from library.files.picture_files import save_whole

# Of these sets of options at most one is given; one on the command line takes the place of a file's other
_EXCLUSIVE = (
    {"prompt", "from_file", "interactive"},
    {"fp16", "bf16"},
    {"sequential_file_name", "use_original_file_name"},
)
# What says how a run is carried out or shown, not what it makes
_NOT_SETTINGS = {"config", "resume", "dry_run", "json", "quiet", "verbose", "debug"}

Said = dict[str, str | list[str] | bool]

_NOT_IN_FILES = {"config", "help", "version"}  # options that are for the command line alone


def with_config(argv: Sequence[str], parser: argparse.ArgumentParser) -> list[str]:
    """The command line with the options of its `--config` file before its own, which win.

    Raises:
        InputError: when the file cannot be read, or names an option that does not exist or is of another kind.
    """
    said = as_said(argv, parser)
    if "config" not in said:
        return list(argv)
    path = str(said["config"])
    options = _read(path)
    displaced = {name for names in _EXCLUSIVE if names & said.keys() for name in names - said.keys()}
    actions = {action.dest: action for action in parser._actions}
    from_file: list[str] = []
    for name, value in options.items():
        if name not in actions or name in _NOT_IN_FILES:
            nearest = get_close_matches(name, actions.keys() - _NOT_IN_FILES, n=1)
            hint = f"; did you mean {nearest[0]}?" if nearest else "; see --help for all options"
            raise InputError(f"--config {path}", f"{name!r} is no option{hint}")
        if name not in displaced and name not in said:
            from_file += _as_arguments(actions[name], value, f"--config {path}")
    return [*from_file, *argv]


def _read(path: str) -> dict[str, object]:
    try:
        return tomllib.loads(Path(path).expanduser().read_text(encoding="utf-8-sig"))
    except tomllib.TOMLDecodeError as problem:
        raise InputError(f"--config {path}", f"is no TOML ({problem}); write lines like steps = 20") from None
    except (OSError, RuntimeError, ValueError) as problem:
        reason = getattr(problem, "strerror", None) or problem
        raise InputError(f"--config {path}", f"cannot be read: {reason}; check the path") from None


def _as_arguments(action: argparse.Action, value: object, subject: str) -> list[str]:
    """A TOML value as it would stand on the command line."""
    name = action.option_strings[0]
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise InputError(subject, f"{action.dest} = {value!r}: is on or off; write true or false")
        return [name] if value else []
    values = value if isinstance(value, list) else [value]
    if any(isinstance(each, bool | dict | list) or not isinstance(each, str | int | float) for each in values):
        raise InputError(subject, f"{action.dest} = {value!r}: takes a text or a number; write one")
    if isinstance(value, list):
        if action.nargs is None:
            raise InputError(subject, f"{action.dest} = {value!r}: takes one value; write one")
        return [name, *map(str, values)]
    return [f"{name}={value}"]


class _PlainParser(argparse.ArgumentParser):
    """A parser that raises what others leave the program for."""

    def error(self, message: str) -> NoReturn:
        raise argparse.ArgumentError(None, message)


def as_said(argv: Sequence[str], parser: argparse.ArgumentParser) -> Said:
    """The options that a command line gives, unconverted, by name."""
    plain = _PlainParser(add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    for action in parser._actions:
        if action.nargs == 0:
            plain.add_argument(*action.option_strings, dest=action.dest, action="store_true", default=argparse.SUPPRESS)
        else:
            plain.add_argument(*action.option_strings, dest=action.dest, nargs=action.nargs)
    try:
        return vars(plain.parse_known_args(argv)[0])
    except argparse.ArgumentError:  # the parser that knows the types says what is wrong
        return {}


def keep_settings(folder: Path, said: Said) -> None:
    """Write the settings of a run as `settings.toml` beside its pictures, unless they are there already.

    Raises:
        EnvironmentFault: when the folder or the disk does not take them.
    """
    content = settings_toml(said).encode("utf-8", "replace")
    for file in folder.glob("settings*.toml"):
        with suppress(OSError):
            if file.read_bytes() == content:
                return
    save_whole(content, folder / "settings.toml")


def settings_toml(said: Said) -> str:
    """The settings of a run as a file for `--config`."""
    lines = ["# The settings of a run of gen_img_diffusers.py, for its option --config"]
    for name, value in said.items():
        if name not in _NOT_SETTINGS:
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
