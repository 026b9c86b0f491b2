"""An upscaler that ends the process which is to enlarge a certain picture, as a fault of a driver's would."""

import os
import signal
from pathlib import Path

import numpy as np
from PIL import Image


class EndsWorkers:
    """Enlarges pictures; at that one, as long as its file is there, the process is killed."""

    def __init__(self, poison: Path) -> None:
        self._poison = poison

    def to(self, device: object, dtype: object) -> None:
        """Nothing goes anywhere."""

    def enlarge(self, pictures: list[Image.Image], width: int, height: int) -> list[Image.Image]:
        """Enlarge pictures to a size."""
        if self._poison.exists():
            end = np.asarray(Image.open(self._poison), int)
            if any(
                np.abs(np.asarray(picture, int) - end).max() <= 1 for picture in pictures
            ):  # batches round otherwise
                os.kill(os.getpid(), signal.SIGKILL)
        return [picture.resize((width, height)) for picture in pictures]


def create_upscaler(poison: str) -> EndsWorkers:
    """Make one; `poison` is the file of that picture."""
    return EndsWorkers(Path(poison))
