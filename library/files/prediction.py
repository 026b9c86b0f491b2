"""What a model predicts, and on which schedule of noise: what its files say of it, and what the user says."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from library.errors import InputError
from library.files.families import FOREIGN_FAMILIES, Family
from library.files.json_files import read_json
from library.files.weight_files import WeightFile

# The schedule that the families were trained with (Rombach et al. 2022, https://arxiv.org/abs/2112.10752)
TRAINING_SCHEDULE: Mapping[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
}
_PREDICTIONS = ("epsilon", "v_prediction")


@dataclass(frozen=True)
class Stated:
    """What a model's files say.

    Args:
        prediction: what the U-Net predicts, as diffusers names it; None where nothing tells.
        zero_snr: zero terminal SNR.
        spacing: how timesteps are spaced, as diffusers names it.
        source: what says so.
        unfollowed: parts of the schedule that differ from the family's.
    """

    prediction: str | None = None
    zero_snr: bool = False
    spacing: str | None = None
    source: str = ""
    unfollowed: tuple[str, ...] = ()


@dataclass(frozen=True)
class Prediction:
    """What is made of it.

    Args:
        type: "epsilon" or "v_prediction".
        zero_snr: the last timestep is pure noise (Lin et al. 2023, https://arxiv.org/abs/2305.08891).
        spacing: the spacing of timesteps that the files state.
        asked: the options of the command line that say of it what its files do not.
        notes: what a user is told of it.
        warnings: what a user is warned of.
    """

    type: str
    zero_snr: bool = False
    spacing: str | None = None
    asked: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


def read_statements(path: Path, unet: WeightFile, subject: str) -> Stated:
    """Read what a model's files say: a Diffusers folder's scheduler, a checkpoint's marks, then its metadata.

    Raises:
        InputError: when they say what this program cannot do.
    """
    scheduler = path / "scheduler" / "scheduler_config.json"
    if scheduler.is_file():
        return _of_scheduler(read_json(scheduler), scheduler, subject)
    marks = [name for name in ("v_pred", "ztsnr") if name in unet.shapes]  # empty tensors, whose names say it
    if marks:
        source = f"its tensor{'' if len(marks) == 1 else 's'} {' and '.join(map(repr, marks))}"
        if "v_pred" in marks:
            return Stated("v_prediction", "ztsnr" in marks, source=source)
        return Stated(zero_snr=True, source=source)
    for name in ("modelspec.prediction_type", "modelspec.predict_key"):
        if stated := unet.metadata.get(name, "").lower():
            return Stated("v_prediction" if stated.startswith("v") else "epsilon", source="its metadata")
    return Stated()


def _of_scheduler(config: Mapping[str, Any], file: Path, subject: str) -> Stated:
    for foreign in FOREIGN_FAMILIES:
        if foreign.scheduler and str(config.get("_class_name", "")).startswith(foreign.scheduler):
            raise InputError(subject, f"is {foreign.name}; its noise is scaled otherwise than this program does")
    prediction = str(config.get("prediction_type", "epsilon"))
    if prediction not in _PREDICTIONS:
        raise InputError(str(file), f"has the prediction type {prediction!r}; use a model that predicts noise or v")
    other = [f"{name} {config[name]}" for name, usual in TRAINING_SCHEDULE.items() if config.get(name, usual) != usual]
    other += ["trained_betas"] if config.get("trained_betas") is not None else []
    return Stated(
        prediction,
        zero_snr=config.get("rescale_betas_zero_snr") is True,
        spacing=config.get("timestep_spacing"),
        source=f"{file.parent.parent.name}{os.sep}scheduler",
        unfollowed=tuple(other),
    )


def decide(stated: Stated, family: Family, *, predicts_v: bool, zero_snr: bool, subject: str) -> Prediction:
    """Decide what a model predicts: the user's word first, then what its files say.

    Args:
        stated: what its files say.
        family: of the model.
        predicts_v: the user says so.
        zero_snr: the user asks for zero terminal SNR.
        subject: what messages are about.

    Raises:
        InputError: when zero terminal SNR is asked for and the model predicts noise.
    """
    notes, warnings = [], []
    says_v = stated.prediction == "v_prediction"
    if predicts_v and stated.prediction == "epsilon":
        warnings.append(f"{subject}: {stated.source} says that it predicts noise; --v_parameterization overrides that")
    elif says_v and not predicts_v and (family.may_hide_v or not family.follows_zero_snr):
        advice = "add --v_parameterization"
        warnings.append(f"{subject}: taken for a v-prediction model, according to {stated.source}; {advice}")
    elif family.may_hide_v and stated.prediction is None and not predicts_v:
        doubt = "nothing tells noise from v prediction; if pictures are brown, add --v_parameterization"
        warnings.append(f"{subject}: {doubt}")
    v_prediction = predicts_v or says_v
    if zero_snr and not v_prediction:
        problem = "a model that predicts noise cannot do without any signal; add --v_parameterization if it predicts v"
        raise InputError("--zero_terminal_snr", problem)
    follows = stated.zero_snr and v_prediction and family.follows_zero_snr
    zero = zero_snr or follows
    asked = ("v_parameterization",) * (predicts_v and not says_v) + ("zero_terminal_snr",) * (zero_snr and not follows)
    if stated.zero_snr and not zero:
        advice = (
            "add --zero_terminal_snr to follow it" if v_prediction else "which is for models that predict v: left out"
        )
        warnings.append(f"{subject}: has zero terminal SNR, according to {stated.source}; {advice}")
    if stated.unfollowed:
        parts = ", ".join(stated.unfollowed)
        warnings.append(f"{subject}: {stated.source} states another schedule of noise ({parts}), which is not followed")
    if says_v and not predicts_v and not warnings:
        with_zero = ", with zero terminal SNR" if zero else ""
        notes.append(f"{subject}: predicts v{with_zero}, according to {stated.source}")
    type_ = "v_prediction" if v_prediction else "epsilon"
    return Prediction(type_, zero, stated.spacing, asked, tuple(notes), tuple(warnings))
