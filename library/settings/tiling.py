"""Tiles: pictures that are larger than a tile are drawn in overlapping tiles, in the memory of one. Their settings."""

from argparse import ArgumentTypeError
from dataclasses import dataclass

from library import values
from library.errors import InputError
from library.settings.options import Options
from library.values import MAX_SIZE_PX, PIXELS_PER_CELL

SMALLEST_PX = 64
_USUAL_SHARE = 4  # of the tile's side is its overlap where none is said


@dataclass(frozen=True)
class Tiling:
    """How large tiles are and how far neighbours overlap at least, in pixels; without a size all is drawn whole."""

    size_px: int | None = None
    overlap_px: int = 0

    @property
    def size(self) -> int | None:
        """A tile's side in latent cells."""
        return None if self.size_px is None else self.size_px // PIXELS_PER_CELL

    @property
    def overlap(self) -> int:
        """The overlap in latent cells."""
        return self.overlap_px // PIXELS_PER_CELL

    def splits(self, *sides: int) -> bool:
        """Whether a picture of these sides in pixels is larger than a tile."""
        return self.size_px is not None and max(sides) > self.size_px

    def within_tile(self, side: int) -> int:
        """How much of a picture's side in pixels the model sees at once."""
        return side if self.size_px is None else min(side, self.size_px)


WHOLE = Tiling()


def size_px(text: str) -> int:
    """Convert a tile's side in pixels."""
    if values.whole_number(0, MAX_SIZE_PX)(text) < SMALLEST_PX:
        raise ArgumentTypeError(f"too small; write {SMALLEST_PX} or more, better the size the model was trained on")
    return values.size_px(text)


def overlap_px(text: str) -> int:
    """Convert an overlap in pixels; 0 is none."""
    return values.whole_number(0, MAX_SIZE_PX)(text) and values.size_px(text)


def from_options(options: Options) -> Tiling:
    """What the options say of them.

    Raises:
        InputError: for an overlap that is as large as a tile.
    """
    size, overlap = options.tile, options.tile_overlap
    if size is None:
        return WHOLE
    if overlap is None:
        overlap = size // _USUAL_SHARE // PIXELS_PER_CELL * PIXELS_PER_CELL
    if overlap >= size:
        problem = f"leaves no way from one tile of {size} to the next; give {size - PIXELS_PER_CELL} or less"
        raise InputError(f"--tile_overlap {overlap}", f"{problem}, {size // _USUAL_SHARE} is usual")
    return Tiling(size, overlap)
