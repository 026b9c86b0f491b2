"""The window of the loop: pictures that come, and those that are finished, shown by OpenCV."""

import contextlib
import ctypes
import logging
import math
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence, Sized
from typing import TYPE_CHECKING

from library.plan.job import Job

if TYPE_CHECKING:
    import numpy as np

logger = logging.getLogger(__name__)

_PROBE_TIMEOUT_S = 30
_POLL_MS = 50
_WINDOW = "gen_img_diffusers"  # how OpenCV finds it; what is read is its title
_SCREEN = (1600, 900)  # pixels that most screens have to spare
_GAP_PX = 4  # between tiles
_GREY = 96  # where there is no picture yet


def can_show() -> bool:
    """Tell whether this process may open a window; warns when it may not.

    OpenCV ends the whole process when it finds no display, so a window is first opened in another process.
    """
    if sys.platform.startswith("linux") and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        return _unavailable("there is no display")
    probe = "import cv2; cv2.namedWindow('preview'); cv2.destroyAllWindows()"
    try:
        done = subprocess.run(
            [sys.executable, "-c", probe], stdin=subprocess.DEVNULL, capture_output=True, timeout=_PROBE_TIMEOUT_S
        )
    except (OSError, subprocess.TimeoutExpired):
        return _unavailable("OpenCV opens no window here")
    if done.returncode == 0:
        return True
    output = done.stderr.decode(errors="replace")
    if "No module named" in output:
        return _unavailable("OpenCV is not installed (pip install opencv-python)")
    if "not implemented" in output:
        return _unavailable("this OpenCV has no windows (pip install opencv-python instead of opencv-python-headless)")
    return _unavailable("the display cannot be reached")


def _unavailable(reason: str) -> bool:
    logger.warning("no preview: %s; --no_preview leaves this warning out", reason)
    return False


class Window:
    """The window of a loop, in which the pictures of a prompt come and then stand, in tiles where there are several."""

    def __init__(self) -> None:
        _let_qt_keep_its_events()
        self._closed = True  # by the user, or not opened yet

    def open(self, jobs: Sequence[Job], title: str) -> None:
        """Open it for the pictures that are going to be drawn."""
        import cv2
        import numpy as np

        self._title, self._layout = title, Layout([job.file_size for job in jobs])
        self._places = {id(job): place for place, job in enumerate(jobs)}
        self._drawn: list[int] = []  # the places of those that are being drawn
        self._finished = 0
        self._pixels = np.full((*self._layout.size[::-1], 3), _GREY, dtype=np.uint8)  # in OpenCV's order of colours
        self._closed = False
        cv2.imshow(_WINDOW, self._pixels)
        self._tell(title)

    def begin(self, jobs: Sequence[Job]) -> None:
        """Note which pictures are drawn from now on."""
        self._drawn = [self._places[id(job)] for job in jobs]

    def steps(self, timesteps: Iterable) -> Iterator:
        """Go through the timesteps of a batch, telling the user of them in the title."""
        steps = f"/{len(timesteps)}" if isinstance(timesteps, Sized) else ""
        several = len(self._places) > 1
        for number, timestep in enumerate(timesteps, 1):
            pictures = f", {self._finished} of {len(self._places)} pictures done" if several else ""
            self._tell(f"step {number}{steps}{pictures}: {self._title}")
            yield timestep

    def come(self, pictures: "np.ndarray") -> None:
        """Show what the pictures that are drawn look like by now: (B, h, w, 3) uint8 RGB of any size."""
        for place, picture in zip(self._drawn, pictures):
            self._put(place, picture)

    def finish(self, job: Job, picture: "np.ndarray") -> None:
        """Show a finished picture (H, W, 3) uint8 RGB."""
        self._finished += 1
        self._put(self._places[id(job)], picture)

    def wait(self) -> None:
        """Leave the finished pictures to be looked at until a key is pressed or the window is closed."""
        import cv2

        if self._is_open():
            cv2.setWindowTitle(_WINDOW, self._title)  # from here on keys count
        while self._finished and self._is_open() and cv2.waitKey(_POLL_MS) < 0:
            pass

    def close(self) -> None:
        """Take it away."""
        import cv2

        self._closed = True
        cv2.destroyAllWindows()
        cv2.waitKey(1)  # lets the window go

    def _put(self, place: int, picture: "np.ndarray") -> None:
        """Show a picture in its tile, as large as that takes it."""
        import cv2

        left, top, width, height = self._layout.tile(place)
        scale = min(width / picture.shape[1], height / picture.shape[0])
        size = (max(1, round(picture.shape[1] * scale)), max(1, round(picture.shape[0] * scale)))
        if size != picture.shape[1::-1]:
            picture = cv2.resize(picture, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)
        left, top = left + (width - size[0]) // 2, top + (height - size[1]) // 2
        self._pixels[top : top + size[1], left : left + size[0]] = picture[..., ::-1]
        if self._is_open():
            cv2.imshow(_WINDOW, self._pixels)
            cv2.waitKey(1)  # lets it be painted

    def _tell(self, title: str) -> None:
        """Change the title, and let the window live a moment."""
        import cv2

        if self._is_open():
            cv2.setWindowTitle(_WINDOW, title)
            cv2.waitKey(1)

    def _is_open(self) -> bool:
        """Whether the user has left it open; once closed it stays so up to the next prompt's pictures."""
        import cv2

        try:
            self._closed = self._closed or cv2.getWindowProperty(_WINDOW, cv2.WND_PROP_VISIBLE) < 1
        except cv2.error:  # where the last window closed by hand was, Qt's part of OpenCV is gone, too
            self._closed = True
        return not self._closed


class Layout:
    """Where pictures stand in a window: one as it is, several in tiles, all of them within a usual screen.

    Args:
        sizes: theirs, (width, height) in pixels.
    """

    def __init__(self, sizes: Sequence[tuple[int, int]]) -> None:
        width, height = (max(sides) for sides in zip(*sizes))

        def grid(columns: int) -> tuple[float, int, int]:
            """How much smaller so many columns make the pictures, how far the window is from a square, and how wide."""
            rows = math.ceil(len(sizes) / columns)
            scale = min(1, _SCREEN[0] / (columns * width), _SCREEN[1] / (rows * height))
            return scale, -abs(columns * width - rows * height), columns

        self._columns = max(range(1, len(sizes) + 1), key=grid)
        rows = math.ceil(len(sizes) / self._columns)
        self._gap, scale = (_GAP_PX, grid(self._columns)[0]) if len(sizes) > 1 else (0, 1)
        self._tile = max(1, round(width * scale)), max(1, round(height * scale))
        across, down = (side + self._gap for side in self._tile)
        self.size = self._columns * across - self._gap, rows * down - self._gap

    def tile(self, place: int) -> tuple[int, int, int, int]:
        """Left, top, width and height of a picture's tile in pixels."""
        row, column = divmod(place, self._columns)
        width, height = self._tile
        return column * (width + self._gap), row * (height + self._gap), width, height


def _let_qt_keep_its_events() -> None:
    """Have the system's libX11-xcb stand before the one in OpenCV's Linux wheel; to be called before the first window.

    The wheel's is older than most systems' libX11 and writes XCBOwnsEventQueue eight bytes before the field this one
    reads. Xlib then takes events away from Qt; without its MapNotify a window stays empty (one in seven when busy).
    """
    if sys.platform.startswith("linux"):
        with contextlib.suppress(OSError):  # not installed: the wheel's own is left
            ctypes.CDLL("libX11-xcb.so.1", mode=ctypes.RTLD_GLOBAL)
