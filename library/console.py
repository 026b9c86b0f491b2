"""What the user sees while the program runs: warnings, errors and progress, all on standard error."""

import codecs
import io
import logging
import os
import re
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

from tqdm import tqdm

from library.texts import readable

logger = logging.getLogger(__name__)


_PACKAGES = ("library", "networks", "tools")  # whose messages are this program's
_LONGEST_ERROR = 2000  # characters; beyond that a value is quoted that nobody reads
_COLOURS = {"error": 31, "warning": 33}  # ECMA-48: red, yellow


class _Handler(logging.Handler):
    """Writes `level: message` lines that do not break progress bars, each warning once; information without level."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        level, message = record.levelname.lower(), readable(record.getMessage())
        if record.levelno < logging.WARNING:
            tqdm.write(message, file=sys.stderr)
        elif message not in self._seen:
            self._seen.add(message)
            tqdm.write(f"{_coloured(level)}: {message}", file=sys.stderr)


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
def messages(lowest_level: int) -> Iterator[None]:
    """Show this program's messages from a level of `logging` on, on standard error, for the length of the block."""
    handler = _Handler()
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
    line = re.sub(r"[\x00-\x1f\x7f]", lambda control: repr(control[0])[1:-1], readable(problem))
    if len(line) > _LONGEST_ERROR:
        line = f"{line[: _LONGEST_ERROR // 2]} … {line[-_LONGEST_ERROR // 2 :]}"
    tqdm.write(f"{_coloured('error')}: {line}", file=sys.stderr)


def say(message: str) -> None:
    """Write one line of information."""
    logger.info("%s", message)


def result(line: str) -> None:
    """Write one line of results to standard output, clear of the progress bars."""
    try:
        tqdm.write(line, file=sys.stdout)
        sys.stdout.flush()
    except OSError:  # nobody reads any more, or the disk is full; the pictures matter, the list does not
        sys.stdout = _nowhere()


class Progress:
    """Progress of a run: a bar for its pictures and one for the current batch's steps on a terminal, else plain lines.

    Args:
        pictures: how many the run makes; None when that is not known, as in interactive use.
    """

    def __init__(self, pictures: int | None) -> None:
        self._on_terminal = sys.stderr.isatty() and logger.isEnabledFor(logging.INFO)
        self._total = pictures
        self._done = 0
        self._started = time.monotonic()
        self._pictures = tqdm(
            total=pictures, unit="image", desc="images", disable=not self._on_terminal or pictures is None, position=0
        )

    def steps(self, timesteps: Iterable) -> Iterable:
        """Go through the timesteps of one batch, showing a bar."""
        return tqdm(timesteps, unit="step", desc="steps", leave=False, disable=not self._on_terminal, position=1)

    def reached(self, pictures: int) -> None:
        """Show that so many pictures are finished."""
        more = pictures - self._done
        self._done = pictures
        self._pictures.update(more)
        if more and not self._on_terminal and self._total is not None:
            per_picture = (time.monotonic() - self._started) / self._done
            left = tqdm.format_interval(per_picture * (self._total - self._done))
            say(f"{self._done}/{self._total} images, {per_picture:.2f} s each, {left} left")

    def close(self) -> None:
        """Take the bars away."""
        self._pictures.close()
