"""What inpainting and edit models read beside the noisy latents: masks and pictures (see `files.model_inputs`)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL

from library.draw.sources import Start, encode, encode_pixels, pixels_to_tensor
from library.files.model_inputs import EDITING, PLAIN, ModelInputs


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
    inputs: ModelInputs, vae: AutoencoderKL, starts: Sequence[Start] | None, shape: tuple[int, int, int], cell_px: int
) -> Beside | None:
    """What a model reads beside a batch's latents; None where it reads nothing.

    Args:
        inputs: of the model.
        vae: encodes the pictures.
        starts: what each picture starts from; None where there is noise alone, which an inpainting model draws as a
            grey picture that is repainted everywhere.
        shape: of the latents of all pictures, (B, h, w).
        cell_px: pixels that a latent cell stands for, each way.
    """
    if inputs is PLAIN:
        return None
    count, *size = shape
    if inputs is EDITING:
        pictures = torch.stack([encode(vae, start.picture) for start in starts or ()])
        # what training gave it were the latents as the VAE has them
        return Beside(pictures.new_empty((count, 0, *size)), pictures / vae.config.scaling_factor)
    pixels, masks = [], []
    for start in starts or (None,):
        mask = torch.ones(1, 1, *(cells * cell_px for cells in size))
        if start is not None and start.mask is not None:
            mask = (pixels_to_tensor(start.mask) >= 0.5).float()
        picture = torch.zeros_like(mask) if start is None else pixels_to_tensor(start.picture) * 2 - 1
        pixels.append((picture * (1 - mask)).expand(-1, 3, -1, -1))
        masks.append(F.interpolate(mask, size=size, mode="nearest"))
    pictures = torch.stack([encode_pixels(vae, each) for each in pixels])
    beside = torch.cat(masks).to(pictures.device)
    return Beside(beside.expand(count, -1, -1, -1), pictures.expand(count, -1, -1, -1))
