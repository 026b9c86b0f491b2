"""Latents to pictures, begun now and waited for later, so that a GPU need not wait for the next batch's beginning."""

import logging

import numpy as np
import torch
from diffusers import AutoencoderKL

from library.draw.tiles import strips, vae_tiles
from library.draw.vae_memory import decode
from library.settings.tiling import WHOLE, Tiling
from library.values import PIXELS_PER_CELL

logger = logging.getLogger(__name__)


class Decoding:
    """Pictures that are being decoded; on CUDA devices the program goes on meanwhile.

    Args:
        vae: decodes, on the device of the latents.
        latents: (B, C, h, w), scaled.
        tiling: pictures that are larger than a tile are decoded in tiles.
    """

    def __init__(self, vae: AutoencoderKL, latents: torch.Tensor, tiling: Tiling = WHOLE) -> None:
        self._vae, self._latents, self._tiling = vae, latents, tiling
        ahead = latents.device.type == "cuda"  # elsewhere nothing tells when a copy has arrived
        self._finite, self._pictures = (part.to("cpu", non_blocking=ahead) for part in _decode(vae, latents, tiling))
        self._arrived = torch.cuda.current_stream(latents.device).record_event() if ahead else None

    @torch.no_grad()
    def pictures(self) -> list[np.ndarray | None]:
        """The pictures (8h, 8w, 3) uint8; one that float16 cannot hold is decoded again in float32, None if in vain."""
        if self._arrived is not None:
            self._arrived.synchronize()
        finite, pictures = self._finite.numpy(), self._pictures.numpy()
        if not finite.all() and self._vae.dtype != torch.float32:
            failed, before = ~finite, (self._vae.device, self._vae.dtype)
            logger.warning("the VAE overflows in %s; such pictures are decoded again in float32", self._vae.dtype)
            try:
                self._vae.to(self._latents.device, torch.float32)
                again = _decode(self._vae, self._latents[torch.from_numpy(failed)], self._tiling)
            finally:
                self._vae.to(*before)
            finite[failed], pictures[failed] = (part.cpu().numpy() for part in again)
        return [picture if ok else None for picture, ok in zip(pictures, finite)]


def _decode(vae: AutoencoderKL, latents: torch.Tensor, tiling: Tiling) -> tuple[torch.Tensor, torch.Tensor]:
    """Which pictures have finite values only (B), and all of them (B, 8h, 8w, 3) uint8."""
    height, width = latents.shape[-2:]
    tiles = vae_tiles(tiling, (height, width))
    if len(tiles) == 1:
        return _as_shown(decode(vae, latents))
    in_pixels = [tile.at(height * PIXELS_PER_CELL, width * PIXELS_PER_CELL) for tile in tiles]
    decoded = strips(in_pixels, (decode(vae, tile.cut(latents)) for tile in tiles))
    finite, shown = zip(*map(_as_shown, decoded))
    return torch.stack(finite).all(0), torch.cat(shown, dim=1)


def _as_shown(pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Which of pictures (B, 3, H, W) have finite values only (B), and all of them (B, H, W, 3) uint8."""
    shown = ((pixels / 2 + 0.5).clamp(0, 1) * 255).nan_to_num().round().byte().permute(0, 2, 3, 1)
    return pixels.isfinite().flatten(1).all(1), shown
