"""Guide pictures: read, preprocessed, and saved as what steers sees them."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from library.files.picture_files import encode, save_whole
from library.files.pictures import load_guide
from library.plan.file_names import guide_name
from library.plan.job import Job
from library.settings.control_net import Canny, ControlNetSpec

# What is made of a guide: of which of those that steer, of which picture, at which (width, height) in pixels
GuideKey = tuple[int, Path, tuple[int, int]]


def guide_key(place: int, job: Job) -> GuideKey:
    """The guide of a job for the one at a place among those that steer."""
    return place, job.guides[place], (job.width, job.height)


def prepare_guide(path: Path, size: tuple[int, int], preprocess: Canny | None) -> np.ndarray:
    """Read a guide picture at (width, height) pixels and preprocess it: (height, width, 3) uint8."""
    pixels = np.asarray(load_guide(path).resize(size, Image.Resampling.LANCZOS))
    if preprocess is None:
        return pixels
    import cv2  # 25 MB that only some runs need

    edges = cv2.Canny(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY), preprocess.low, preprocess.high)
    return np.stack([edges] * 3, axis=-1)


def save_guides(jobs: Sequence[Job], specs: Sequence[ControlNetSpec]) -> None:
    """Save the guides beside each picture, as they were prepared; a batch that is drawn once more has saved them."""
    for job in jobs if jobs[0].stage != 1 else ():
        for place, spec in enumerate(specs):
            file = job.file.with_name(guide_name(job.file.stem, place + 1))
            if not file.exists():
                guide = prepare_guide(job.guides[place], (job.width, job.height), spec.control.preprocess)
                save_whole(encode(guide, ".png", {}), file)
