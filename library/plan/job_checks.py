"""What a single picture is refused or warned of, once all that it is made by is known."""

import logging
import math

from library.errors import InputError
from library.files.model_files import ModelFiles
from library.files.picture_files import FORMATS, LONGEST_SIDE_PX
from library.files.pictures import region_color
from library.plan.job import Job
from library.plan.sources import Sources
from library.settings.loss_guidance import LossGuidanceSettings
from library.values import MAX_SIZE_PX, PIXELS_PER_CELL
from networks.files import OWN_MODULE, NetworkPlan, check_strength

logger = logging.getLogger(__name__)


def check_settings(job: Job) -> None:
    """Refuse and warn of settings that do not go together.

    Raises:
        InputError: when nothing of an img2img job would be run.
    """
    if job.steps_run < 1:
        smallest = math.ceil(1000 / job.steps) / 1000
        raise InputError(
            f"strength {job.strength:g} of {job.steps} steps",
            f"leaves no step to run; use a strength of {smallest:g} or more, or more steps",
            job.where,
        )
    _check_format(job)
    if len(job.parts) > 1 and job.regions is None and not job.composes:
        logger.warning("a prompt's parts (AND) have no map of regions (--mask_path): each is for the whole picture")
    if job.regions is not None and any(part.weight != 1 for part in job.parts):
        logger.warning("the weights of a prompt's parts (AND) do nothing beside a map of regions")
    if job.negative_scale is not None and job.branches == 1:
        place = f"{job.where}: " if job.where else ""
        logger.warning("%sthe negative scale does nothing at a guidance scale of 1 or less", place)


def _check_format(job: Job) -> None:
    """Refuse pictures that are larger than their format takes, and than pictures should be when they are enlarged."""
    width, height = job.file_size
    longest = LONGEST_SIDE_PX.get(job.file.suffix)
    if longest is not None and max(width, height) > longest:
        problem = f"{FORMATS[job.file.suffix[1:]]} takes {longest} a side"
        advice = f"use {longest - longest % PIXELS_PER_CELL} or less" if job.upscale == 1 else "enlarge less"
        raise InputError(f"{width} x {height} pixels", f"{problem}; {advice}, or --format png", job.where)
    if job.upscale != 1 and max(width, height) > MAX_SIZE_PX:
        problem = f"{job.width} x {job.height} pixels become {width} x {height}, more than {MAX_SIZE_PX} a side"
        raise InputError(f"--upscale {job.upscale:g}", f"{problem}; enlarge less", job.where)


def check_loss_guidance(job: Job, guidance: LossGuidanceSettings) -> None:
    """Refuse pictures that cannot be guided, and warn of a text for CLIP that nothing reads."""
    if guidance.uses_anything and len(job.parts) > 1:
        problem = "a prompt in parts cannot be guided by CLIP or VGG16; leave out AND, or the guidance"
        raise InputError("AND", problem, job.where)
    smallest = guidance.smallest_side_px
    if min(job.width, job.height) < smallest:
        problem = f"VGG16's layer {guidance.vgg16_layer} sees nothing of it; use sides of {smallest} pixels or more"
        raise InputError(f"{job.width} x {job.height} pixels", problem, job.where)
    if job.clip_prompt and not guidance.clip_scale:
        place = f"{job.where}: " if job.where else ""
        logger.warning("%s--c does nothing without --clip_guidance_scale", place)


def check_networks(networks: NetworkPlan, model: ModelFiles, job: Job) -> None:
    """Refuse strengths that a job's networks or the model's blocks do not know, and what does not keep to regions.

    Args:
        networks: those that options name.
        model: what the job is drawn with.
        job: the job; its tags are checked already.
    """
    for spec, strength in zip(networks.specs[networks.merged :], job.network_multipliers):
        if strength.number is None:
            check_strength(spec, strength, model, f"--am {strength}", job.where)
    _check_regions(networks, job)


def _check_regions(networks: NetworkPlan, job: Job) -> None:
    """Refuse networks that cannot keep to the regions of a job's parts."""
    if job.regions is None:
        return
    if networks.merged or (networks.pre_calculated and (networks.specs or job.tags)):
        option = "--network_merge" if networks.merged else "--network_pre_calc"
        problem = "acts on the whole picture, not on the regions of a prompt with AND; leave it out, or --mask_path"
        raise InputError(option, problem, job.where)
    for spec in networks.specs:
        if spec.module != OWN_MODULE:
            problem = f"does not keep to regions; use {OWN_MODULE}, which reads LoRA and its relatives"
            raise InputError(f"--network_module {spec.module}", problem, job.where)
    if len(networks.specs) > len(job.parts):
        problem = f"the prompt has {len(job.parts)} parts (AND), each for one network; add parts or leave out networks"
        raise InputError(f"--network_module, {len(networks.specs)} of them", problem, job.where)


def warn_of_lacking_colors(job: Job, sources: Sources) -> None:
    """Warn of parts that are drawn everywhere because a map of pure colours lacks theirs."""
    for part in sources.lacking.get(job.regions, ()) if job.regions else ():
        if part < len(job.parts):
            problem = f"has no pure {region_color(part)}, so that part {part + 1} is for the whole picture"
            logger.warning("--mask_path %s: %s", job.regions, problem)


def warn_of_unused_seeds(unused: int, pictures: int, where: str) -> None:
    """Warn of seeds that a line names and no picture has."""
    if unused > 0:
        place, drawn = f"{where}: " if where else "", f"{pictures} picture{'s' if pictures > 1 else ''}"
        more = f"{unused} seed{'s' if unused > 1 else ''} more"
        advice = "leave seeds or --images_per_prompt out"
        logger.warning("%s--d has %s than the %s of the line; %s", place, more, drawn, advice)
