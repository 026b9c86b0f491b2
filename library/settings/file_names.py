"""Names for picture files that the user gives: one in a prompt line, or a pattern for all of them."""

import os
import re
import unicodedata
from argparse import ArgumentTypeError
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from string import Formatter

from library.files.picture_files import FORMATS

# What Windows takes in no name, and what separates folders anywhere
_REFUSED = re.compile(r'[<>:"/\\|?*]')
_RESERVED = re.compile(r"(?:con|prn|aux|nul|conin\$|conout\$|com[0-9¹²³]|lpt[0-9¹²³])\s*(?:\..*)?", re.IGNORECASE)
_ENDING = re.compile(rf"\.(?:{'|'.join([*FORMATS, 'jpeg'])})", re.IGNORECASE)

FIELDS = ("number", "seed", "prompt", "sampler", "date", "model", "width", "height", "steps", "scale")
_WHOLE_NUMBERS = ("number", "seed", "width", "height", "steps")
_NUMBER_DIGITS = 3  # of a picture's number, where the pattern does not say


def picture_name(text: str) -> str:
    """Convert a name for a picture, without the ending of a picture's format.

    Raises:
        ArgumentTypeError: for one that leads out of the folder, or that a file system does not take.
    """
    name = _without_ending(text.strip())
    if not name:
        raise ArgumentTypeError("is empty; give a name")
    if refused := _REFUSED.search(name):
        raise ArgumentTypeError(f"holds {refused[0]}; pictures stand in --outdir, under names without {refused[0]}")
    if any(map(_acts, name)):
        raise ArgumentTypeError("holds a control character; leave it out")
    if name.startswith(".") or name.endswith((".", " ")):
        raise ArgumentTypeError("begins or ends with a dot or a space; leave it out")
    if _RESERVED.fullmatch(name):
        raise ArgumentTypeError("is no name for files on Windows; give another")
    return name


def name_pattern(text: str) -> str:
    """Convert a pattern of names; see `NamePattern`."""
    NamePattern.from_text(text)
    return text


@dataclass(frozen=True)
class NamePattern:
    """A pattern of names: texts, and fields in braces with what is put into them.

    Args:
        text: as it was written.
        parts: a text, the field after it ("" for none), and how many digits that has (0 where it does not say).
    """

    text: str
    parts: tuple[tuple[str, str, int], ...]

    @classmethod
    def from_text(cls, text: str) -> "NamePattern":
        """Read `{seed}_{number:04d}`; a brace itself is written twice.

        Raises:
            ArgumentTypeError: for an unknown field, a brace that is not closed, and a text that is in no name.
        """
        try:
            found = list(Formatter().parse(_without_ending(text.strip())))
        except ValueError as problem:
            raise ArgumentTypeError(f"{problem}; write fields like {{seed}}, and a brace itself twice") from None
        parts = tuple(
            (literal, "" if field is None else _field(field, conversion), _digits(field, digits))
            for literal, field, digits, conversion in found
        )
        picture_name("".join(literal + "x" * bool(field) for literal, field, _ in parts))
        return cls(text, parts)

    def stem(self, values: Mapping[str, object], most_bytes: int) -> str:
        """The name of a picture, without an ending, in so many bytes; the prompt is shortened to fit.

        Args:
            values: of all `FIELDS`.
            most_bytes: that there is room for; where all but the prompt needs more, the name has more.
        """
        prompts = sum(field == "prompt" for _, field, _ in self.parts)
        without = self._filled({**values, "prompt": ""})
        room = max(0, most_bytes - len(os.fsencode(without))) // (prompts or 1)
        prompt = _shortened(safe(str(values["prompt"])).strip(" ._"), room)
        return _whole(self._filled({**values, "prompt": prompt})) if prompts else _whole(without)

    def _filled(self, values: Mapping[str, object]) -> str:
        return "".join(literal + self._value(field, digits, values) for literal, field, digits in self.parts)

    @staticmethod
    def _value(field: str, digits: int, values: Mapping[str, object]) -> str:
        if not field:
            return ""
        value = values[field]
        return f"{value:0{digits}d}" if digits and isinstance(value, int) else safe(_as_text(value))


def _field(field: str, conversion: str | None) -> str:
    name = re.match(r"\w*", field)
    if field not in FIELDS:
        nearest = get_close_matches(name[0] if name else "", FIELDS, n=1)
        known = f"did you mean {{{nearest[0]}}}?" if nearest else f"known are {', '.join(FIELDS)}"
        raise ArgumentTypeError(f"{{{field}}}: no such field; {known}")
    if conversion:
        raise ArgumentTypeError(f"{{{field}!{conversion}}}: fields have no conversions; write {{{field}}}")
    return field


def _digits(field: str | None, written: str | None) -> int:
    if not written:
        return _NUMBER_DIGITS if field == "number" else 0
    match = re.fullmatch(r"0?([1-9][0-9]?)d?", written, re.ASCII)
    if field not in _WHOLE_NUMBERS or not match:
        advice = f"a number of digits, as {{{field}:04d}}" if field in _WHOLE_NUMBERS else f"{{{field}}}"
        raise ArgumentTypeError(f"{{{field}:{written}}}: cannot be written so; write {advice}")
    return int(match[1])


def _as_text(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _without_ending(name: str) -> str:
    ending = re.search(r"\.[A-Za-z]+\Z", name)
    return name[: ending.start()] if ending and _ENDING.fullmatch(ending[0]) else name


def _acts(character: str) -> bool:
    """Whether a character does something, or is half of one."""
    return unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp")


def safe(text: str) -> str:
    """A text for a part of a name: what some file system refuses is `_`, and white space one space."""
    text = _REFUSED.sub("_", " ".join(text.split()))
    return text if text.isprintable() else "".join("_" if _acts(each) else each for each in text)


def _shortened(text: str, room: int) -> str:
    """As many whole characters of a text as fit into so many bytes."""
    whole = os.fsencode(text)
    if len(whole) <= room:
        return text
    kept = whole[:room].decode("utf-8", "ignore")
    while kept and unicodedata.combining(text[len(kept)]):  # its accents stay with the letter before them
        kept = kept[:-1]
    return kept.strip(" ._")


def _whole(name: str) -> str:
    """A name put together of parts that are safe, as a safe one."""
    name = re.sub(r"^\.+|[. ]+$", "_", name.lstrip(" ")) or "_"
    return f"_{name}" if _RESERVED.fullmatch(name) else name
