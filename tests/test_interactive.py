"""The loop: prompts typed through a pipe, with a window under Xvfb and without a display."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from child_runs import Child
from PIL import Image
from Xlib import X
from Xlib.display import Display
from Xlib.protocol.event import ClientMessage

SMALL = ["--W", "64", "--H", "64", "--steps", "1", "--seed", "1"]


def talk(models, outdir: Path, text: str, *options: str, display: str = "") -> subprocess.CompletedProcess[str]:
    def be_at(display: str) -> None:
        for name in ("DISPLAY", "WAYLAND_DISPLAY"):
            os.environ.pop(name, None)
        if display:
            os.environ["DISPLAY"] = display

    argv = ("--ckpt", models.folder, "--outdir", outdir, "--interactive", *SMALL, *options)
    return Child(*argv, text=text, prepare=lambda: be_at(display)).wait()


def test_lines_are_drawn_and_bad_ones_explained(sd1, tmp_path):
    done = talk(sd1, tmp_path / "out", "a cat\n\na dog --w 5\n{a|b\na bird --d 9\n", "--no_preview", "--n_iter", "2")
    assert done.returncode == 0
    assert done.stderr.count("Type prompt:") == 6
    assert "Ctrl-D ends the loop" in done.stderr
    assert [Path(line) for line in done.stdout.splitlines()] == sorted((tmp_path / "out").glob("*.png"))
    assert "error: --w 5 (column 7): out of range" in done.stderr
    assert "is never closed" in done.stderr
    seeds = [Image.open(path).info["seed"] for path in sorted((tmp_path / "out").glob("*.png"))]
    assert len(seeds) == 4
    assert seeds[2:] == ["9", "9"]
    assert f"seed: {seeds[0]}, {seeds[1]}" in done.stderr
    again = talk(sd1, tmp_path / "again", "a cat\n", "--no_preview", "--n_iter", "2")
    assert f"seed: {seeds[0]}, {seeds[1]}" in again.stderr


def test_words_for_leaving_are_asked_about(sd1, tmp_path):
    """An answer that is none is the next prompt; `exit` with something beside it is a prompt."""
    text = "exit\nn\nquit\na cat --d 1\nexit --d 2\nQuit\ny\na dog --d 3\n"
    done = talk(sd1, tmp_path, text, "--no_preview")
    assert done.returncode == 0
    assert done.stderr.count("Leave? (y/n)") == 3
    assert [Image.open(path).info["prompt"] for path in sorted(tmp_path.glob("*.png"))] == ["a cat", "exit"]


def test_lines_that_are_no_text_are_explained(sd1, tmp_path):
    """The lines after them are drawn all the same."""
    done = talk(sd1, tmp_path, "a \udcff cat\na bird \0\na dog --d 3\n", "--no_preview")
    assert done.returncode == 0
    assert "error: the prompt: the text is not UTF-8" in done.stderr
    assert "error: the prompt: the text holds a NUL character" in done.stderr
    assert [Image.open(path).info["seed"] for path in tmp_path.glob("*.png")] == ["3"]


def test_without_a_display_there_is_one_warning(sd1, tmp_path):
    done = talk(sd1, tmp_path, "a cat\na dog\n")
    assert done.returncode == 0
    assert done.stderr.count("warning: no preview: there is no display") == 1
    assert len(list(tmp_path.glob("*.png"))) == 2


def test_a_display_that_cannot_be_reached(sd1, tmp_path):
    """OpenCV would end the process."""
    done = talk(sd1, tmp_path, "a cat\n", display=":97531")
    assert done.returncode == 0
    assert done.stderr.count("warning: no preview") == 1
    assert len(list(tmp_path.glob("*.png"))) == 1


@pytest.fixture
def xvfb():
    """An X server of our own and its display."""
    display = f":{os.getpid() % 10_000 + 100}"
    # without -noreset it begins anew whenever its last client leaves, and ends who comes meanwhile
    command = ["Xvfb", display, "-screen", "0", "800x480x24", "-noreset"]
    server = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    socket = Path(f"/tmp/.X11-unix/X{display[1:]}")
    deadline = time.monotonic() + 30
    while not socket.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    yield display
    server.terminate()
    server.wait()


@pytest.mark.skipif(
    not all(map(shutil.which, ("Xvfb", "xdotool", "import"))), reason="needs Xvfb, xdotool and ImageMagick"
)
def test_windows_show_the_pictures_until_they_are_closed_or_a_key_is_pressed(sd1, tmp_path, xvfb):
    environment = os.environ | {"DISPLAY": xvfb}
    argv = [sys.executable, "gen_img_diffusers.py", "--ckpt", sd1.folder, "--outdir", tmp_path / "out", "--interactive"]
    argv += ["--W", "256", "--H", "192", "--steps", "2", "--preview_every", "1"]
    process = subprocess.Popen(argv, stdin=subprocess.PIPE, env=environment, text=True, stderr=subprocess.PIPE)
    process.stdin.write(":set --l 1\na distinctive title --d 1\na second --d 2,3\n")
    process.stdin.close()

    def x(*command: str) -> str:
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60).stdout.strip()

    def press_close_button(window: int) -> None:
        """What a window manager does then; there is none here."""
        server = Display(xvfb)
        closing = (server.intern_atom("WM_DELETE_WINDOW"), X.CurrentTime, 0, 0, 0)
        event = ClientMessage(window=window, client_type=server.intern_atom("WM_PROTOCOLS"), data=(32, closing))
        server.send_event(window, event)
        server.sync()  # a server may drop what is not yet read from a client that leaves
        server.close()

    for title, made, showing in (("a distinctive title", 1, 1), ("a second", 3, 2)):
        deadline = time.monotonic() + 60
        window, shown = "", False
        while not shown and time.monotonic() < deadline:  # it is there before the pictures, with progress in its title
            time.sleep(0.05)
            files = sorted((tmp_path / "out").glob("*.png"))
            # a search fails when a window closes in its midst, and is made again
            window = (x("xdotool", "search", "--name", f"^{title}$").splitlines() or [""])[-1]
            if len(files) < made or not window:
                continue
            x("import", "-window", "root", str(tmp_path / "screen.png"))
            screen = np.asarray(Image.open(tmp_path / "screen.png").convert("RGB")).astype(int)
            shown = all(shows(screen, np.asarray(Image.open(file)).astype(int)) for file in files[-showing:])
        assert shown, f"the window {title!r} does not show {files}; the program's status: {process.poll()}"
        if title == "a second":
            x("xdotool", "key", "--window", window, "space")
        else:
            press_close_button(int(window))
    assert process.wait(timeout=60) == 0, process.stderr.read()


def shows(screen: np.ndarray, picture: np.ndarray) -> bool:
    """Whether the picture stands somewhere on the screen, exactly."""
    height, width = picture.shape[:2]
    for y in range(screen.shape[0] - height + 1):
        starts = np.flatnonzero((screen[y, : screen.shape[1] - width + 1] == picture[0, 0]).all(1))
        for start in starts:
            if np.array_equal(screen[y : y + height, start : start + width], picture):
                return True
    return False
