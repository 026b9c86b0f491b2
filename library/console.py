"""What the user sees while the program runs: warnings, errors and progress, all on standard error.

Every line that is written goes through `one_line`: names and texts come from files of others, and none of them may move
the cursor, turn the writing around, or begin a line that looks like one of this program's.
"""

import codecs
import io
import logging
import os
import sys
import time
import traceback
import unicodedata
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

from tqdm import tqdm

from library.texts import readable

logger = logging.getLogger(__name__)


_PACKAGES = ("library", "networks", "tools")  # whose messages are this program's
_LONGEST = 2000  # characters of an error or a warning; beyond that a value is quoted that nobody reads
_JOINERS = "\u200c\u200d"  # without which scripts and emoji fall apart; all they do is join
_SECONDS_BETWEEN_LINES = 10  # of progress, where there is no terminal
_COLOURS = {"error": 31, "warning": 33}  # ECMA-48: red, yellow


class _Handler(logging.Handler):
    """Writes `level: message` lines that do not break progress bars, each warning once; information without level."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        level, message = record.levelname.lower(), one_line(readable(record.getMessage()))
        if record.levelno < logging.WARNING:
            tqdm.write(message, file=sys.stderr)
        elif message not in self._seen:
            self._seen.add(message)
            tqdm.write(f"{_coloured(level)}: {_shortened(message)}", file=sys.stderr)


def one_line(text: str) -> str:
    """A text with what would act on a terminal or end the line written as Python writes it: `\\n`, `\\x1b`, `\\u202e`.

    That is control characters, separators of lines, and marks that nobody sees, such as those of the writing's
    direction. Bytes that are no UTF-8 are left to the stream, which writes them as they are or as `\\udc80`.
    """
    if text.isprintable():
        return text
    return "".join(repr(character)[1:-1] if _acts(character) else character for character in text)


def _acts(character: str) -> bool:
    return unicodedata.category(character) in ("Cc", "Cf", "Zl", "Zp") and character not in _JOINERS


def _shortened(line: str) -> str:
    return line if len(line) <= _LONGEST else f"{line[: _LONGEST // 2]} … {line[-_LONGEST // 2 :]}"


def _coloured(level: str) -> str:
    """The name of a level in its colour on a terminal, unless NO_COLOR (https://no-color.org) is set."""
    if os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb" or not sys.stderr.isatty():
        return level
    return f"\x1b[{_COLOURS.get(level, 0)}m{level}\x1b[0m"


def _as_bytes_or_escaped(problem: UnicodeError) -> tuple[str | bytes, int]:
    """What stands for a character that a stream cannot take: the byte that it was in a file's name, or an escape."""
    if isinstance(problem, UnicodeDecodeError):  # whoever reads what was written by the same stream
        return codecs.lookup_error("surrogateescape")(problem)
    assert isinstance(problem, UnicodeEncodeError)  # streams have no other
    character = problem.object[problem.start]
    errors = "surrogateescape" if "\udc80" <= character <= "\udcff" else "backslashreplace"
    return character.encode("ascii", errors), problem.start + 1


codecs.register_error("bytes_or_escaped", _as_bytes_or_escaped)


def make_streams_safe() -> None:
    """Let no character and no closed stream stop the program: what cannot be written is escaped or left out.

    Standard output takes names as the bytes that they are, so that whoever reads it finds the files.
    """
    if isinstance(sys.stdin, io.TextIOWrapper):  # what is no text is refused line by line, by its surrogates
        sys.stdin.reconfigure(errors="surrogateescape")
    for name, errors in (("stdout", "bytes_or_escaped"), ("stderr", "backslashreplace")):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, _nowhere())
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)


def _nowhere() -> io.TextIOWrapper:
    """A stream that takes everything and keeps nothing."""
    return Path(os.devnull).open("w", encoding="utf-8", errors="replace")


@contextmanager
def others_at_work() -> Iterator[None]:
    """A block that runs other people's modules: what they print goes to standard error, as all that is no result."""
    with redirect_stdout(sys.stderr):
        yield


@contextmanager
def messages(lowest_level: int, handler: logging.Handler | None = None) -> Iterator[None]:
    """Show this program's messages from a level of `logging` on, for the length of the block.

    Args:
        lowest_level: of them.
        handler: takes them; None for what writes them to standard error.
    """
    handler = handler or _Handler()
    before = {own: own.level for own in map(logging.getLogger, _PACKAGES)}
    for own in before:
        own.addHandler(handler)
        own.setLevel(lowest_level)
    try:
        yield
    finally:
        for own, level in before.items():
            own.setLevel(level)
            own.removeHandler(handler)


def error(problem: object) -> None:
    """Write one error line."""
    tqdm.write(f"{_coloured('error')}: {_shortened(one_line(readable(problem)))}", file=sys.stderr)


def warn(message: str) -> None:
    """Write one warning, also where the same has been said before."""
    if logger.isEnabledFor(logging.WARNING):
        tqdm.write(f"{_coloured('warning')}: {_shortened(one_line(readable(message)))}", file=sys.stderr)


def trace() -> None:
    """Write the traceback of the exception in hand, indented, so that none of its lines passes for a message."""
    for line in traceback.format_exc().splitlines():
        tqdm.write(f"  {one_line(readable(line))}", file=sys.stderr)


def say(message: str) -> None:
    """Write one line of information."""
    logger.info("%s", message)


def answer(line: str) -> None:
    """Write one line that was asked for, on standard error, whatever else is shown there."""
    tqdm.write(one_line(readable(line)), file=sys.stderr)


def result(line: str) -> None:
    """Write one line of results to standard output, clear of the progress bars."""
    try:
        tqdm.write(one_line(line), file=sys.stdout)
        sys.stdout.flush()
    except OSError:  # nobody reads any more, or the disk is full; the pictures matter, the list does not
        sys.stdout = _nowhere()


class Progress:
    """Progress of a run: a bar for its pictures and one for the current batch's steps on a terminal, else plain lines.

    Of these there is one at most every ten seconds, so that a log of a long run can be read, and one at the end.

    Args:
        pictures: how many the run makes; None when that is not known, as in interactive use.
    """

    def __init__(self, pictures: int | None) -> None:
        self._on_terminal = sys.stderr.isatty() and logger.isEnabledFor(logging.INFO)
        self._total = pictures
        self.beside = ""  # what else is said of it: who is at work
        self._done = 0
        self._started = self._told = time.monotonic()
        self._pictures = tqdm(
            total=pictures, unit="image", desc="images", disable=not self._on_terminal or pictures is None, position=0
        )

    def steps(self, timesteps: Iterable) -> Iterable:
        """Go through the timesteps of one batch, showing a bar."""
        if not self._on_terminal:
            return timesteps
        return tqdm(timesteps, unit="step", desc="steps", leave=False, position=1)

    def reached(self, pictures: int) -> None:
        """Show that so many pictures are finished."""
        more = pictures - self._done
        self._done = pictures
        if self.beside:
            self._pictures.set_postfix_str(self.beside, refresh=False)
        self._pictures.update(more)
        if more and not self._on_terminal and self._total is not None and self._is_time():
            per_picture = (self._told - self._started) / self._done
            left = tqdm.format_interval(per_picture * (self._total - self._done))
            beside = f", {self.beside}" * bool(self.beside)
            say(f"{self._done}/{self._total} images, {per_picture:.2f} s each{beside}, {left} left")

    def _is_time(self) -> bool:
        """Whether a line is due, which is noted."""
        now = time.monotonic()
        if now - self._told < _SECONDS_BETWEEN_LINES and self._done != self._total:
            return False
        self._told = now
        return True

    def close(self) -> None:
        """Take the bars away."""
        self._pictures.close()
