"""Euler's ancestral sampler for latents that grow while they are denoised (Gradual Latent)."""

import torch
import torch.nn.functional as F
from diffusers import EulerAncestralDiscreteScheduler
from diffusers.schedulers.scheduling_euler_ancestral_discrete import EulerAncestralDiscreteSchedulerOutput

from library.draw.step_noise import step_noise
from library.settings.gradual_latent import GradualLatent, Unsharp


class GrowingEulerAncestral(EulerAncestralDiscreteScheduler):
    """Diffusers' scheduler, but that some steps end at another size than they began with; see `plan`."""

    def plan(self, settings: GradualLatent, sizes: dict[int, tuple[int, int]]) -> None:
        """Set which steps (by `step_index`) end at which (height, width), in latent cells."""
        self._settings, self._sizes = settings, sizes

    def step(
        self,
        model_output: torch.Tensor,
        timestep: torch.Tensor,
        sample: torch.Tensor,
        generator: list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> EulerAncestralDiscreteSchedulerOutput | tuple:
        """One step, as diffusers' own; a step that grows resizes before the ancestral noise is added.

        Ancestral sampling after Karras et al. 2022 (https://arxiv.org/abs/2206.00364), algorithm 2 with the noise of
        k-diffusion's `sample_euler_ancestral`.
        """
        if self.step_index is None:
            self._init_step_index(timestep)
        size = self._sizes.get(self.step_index)
        if size is None:
            return super().step(model_output, timestep, sample, generator, return_dict)
        sigma, sigma_next = self.sigmas[self.step_index], self.sigmas[self.step_index + 1]
        sigma_up = (sigma_next**2 * (sigma**2 - sigma_next**2) / sigma**2) ** 0.5
        sigma_down = (sigma_next**2 - sigma_up**2) ** 0.5
        if self.config.prediction_type == "v_prediction":
            original = sample / (sigma**2 + 1) - model_output * sigma / (sigma**2 + 1) ** 0.5
        else:
            original = sample - sigma * model_output
        derivative, change = (sample - original) / sigma, sigma_down - sigma
        unsharp = self._settings.unsharp
        if unsharp is None or unsharp.on_sample:
            latents = sharpen(resize(sample + derivative * change, size), unsharp)
        else:
            latents = sharpen(resize(sample, size), unsharp) + resize(derivative, size) * change
        noise = step_noise(latents.shape, generator=generator, device=latents.device, dtype=latents.dtype)
        latents = latents + noise * (sigma_up * self._settings.s_noise)
        self._step_index += 1
        return EulerAncestralDiscreteSchedulerOutput(latents, original) if return_dict else (latents, original)


def shrink_start(latents: torch.Tensor, settings: GradualLatent) -> torch.Tensor:
    """The latents (B, C, h, w) that denoising begins with, at `settings.ratio` of their size."""
    small = F.interpolate(latents, scale_factor=settings.ratio, mode="bicubic", align_corners=False)
    return sharpen(small, settings.unsharp)


def resize(latents: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """(B, C, h, w) → (B, C, *size)"""
    return F.interpolate(latents, size=size, mode="bicubic", align_corners=False)


def sharpen(latents: torch.Tensor, unsharp: Unsharp | None) -> torch.Tensor:
    """Unsharp masking of latents (B, C, h, w), if any is asked for."""
    if unsharp is None:
        return latents
    return latents + (latents - gaussian_blur(latents, unsharp.kernel_size, unsharp.sigma)) * unsharp.strength


def gaussian_blur(x: torch.Tensor, kernel_size: int, sigma: float) -> torch.Tensor:
    """Blur (B, C, h, w) with a Gaussian of `sigma` cells cut off after `kernel_size` cells, borders mirrored."""
    reach, channels = kernel_size // 2, x.shape[1]
    kernel = torch.exp(-0.5 * (torch.arange(-reach, reach + 1, device=x.device, dtype=x.dtype) / sigma) ** 2)
    kernel = (kernel / kernel.sum()).expand(channels, 1, 1, -1)
    x = F.pad(x, (reach,) * 4, mode="reflect")
    return F.conv2d(F.conv2d(x, kernel, groups=channels), kernel.transpose(2, 3), groups=channels)
