"""Highres. fix: a small picture first, then img2img on its enlargement. Its settings; `plan.stages` has the stages."""

import importlib.util
from argparse import ArgumentTypeError
from dataclasses import dataclass
from pathlib import Path

from library.console import others_at_work
from library.errors import InputError
from library.files.families import SD1, Family
from library.settings.options import Options

DEFAULT_FIRST_STEPS = 28
_LATENT_UPSCALER = "tools.latent_upscaler"


@dataclass(frozen=True)
class UpscalerSpec:
    """A module with `create_upscaler(**arguments)`, which enlarges the first stage's picture to latents."""

    module: str
    arguments: tuple[tuple[str, str], ...] = ()

    @property
    def subject(self) -> str:
        """What error messages call it."""
        return f"--highres_fix_upscaler {self.module}"


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
            return self.upscaler.module
        return "Latent (bilinear)" if self.enlarge_latents else "Lanczos"


def upscaler_arguments(text: str) -> tuple[tuple[str, str], ...]:
    """Convert `key=value;key=value`; a value may hold `=`."""
    pairs = []
    for part in filter(None, (part.strip() for part in text.split(";"))):
        key, equals, value = part.partition("=")
        if not equals or not key.isidentifier():
            raise ArgumentTypeError(f"{part!r} is not KEY=VALUE; write KEY=VALUE;KEY=VALUE")
        pairs.append((key, value))
    return tuple(pairs)


def check_upscaler(spec: UpscalerSpec) -> None:
    """Refuse an upscaler that is not there, and one whose weights are not, before anything is loaded.

    Raises:
        InputError: naming the module or the file.
    """
    try:
        with others_at_work():
            found = importlib.util.find_spec(spec.module) is not None
    except Exception:  # whatever the packages that it is in raise
        found = False
    if not found:
        raise InputError(spec.subject, "no such Python module; the one that comes along is " + _LATENT_UPSCALER)
    weights = dict(spec.arguments).get("weights")
    if weights is not None and not Path(weights).expanduser().is_file():
        raise InputError("--highres_fix_upscaler_args", f"no such file: weights={weights}; check the path")


def check_family(highres: HighresFix | None, family: Family) -> None:
    """Refuse the upscaler of latents for a family with latents of another kind.

    Raises:
        InputError: naming the family.
    """
    upscaler = highres.upscaler if highres else None
    if upscaler and upscaler.module == _LATENT_UPSCALER and family.vae_factor != SD1.vae_factor:
        problem = f"enlarges other latents than those of {family.name}; leave it out, or enlarge the latents themselves"
        raise InputError(upscaler.subject, f"{problem} (--highres_fix_latents_upscaling)")


def from_options(options: Options) -> HighresFix | None:
    """How it is done, if it is.

    Raises:
        InputError: for options that do not go together, and an upscaler that is not there.
    """
    if options.highres_fix_scale is None:
        return None
    if options.image_path is not None:
        problem = "do not go together, Highres. fix draws its own first picture; give one of them"
        raise InputError("--highres_fix_scale and --image_path", problem)
    upscaler = None
    if options.highres_fix_upscaler:
        upscaler = UpscalerSpec(options.highres_fix_upscaler, options.highres_fix_upscaler_args or ())
        check_upscaler(upscaler)
    return HighresFix(
        scale=options.highres_fix_scale,
        steps=options.highres_fix_steps or DEFAULT_FIRST_STEPS,
        save_first=options.highres_fix_save_1st,
        enlarge_latents=options.highres_fix_latents_upscaling,
        upscaler=upscaler,
        control_net=not options.highres_fix_disable_control_net,
    )
