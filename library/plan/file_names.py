"""Names of picture files, chosen before they are made, and the folder they go to."""

import os
import re
import tempfile
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path

from library.errors import InputError
from library.files.picture_files import numbered

_USUAL_LONGEST_NAME, _USUAL_LONGEST_PATH = 255, 4096  # bytes


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
        beside: what the names of a picture's other files have around its stem, such as `_guide1.png`.
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
        beside: Iterable[str] = (),
    ) -> None:
        self.folder = folder
        self._around_stem = max(map(len, (suffix, *beside)))
        self._longest = longest_name(folder)
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
        """The next picture's file, different from all others and from those that are there.

        Raises:
            InputError: when its name is too long for the file system.
        """
        self._count += 1
        if self._original and source is not None:
            stem = source.stem
        else:
            number = f"{self._stage}{self._count:06d}" if self._sequential else f"{self._stage}{self._count:03d}_{seed}"
            stem = f"im_{number}" if self._sequential else f"im_{self._time}_{number}"
        file = next(file for file in numbered(self.folder / f"{stem}{self._suffix}") if file.name not in self._taken)
        if (length := len(os.fsencode(file.stem)) + self._around_stem) > self._longest:
            problem = f"would need names of {length} bytes, the file system takes {self._longest}"
            advice = "give the source picture a shorter name, or leave the option out"
            raise InputError(f"--use_original_file_name, {file.name}", f"{problem}; {advice}")
        self._taken.add(file.name)
        return file


def longest_name(folder: Path) -> int:
    """How many bytes a file's name may have in a folder, which need not exist yet."""
    return _limit(_existing(folder), "PC_NAME_MAX", _USUAL_LONGEST_NAME)


def _limit(path: Path, name: str, usual: int) -> int:
    try:
        return os.pathconf(path, name)
    except (OSError, ValueError, AttributeError):  # AttributeError: Windows
        return usual


def _existing(folder: Path) -> Path:
    """A folder, or the innermost one around it that exists."""
    while not os.path.lexists(folder) and folder.parent != folder:
        folder = folder.parent
    return folder


def guide_name(stem: str, number: int) -> str:
    """The name of a guide, from 1, that is saved beside a picture."""
    return f"{stem}_guide{number}.png"


def sheet_name(stem: str) -> str:
    """The name of the contact sheet that begins with a picture."""
    return f"grid_{stem}.png"


def check_folder(folder: Path, option: str) -> None:
    """Refuse an output folder that pictures cannot go to; `make_folder` makes it once everything else is checked.

    Raises:
        InputError: when it is a file, or it or the folder it will be made in cannot be written to.
    """
    if "\0" in str(folder):
        raise InputError(f"{option} {folder}", "holds a NUL character; give another folder")
    try:
        existing = _existing(folder)
        if not existing.is_dir():
            raise InputError(f"{option} {folder}", f"{existing} is no folder; give another one")
        if not os.access(existing, os.W_OK | os.X_OK):
            raise InputError(f"{option} {folder}", f"{existing} cannot be written to; give another folder")
        longest, longest_path = longest_name(existing), _limit(existing, "PC_PATH_MAX", _USUAL_LONGEST_PATH)
        if any(len(os.fsencode(part)) > longest for part in folder.parts):
            raise InputError(f"{option} {folder}", f"names may have {longest} bytes here; give a shorter one")
        if len(os.fsencode(folder)) + longest + 2 > longest_path:  # a slash and the end of the text
            problem = f"leaves no room for names of files in the {longest_path} bytes of a path; give a shorter one"
            raise InputError(f"{option} {folder}", problem)
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
