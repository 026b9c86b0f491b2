"""Gradual Latent: settings, and the sizes that latents grow through while they are denoised.

Denoising begins on latents smaller than the picture's; they grow step by step to their full size. The method is that of
sd-scripts, for the sampler euler_a.
"""

import math
from argparse import ArgumentTypeError
from collections.abc import Sequence
from dataclasses import dataclass

from library import values
from library.settings.options import Options

SAMPLER = "euler_a"  # the only one whose steps can change the latents' size
USUAL_TIMESTEPS = 750  # where growth begins when a prompt line sets only the other options
_LAST_TIMESTEP = 999
_ALIGNMENT = 8  # latent cells; sizes between the first and the last are rounded down to this, for the U-Net's halvings
_ROUNDING = 1e-6  # a ratio this near to 1 is 1: steps such as 0.1 add up inexactly


@dataclass(frozen=True, slots=True)
class Unsharp:
    """Unsharp masking of latents that were resized: `x + (x - gaussian_blur(x)) * strength`."""

    kernel_size: int
    sigma: float
    strength: float
    on_sample: bool = True  # the step's result is sharpened; else what it starts from


@dataclass(frozen=True, slots=True, kw_only=True)
class GradualLatent:
    """How latents grow; without `timesteps` they have their full size all along."""

    timesteps: int | None = None  # growth happens in steps whose timestep is below
    ratio: float = 0.5  # of the full size, to begin with
    ratio_step: float = 0.125
    every_n_steps: int = 3
    s_noise: float = 1.0  # factor of the ancestral noise of a step that grows
    unsharp: Unsharp | None = None

    def first_size(self, height: int, width: int) -> tuple[int, int]:
        """The (height, width) of the latents that denoising begins with, in latent cells."""
        return int(height * self.ratio), int(width * self.ratio)

    def growth(self, timesteps: Sequence[float], height: int, width: int) -> dict[int, tuple[int, int]]:
        """The steps that make the latents larger: place of the step → (height, width) after it, in latent cells."""
        sizes: dict[int, tuple[int, int]] = {}
        if self.timesteps is None:
            return sizes
        ratio, waited = self.ratio, math.inf
        for place, timestep in enumerate(timesteps):
            if timestep < self.timesteps and ratio < 1 and waited >= self.every_n_steps:
                ratio, waited = ratio + self.ratio_step, 0
                if ratio > 1 - _ROUNDING:
                    ratio, sizes[place] = 1.0, (height, width)
                else:
                    sizes[place] = (_aligned(height, ratio), _aligned(width, ratio))
            waited += 1
        return sizes

    def check(self, timesteps: Sequence[float], height: int, width: int) -> str | None:
        """Why these settings cannot work, and what would; None when they can.

        Args:
            timesteps: of the steps that are run.
            height: of the full latents, in latent cells.
            width: likewise.
        """
        smallest = min(self.first_size(height, width))
        if smallest < 1:
            return f"leaves no latent of a picture this small; use a ratio of {1 / min(height, width):.3g} or more"
        if self.unsharp is not None and self.unsharp.kernel_size // 2 >= smallest:
            return f"unsharp kernel is too large for this picture; use one of {2 * smallest - 1} or less"
        growths = self.growth(timesteps, height, width)
        if self.ratio > 1 - _ROUNDING or (height, width) in growths.values():
            return None
        return f"never reaches the full size; {self._remedy(timesteps, len(growths))}"

    def _remedy(self, timesteps: Sequence[float], growths: int) -> str:
        """The smallest change that lets the latents reach their full size."""
        if growths:
            smallest = math.ceil(1000 * (1 - self.ratio) / growths) / 1000
            return f"it grows {growths} times in these steps: use a ratio step of {smallest:g} or more"
        return f"no step's timestep is below {self.timesteps}: use {int(min(timesteps)) + 1} or more"


def _aligned(side: int, ratio: float) -> int:
    return max(int(side * ratio) // _ALIGNMENT * _ALIGNMENT, min(side, _ALIGNMENT))


def ancestral_timesteps(steps: int, spacing: str | None = None) -> list[float]:
    """The timesteps of euler_a, from noise to picture: evenly spaced over the training schedule, both ends included.

    Args:
        steps: how many.
        spacing: another, as diffusers names it.
    """
    if spacing == "trailing":
        return [round(place * (_LAST_TIMESTEP + 1) / steps) - 1 for place in range(steps, 0, -1)]
    if spacing == "leading":
        return [place * ((_LAST_TIMESTEP + 1) // steps) + 1 for place in reversed(range(steps))]
    distance = _LAST_TIMESTEP / (steps - 1) if steps > 1 else 0.0
    return [place * distance for place in reversed(range(steps))]


# ---------------------------------------------------------------------------------------------------------------------
# Converters of the options' values, as in `library.values`


def timesteps_or_none(text: str) -> int | None:
    """Convert a timestep, or `none` for a prompt line that does without Gradual Latent."""
    return None if text.strip().lower() == "none" else values.whole_number(1, 1000)(text)


def unsharp(text: str) -> Unsharp | None:
    """Convert `ksize,sigma,strength[,target_x]`, or `none`."""
    form = "write SIZE,SIGMA,STRENGTH or SIZE,SIGMA,STRENGTH,TARGET, for instance 3,0.5,0.5,1"
    if text.strip().lower() == "none":
        return None
    parts = [part.strip() for part in text.split(",")]
    if len(parts) not in (3, 4):
        raise ArgumentTypeError(f"has {len(parts)} values; {form}")
    if len(parts) == 4 and parts[3] not in ("0", "1"):
        raise ArgumentTypeError("target is 1 (the sample) or 0 (the step's input)")
    size = values.whole_number(1, 99)(parts[0])
    if size % 2 == 0:
        raise ArgumentTypeError(f"a kernel's size is odd; use {size - 1} or {size + 1}")
    sigma = values.number(0, 100, above=True)(parts[1])
    return Unsharp(size, sigma, values.number(-100, 100)(parts[2]), parts[3:] != ["0"])


ratio = values.number(0, 1, above=True)
every_n_steps = values.whole_number(1, values.MAX_STEPS)
s_noise = values.number(0, 10)


def from_options(options: Options) -> GradualLatent:
    """What the options say of it; a line's options may say otherwise."""
    said = {
        "timesteps": options.gradual_latent_timesteps,
        "ratio": options.gradual_latent_ratio,
        "ratio_step": options.gradual_latent_ratio_step,
        "every_n_steps": options.gradual_latent_every_n_steps,
        "s_noise": options.gradual_latent_s_noise,
        "unsharp": options.gradual_latent_unsharp_params,
    }
    return GradualLatent(**{name: value for name, value in said.items() if value is not None})
