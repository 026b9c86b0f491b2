"""Paths with `*`, `?` and `[…]` in them."""

import glob
from pathlib import Path


def is_glob(given: str) -> bool:
    """Whether a path holds characters that stand for others."""
    return any(character in given for character in "*?[")


def matching(pattern: Path, *, recursive: bool = False) -> list[str]:
    """The paths that fit a pattern, sorted as strings; with `recursive`, `**` is any number of folders."""
    # Path.glob takes no absolute patterns; with several `**` a path is found more than once
    return sorted({*glob.glob(str(pattern), recursive=recursive)})  # noqa: PTH207
