"""Names of picture files, chosen before they are made, and the folder they go to."""

import os
import re
import tempfile
from collections.abc import Collection, Iterable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from library.errors import InputError
from library.files.picture_files import numbered
from library.settings.file_names import NamePattern

_ROOM_FOR_NUMBERS = len("-999999")  # that are added to equal names
_SHORTER_SOURCE = "give the source picture a shorter name, or leave the option out"
_FIRST_STAGE = "_1st"
_USUAL_SECOND_STAGE = re.compile(r"(im_(?:\d{14}_)?)1(\d{3,}.*)", re.DOTALL)
_NOTHING: Mapping[str, Any] = {}
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
        pattern: of names, instead of the usual ones.
        model: the name of the model, for the pattern.
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
        pattern: NamePattern | None = None,
        model: str = "",
    ) -> None:
        self.folder = folder
        self._around_stem = max(map(len, (suffix, *beside, f"{_FIRST_STAGE * two_stages}{suffix}")))
        self._pattern, self._model = pattern, model
        self._two_stages = two_stages
        self._last: dict[str, int] = {}  # numbers that were added to a stem, so that it is not counted from 0 again
        self._longest = longest_name(folder)
        self._stage = "1" if two_stages else ""
        self._sequential = sequential
        self._suffix = suffix
        self._original = original
        self._time = now.strftime("%Y%m%d%H%M%S")
        self._taken = {entry.name for entry in os.scandir(folder)} if folder.is_dir() else set()
        given = list(taken)
        self._taken.update(given, map(first_stage_name, given) if two_stages else ())
        stage = "[01]" if two_stages else ""
        numbers = (re.fullmatch(rf"im_{stage}(\d{{6,}})(?:-\d+)?\.(?:png|webp|jpg)", name) for name in self._taken)
        self._count = max((int(match[1]) for match in numbers if match), default=0) if sequential else -1
        if pattern:
            self._count = len(given)  # the number of the last picture of the run; the first is number 1

    def next(self, seed: int, source: Path | None = None, said: Mapping[str, Any] = _NOTHING) -> Path:
        """The next picture's file, different from all others and from those that are there.

        Args:
            seed: of the picture.
            source: the picture that it starts from.
            said: more of it, by the names of a job's fields: `file_name`, `where`, and what the pattern needs.

        Raises:
            InputError: when its name is too long for the file system.
        """
        self._count += 1
        stem, subject, advice = self._stem(seed, source, said)
        file = self._free(stem, given=bool(subject))
        if (length := len(os.fsencode(file.stem)) + self._around_stem) > self._longest:
            problem = f"would need names of {length} bytes, the file system takes {self._longest}; {advice}"
            raise InputError(f"{subject}, {file.name}", problem, said["where"] if said.get("file_name") else "")
        return file

    def _stem(self, seed: int, source: Path | None, said: Mapping[str, Any]) -> tuple[str, str, str]:
        """A picture's name without its ending, the option that gives it ("" for a usual one), and how to shorten it."""
        if said.get("file_name"):
            return said["file_name"], "--f", "give a shorter name"
        if self._pattern is not None:
            values = {**said, "number": self._count, "seed": seed, "date": self._time, "model": self._model}
            values["scale"] = said["guidance_scale"]
            stem = self._pattern.stem(values, self._longest - self._around_stem - _ROOM_FOR_NUMBERS)
            return stem, f"--file_name {self._pattern.text}", "take something out of the pattern"
        if self._original and source is not None:
            return source.stem, "--use_original_file_name", _SHORTER_SOURCE
        number = f"{self._stage}{self._count:06d}" if self._sequential else f"{self._stage}{self._count:03d}_{seed}"
        return (f"im_{number}" if self._sequential else f"im_{self._time}_{number}"), "", ""

    def _free(self, stem: str, *, given: bool) -> Path:
        """A stem's first file that is not taken, and is from now on; a given name's first stage has one of its own."""
        for file in numbered(self.folder / f"{stem}{self._suffix}", self._last.get(stem, 0)):
            names = {file.name, first_stage_name(file.name)} if given and self._two_stages else {file.name}
            if self._taken.isdisjoint(names):
                self._taken |= names
                return file
            self._last[stem] = self._last.get(stem, 0) + 1
        raise AssertionError("names do not run out")


# ---------------------------------------------------------------------------------------------------------------------
# Names beside a picture's


def first_stage_name(name: str) -> str:
    """The name of the picture of Highres. fix's first stage: `im_0…` for `im_1…`, `x_1st.png` for a name `x.png`."""
    usual = _USUAL_SECOND_STAGE.fullmatch(name)
    return f"{usual[1]}0{usual[2]}" if usual else f"{Path(name).stem}{_FIRST_STAGE}{Path(name).suffix}"


def guide_name(stem: str, number: int, part: int = 0) -> str:
    """The name of a guide, from 1, that is saved beside a picture; of further parts that are drawn in turn, as well."""
    return f"{stem}_guide{number}{f'_{part + 1}' if part else ''}.png"


def sheet_name(stem: str) -> str:
    """The name of the contact sheet that begins with a picture."""
    return f"grid_{stem}.png"


_GUIDE_OF = re.compile(r"(.+)_guide\d+(?:_\d+)?\.png")
_SHEET_OF = re.compile(r"grid_(.+)\.png")


def beside_others(names: Collection[str]) -> set[str]:
    """The files among these that were made beside another of them: first stages, guides and contact sheets."""
    stems = {Path(name).stem for name in names}
    beside = {first for name in names if (first := first_stage_name(name)) != name} & set(names)
    for name in names:
        if (of := _GUIDE_OF.fullmatch(name) or _SHEET_OF.fullmatch(name)) and of[1] in stems:
            beside.add(name)
    return beside


# ---------------------------------------------------------------------------------------------------------------------
# The folder


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
