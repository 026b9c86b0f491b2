"""What inpainting and edit models read beside the noisy latents: masks and pictures (see `files.model_inputs`)."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Self

import torch
import torch.nn.functional as F
from PIL import Image

from library.draw.sources import SourceLatents, Start, encode_pixels, pixels_to_tensor
from library.files.model_inputs import EDITING, ModelInputs
from library.plan.job import Job


class Beside:
    """What stands beside a batch's latents in the U-Net's input.

    Args:
        masks: (B, 1, h, w), 1 is repainted; (B, 0, h, w) for models that read none.
        pictures: latents (B, 4, h, w).
    """

    def __init__(self, masks: torch.Tensor, pictures: torch.Tensor) -> None:
        self._masks, self._pictures = masks, pictures
        self._at = torch.cat([masks, pictures], dim=1)

    def at(self, size: tuple[int, int]) -> torch.Tensor:
        """(B, c, *size); at another size than its own, as Gradual Latent has it, masks stay black and white."""
        if self._at.shape[-2:] != size:
            pictures = F.interpolate(self._pictures, size=size, mode="bicubic", align_corners=False)
            masks = self._masks.new_empty((len(pictures), 0, *size))
            if self._masks.shape[1]:
                masks = F.interpolate(self._masks, size=size, mode="nearest")
            self._at = torch.cat([masks, pictures], dim=1)
        return self._at


def read_beside(
    inputs: ModelInputs,
    sources: SourceLatents,
    starts: Sequence[Start] | None,
    jobs: Sequence[Job],
    cells: tuple[int, int],
) -> Beside:
    """What a model that is not `PLAIN` reads beside a batch's latents.

    Args:
        inputs: of the model.
        sources: encodes pictures.
        starts: what the pictures are drawn over; None where that is noise or a picture that was drawn itself, which an
            inpainting model takes for grey pictures that are repainted everywhere.
        jobs: the pictures.
        cells: (height, width) of their latents.
    """
    if inputs is EDITING:
        pictures = sources.of(starts or ())
        # their training read latents as the VAE has them
        return Beside(pictures.new_empty((len(jobs), 0, *cells)), pictures / sources.vae.config.scaling_factor)
    masked = [MaskedPicture.of(start) for start in starts or ()]
    masked = masked or [MaskedPicture(("grey", cells), torch.ones(1, 1, jobs[0].height, jobs[0].width))] * len(jobs)
    pictures = torch.stack([sources.kept(each.key, partial(each.encode, sources)) for each in masked])
    masks = torch.cat([F.interpolate(each.mask, size=cells, mode="nearest") for each in masked])
    return Beside(masks.to(pictures.device), pictures)


@dataclass(frozen=True)
class MaskedPicture:
    """A picture without what is to be repainted, as inpainting models read it.

    Args:
        key: what it is kept under, if it is.
        mask: (1, 1, height, width), 1 is repainted.
        picture: RGB; None where all is repainted.
    """

    key: Hashable | None
    mask: torch.Tensor
    picture: Image.Image | None = None

    @classmethod
    def of(cls, start: Start) -> Self:
        """What a picture is drawn over; masks are black and white, from half bright on."""
        key = None if start.key is None else ("masked", start.key)
        width, height = start.picture.size
        if start.mask is None:
            return cls(key, torch.ones(1, 1, height, width))
        return cls(key, (pixels_to_tensor(start.mask) >= 0.5).float(), start.picture)

    def encode(self, sources: SourceLatents) -> torch.Tensor:
        """Its latents (C, h, w), grey under the mask."""
        pixels = torch.zeros(1, 3, *self.mask.shape[-2:])
        if self.picture is not None:
            pixels = (pixels_to_tensor(self.picture) * 2 - 1) * (1 - self.mask)
        return encode_pixels(sources.vae, pixels, sources.tiling)
