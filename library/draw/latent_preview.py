"""Pictures as they come: what the latents promise, shown by a linear map in place of the VAE.

Latents are nearly a small picture in other colours, as was found for Stable Diffusion 1 by a least squares fit
("Decoding latents to RGB without upscaling", Hugging Face's forum, 2022). Here the fit is made for the VAE at hand, so
that each has its own map.
"""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, SchedulerMixin

from library.draw.sources import encode_pixels

_PATCH_CELLS = 4  # a colour's side on the chart, in latent cells: the VAE sees whole patches, and edges count little
_PATCHES = 8  # each way


class LatentPreview:
    """Shows at every so many steps the clean pictures that a prediction promises.

    Args:
        vae: whose latents they are, on the device of the U-Net.
        every: so many steps.
        show: takes the pictures (B, h, w, 3) uint8, a pixel for each cell of the latents.
    """

    def __init__(self, vae: AutoencoderKL, every: int, show: Callable[[np.ndarray], None]) -> None:
        self._every, self._show = every, show
        self._map = fit_colours(vae)

    def follow(
        self, scheduler: SchedulerMixin, timesteps: torch.Tensor
    ) -> Callable[[torch.Tensor, torch.Tensor, int], tuple[torch.Tensor, torch.Tensor]]:
        """What is done before each step of a batch: it looks at prediction and latents, (B, C, h, w), alone."""

        def look(prediction: torch.Tensor, latents: torch.Tensor, index: int) -> tuple[torch.Tensor, torch.Tensor]:
            if (index + 1) % self._every == 0:
                sample = scheduler.scale_model_input(latents, timesteps[index])
                self._show(self._picture(promised(scheduler, prediction, sample, float(timesteps[index]))))
            return prediction, latents

        return look

    def _picture(self, latents: torch.Tensor) -> np.ndarray:
        weight, bias = self._map[:-1].to(latents), self._map[-1].to(latents)
        colours = torch.einsum("bchw,cr->bhwr", latents, weight) + bias
        return (colours.nan_to_num().clamp(0, 1) * 255).round().byte().cpu().numpy()


def promised(
    scheduler: SchedulerMixin, prediction: torch.Tensor, sample: torch.Tensor, timestep: float
) -> torch.Tensor:
    """The clean latents (B, C, h, w) float32 that a prediction promises, whatever the sampler.

    The sample that the U-Net reads is √ᾱ of clean latents and √(1 - ᾱ) of noise (Ho et al. 2020,
    https://arxiv.org/abs/2006.11239); a model that predicts v tells √ᾱ of noise less √(1 - ᾱ) of clean latents
    (Salimans and Ho 2022, https://arxiv.org/abs/2202.00512).
    """
    alpha = float(scheduler.alphas_cumprod[min(round(timestep), len(scheduler.alphas_cumprod) - 1)])
    prediction, sample = prediction.float(), sample.float()
    if scheduler.config.prediction_type == "v_prediction":
        return alpha**0.5 * sample - (1 - alpha) ** 0.5 * prediction
    return (sample - (1 - alpha) ** 0.5 * prediction) / max(alpha, 1e-4) ** 0.5


@torch.no_grad()
def fit_colours(vae: AutoencoderKL) -> torch.Tensor:
    """The map (C + 1, 3) from scaled latents, and 1 as the last, to red, green and blue from 0 to 1.

    It is the least squares fit between a chart of colours and what the VAE makes of it.
    """
    side = _PATCHES * _PATCH_CELLS
    noise = torch.rand(1, 3, _PATCHES, _PATCHES, generator=torch.Generator().manual_seed(0))
    chart = F.interpolate(noise, size=(side, side), mode="nearest")
    cell_px = 2 ** (len(vae.config.block_out_channels) - 1)
    latents = encode_pixels(vae, F.interpolate(chart, scale_factor=cell_px, mode="nearest") * 2 - 1)
    rows = latents.flatten(1).T.double().cpu()  # (cells, C)
    rows = torch.cat([rows, torch.ones_like(rows[:, :1])], dim=1)
    return torch.linalg.lstsq(rows, chart[0].flatten(1).T.double()).solution.float().to(vae.device)
