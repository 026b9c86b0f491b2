"""Plain text that people write for the program: prompt files and lists, in UTF-8."""

import re
import sys
from pathlib import Path

from library.errors import InputError
from library.files.globs import advice_on

LINE_END = re.compile(r"\r\n|\n|\r")  # only CR and LF end a line, no other of Unicode's separators


def read_text(path: str, subject: str, longest: int | None = None) -> str:
    """The text of a file, or of standard input for `-`.

    Args:
        path: of the file.
        subject: what it is called in messages.
        longest: bytes that it may have.

    Raises:
        InputError: when it cannot be read, is too long, is not UTF-8, or holds a NUL.
    """
    if path == "-" and sys.stdin is None:
        raise InputError(subject, "standard input is closed; give a file")
    try:
        if path == "-":
            raw = sys.stdin.buffer.read()
        else:
            with Path(path).expanduser().open("rb") as file:
                raw = file.read(-1 if longest is None else longest + 1)
    except (OSError, RuntimeError, ValueError) as problem:
        reason = getattr(problem, "strerror", None) or problem
        raise InputError(subject, f"cannot be read: {reason}; {advice_on(Path(path))}") from None
    if longest is not None and len(raw) > longest:
        raise InputError(subject, f"has more than {longest:,} bytes; split it")
    return _decode(raw, subject)


def _decode(raw: bytes, subject: str) -> str:
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise InputError(subject, "line 1, byte 1: the file is UTF-16; save it as UTF-8")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as problem:
        lines = re.split(rb"\r\n|\n|\r", raw[: problem.start])
        place = f"line {len(lines)}, byte {len(lines[-1]) + 1}"
        raise InputError(subject, f"{place}: 0x{raw[problem.start]:02X} is not UTF-8; save the file as UTF-8") from None
    if (place := text.find("\0")) >= 0:
        lines = LINE_END.split(text[:place])
        raise InputError(subject, f"line {len(lines)}: holds a NUL character; save it as plain text")
    return text
