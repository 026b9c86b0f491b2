"""Paths with `*`, `?` and `[…]` in them, and misspelt ones."""

import glob
import re
from difflib import get_close_matches
from pathlib import Path


def is_glob(given: str) -> bool:
    """Whether a path holds characters that stand for others."""
    return any(character in given for character in "*?[")


def matching(pattern: Path, *, recursive: bool = False) -> list[str]:
    """The paths that fit a pattern, sorted as strings; with `recursive`, `**` is any number of folders."""
    # Path.glob takes no absolute patterns; with several `**` a path is found more than once
    return sorted({*glob.glob(str(pattern), recursive=recursive)})  # noqa: PTH207


def near_path(path: Path) -> Path | None:
    """What is on the disk where one name or several of a path are misspelt; None where nothing is near."""
    found = Path(path.anchor)
    try:
        for part in path.parts[bool(path.anchor) :]:
            if not (found / part).exists():
                here = sorted(entry.name for entry in found.iterdir())
                others = [name for name in here if _without_digits(name) != _without_digits(part)]
                near = get_close_matches(part, others, n=1, cutoff=_NEAR)
                if not near:
                    return None
                part = near[0]
            found /= part
    except (OSError, ValueError):
        return None
    return found


def _without_digits(name: str) -> str:
    """Names that are alike but for their numbers, as of pictures in a row, are seldom meant for one another."""
    return re.sub(r"\d+", "#", name)


def advice_on(path: Path) -> str:
    """What to do about a path that cannot be read: the near one, where it is not there at all."""
    try:
        near = None if path.exists() else near_path(path)
    except (OSError, ValueError):
        near = None
    return f"did you mean {near}?" if near else "check the path"


_NEAR = 0.75  # of the letters of a name, those that agree; two of eight may differ
