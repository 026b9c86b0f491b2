"""The noise that a run's pictures are denoised from: what its model predicts, and whether it ends in pure noise."""

from dataclasses import dataclass

from library.files.prediction import Prediction
from library.settings.samplers import OWN, SPACINGS, Sampler


@dataclass(frozen=True)
class NoiseSchedule:
    """How a run's pictures are denoised, beside the sampler and schedule of each.

    Args:
        prediction_type: what the model predicts, "epsilon" or "v_prediction".
        zero_snr: the last of the training's timesteps is pure noise (Lin et al. 2023, https://arxiv.org/abs/2305.08891).
    """

    prediction_type: str = "epsilon"
    zero_snr: bool = False

    def zero_snr_for(self, sampler: Sampler) -> bool:
        """Whether a sampler begins at pure noise; those that cannot begin a little below."""
        return self.zero_snr and sampler.zero_snr

    def spacing_for(self, sampler: Sampler, schedule: str = OWN) -> str | None:
        """The spacing to give to a sampler's scheduler, None for the usual one.

        With zero SNR, DDIM and DDPM have to begin at the last timestep.
        """
        if schedule in SPACINGS:
            return schedule
        return "trailing" if self.zero_snr_for(sampler) and sampler.spacing == "leading" else None


USUAL_NOISE = NoiseSchedule()


def of_model(prediction: Prediction) -> NoiseSchedule:
    """The noise of a model."""
    return NoiseSchedule(prediction.type, prediction.zero_snr)
