"""Highres. fix's upscalers: modules whose `create_upscaler` makes what enlarges pictures to latents."""

import importlib
import inspect
from collections.abc import Sequence
from typing import Protocol

import torch
from diffusers import AutoencoderKL
from PIL.Image import Image

from library import console
from library.errors import InputError
from library.settings.highres import UpscalerSpec


class Upscaler(Protocol):
    """What a module's `create_upscaler` gives; `tools.latent_upscaler.LatentUpscaler` says more."""

    def to(self, device: torch.device, dtype: torch.dtype) -> object:
        """Go to a device, in the type that the VAE runs in."""

    def upscale(
        self,
        vae: AutoencoderKL,
        lowreso_images: Sequence[Image],
        lowreso_latents: torch.Tensor | None,
        dtype: torch.dtype,
        width: int,
        height: int,
        batch_size: int = 1,
        vae_batch_size: int = 1,
    ) -> torch.Tensor:
        """Enlarge pictures to latents."""


@console.others_at_work()
def make_upscaler(spec: UpscalerSpec, device: torch.device, dtype: torch.dtype) -> Upscaler:
    """Make Highres. fix's upscaler by its module's `create_upscaler`.

    Raises:
        InputError: when the module has none, or refuses its arguments.
    """
    try:
        create = importlib.import_module(spec.module).create_upscaler
    except Exception as problem:  # whatever the module raises
        raise InputError(spec.subject, f"is no upscaler ({problem}); use tools.latent_upscaler") from None
    try:
        inspect.signature(create).bind(**dict(spec.arguments))
    except TypeError as problem:
        raise InputError("--highres_fix_upscaler_args", f"{spec.module} refuses them: {problem}") from None
    upscaler = create(**dict(spec.arguments))
    upscaler.to(device=device, dtype=dtype)
    return upscaler
