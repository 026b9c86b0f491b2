"""Attention Couple: the parts of a prompt, each drawn where its region of the picture is.

The method of the web UI's extension of that name: in every cross-attention layer the picture attends to each part by
itself, and the outcomes are averaged with the regions as weights. Everything else sees the picture as a whole.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from library.draw.feature_sizes import followed
from library.draw.tiles import Tile
from library.files.pictures import read_drawn, region_color
from library.machine.devices import sent
from library.plan.job import Job

_CHANNELS = 3
_SUM_OFFSET = 1e-4  # where no region is, the parts' share is 0 / this, not 0 / 0


@lru_cache(maxsize=4)
def load_regions(path: Path | None, parts: int, color_codes: int | None = None) -> torch.Tensor:
    """Read a map of regions: (parts, height, width) uint8, 255 where a part is.

    Args:
        path: the map; None makes every region the whole picture.
        parts: how many regions.
        color_codes: None reads the first three from the red, green and blue channel; a number reads so many from pure
            colours, see `pictures.region_color`.

    What is clear in the map belongs to no region. Regions beyond these, and those that the map leaves empty, are the
    whole picture.
    """
    if path is None:
        return torch.full((parts, 1, 1), 255, dtype=torch.uint8)
    pixels = torch.from_numpy(np.array(read_drawn(path, "--mask_path")))  # (height, width, 4)
    colors, alpha = pixels[..., :3], pixels[..., 3]
    regions = torch.full((parts, *alpha.shape), 255, dtype=torch.uint8)
    for part in range(min(parts, _CHANNELS if color_codes is None else color_codes)):
        if color_codes is None:
            region = (colors[..., part].float() * alpha / 255).round()
        else:
            region = (colors == torch.tensor(region_color(part))).all(dim=2) * alpha
        if region.any():
            regions[part] = region
    return regions


class Regions:
    """The regions of a batch, at the size of whatever feature map the U-Net is working on.

    Rows of tensors are the branches' pictures, branch by branch. The prompt's branch, the first or the one after the
    negative prompt's, is one row for each picture outside cross-attention; its text, and all that attends to it, has
    one row for each part of each picture, part by part.

    Args:
        masks: for each picture its regions, as `load_regions` gives them; heights and widths may differ.
        device: where the U-Net is.
        networks: how many networks keep to a part's region, one for each of the first parts; parts beyond them then
            have no share in the picture. 0 is for networks that act everywhere.
    """

    def __init__(self, masks: Sequence[torch.Tensor], device: torch.device, networks: int = 0) -> None:
        self._masks = [sent(mask, device) for mask in masks]
        self.pictures = len(masks)
        self.parts = len(masks[0])
        self.networks = networks
        self.token_size = (0, 0)  # height and width of the feature map that attention is in
        self._at_size: dict[tuple[int, int], torch.Tensor] = {}
        self._tile: Tile | None = None  # that the U-Net is working on, where that is not the whole picture
        self._in_tiles: dict[tuple[Tile, tuple[int, int]], torch.Tensor] = {}

    def begin_tile(self, tile: Tile) -> None:
        """Say which tile of the latents the U-Net's next evaluation is for."""
        self._tile = None if tile.is_whole else tile

    def masks(self, size: tuple[int, int]) -> torch.Tensor:
        """The shares of the parts at a height and width: (parts, pictures, height, width) float32."""
        tile = self._tile
        if tile is None:
            return self._of_whole(size)
        if (tile, size) not in self._in_tiles:
            self._in_tiles[tile, size] = F.interpolate(tile.cut(self._of_whole(tile.whole)), size, mode="bilinear")
        return self._in_tiles[tile, size]

    def _of_whole(self, size: tuple[int, int]) -> torch.Tensor:
        if size not in self._at_size:
            resized = [  # part by part: maps can be large
                torch.cat([F.interpolate(part[None, None].float(), size, mode="bilinear") for part in mask])
                for mask in self._masks
            ]
            self._at_size[size] = torch.cat(resized, dim=1) / 255
            if self.networks:
                self._at_size[size][self.networks :] = 0
        return self._at_size[size]

    def sums(self, size: tuple[int, int]) -> torch.Tensor:
        """What the parts' shares are divided by in averages: (pictures, height, width)."""
        return self.masks(size).sum(dim=0) + _SUM_OFFSET

    def spread(self, x: torch.Tensor) -> torch.Tensor:
        """Repeat the prompt's rows for each part: (branches * pictures, …) → (rows of the text, …)"""
        before, prompt, after = self._split(x, self.pictures)
        return torch.cat([before, *[prompt] * self.parts, after])

    def average(self, x: torch.Tensor) -> torch.Tensor:
        """Average the parts' rows, the regions as weights: (rows of the text, T, C) → (branches * pictures, T, C)"""
        before, prompt, after = self._split(x, self.parts * self.pictures)
        weights = (self.masks(self.token_size) / self.sums(self.token_size)).flatten(2).to(x.dtype)
        prompt = (prompt.unflatten(0, (self.parts, self.pictures)) * weights[..., None]).sum(dim=0)
        return torch.cat([before, prompt, after])

    def _split(self, x: torch.Tensor, prompt_rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The rows before the prompt's, the prompt's, and the rows after them."""
        before = 0 if len(x) == prompt_rows else self.pictures
        return x[:before], x[before : before + prompt_rows], x[before + prompt_rows :]

    @contextmanager
    def attached(self, *models: nn.Module) -> Iterator[None]:
        """Follow the sizes of feature maps through the U-Net and its ControlNets, for the length of the block."""
        with followed(self._note_size, *models):
            yield

    def _note_size(self, size: tuple[int, int]) -> None:
        self.token_size = size


def make_regions(jobs: Sequence[Job], color_codes: int | None, device: torch.device) -> Regions | None:
    """The regions of a batch's jobs; None where prompts have none. For `color_codes` see `load_regions`."""
    parts = len(jobs[0].parts)
    if parts == 1 or jobs[0].composes:
        return None
    networks = len(jobs[0].network_multipliers) if jobs[0].regions is not None else 0
    return Regions([load_regions(job.regions, parts, color_codes) for job in jobs], device, networks)
