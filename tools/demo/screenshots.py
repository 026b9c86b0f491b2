"""Take the screenshots of docs/screenshots: the page of a run in Chromium, and the loop with its window under Xvfb.

python -m tools.demo.screenshots

Needs chromium, Xvfb, xdotool and ImageMagick's import. No test compares them with what is drawn now: browsers and fonts
differ from machine to machine. What the terminal shows is drawn here from what the program wrote.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from tools.demo.showcase import ROOT

SHOTS = ROOT / "docs" / "screenshots"
PROGRAM = (sys.executable, str(ROOT / "gen_img_diffusers.py"), "--ckpt", str(ROOT / "examples" / "shapes"))
SMALL = ("--W", "128", "--H", "128", "--steps", "20", "--scale", "5")
PAGE_PX = (1000, 640)  # of the browser's window
LINES = (
    "a large red circle in the centre, on a white background --d 1",
    "a large striped blue star, on a yellow background --d 7",
    "a shaded cyan ring in the centre, on a brown background --d 7",
)
TERMINAL_PX, LINE_PX, TEXT_PX, BORDER_PX = 590, 19, 14, 16


def page(file: Path) -> None:
    """The page of a run, from its top."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place, "outputs")  # which the page is headed with
        folder.mkdir()
        prompts = Path(folder, "prompts.txt")
        prompts.write_text("".join(f"{line}\n" for line in LINES))
        subprocess.run([*PROGRAM, *SMALL, "--outdir", folder, "--from_file", prompts, "--html"], check=True)
        browser = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        size = f"--window-size={PAGE_PX[0]},{PAGE_PX[1]}"
        shot = f"--screenshot={folder}/page.png"
        profile = f"--user-data-dir={folder}/profile"
        subprocess.run([*browser, size, shot, profile, Path(folder, "index.html").as_uri()], check=True)
        _save(Image.open(f"{folder}/page.png"), file)


def loop(file: Path) -> None:
    """A terminal with three prompts, and beside it the window of the last picture."""
    display = f":{os.getpid() % 10_000 + 100}"
    server = subprocess.Popen(["Xvfb", display, "-screen", "0", "640x480x24"], stderr=subprocess.DEVNULL)
    environment = os.environ | {"DISPLAY": display}
    try:
        time.sleep(2)  # it has no other way to say that it is there
        with tempfile.TemporaryDirectory() as folder:
            argv = [*PROGRAM, *SMALL, "--outdir", "outputs", "--interactive"]
            process = subprocess.Popen(
                argv,
                env=environment,
                cwd=folder,
                text=True,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
            shown = _talk(process, environment, folder)
            _save(_side_by_side(shown, Image.open(f"{folder}/window.png")), file)
    finally:
        server.terminate()
        server.wait()


def _talk(process: subprocess.Popen, environment: dict[str, str], folder: str) -> str:
    """Type the prompts, press a key in each window but the last, and take that one's picture: what was to be read."""

    def x(*command: str) -> str:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
        return done.stdout.strip()

    assert process.stdin is not None
    for line in LINES:
        process.stdin.write(f"{line}\n")
        process.stdin.flush()
        title = line.partition(",")[0]
        x("xdotool", "search", "--sync", "--name", title)
        time.sleep(2)  # it is painted some time after it is there
        if line == LINES[-1]:
            x("import", "-window", x("xdotool", "search", "--name", title).splitlines()[-1], f"{folder}/window.png")
        while (windows := x("xdotool", "search", "--name", title)) and process.poll() is None:
            x("xdotool", "key", "--window", windows.splitlines()[-1], "space")
            time.sleep(0.5)
    read, _ = process.communicate()
    for line in LINES:  # a pipe does not show what is typed
        read = read.replace("Type prompt: ", f"Type prompt:\0{line}\n", 1)
    return read.replace("\0", " ")


def _side_by_side(text: str, window: Image.Image) -> Image.Image:
    lines = [line.rpartition("\r")[2] for line in text.splitlines()]
    height = max(LINE_PX * len(lines), window.height) + 2 * BORDER_PX
    shot = Image.new("RGB", (TERMINAL_PX + window.width + 2 * BORDER_PX, height), (24, 26, 30))
    pen, font = ImageDraw.Draw(shot), ImageFont.load_default(TEXT_PX)
    for row, line in enumerate(lines):
        pen.text((BORDER_PX, BORDER_PX + row * LINE_PX), line, (220, 222, 226), font)
    shot.paste(window.convert("RGB"), (TERMINAL_PX + BORDER_PX, (height - window.height) // 2))
    return shot


def _save(shot: Image.Image, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    shot.convert("RGB").quantize(128, dither=Image.Dither.NONE).save(file, optimize=True)


def main() -> None:
    """Take both, or one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("page", "loop"), help="take this one alone")
    only = parser.parse_args().only
    for shot in (page, loop):
        if only in (None, shot.__name__):
            shot(SHOTS / f"{shot.__name__}.png")


if __name__ == "__main__":
    main()
