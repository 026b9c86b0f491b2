"""Which pictures `--engine openvino` draws, and which it leaves to PyTorch."""

import importlib.util
import logging
from collections.abc import Sequence
from dataclasses import dataclass

from library.errors import InputError
from library.files.lllite import LLLiteFile
from library.plan.job import Job
from library.settings.computing import OPENVINO
from library.settings.control_net import ControlNetSettings
from library.settings.loss_guidance import LossGuidanceSettings
from library.settings.options import Options
from networks.files import OWN_MODULE, NetworkPlan

logger = logging.getLogger(__name__)

OPTION = f"--engine {OPENVINO}"


@dataclass(frozen=True)
class Engine:
    """What computes the U-Net of a run, and the VAE's decoder.

    Args:
        openvino: whether OpenVINO is asked for.
        all_by_torch: why it can draw none of the run's pictures, nevertheless; empty when it can.
        decodes: whether OpenVINO computes the VAE's decoder.
    """

    openvino: bool = False
    all_by_torch: str = ""
    decodes: bool = False

    @property
    def draws(self) -> bool:
        """Whether OpenVINO computes the U-Net, at least for some pictures."""
        return self.openvino and not self.all_by_torch

    def by_torch(self, job: Job) -> str:
        """Why a picture's steps are left to PyTorch, in a few words; empty when OpenVINO draws it."""
        if self.all_by_torch:
            return self.all_by_torch
        if len(job.parts) > 1 and not job.composes:
            return "regions"
        if job.deep_shrink.depth_1 is not None:
            return "Deep Shrink"
        if job.all_strengths and any(job.strengths_at(step) != job.strengths_at(0) for step in range(1, job.steps_run)):
            return "networks that act in some steps"
        return ""

    def warn_of(self, job: Job, told: set[str]) -> None:
        """Say of a picture that no plan has spoken of that it is left to PyTorch, once for each reason."""
        if self.openvino and (reason := self.by_torch(job)) and reason not in told:
            told.add(reason)
            logger.warning("%s: this picture is drawn by torch: %s", OPTION, reason)

    def warn(self, jobs: Sequence[Job]) -> None:
        """Say which of a run's pictures are left to PyTorch."""
        if not self.openvino:
            return
        reasons = [reason for job in jobs if (reason := self.by_torch(job))]
        if reasons:
            what = "all pictures are" if len(reasons) == len(jobs) else f"{len(reasons)} of {len(jobs)} pictures are"
            logger.warning("%s: %s drawn by torch: %s", OPTION, what, ", ".join(dict.fromkeys(reasons)))


def from_options(
    options: Options, networks: NetworkPlan, control: ControlNetSettings, guidance: LossGuidanceSettings
) -> Engine:
    """What the options say of it.

    Raises:
        InputError: when OpenVINO is not installed, and for what does not go together with it.
    """
    if options.engine != OPENVINO:
        return Engine()
    if importlib.util.find_spec("openvino") is None:
        raise InputError(OPTION, "OpenVINO is not installed; run `pip install -r requirements-openvino.txt`")
    if options.compile:
        raise InputError(f"{OPTION} and --compile", "do not go together; give one")
    reason = ""
    if guidance.uses_anything:
        reason = "guidance by CLIP and VGG16"
    elif any(isinstance(spec.file, LLLiteFile) for spec in control.specs):
        reason = "ControlNet-LLLites"
    elif any(spec.module != OWN_MODULE for spec in networks.specs[networks.merged :]):
        reason = f"networks of other modules than {OWN_MODULE}"
    # slices are asked for to save memory, which OpenVINO does not have
    decodes = not guidance.uses_anything and options.vae_slices is None
    return Engine(openvino=True, all_by_torch=reason, decodes=decodes)
