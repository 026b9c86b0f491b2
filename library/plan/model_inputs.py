"""What pictures can be drawn with models that read more than the noisy latents (see `files.model_inputs`)."""

import logging
from collections.abc import Mapping

from library.errors import InputError
from library.files.model_files import ModelFiles
from library.files.model_inputs import EDITING, PLAIN
from library.plan.job import Job
from library.settings.loss_guidance import LossGuidanceSettings
from library.settings.masks import FILLS, MaskSettings
from library.settings.options import Options

logger = logging.getLogger(__name__)

USUAL_IMAGE_GUIDANCE = 1.5


def settings_of(options: Options, model: ModelFiles) -> Mapping[str, float | None]:
    """The settings of jobs that the model's inputs decide.

    An edit model always begins at noise alone: it keeps to its picture by reading it.
    """
    if model.inputs is not EDITING:
        return {"strength": options.strength, "image_guidance": options.image_guidance}
    guidance = USUAL_IMAGE_GUIDANCE if options.image_guidance is None else options.image_guidance
    return {"strength": options.strength if "strength" in options.said else 1.0, "image_guidance": guidance}


def check_run(options: Options, model: ModelFiles, guidance: LossGuidanceSettings) -> None:
    """Refuse what a run's model has no use for.

    Raises:
        InputError: for the first such option.
    """
    inputs, subject = model.inputs, f"--ckpt {options.ckpt}"
    if inputs is not EDITING and options.image_guidance is not None:
        raise InputError(f"--image_guidance {options.image_guidance:g}", _FOR_EDITING)
    if inputs is EDITING and options.image_path is None:
        raise InputError(subject, f"is {inputs.name}, which changes a picture; give --image_path")
    if inputs is not PLAIN and guidance.uses_anything:
        raise InputError(subject, f"is {inputs.name}, which CLIP and VGG16 cannot guide; use {PLAIN.name}")


_FOR_EDITING = "is for edit models (InstructPix2Pix), which this one is not; leave it out"


def check_job(model: ModelFiles, masks: MaskSettings, job: Job) -> None:
    """Refuse what a picture's model has no use for.

    Args:
        model: that it is drawn with.
        masks: how masks are read and filled.
        job: the picture.

    Raises:
        InputError: naming the first such thing.
    """
    if model.inputs is not PLAIN and masks.fill != FILLS[0] and job.is_masked and job.steps_run == job.steps:
        problem = f"nothing of it is left: {model.inputs.name} begins at noise alone here; leave it out"
        advice = "" if model.inputs is EDITING else ", or give a strength below 1"
        raise InputError(f"--fill {masks.fill}", f"{problem}{advice}", job.where)
    if model.inputs is not EDITING:
        if job.image_guidance is not None:
            raise InputError(f"--ig {job.image_guidance:g}", _FOR_EDITING, job.where)
        return
    if job.strength != 1:
        problem = "an edit model begins at noise alone; leave it out, and use --image_guidance"
        raise InputError(f"strength {job.strength:g}", problem, job.where)
    if job.image_guidance != USUAL_IMAGE_GUIDANCE and not job.drops_picture:
        place = f"{job.where}: " if job.where else ""
        logger.warning("%sthe image guidance does nothing at a guidance scale of 1 or less", place)
    if job.negative_scale is not None:
        problem = "an edit model has its own third branch; leave it out"
        raise InputError(f"negative scale {job.negative_scale:g}", problem, job.where)
    if len(job.parts) > 1:
        raise InputError("AND", "an edit model follows one instruction for the picture; leave AND out", job.where)
