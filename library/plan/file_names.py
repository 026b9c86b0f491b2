"""Names of picture files, chosen before they are made, and the folder they go to."""

import os
import re
import tempfile
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path

from library.errors import InputError
from library.files.picture_files import numbered


class FileNames:
    """Names for the pictures of a run, chosen before they are made.

    Args:
        folder: where they go; it need not exist yet.
        sequential: `im_000001.png` on, after the highest there is, instead of time, number and seed.
        original: the name of the source picture.
        now: the run's time.
        two_stages: numbers begin with a 1, which is a 0 in the name of a first stage's picture.
        suffix: of the pictures' format.
        taken: names in the folder that are given already, to files that may not be there yet.
    """

    def __init__(
        self,
        folder: Path,
        *,
        sequential: bool,
        now: datetime,
        original: bool = False,
        two_stages: bool = False,
        suffix: str = ".png",
        taken: Iterable[str] = (),
    ) -> None:
        self.folder = folder
        self._stage = "1" if two_stages else ""
        self._sequential = sequential
        self._suffix = suffix
        self._original = original
        self._time = now.strftime("%Y%m%d%H%M%S")
        self._taken = {entry.name for entry in os.scandir(folder)} if folder.is_dir() else set()
        self._taken.update(taken)
        stage = "[01]" if two_stages else ""
        numbers = (re.fullmatch(rf"im_{stage}(\d{{6,}})(?:-\d+)?\.(?:png|webp|jpg)", name) for name in self._taken)
        self._count = max((int(match[1]) for match in numbers if match), default=0) if sequential else -1

    def next(self, seed: int, source: Path | None = None) -> Path:
        """The next picture's file, different from all others and from those that are there."""
        self._count += 1
        if self._original and source is not None:
            stem = source.stem
        else:
            number = f"{self._stage}{self._count:06d}" if self._sequential else f"{self._stage}{self._count:03d}_{seed}"
            stem = f"im_{number}" if self._sequential else f"im_{self._time}_{number}"
        file = next(file for file in numbered(self.folder / f"{stem}{self._suffix}") if file.name not in self._taken)
        self._taken.add(file.name)
        return file


def check_folder(folder: Path, option: str) -> None:
    """Refuse an output folder that pictures cannot go to; `make_folder` makes it once everything else is checked.

    Raises:
        InputError: when it is a file, or it or the folder it will be made in cannot be written to.
    """
    if "\0" in str(folder):
        raise InputError(f"{option} {folder}", "holds a NUL character; give another folder")
    try:
        existing = folder
        while not os.path.lexists(existing) and existing.parent != existing:
            existing = existing.parent
        if not existing.is_dir():
            raise InputError(f"{option} {folder}", f"{existing} is no folder; give another one")
        if not os.access(existing, os.W_OK | os.X_OK):
            raise InputError(f"{option} {folder}", f"{existing} cannot be written to; give another folder")
    except (OSError, ValueError) as problem:
        raise InputError(f"{option} {folder}", f"cannot be used ({problem}); give another folder") from None


def make_folder(folder: Path, option: str) -> None:
    """Make the output folder; a folder that cannot take files after all is an `InputError`."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as problem:
        raise InputError(
            f"{option} {folder}", f"cannot be written to ({problem.strerror}); give another folder"
        ) from None
