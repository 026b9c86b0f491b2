"""Inpainting: outside a mask, what is drawn over stays as it was."""

import torch
import torch.nn.functional as F
from diffusers import SchedulerMixin

from library.draw.samplers import add_noise


class Inpainting:
    """Puts the source picture back outside the mask, after each step at the noise level of the next one."""

    def __init__(
        self,
        scheduler: SchedulerMixin,
        timesteps: torch.Tensor,
        originals: torch.Tensor,
        noise: torch.Tensor,
        masks: torch.Tensor,
    ) -> None:
        self._scheduler, self._timesteps = scheduler, timesteps
        self._originals, self._noise, self._masks = originals, noise, masks

    def __call__(self, latents: torch.Tensor, index: int) -> torch.Tensor:
        """Latents (B, C, h, w) after step `index`; after the last one the picture is put back clean."""
        outside = self._originals
        following = self._timesteps[index + 1 : index + 2]
        if len(following):
            outside = add_noise(self._scheduler, outside, self._noise, following)
        masks = self._masks
        if latents.shape != outside.shape:  # Gradual Latent has not reached the full size yet
            size = latents.shape[-2:]
            outside = F.interpolate(outside, size=size, mode="bicubic", align_corners=False)
            masks = F.interpolate(masks, size=size, mode="bilinear", align_corners=False)
        return latents * masks + outside * (1 - masks)
