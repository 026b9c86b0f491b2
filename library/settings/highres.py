"""Highres. fix: a small picture first, then img2img on its enlargement. Its settings; `plan.stages` has the stages."""

from dataclasses import dataclass

from library.errors import InputError
from library.files.families import SD1, Family
from library.settings.options import Options
from library.settings.upscaler import LATENT_UPSCALER, UpscalerSpec

DEFAULT_FIRST_STEPS = 28


@dataclass(frozen=True, kw_only=True)
class HighresFix:
    """How a run's pictures are drawn in two stages."""

    scale: float  # of the first stage's sides
    steps: int  # of the first stage
    save_first: bool
    enlarge_latents: bool  # bilinearly, instead of the picture by LANCZOS
    upscaler: UpscalerSpec | None = None  # instead of either
    control_net: bool = True  # whether ControlNets steer the second stage too

    @property
    def needs_pictures(self) -> bool:
        """Whether the first stage's latents have to be decoded."""
        return self.save_first or self.upscaler is not None or not self.enlarge_latents

    @property
    def method(self) -> str:
        """The way of enlarging, for the picture's metadata."""
        if self.upscaler is not None:
            return self.upscaler.name
        return "Latent (bilinear)" if self.enlarge_latents else "Lanczos"


def check_family(highres: HighresFix | None, family: Family) -> None:
    """Refuse the upscaler of latents for a family with latents of another kind.

    Raises:
        InputError: naming the family.
    """
    upscaler = highres.upscaler if highres else None
    if upscaler and upscaler.module == LATENT_UPSCALER and family.vae_factor != SD1.vae_factor:
        problem = f"enlarges other latents than those of {family.name}; leave it out, or enlarge the latents themselves"
        raise InputError(upscaler.subject, f"{problem} (--highres_fix_latents_upscaling)")


def from_options(options: Options, upscaler: UpscalerSpec | None) -> HighresFix | None:
    """How it is done, if it is.

    Raises:
        InputError: for options that do not go together.
    """
    if options.highres_fix_scale is None:
        return None
    if options.image_path is not None:
        problem = "do not go together, Highres. fix draws its own first picture; give one of them"
        raise InputError("--highres_fix_scale and --image_path", problem)
    return HighresFix(
        scale=options.highres_fix_scale,
        steps=options.highres_fix_steps or DEFAULT_FIRST_STEPS,
        save_first=options.highres_fix_save_1st,
        enlarge_latents=options.highres_fix_latents_upscaling,
        upscaler=upscaler,
        control_net=not options.highres_fix_disable_control_net,
    )
