"""What all pictures of a run together are refused or warned of."""

import logging
from collections.abc import Sequence

from library.errors import InputError
from library.files.model_files import ModelFiles
from library.plan.job import Job
from library.plan.run_record import job_id
from library.plan.sources import Sources
from library.settings.cfg_interval import WHOLE_RUN, CfgInterval
from library.settings.options import Options
from library.settings.repeats import Repeats
from library.settings.tiling import Tiling
from library.values import PIXELS_PER_CELL

logger = logging.getLogger(__name__)


def check_use(options: Options, interval: CfgInterval, sources: Sources, jobs: Sequence[Job]) -> None:
    """Refuse what was given for all pictures and is used by none."""
    for group, switch, used in (
        ("Gradual Latent", "gradual_latent_timesteps", any(job.gradual_latent.timesteps is not None for job in jobs)),
        ("Deep Shrink", "ds_depth_1", any(job.deep_shrink.depth_1 is not None for job in jobs)),
    ):
        given = options.given_in(group)
        if given and not used and switch not in given:
            raise InputError(f"--{given[0]}", f"does nothing by itself; give --{switch} too")
    if interval != WHOLE_RUN and all(job.branches == 1 for job in jobs):
        problem = "there is no guidance at a scale of 1 or less; give a higher --scale, or leave it out"
        name = "guidance_start" if options.guidance_start > 0 else "guidance_end"
        raise InputError(f"--{name} {getattr(options, name):g}", problem)
    for name in filter(options.given, ("mask_invert", "mask_blur", "fill")):
        if not any(job.mask or (job.extend and name != "mask_invert") for job in jobs):
            problem = "is for masks, and a prompt with AND has a map of regions in place of one; leave it out"
            raise InputError(f"--{name}", problem)
    if "strength" in options.said and not sources.pictures and options.highres_fix_scale is None:
        logger.warning("--strength %g does nothing without --image_path and without Highres. fix", options.strength)
    if sources.masks and not any(job.mask or job.regions for job in jobs):
        problem = "is for inpainting or for prompts with AND; give --image_path or such a prompt, or leave it out"
        raise InputError(f"--mask_path {options.mask_path}", problem)


def warn_of_pictures(jobs: Sequence[Job], model: ModelFiles, tiles: Tiling, counts: Repeats) -> None:
    """Warn of tiles that no picture is larger than, of pictures that are the same, and of such as are too large."""
    _warn_of_tiles(tiles, jobs)
    _warn_of_equal_pictures(counts, jobs)
    _warn_of_size(model, tiles, jobs)


def _warn_of_tiles(tiles: Tiling, jobs: Sequence[Job]) -> None:
    """Warn of tiles that no picture is larger than."""
    if tiles.size_px is not None and not any(tiles.splits(job.width, job.height) for job in jobs):
        logger.warning("--tile %d does nothing: no picture is larger", tiles.size_px)


def _warn_of_equal_pictures(counts: Repeats, jobs: Sequence[Job]) -> None:
    """Warn where one seed for all pictures of an iteration makes several of one prompt the same."""
    if counts.same_seed_in_iteration and (counts.images_per_prompt or 1) > 1:
        equal = len(jobs) - len({job_id(job) for job in jobs})
        if equal:
            problem = f"{equal} of {len(jobs)} pictures are as another: the same prompt and the same seed"
            logger.warning("--iter_same_seed: %s; leave out --images_per_prompt, or give --n_iter", problem)


def _warn_of_size(model: ModelFiles, tiles: Tiling, jobs: Sequence[Job]) -> None:
    """Warn of pictures that are much larger than a small model draws, where nothing else makes it see less of them."""
    cells = model.unet.config.get("sample_size")
    small_px = cells * PIXELS_PER_CELL if isinstance(cells, int) else model.family.size_px
    if small_px * 2 > model.family.size_px or tiles.size_px is not None:
        return
    for job in jobs:
        shrunk = job.deep_shrink.depth_1 is not None or job.gradual_latent.timesteps is not None
        if max(job.width, job.height) >= 2 * small_px and job.source is None and not shrunk:
            size = f"{job.width} x {job.height}"
            advice = f"give --W {small_px} --H {small_px}"
            logger.warning("the model was made for %d pixels a side; %s repeats things: %s", small_px, size, advice)
            return
