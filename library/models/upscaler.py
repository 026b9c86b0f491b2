"""What enlarges pictures: LANCZOS, and the modules whose `create_upscaler` makes an upscaler.

An upscaler gives pictures (`enlarge`), which can be a run's results or be encoded for Highres. fix's second stage, or
it gives that stage's latents (`upscale`), as those of sd-scripts do.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from PIL.Image import Image, Resampling

from library import console
from library.errors import InputError
from library.settings.upscaler import MODEL_UPSCALER, ONLY_LATENTS, UpscalerSpec

if TYPE_CHECKING:
    import torch
    from diffusers import AutoencoderKL


@runtime_checkable
class PictureUpscaler(Protocol):
    """What enlarges pictures to pictures."""

    def to(self, device: torch.device, dtype: torch.dtype) -> object:
        """Go to a device; the type is the one that the models run in."""

    def enlarge(self, pictures: Sequence[Image], width: int, height: int) -> list[Image]:
        """Enlarge RGB pictures to exactly this size."""


class LatentUpscaler(Protocol):
    """What enlarges pictures to latents; `tools.latent_upscaler.LatentUpscaler` says more."""

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


Upscaler = PictureUpscaler | LatentUpscaler


class Lanczos:
    """Enlarges pictures by LANCZOS, without a model."""

    def to(self, device: torch.device, dtype: torch.dtype) -> None:
        """Nothing goes anywhere."""

    def enlarge(self, pictures: Sequence[Image], width: int, height: int) -> list[Image]:
        """Enlarge pictures to exactly this size."""
        return [picture.resize((width, height), Resampling.LANCZOS) for picture in pictures]


@console.others_at_work()
def make_upscaler(spec: UpscalerSpec, device: torch.device, dtype: torch.dtype, *, pictures: bool = False) -> Upscaler:
    """Make an upscaler by its module's `create_upscaler`.

    Args:
        spec: the module and its arguments.
        device: where it works.
        dtype: what the models run in.
        pictures: whether finished pictures are to be enlarged.

    Raises:
        InputError: when the module has none, refuses its arguments, or enlarges no pictures though it is to.
    """
    try:
        create = importlib.import_module(spec.module).create_upscaler
    except Exception as problem:  # whatever the module raises
        advice = f"use {MODEL_UPSCALER} or another that has `create_upscaler`"
        raise InputError(spec.subject, f"is no upscaler ({problem}); {advice}") from None
    try:
        inspect.signature(create).bind(**dict(spec.arguments))
    except TypeError as problem:
        raise InputError("--highres_fix_upscaler_args", f"{spec.module} refuses them: {problem}") from None
    upscaler = create(**dict(spec.arguments))
    if pictures and not isinstance(upscaler, PictureUpscaler):
        raise InputError(f"--upscale and {spec.subject}", ONLY_LATENTS)
    upscaler.to(device=device, dtype=dtype)
    return upscaler
