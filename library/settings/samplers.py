"""The samplers: their names, and the names of the diffusers schedulers behind them."""

import math
from argparse import ArgumentTypeError
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches


@dataclass(frozen=True)
class Sampler:
    """One entry of the table of samplers."""

    name: str
    scheduler: str  # class name in `draw.schedulers` or diffusers
    a1111_name: str  # what AUTOMATIC1111's web UI calls it, for its metadata
    arguments: Mapping[str, object] = field(default_factory=dict)
    draws_noise: bool = False  # whether its steps add noise, drawn from each picture's generator
    steps: tuple[int, int] = (1, 1000)  # fewest and most it can do
    reserved_noises: int = 1  # for each step, noises that are drawn and set aside before the sampler begins
    highest_scale: float = math.inf  # of guidance that makes sense with it
    spacing: str | None = "linspace"  # of its timesteps, as diffusers names it; None where it cannot be chosen
    zero_snr: bool = False  # whether it can begin at pure noise


_OFFSET = {"steps_offset": 1}

SAMPLERS = {
    sampler.name: sampler
    for sampler in (
        Sampler(
            "ddim",
            "DDIMScheduler",
            "DDIM",
            {"clip_sample": False} | _OFFSET,
            steps=(1, 999),
            spacing="leading",
            zero_snr=True,
        ),
        Sampler("pndm", "LatePNDM", "PLMS", {"skip_prk_steps": True} | _OFFSET, steps=(4, 999), spacing=None),
        Sampler("lms", "LateLMS", "LMS", _OFFSET),
        Sampler("euler", "EulerDiscreteScheduler", "Euler", _OFFSET, zero_snr=True),
        Sampler("euler_a", "EulerAncestralDiscreteScheduler", "Euler a", _OFFSET, draws_noise=True, zero_snr=True),
        Sampler("heun", "HeunDiscreteScheduler", "Heun", _OFFSET),
        Sampler("dpm_2", "KDPM2DiscreteScheduler", "DPM2", _OFFSET),
        Sampler("dpm_2_a", "KDPM2AncestralDiscreteScheduler", "DPM2 a", _OFFSET, draws_noise=True, reserved_noises=2),
        Sampler(
            "dpmsolver",
            "DPMSolverMultistepScheduler",
            "DPM-Solver",
            {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"} | _OFFSET,
            zero_snr=True,
        ),
        Sampler(
            "dpmsolver++",
            "DPMSolverMultistepScheduler",
            "DPM++ 2M",
            {"algorithm_type": "dpmsolver++"} | _OFFSET,
            zero_snr=True,
        ),
        Sampler("dpmsingle", "DPMSolverSinglestepScheduler", "DPM++ 2S", spacing=None),
        # Latent consistency models (Luo et al. 2023, https://arxiv.org/abs/2310.04378): distilled from 50 DDIM steps
        # and with guidance in them already
        Sampler(
            "lcm",
            "LCMScheduler",
            "LCM",
            draws_noise=True,
            steps=(1, 50),
            highest_scale=2.0,
            spacing=None,
            zero_snr=True,
        ),
    )
}
SECOND_NAMES = {
    "k_lms": "lms",
    "k_euler": "euler",
    "k_euler_a": "euler_a",
    "k_dpm_2": "dpm_2",
    "k_dpm_2_a": "dpm_2_a",
    "dpmsolver+++": "dpmsolver++",
}


def sampler_name(text: str) -> str:
    """Convert a sampler's first or second name to its first."""
    name = SECOND_NAMES.get(text, text)
    if name not in SAMPLERS:
        known = [*SAMPLERS, *SECOND_NAMES]
        nearest = get_close_matches(text, known, n=1)
        hint = f"did you mean {nearest[0]}?" if nearest else f"known are {', '.join(known)}"
        raise ArgumentTypeError(f"no such sampler; {hint}")
    return name


def sampler_lines() -> Iterator[str]:
    """Each sampler's name with its second ones."""
    for name in SAMPLERS:
        yield " ".join([name, *(second for second, first in SECOND_NAMES.items() if first == name)])
