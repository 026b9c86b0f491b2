"""Validating converters for the values of options, shared by the command line and by prompt lines.

Each takes the text that the user wrote and returns the value, or raises `argparse.ArgumentTypeError` that says the rule
and what to write instead.
"""

import math
import re
from argparse import ArgumentTypeError
from collections.abc import Callable, Sequence

# Pictures are made of latent cells of 8×8 pixels: the VAEs of all families halve the size three times.
PIXELS_PER_CELL = 8
MAX_SIZE_PX = 16384
MAX_SCALE = 1000.0  # far beyond use; keeps predictions finite
MAX_STEPS = 1000  # timesteps that all families were trained on
FRESH_SEED = -1  # in place of a seed: one that is drawn for the picture
_MOST_SEEDS = 100_000  # in one range
MAX_SEED = 2**63 - 1  # what torch.Generator.manual_seed takes, with room for a second stage's seed + 1


def whole_number(low: int, high: int | None = None) -> Callable[[str], int]:
    """Make a converter for whole numbers from `low` to `high` (no upper limit when None)."""
    allowed = f"a whole number from {low} to {high}" if high is not None else f"a whole number, {low} or more"

    def convert(text: str) -> int:
        if not re.fullmatch(r"[+-]?[0-9]{1,20}", text.strip(), re.ASCII):
            raise ArgumentTypeError(f"not a whole number; write {allowed}")
        value = int(text)
        if value < low or (high is not None and value > high):
            raise ArgumentTypeError(f"out of range; write {allowed}")
        return value

    return convert


def number(low: float = -math.inf, high: float = math.inf, *, above: bool = False) -> Callable[[str], float]:
    """Make a converter for finite numbers from `low` (without `low` itself when `above`) to `high`."""
    allowed = "a number" if low == -math.inf else f"a number {'above' if above else 'not below'} {low:g}"
    if high < math.inf:
        allowed += f", up to {high:g}"

    def convert(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise ArgumentTypeError(f"not a number; write {allowed}") from None
        if not math.isfinite(value):
            raise ArgumentTypeError(f"not a finite number; write {allowed}")
        if not low <= value <= high or (above and value == low):
            raise ArgumentTypeError(f"out of range; write {allowed}")
        return value

    return convert


def size_px(text: str) -> int:
    """Convert a picture's width or height in pixels, a multiple of 8."""
    value = whole_number(PIXELS_PER_CELL, MAX_SIZE_PX)(text)
    if remainder := value % PIXELS_PER_CELL:
        lower = value - remainder
        raise ArgumentTypeError(f"must be a multiple of {PIXELS_PER_CELL}; use {lower} or {lower + PIXELS_PER_CELL}")
    return value


def one_of(names: Sequence[str]) -> Callable[[str], str]:
    """Make a converter for one of a few names."""

    def convert(text: str) -> str:
        if text not in names:
            raise ArgumentTypeError(f"there is none of that name; write {', '.join(names[:-1])} or {names[-1]}")
        return text

    return convert


def seeds(text: str) -> tuple[int, ...]:
    """Convert `a`, `a,b,c` or `a-c`: one seed for each picture of a prompt, or `FRESH_SEED`."""
    return tuple(each for part in text.split(",") for each in _seed_range(part))


def _seed_range(text: str) -> Sequence[int]:
    """One seed, or those from one to another."""
    if re.fullmatch(r"\s*-1\s*", text):
        return (FRESH_SEED,)
    if (ends := re.fullmatch(r"\s*([0-9]+)\s*-\s*([0-9]+)\s*", text, re.ASCII)) is None:
        return (seed(text),)
    first, last = seed(ends[1]), seed(ends[2])
    if not first <= last < first + _MOST_SEEDS:
        raise ArgumentTypeError(f"is no range of seeds; write the smaller first, and at most {_MOST_SEEDS:,} of them")
    return range(first, last + 1)


def seed_or_fresh(text: str) -> int | None:
    """Convert a seed; `-1` is that none is given."""
    return None if text.strip() == str(FRESH_SEED) else seed(text)


def number_or_none(text: str) -> float | None:
    """Convert a finite number, or the word `none`."""
    return None if text.strip().lower() == "none" else number(-MAX_SCALE, MAX_SCALE)(text)


def strength(text: str) -> float:
    """Convert an img2img strength, above 0 and up to 1."""
    return number(0, 1, above=True)(text)


def not_empty(text: str) -> str:
    """Convert a text that has to name something."""
    if not text.strip():
        raise ArgumentTypeError("is empty; give a file, a folder or a name")
    return text


steps = whole_number(1, MAX_STEPS)
seed = whole_number(0, MAX_SEED)
guidance_scale = number(0, MAX_SCALE)
image_guidance = number(1, MAX_SCALE)
multiplier = number(-MAX_SCALE, MAX_SCALE)
loss_scale = number(0)
share = number(0, 1)
