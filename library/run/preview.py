"""Showing finished pictures in OpenCV windows."""

import contextlib
import ctypes
import logging
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

logger = logging.getLogger(__name__)

_PROBE_TIMEOUT_S = 30
_POLL_MS = 50


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


def show(pictures: Sequence["np.ndarray"], title: str) -> None:
    """Show pictures (H, W, 3) uint8 RGB, one window each, until a key is pressed or the windows are closed."""
    _let_qt_keep_its_events()
    import cv2

    windows = [f"{title} ({number})" if len(pictures) > 1 else title for number in range(1, len(pictures) + 1)]
    for window, picture in zip(windows, pictures):
        cv2.imshow(window, cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))
    while cv2.waitKey(_POLL_MS) < 0:
        if not any(map(_is_open, windows)):
            break
    cv2.destroyAllWindows()
    cv2.waitKey(1)  # lets the windows go


def _is_open(window: str) -> bool:
    import cv2

    try:
        return cv2.getWindowProperty(window, cv2.WND_PROP_VISIBLE) >= 1
    except cv2.error:  # where the last window closed by hand was, Qt's part of OpenCV is gone, too
        return False


def _let_qt_keep_its_events() -> None:
    """Have the system's libX11-xcb stand before the one in OpenCV's Linux wheel; to be called before the first window.

    The wheel's is older than most systems' libX11 and writes XCBOwnsEventQueue eight bytes before the field this one
    reads. Xlib then takes events away from Qt; without its MapNotify a window stays empty (one in seven when busy).
    """
    if sys.platform.startswith("linux"):
        with contextlib.suppress(OSError):  # not installed: the wheel's own is left
            ctypes.CDLL("libX11-xcb.so.1", mode=ctypes.RTLD_GLOBAL)
