"""What paths mean, however they are written: relative or not, with `..`, `~`, a slash at the end, or by a link."""

import os
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path


def meaning(path: str, folder: str = "") -> str | None:
    """The file or folder that a path stands for, without links; None where there is none.

    Args:
        path: as it was written.
        folder: what a relative one begins at; empty for the folder that the program runs in.
    """
    try:
        return os.path.realpath(Path(folder) / Path(path).expanduser(), strict=True)
    except (OSError, RuntimeError, ValueError):
        return None


def agree(before: object, now: object, folder: str) -> bool:
    """Whether two values of an option are the same, or name the same files.

    Args:
        before: the value that a run has as plain data: a text, a number, or a list of them.
        now: the value to compare.
        folder: what the run's relative paths begin at.
    """
    if before == now:
        return True
    if isinstance(before, list) and isinstance(now, list):
        return len(before) == len(now) and all(agree(b, n, folder) for b, n in zip(before, now))
    if isinstance(before, str) and isinstance(now, str):
        return (file := meaning(now)) is not None and file == meaning(before, folder)
    return False


class RunPaths:
    """What a run calls its files: they keep the paths that they were given when it began.

    Args:
        files: those paths.
        folder: what relative ones among them begin at.
    """

    def __init__(self, files: Iterable[str], folder: str) -> None:
        self._files = frozenset(files)
        self._folder = folder

    def name(self, path: Path) -> str:
        """The run's name of a file; one that it does not know is called by its path."""
        text = str(path)
        if text in self._files:
            return text
        # a link beside the file that it leads to is told from that by its own place
        keys = (_place(text), meaning(text))
        return next((self._known[key] for key in keys if key is not None and key in self._known), text)

    @cached_property
    def _known(self) -> dict[str, str]:
        files = sorted(self._files)
        by_meaning = {key: file for file in files if (key := meaning(file, self._folder)) is not None}
        return by_meaning | {key: file for file in files if (key := _place(file, self._folder)) is not None}


def _place(path: str, folder: str = "") -> str | None:
    """A file's path in its folder, which stands without links."""
    try:
        parent, name = os.path.split(Path(folder) / Path(path).expanduser())
    except RuntimeError:
        return None
    place = meaning(parent)
    return None if place is None else os.path.join(place, name)  # noqa: PTH118  # no `..` is taken out
