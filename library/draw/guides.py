"""Guide pictures: read, preprocessed, and saved as what steers sees them."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from library.draw.preprocessing import preprocessed
from library.files.picture_files import encode, save_whole
from library.files.pictures import load_guide, read_mask
from library.plan.file_names import guide_name
from library.plan.job import Job
from library.settings.control_net import ControlNetSpec
from library.settings.preprocessing import Preprocess

# What is made of a guide: for which of those that steer, of which picture, at which (width, height) in pixels, how, and
# the seed and the mask of the picture drawn where they have a say
GuideKey = tuple[int, Path, tuple[int, int], Preprocess | None, int | None, Path | None]


def guide_key(place: int, job: Job, how: Preprocess | None) -> GuideKey:
    """The guide of a job for the one at a place among those that steer."""
    # both stages of Highres. fix see the same guide, though the second has the seed that follows
    seed = job.seed - (job.stage == 2) if how is not None and how.by.by_seed else None
    mask = job.mask if how is not None and how.by.by_mask else None
    return place, job.guides[place], (job.width, job.height), how, seed, mask


def prepare_guide(
    path: Path, size: tuple[int, int], how: Preprocess | None, seed: int | None = None, mask: Path | None = None
) -> np.ndarray:
    """Read a guide picture at (width, height) pixels and preprocess it: (height, width, 3), 0 to 255, and -255 where a
    mask hides it.
    """
    pixels = np.asarray(load_guide(path).resize(size, Image.Resampling.LANCZOS))
    if how is None:
        return pixels
    further: list[int | np.ndarray] = [] if seed is None else [seed]
    if mask is not None:
        further.append(np.asarray(read_mask(mask).resize(size, Image.Resampling.BILINEAR)))
    return preprocessed(pixels, how, *further)


def save_guides(jobs: Sequence[Job], specs: Sequence[ControlNetSpec]) -> None:
    """Save the guides beside each picture, as they were prepared; a batch that is drawn once more has saved them."""
    for job in jobs if jobs[0].stage != 1 else ():
        for place, spec in enumerate(specs):
            file = job.file.with_name(guide_name(job.file.stem, place + 1))
            if not file.exists():
                guide = prepare_guide(*guide_key(place, job, spec.control.preprocess)[1:])
                save_whole(encode(guide.clip(0, 255).astype(np.uint8), ".png", {}), file)  # what is masked is black
