"""Decoding latents in whatever memory there is: together, one by one, and at last in tiles."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from diffusers import AutoencoderKL

from library.machine.devices import try_to_run

logger = logging.getLogger(__name__)

_TILE_CELLS = (64, 32, 16)  # side of a tile in latent cells; divisible by 4, as tiles overlap by a quarter


def decode(vae: AutoencoderKL, latents: torch.Tensor) -> torch.Tensor:
    """Decode scaled latents (B, C, h, w) to pixels (B, 3, 8h, 8w), float32, about -1 to 1.

    Where the memory does not suffice, pictures are decoded one by one, and then in tiles that overlap, which changes
    them slightly.

    Raises:
        torch.OutOfMemoryError: when the smallest tiles are too large still.
    """

    dtype = next(vae.parameters()).dtype  # `vae.dtype` goes through all of them

    def run(part: torch.Tensor) -> torch.Tensor:
        return vae.decode((part / vae.config.scaling_factor).to(dtype)).sample.float()

    pixels = try_to_run(lambda: run(latents))
    if pixels is not None:
        return pixels
    if len(latents) > 1:
        logger.warning("out of memory in the VAE; decoding pictures one by one (--vae_batch_size 1)")
    return torch.cat([_decode_one(vae, run, one) for one in latents.split(1)])


def _decode_one(vae: AutoencoderKL, run: Callable[[torch.Tensor], torch.Tensor], latents: torch.Tensor) -> torch.Tensor:
    """Decode one picture: whole, or in the largest tiles that the memory takes."""
    pixels = try_to_run(lambda: run(latents))
    for cells in _TILE_CELLS:
        if pixels is None and max(latents.shape[-2:]) > cells:
            logger.warning("out of memory in the VAE; decoding in tiles of %d x %d pixels", 8 * cells, 8 * cells)
            with tiles(vae, cells):
                pixels = try_to_run(lambda: run(latents))
    if pixels is None:
        raise torch.OutOfMemoryError("the VAE does not fit into memory")
    return pixels


@contextmanager
def tiles(vae: AutoencoderKL, cells: int) -> Iterator[None]:
    """Let the VAE decode in tiles of `cells` latent cells a side for the length of the block."""
    names = ("use_tiling", "tile_latent_min_size", "tile_sample_min_size")
    before = {name: getattr(vae, name) for name in names}
    cell_px = 2 ** (len(vae.config.block_out_channels) - 1)
    try:
        for name, value in zip(names, (True, cells, cells * cell_px)):
            setattr(vae, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(vae, name, value)
