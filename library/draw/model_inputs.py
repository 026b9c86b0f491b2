"""What inpainting and edit models read beside the noisy latents: masks and pictures (see `files.model_inputs`)."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Self

import torch
import torch.nn.functional as F

from library.draw.sources import SourceLatents, Start, encode_pixels, pixels_to_tensor
from library.files.model_inputs import EDITING, ModelInputs
from library.machine.devices import sent
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
    of_each: Sequence[Start | None] = starts or [None] * len(jobs)
    size = (jobs[0].height, jobs[0].width)
    masked = [MaskedPicture.of(start, size) for start in of_each]
    pictures = torch.stack(
        [sources.kept(("masked", size), each.start, partial(each.encode, sources)) for each in masked]
    )
    masks = torch.cat([F.interpolate(each.mask, size=cells, mode="nearest") for each in masked])
    return Beside(sent(masks, pictures.device), pictures)


@dataclass(frozen=True)
class MaskedPicture:
    """A picture without what is to be repainted, as inpainting models read it.

    Args:
        mask: (1, 1, height, width), 1 is repainted.
        start: of the picture; None where all is repainted.
    """

    mask: torch.Tensor
    start: Start | None = None

    @classmethod
    def of(cls, start: Start | None, size: tuple[int, int]) -> Self:
        """Of what a picture of (height, width) is drawn over; masks are black and white, from half bright on."""
        if start is None or start.mask is None:
            return cls(torch.ones(1, 1, *size))
        return cls((pixels_to_tensor(start.mask) >= 0.5).float(), start)

    def encode(self, sources: SourceLatents) -> torch.Tensor:
        """Its latents (C, h, w), grey under the mask."""
        pixels = torch.zeros(1, 3, *self.mask.shape[-2:])
        if self.start is not None:
            pixels = (pixels_to_tensor(self.start.picture) * 2 - 1) * (1 - self.mask)
        return encode_pixels(sources.vae, pixels, sources.tiling)
