"""Tiles of a picture: where they lie, and how what was made of each becomes a whole again.

The U-Net's predictions of overlapping tiles are averaged at each step (MultiDiffusion, Bar-Tal et al. 2023,
https://arxiv.org/abs/2302.08113, equation 5), by weights that fall towards a tile's borders: where tiles disagree, even
ones would show where they end. What the VAE makes of tiles is joined in the same way.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from library.settings.tiling import Tiling


@dataclass(frozen=True, slots=True)
class Tile:
    """A part of a picture, in latent cells or in pixels; `whole` is the (height, width) that it is a part of."""

    top: int
    left: int
    height: int
    width: int
    whole: tuple[int, int]

    @property
    def is_whole(self) -> bool:
        """Whether it is all there is."""
        return (self.height, self.width) == self.whole

    @property
    def box(self) -> tuple[int, int, int, int]:
        """Its left, upper, right and lower border, as Pillow crops pictures."""
        return self.left, self.top, self.left + self.width, self.top + self.height

    def cut(self, x: torch.Tensor) -> torch.Tensor:
        """(…, *whole) → (…, height, width)"""
        return x[..., self.top : self.top + self.height, self.left : self.left + self.width]

    def at(self, height: int, width: int) -> "Tile":
        """The same part of a whole of another size, rounded to its places."""
        rows, columns = height / self.whole[0], width / self.whole[1]
        left, top, right, bottom = (round(b * by) for b, by in zip(self.box, (columns, rows) * 2))
        return Tile(top, left, bottom - top, right - left, (height, width))

    def widened(self, by: int) -> "Tile":
        """With so much more on each side as there is."""
        left, top, right, bottom = self.box
        top, left = max(top - by, 0), max(left - by, 0)
        bottom, right = min(bottom + by, self.whole[0]), min(right + by, self.whole[1])
        return Tile(top, left, bottom - top, right - left, self.whole)


def tiles_over(whole: tuple[int, int], size: int | None, overlap: int) -> list[Tile]:
    """Tiles that cover a whole of (height, width), row by row, from the top.

    Args:
        whole: what is covered.
        size: a tile's sides, cut down to the whole's; None is one tile.
        overlap: of neighbours, at least. They are spread evenly, and the last one ends where the whole does.
    """
    (tops, height), (lefts, width) = (_spread(length, size or length, overlap) for length in whole)
    return [Tile(top, left, height, width, whole) for top in tops for left in lefts]


def _spread(length: int, size: int, overlap: int) -> tuple[list[int], int]:
    """Where the tiles begin along a side, and how long they are."""
    size = min(size, length)
    further = -(-(length - size) // (size - overlap)) if length > size else 0
    return [round(place * (length - size) / max(further, 1)) for place in range(further + 1)], size


def model_tiles(tiling: Tiling, whole: tuple[int, int]) -> list[Tile]:
    """The tiles of latents of (height, width) that the U-Net sees."""
    return tiles_over(whole, tiling.size, tiling.overlap)


def vae_tiles(tiling: Tiling, whole: tuple[int, int]) -> list[Tile]:
    """The tiles of latents of (height, width) that the VAE sees: they overlap by a quarter at least."""
    return tiles_over(whole, tiling.size, max(tiling.overlap, (tiling.size or 0) // 4))


def tile_weights(tile: Tile) -> torch.Tensor:
    """Weights (height, width) that fall towards those borders of a tile beyond which there are others."""

    def along(first: int, length: int, whole: int) -> torch.Tensor:
        before = torch.arange(length) + 0.5
        after = before.flip(0)
        within = [distance for distance, inner in ((before, first > 0), (after, first + length < whole)) if inner]
        return torch.stack(within).amin(dim=0) if within else torch.ones(length)

    rows, columns = along(tile.top, tile.height, tile.whole[0]), along(tile.left, tile.width, tile.whole[1])
    return rows[:, None] * columns


def strips(tiles: Sequence[Tile], parts: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
    """Join what was made of tiles, by `tile_weights` where they overlap: strips (…, rows, width), from the top.

    Only the strip that further tiles reach into is kept, so that no whole need stand in memory in float32.

    Args:
        tiles: as `tiles_over` gives them.
        parts: of each tile, (…, height, width); they are joined in float32.
    """
    total = weights = torch.empty(0)
    for place, (tile, part) in enumerate(zip(tiles, parts, strict=True)):
        if place == 0:
            shape = (*part.shape[:-2], tile.height, tile.whole[1])
            total = torch.zeros(shape, device=part.device)
            weights = total.new_zeros(tile.height, tile.whole[1])
        weight, columns = tile_weights(tile).to(total, non_blocking=True), slice(tile.left, tile.left + tile.width)
        total[..., columns] += part * weight
        weights[..., columns] += weight
        following = tiles[place + 1].top if place + 1 < len(tiles) else tile.top + tile.height
        if finished := following - tile.top:
            yield total[..., :finished, :] / weights[:finished]
            total, weights = (F.pad(x[..., finished:, :], (0, 0, 0, finished)) for x in (total, weights))


def join(tiles: Sequence[Tile], parts: Iterable[torch.Tensor]) -> torch.Tensor:
    """As `strips`, all of them: (…, *whole) float32"""
    return torch.cat(list(strips(tiles, parts)), dim=-2)
