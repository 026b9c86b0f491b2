"""Pictures that are drawn over: the part of them that is drawn, as latents, and put back."""

from collections.abc import Callable, Hashable, Sequence
from functools import cached_property, partial

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image

from library.plan.canvas import Canvas, Size, cut
from library.plan.job import Job
from library.settings.masks import MaskSettings

_KEPT_SOURCES = 64  # source pictures whose latents are kept for later batches


class Start:
    """What a picture is drawn over.

    Args:
        job: the picture; its `turn` says which of its boxes is drawn.
        settings: how masks are read.
        before: the whole picture as earlier turns left it.
    """

    def __init__(self, job: Job, settings: MaskSettings, before: Image.Image | None = None) -> None:
        assert job.source is not None
        self._job, self._before = job, before
        self._canvas = Canvas(job.source, job.mask, job.extend, settings)
        self._size: Size = (job.width, job.height)
        self._box = job.boxes[job.turn] if job.boxes else None

    @property
    def key(self) -> Hashable | None:
        """Starts of one run with equal keys have equal pictures; None for one that has no equal."""
        return None if self._before else (self._canvas, self._size, self._box, self._job.turn)

    @cached_property
    def picture(self) -> Image.Image:
        """RGB, of the job's width and height, filled under the mask."""
        return filled(self._source, self.mask, self._canvas.settings.fill) if self.mask else self._source

    @cached_property
    def mask(self) -> Image.Image | None:
        """Grey, of the job's width and height; 255 is redrawn. None to redraw all."""
        return self.mask_at(self._size)

    def mask_at(self, size: Size) -> Image.Image | None:
        """The mask at another (width, height)."""
        return self._mask and self._mask.resize(size, Image.Resampling.BILINEAR)

    @cached_property
    def _mask(self) -> Image.Image | None:
        """The mask of what is drawn, at the canvas's size or its own."""
        if self._box is None:
            return self._canvas.mask
        mask = self._canvas.mask_of(self._job.turn)
        return mask and cut(mask, self._box, self._box.size, Image.Resampling.BILINEAR)

    @cached_property
    def _whole(self) -> Image.Image:
        return self._before or self._canvas.picture

    @cached_property
    def _source(self) -> Image.Image:
        """What is drawn, at the job's width and height, as it is in the source."""
        if self._box is not None:
            return cut(self._whole, self._box, self._size, Image.Resampling.LANCZOS)
        return (
            self._whole if self._whole.size == self._size else self._whole.resize(self._size, Image.Resampling.LANCZOS)
        )

    def put_back(self, drawn: np.ndarray) -> np.ndarray:
        """The finished picture (H, W, 3) of what was drawn (height, width, 3)."""
        picture = Image.fromarray(drawn)
        if self._box is not None:
            whole = self._whole.copy()
            whole.paste(picture.resize(self._box.size, Image.Resampling.LANCZOS), self._box[:2], self._mask)
            return np.asarray(whole)
        if self.mask is not None and self._canvas.settings.keep_unmasked:
            return np.asarray(Image.composite(picture, self._source, self.mask))
        return drawn


def filled(picture: Image.Image, mask: Image.Image, fill: str) -> Image.Image:
    """A picture whose masked part is replaced as `settings.masks.FILLS` say; noise comes when it is latents."""
    if fill == "black":
        return Image.composite(Image.new("RGB", picture.size), picture, mask)
    if fill == "blur":
        return Image.composite(_spread(picture, mask), picture, mask)
    return picture


def _spread(picture: Image.Image, mask: Image.Image) -> Image.Image:
    """What is around a mask, spread into it: blurred as far as it takes, the nearer the sharper.

    Each blur weighs the pixels by what the mask leaves of them (normalised convolution, Knutsson and Westin 1993).
    """
    import cv2  # 25 MB that only some runs need

    pixels = np.asarray(picture, dtype=np.float32)
    kept = 1 - np.asarray(mask, dtype=np.float32)[..., None] / 255
    if not kept.any():
        return picture
    spread = np.broadcast_to((pixels * kept).sum(axis=(0, 1)) / kept.sum(), pixels.shape)
    sigma = max(picture.size) / 4
    while sigma >= 1:
        weight = cv2.GaussianBlur(kept, (0, 0), sigma)[..., None]
        blurred = cv2.GaussianBlur(pixels * kept, (0, 0), sigma) / np.maximum(weight, 1e-6)
        share = np.minimum(weight * 8, 1)  # a blur that an eighth of its window feeds is taken whole
        spread = spread + share * (blurred - spread)
        sigma /= 2
    return Image.fromarray(spread.clip(0, 255).round().astype(np.uint8))


def pixels_to_tensor(picture: Image.Image) -> torch.Tensor:
    """An RGB or grey picture as (1, channels, height, width) float32 from 0 to 1."""
    pixels = torch.from_numpy(np.array(picture)).float() / 255
    return pixels.reshape(1, picture.height, picture.width, -1).permute(0, 3, 1, 2)


def encode(vae: AutoencoderKL, picture: Image.Image) -> torch.Tensor:
    """The latent mean of a picture, scaled: (C, h, w) float32."""
    return encode_pixels(vae, pixels_to_tensor(picture).to(vae.device, vae.dtype) * 2 - 1)


def encode_pixels(vae: AutoencoderKL, pixels: torch.Tensor) -> torch.Tensor:
    """The latent mean of pixels (1, 3, height, width) from -1 to 1, scaled: (C, h, w) float32."""
    mean = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist.mean
    return mean[0].float() * vae.config.scaling_factor


class SourceLatents:
    """The latents of source pictures; those of pictures used lately are kept."""

    def __init__(self, vae: AutoencoderKL) -> None:
        self.vae = vae
        self._kept: dict[Hashable, torch.Tensor] = {}  # least lately used first

    def of(self, starts: Sequence[Start]) -> torch.Tensor:
        """What pictures are drawn over, as latents (B, C, h, w) float32."""
        return torch.stack([self.kept(start.key, partial(encode, self.vae, start.picture)) for start in starts])

    def kept(self, key: Hashable | None, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        """The latents (C, h, w) of a key, made where they are not kept; None for what is not to be kept."""
        if key is None:
            return make()
        kept = self._kept.pop(key, None)
        if kept is None:
            kept = make()
        self._kept[key] = kept
        if len(self._kept) > _KEPT_SOURCES:
            del self._kept[next(iter(self._kept))]
        return kept


def latent_masks(starts: Sequence[Start], size: tuple[int, int]) -> torch.Tensor | None:
    """The masks at the latents' (height, width): (B, 1, h, w), 1 is redrawn; None where there are none."""
    masks = [start.mask_at(size[::-1]) for start in starts]
    return torch.cat([pixels_to_tensor(mask) for mask in masks if mask]) if masks[0] else None


def fill_with_noise(originals: torch.Tensor, masks: torch.Tensor, seeds: Sequence[int]) -> torch.Tensor:
    """Latents (B, C, h, w) whose masked part is noise: each picture's own, which no other of its noise equals."""
    generators = [torch.Generator("cpu").manual_seed(seed + _FILL_SEED) for seed in seeds]
    noise = torch.stack([torch.randn(originals.shape[1:], generator=each) for each in generators])
    return torch.lerp(originals, noise.to(originals), masks)


_FILL_SEED = 2  # 1 is for Highres. fix's second stage
