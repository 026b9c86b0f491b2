"""Guide pictures: read, preprocessed, and saved as what steers sees them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
from PIL import Image

from library.draw.preprocessing import preprocessed
from library.files.picture_files import encode, save_whole
from library.files.pictures import load_guide
from library.plan.canvas import Size, View
from library.plan.file_names import guide_name
from library.plan.job import Job
from library.settings.control_net import ControlNetSpec
from library.settings.masks import MaskSettings
from library.settings.preprocessing import Preprocess


@dataclass(frozen=True)
class Guide:
    """What is made of a guide picture; equal ones are prepared and embedded once.

    Args:
        place: of what it is for among all that steers.
        file: the picture.
        size: the width and height of what it guides, in pixels.
        how: it is preprocessed.
        seed: of the picture that it guides, where that has a say.
        view: what of its source picture is drawn, where a part of it is, or where its mask has a say.
    """

    place: int
    file: Path
    size: Size
    how: Preprocess | None = None
    seed: int | None = None
    view: View | None = None

    @classmethod
    def of(cls, place: int, job: Job, how: Preprocess | None, masks: MaskSettings) -> Self:
        """The guide of a job for the one at a place among those that steer."""
        # both stages of Highres. fix see the same guide, though the second has the seed that follows
        seed = job.seed - (job.stage == 2) if how is not None and how.by.by_seed else None
        view = job.view(masks) if job.boxes or (how is not None and how.by.by_mask) else None
        return cls(place, job.guides[place], (job.width, job.height), how, seed, view)

    def prepare(self) -> np.ndarray:
        """Read and preprocess it: (height, width, 3), 0 to 255, and -255 where a mask hides it."""
        picture = load_guide(self.file)
        small = self.view.of(picture) if self.view else picture.resize(self.size, Image.Resampling.LANCZOS)
        pixels = np.asarray(small)
        if self.how is None:
            return pixels
        further: list[int | np.ndarray] = [] if self.seed is None else [self.seed]
        if self.how.by.by_mask and self.view and self.view.mask:
            further.append(np.asarray(self.view.mask))
        return preprocessed(pixels, self.how, *further)


def save_guides(jobs: Sequence[Job], specs: Sequence[ControlNetSpec], masks: MaskSettings) -> None:
    """Save the guides beside each picture, as they were prepared; a batch that is drawn once more has saved them."""
    for job in jobs if jobs[0].stage != 1 else ():
        for place, spec in enumerate(specs):
            file = job.file.with_name(guide_name(job.file.stem, place + 1, job.turn))
            if not file.exists():
                guide = Guide.of(place, job, spec.control.preprocess, masks).prepare()
                save_whole(encode(guide.clip(0, 255).astype(np.uint8), ".png", {}), file)  # what is masked is black
