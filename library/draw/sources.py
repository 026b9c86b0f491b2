"""Pictures that are drawn over: the part of them that is drawn, as latents, and put back."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from functools import cached_property, partial

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image

from library.draw.tiles import Tile, join, vae_tiles
from library.machine.devices import sent
from library.plan.canvas import Size, View
from library.settings.tiling import WHOLE, Tiling
from library.values import PIXELS_PER_CELL

_KEPT_SOURCES = 64  # source pictures whose latents are kept for later batches


class Start:
    """What a picture is drawn over.

    Args:
        view: the part of a canvas that is drawn.
        before: the whole picture as earlier turns left it.
    """

    def __init__(self, view: View, before: Image.Image | None = None) -> None:
        self._view, self._before = view, before

    @property
    def key(self) -> Hashable | None:
        """Starts with equal keys have equal pictures; None for one that has no equal."""
        if self._before:
            return None
        return replace(self._view, canvas=replace(self._view.canvas))  # copies hold no pictures, and keys are kept

    @property
    def marks(self) -> Hashable | None:
        """What tells its files as they are now; None if one is gone."""
        return self._view.canvas.marks

    @cached_property
    def picture(self) -> Image.Image:
        """RGB, of the width and height that are drawn."""
        return self._view.of(self._whole)

    @property
    def fill(self) -> str:
        """What is under the mask at first."""
        return self._view.canvas.settings.fill

    @property
    def filled(self) -> Image.Image:
        """The picture, filled under the mask."""
        return filled(self.picture, self.mask, self.fill) if self.mask else self.picture

    @property
    def mask(self) -> Image.Image | None:
        """Grey, of the same size; 255 is redrawn. None to redraw all."""
        return self._view.mask

    def mask_at(self, size: Size) -> Image.Image | None:
        """The mask at another (width, height)."""
        return self._view.mask_at(size)

    @cached_property
    def _whole(self) -> Image.Image:
        return self._before or self._view.canvas.picture

    def put_back(self, drawn: np.ndarray) -> np.ndarray:
        """The finished picture (H, W, 3) of what was drawn (height, width, 3)."""
        picture, box = Image.fromarray(drawn), self._view.box
        if box is not None:
            whole = self._whole.copy()
            whole.paste(picture.resize(box.size, Image.Resampling.LANCZOS), box[:2], self._view.own_mask)
            return np.asarray(whole)
        if self.mask is not None and self._view.canvas.settings.keep_unmasked:
            return np.asarray(Image.composite(picture, self.picture, self.mask))
        return drawn


def filled(picture: Image.Image, mask: Image.Image, fill: str) -> Image.Image:
    """A picture whose masked part is replaced as `settings.masks.FILLS` say; noise comes when it is latents."""
    if fill == "black":
        return Image.composite(Image.new("RGB", picture.size), picture, mask)
    if fill == "blur":
        return Image.composite(_spread(picture, mask), picture, mask)
    return picture


def _spread(picture: Image.Image, mask: Image.Image) -> Image.Image:
    """What is around a mask, spread into it, the further in the softer.

    The picture is halved again and again, each pixel counting by what the mask leaves of it, and what is missing at a
    size comes from the next smaller one (Gortler et al. 1996, The Lumigraph: pull-push).
    """
    kept = 1 - np.asarray(mask, dtype=np.float32) / 255
    if not kept.any():
        return picture
    spread = _pull_push(np.asarray(picture, dtype=np.float32), kept)
    return Image.fromarray(spread.round().clip(0, 255).astype(np.uint8))


def _pull_push(pixels: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """(H, W, 3), whose pixels count by `kept` (H, W) from 0 to 1 → the same, without holes"""
    import cv2  # 25 MB that only some runs need

    height, width = kept.shape
    if kept.min() == 1 or height * width == 1:
        return pixels
    half = ((width + 1) // 2, (height + 1) // 2)
    small_kept = cv2.resize(kept, half, interpolation=cv2.INTER_AREA)
    small = cv2.resize(pixels * kept[..., None], half, interpolation=cv2.INTER_AREA)
    small = small / np.maximum(small_kept, 1e-6)[..., None]
    beneath = _pull_push(small, np.minimum(1, 2 * small_kept))
    beneath = cv2.resize(beneath, (width, height), interpolation=cv2.INTER_CUBIC)
    return beneath + kept[..., None] * (pixels - beneath)


def pixels_to_tensor(picture: Image.Image) -> torch.Tensor:
    """An RGB or grey picture as (1, channels, height, width) float32 from 0 to 1."""
    pixels = torch.from_numpy(np.array(picture)).float() / 255
    return pixels.reshape(1, picture.height, picture.width, -1).permute(0, 3, 1, 2)


def encode(vae: AutoencoderKL, picture: Image.Image, tiling: Tiling = WHOLE) -> torch.Tensor:
    """The latent mean of a picture, scaled: (C, h, w) float32. One that is larger than a tile is encoded in tiles."""

    def pixels(tile: Tile) -> torch.Tensor:  # made for a tile at a time, as floats of the whole are large
        return pixels_to_tensor(picture if tile.is_whole else picture.crop(tile.box)) * 2 - 1

    return _encode(vae, picture.size, tiling, pixels)


def encode_pixels(vae: AutoencoderKL, pixels: torch.Tensor, tiling: Tiling = WHOLE) -> torch.Tensor:
    """As `encode`, of pixels (1, 3, height, width) from -1 to 1."""
    return _encode(vae, (pixels.shape[-1], pixels.shape[-2]), tiling, lambda tile: tile.cut(pixels))


def _encode(vae: AutoencoderKL, size: Size, tiling: Tiling, pixels: Callable[[Tile], torch.Tensor]) -> torch.Tensor:
    width, height = size
    weight = next(vae.parameters())  # `vae.device` and `vae.dtype` go through all of them

    def mean(tile: Tile) -> torch.Tensor:
        encoded = vae.encode(sent(pixels(tile.at(height, width)).to(weight.dtype), weight.device))
        return encoded.latent_dist.mean[0].float() * vae.config.scaling_factor

    tiles = vae_tiles(tiling, (height // PIXELS_PER_CELL, width // PIXELS_PER_CELL))
    means = map(mean, tiles)
    return next(means) if len(tiles) == 1 else join(tiles, means)


class SourceLatents:
    """The latents of source pictures; those of pictures used lately are kept."""

    def __init__(self, vae: AutoencoderKL, tiling: Tiling = WHOLE) -> None:
        self.vae, self.tiling = vae, tiling
        self._kept: dict[Hashable, tuple[Hashable | None, torch.Tensor]] = {}  # least lately used first; with marks

    def of(self, starts: Sequence[Start]) -> torch.Tensor:
        """The pictures that are drawn over, as latents (B, C, h, w) float32."""
        return torch.stack([self.kept("picture", start, partial(self._encode, start)) for start in starts])

    def beneath(self, starts: Sequence[Start], masks: torch.Tensor | None, seeds: Sequence[int]) -> torch.Tensor:
        """What pictures begin with, as latents (B, C, h, w) float32: filled under their masks.

        Args:
            starts: the pictures.
            masks: theirs, see `latent_masks`.
            seeds: of what is drawn over them.
        """
        if masks is None or starts[0].fill == "original":
            return self.of(starts)
        if starts[0].fill == "noise":
            return fill_with_noise(self.of(starts), masks, seeds)
        return torch.stack([self.kept("filled", start, partial(self._encode_filled, start)) for start in starts])

    def _encode(self, start: Start) -> torch.Tensor:
        return encode(self.vae, start.picture, self.tiling)

    def _encode_filled(self, start: Start) -> torch.Tensor:
        return encode(self.vae, start.filled, self.tiling)

    def kept(self, what: Hashable, start: Start | None, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Latents (C, h, w), made where they are not kept, or where the files that they are of have changed.

        Args:
            what: of a start they are, or of no picture.
            start: that they are of.
            make: makes them.
        """
        if start is not None and start.key is None:
            return make()
        key, marks = (what, start and start.key), start and start.marks
        before, kept = self._kept.pop(key, (None, None))
        if kept is None or (marks is not None and marks != before):  # of a file that is gone, what was read is good
            before, kept = marks, make()
        self._kept[key] = before, kept
        if len(self._kept) > _KEPT_SOURCES:
            del self._kept[next(iter(self._kept))]
        return kept


def latent_masks(starts: Sequence[Start], size: tuple[int, int], device: torch.device) -> torch.Tensor | None:
    """The masks at the latents' (height, width): (B, 1, h, w), 1 is redrawn; None where there are none."""
    masks = [start.mask_at(size[::-1]) for start in starts]
    return sent(torch.cat([pixels_to_tensor(mask) for mask in masks if mask]), device) if masks[0] else None


def fill_with_noise(originals: torch.Tensor, masks: torch.Tensor, seeds: Sequence[int]) -> torch.Tensor:
    """Latents (B, C, h, w) whose masked part is noise: each picture's own, which no other of its noise equals."""
    generators = [torch.Generator("cpu").manual_seed(seed + _FILL_SEED) for seed in seeds]
    noise = torch.stack([torch.randn(originals.shape[1:], generator=each) for each in generators])
    return torch.lerp(originals, sent(noise, originals.device), masks)


_FILL_SEED = 2  # 1 is for Highres. fix's second stage
