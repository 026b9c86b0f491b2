"""Pictures that are drawn over, as latents."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image

from library.draw.tiles import join, vae_tiles
from library.files.pictures import load_mask, load_source
from library.plan.job import Job
from library.settings.tiling import WHOLE, Tiling
from library.values import PIXELS_PER_CELL

_KEPT_SOURCES = 64  # source pictures whose latents are kept for later batches


def pixels_to_tensor(picture: Image.Image) -> torch.Tensor:
    """An RGB or grey picture as (1, channels, height, width) float32 from 0 to 1."""
    pixels = torch.from_numpy(np.array(picture)).float() / 255
    return pixels.reshape(1, picture.height, picture.width, -1).permute(0, 3, 1, 2)


def encode(vae: AutoencoderKL, picture: Image.Image, tiling: Tiling = WHOLE) -> torch.Tensor:
    """The latent mean of a picture, scaled: (C, h, w) float32. One that is larger than a tile is encoded in tiles."""
    cells = picture.height // PIXELS_PER_CELL, picture.width // PIXELS_PER_CELL
    tiles = vae_tiles(tiling, cells)
    if len(tiles) > 1:
        boxes = (tile.at(picture.height, picture.width).box for tile in tiles)
        return join(tiles, (encode(vae, picture.crop(box)) for box in boxes))
    pixels = pixels_to_tensor(picture).to(vae.device, vae.dtype)
    mean = vae.encode(pixels * 2 - 1).latent_dist.mean
    return mean[0].float() * vae.config.scaling_factor


class SourceLatents:
    """The latents of source pictures; those of pictures used lately are kept."""

    def __init__(self, vae: AutoencoderKL, tiling: Tiling = WHOLE) -> None:
        self._vae, self._tiling = vae, tiling
        self._kept: dict[tuple[Path, tuple[int, int]], torch.Tensor] = {}  # least lately used first

    def of(self, jobs: Sequence[Job]) -> torch.Tensor:
        """The jobs' source pictures as latents (B, C, h, w) float32."""
        return torch.stack([self._encode(job.source, (job.width, job.height)) for job in jobs if job.source])

    def _encode(self, path: Path, size_px: tuple[int, int]) -> torch.Tensor:
        kept = self._kept.pop((path, size_px), None)
        if kept is None:
            kept = encode(self._vae, load_source(path, size_px), self._tiling)
        self._kept[path, size_px] = kept
        if len(self._kept) > _KEPT_SOURCES:
            del self._kept[next(iter(self._kept))]
        return kept


def latent_masks(jobs: Sequence[Job], size: tuple[int, int]) -> torch.Tensor:
    """The jobs' masks at the latents' (height, width): (B, 1, h, w); 1 is repainted."""
    return torch.cat([pixels_to_tensor(load_mask(job.mask, size[::-1])) for job in jobs if job.mask])
