"""The noise that a sampler goes through: how its timesteps are spaced, and whether it ends in pure noise."""

from argparse import ArgumentTypeError
from dataclasses import dataclass
from difflib import get_close_matches

from library.errors import InputError
from library.files.prediction import Prediction
from library.settings.loss_guidance import LossGuidanceSettings
from library.settings.options import Options
from library.settings.samplers import SAMPLERS, Sampler

# Names as diffusers has them; "sgm_uniform" is what other programs call the second
_OWN = "own"
_NAMES = {_OWN: None, "trailing": "trailing", "sgm_uniform": "trailing", "linspace": "linspace", "leading": "leading"}


@dataclass(frozen=True)
class NoiseSchedule:
    """How a run's pictures are denoised, beside the sampler.

    Args:
        prediction_type: what the model predicts, "epsilon" or "v_prediction".
        zero_snr: the last of the training's timesteps is pure noise (Lin et al. 2023, https://arxiv.org/abs/2305.08891).
        spacing: of the timesteps, as diffusers names it; None is the sampler's own.
    """

    prediction_type: str = "epsilon"
    zero_snr: bool = False
    spacing: str | None = None

    def spacing_for(self, sampler: Sampler) -> str | None:
        """The spacing to give to a sampler's scheduler: with zero SNR DDIM has to begin at the last timestep."""
        return "trailing" if self.spacing is None and self.zero_snr and sampler.spacing == "leading" else self.spacing


USUAL_SCHEDULE = NoiseSchedule()


def schedule_name(text: str) -> str:
    """Convert a schedule's name."""
    if text not in _NAMES:
        nearest = get_close_matches(text, _NAMES, n=1)
        raise ArgumentTypeError(f"no such schedule; {f'did you mean {nearest[0]}?' if nearest else schedule_names()}")
    return text


def schedule_names() -> str:
    """All of them, for people."""
    return ", ".join(_NAMES)


def from_options(
    options: Options, prediction: Prediction, guidance: LossGuidanceSettings
) -> tuple[NoiseSchedule, list[str], list[str]]:
    """The schedule for a model, and what there is to tell and to warn of.

    Args:
        options: what the user said.
        prediction: of the model.
        guidance: by CLIP and VGG16, which looks at the picture that a step promises.

    Raises:
        InputError: for a schedule that the sampler or the guidance cannot go through.
    """
    sampler, spacing = SAMPLERS[options.sampler], _NAMES[options.schedule]
    notes, warnings = [], []
    if spacing and not sampler.spacing:
        able = ", ".join(name for name, other in SAMPLERS.items() if other.spacing)
        raise InputError(
            f"--schedule {options.schedule}", f"{sampler.name} has a schedule of its own; use one of {able}"
        )
    zero = prediction.zero_snr
    if zero and not sampler.zero_snr:
        able = ", ".join(name for name, other in SAMPLERS.items() if other.zero_snr)
        if options.zero_terminal_snr:
            raise InputError("--zero_terminal_snr", f"{sampler.name} cannot begin at pure noise; use one of {able}")
        problem = f"{sampler.name} cannot begin at pure noise as the model was trained to; better use one of {able}"
        warnings.append(f"--sampler: {problem}")
        zero = False
    if zero and guidance.uses_anything:
        problem = "finds nothing to look at in the pure noise of zero terminal SNR; use --sampler lms or pndm"
        raise InputError("guidance by CLIP or VGG16", problem)
    stated = prediction.spacing
    if stated and sampler.spacing and spacing is None and not zero and stated != sampler.spacing:
        tell = warnings if stated == "trailing" else notes  # models of few steps need it, others hardly differ
        advice = f"add --schedule {stated} to follow it"
        tell.append(f"the model's scheduler states {stated} timesteps, {sampler.name} has {sampler.spacing}; {advice}")
    return NoiseSchedule(prediction.type, zero, spacing), notes, warnings
