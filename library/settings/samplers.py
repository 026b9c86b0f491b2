"""The samplers: their names, the diffusers schedulers behind them, and the schedules that each can go through."""

import math
from argparse import ArgumentTypeError
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise

from library.values import MAX_STEPS, number, whole_number

OWN = "own"  # the schedule that a sampler has by itself
SPACINGS = ("linspace", "leading", "trailing")  # of the training's timesteps, as diffusers names them
NOISE_LEVELS = ("karras", "exponential", "beta")  # schedules that space the noise's level itself


@dataclass(frozen=True)
class Sampler:
    """One entry of the table of samplers."""

    name: str
    scheduler: str  # class name in `draw.schedulers` or diffusers
    a1111_name: str  # what AUTOMATIC1111's web UI calls it
    arguments: Mapping[str, object] = field(default_factory=dict)
    draws_noise: bool = False  # whether its steps add noise, drawn from each picture's generator
    steps: tuple[int, int] = (1, 1000)  # fewest and most it can do
    reserved_noises: int = 1  # for each step, noises that are drawn and set aside before the sampler begins
    highest_scale: float = math.inf  # of guidance that makes sense with it
    spacing: str | None = "linspace"  # of its timesteps, as diffusers names it; None where it cannot be chosen
    noise_levels: tuple[str, ...] = NOISE_LEVELS  # those that it goes through
    timesteps: bool = False  # whether it takes any timesteps that are given
    zero_snr: bool = False  # whether it can begin at pure noise
    eta: float | None = None  # usual share of noise in its steps (`--eta`); None where it cannot be chosen
    churns: bool = False  # whether noise may be stirred in before each step (`--s_churn`)

    @property
    def schedules(self) -> tuple[str, ...]:
        """The names of the schedules that it goes through."""
        return (OWN, *(SPACINGS if self.spacing else ()), *self.noise_levels)


_OFFSET = {"steps_offset": 1}


def _multistep(name: str, a1111_name: str, algorithm: str, **arguments: object) -> Sampler:
    """DPM-Solver of a kind that uses the steps before."""
    return Sampler(
        name,
        "DPMSolverMultistepScheduler",
        a1111_name,
        {"algorithm_type": algorithm} | arguments | _OFFSET,
        draws_noise=algorithm.startswith("sde"),
        zero_snr=True,
        timesteps=True,
    )


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
            noise_levels=(),
            zero_snr=True,
            eta=0.0,
        ),
        Sampler(
            "pndm",
            "LatePNDM",
            "PLMS",
            {"skip_prk_steps": True} | _OFFSET,
            steps=(4, 999),
            spacing=None,
            noise_levels=(),
        ),
        Sampler("lms", "LateLMS", "LMS", _OFFSET),
        Sampler("euler", "EulerDiscreteScheduler", "Euler", _OFFSET, timesteps=True, zero_snr=True, churns=True),
        Sampler(
            "euler_a",
            "EulerAncestralDiscreteScheduler",
            "Euler a",
            _OFFSET,
            draws_noise=True,
            noise_levels=(),
            zero_snr=True,
        ),
        Sampler("heun", "HeunDiscreteScheduler", "Heun", _OFFSET, timesteps=True),
        Sampler("dpm_2", "KDPM2DiscreteScheduler", "DPM2", _OFFSET),
        Sampler("dpm_2_a", "KDPM2AncestralDiscreteScheduler", "DPM2 a", _OFFSET, draws_noise=True, reserved_noises=2),
        _multistep("dpmsolver", "DPM-Solver", "dpmsolver", final_sigmas_type="sigma_min"),
        # Where the level falls by much in a step, as in the last ones of evenly spaced timesteps, noise stays in the
        # picture: 0.7 of the latents' spread of about 1 after 50 steps, with Karras' levels nothing
        Sampler(
            "dpmsolver_sde",
            "DPMSolverMultistepScheduler",
            "DPM-Solver SDE",
            {"algorithm_type": "sde-dpmsolver", "final_sigmas_type": "sigma_min", "use_karras_sigmas": True} | _OFFSET,
            draws_noise=True,
            spacing=None,
            noise_levels=("karras", "exponential"),
        ),
        _multistep("dpmsolver++", "DPM++ 2M", "dpmsolver++"),
        _multistep("dpmsolver++_sde", "DPM++ 2M SDE", "sde-dpmsolver++"),
        _multistep("dpmsolver++_sde_heun", "DPM++ 2M SDE Heun", "sde-dpmsolver++", solver_type="heun"),
        _multistep("dpmsolver++_3m", "DPM++ 3M", "dpmsolver++", solver_order=3),
        _multistep("dpmsolver++_3m_sde", "DPM++ 3M SDE", "sde-dpmsolver++", solver_order=3),
        Sampler(
            "dpmsingle",
            "DPMSolverSinglestepScheduler",
            "DPM++ 2S",
            {"lower_order_final": True},
            spacing=None,
            timesteps=True,
        ),
        Sampler(
            "dpmsingle_sde",
            "DPMSolverSinglestepScheduler",
            "DPM++ 2S SDE",
            {"algorithm_type": "sde-dpmsolver++", "lower_order_final": True},
            draws_noise=True,
            spacing=None,
            timesteps=True,
        ),
        # Zhao et al. 2023 (https://arxiv.org/abs/2302.04867)
        Sampler("unipc", "UniPC", "UniPC", _OFFSET, steps=(1, 999), zero_snr=True),
        # Zhang and Chen 2022 (https://arxiv.org/abs/2204.13902)
        Sampler("deis", "DEISMultistepScheduler", "DEIS", _OFFSET, steps=(1, 999)),
        # Xue et al. 2023 (https://arxiv.org/abs/2309.05019)
        Sampler("sa_solver", "SASolver", "SA-Solver", _OFFSET, draws_noise=True, steps=(1, 999)),
        # Ho et al. 2020 (https://arxiv.org/abs/2006.11239)
        Sampler(
            "ddpm",
            "DDPMScheduler",
            "DDPM",
            {"clip_sample": False} | _OFFSET,
            draws_noise=True,
            steps=(1, 999),
            spacing="leading",
            noise_levels=(),
            timesteps=True,
            zero_snr=True,
        ),
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
            noise_levels=(),
            timesteps=True,
            zero_snr=True,
        ),
        # Trajectory consistency distillation (Zheng et al. 2024, https://arxiv.org/abs/2402.19159), of 50 steps, too
        Sampler(
            "tcd",
            "TCDScheduler",
            "TCD",
            draws_noise=True,
            steps=(1, 50),
            spacing=None,
            noise_levels=(),
            timesteps=True,
            zero_snr=True,
            eta=0.3,
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

# ---------------------------------------------------------------------------------------------------------------------
# Converters of the options' values, as in `library.values`


def timesteps(text: str) -> tuple[int, ...]:
    """Convert `999,749,499,249`, or `none`."""
    if text.strip().lower() == "none":
        return ()
    given = tuple(whole_number(0, MAX_STEPS - 1)(part) for part in text.split(","))
    if any(after >= before for before, after in pairwise(given)):
        raise ArgumentTypeError(f"do not fall; write each smaller than the one before, from at most {MAX_STEPS - 1}")
    return given


def eta(text: str) -> float | None:
    """Convert a share of noise, or `none` for the sampler's own."""
    return None if text.strip().lower() == "none" else number(0, 1)(text)


s_churn = number(0, MAX_STEPS)
