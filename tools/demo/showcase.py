"""Draw the pictures of the README and of docs/ anew, by the very commands that are printed above them.

python -m tools.demo.showcase                   # all that stand in docs/pictures
python -m tools.demo.showcase lora regions      # these of them
python -m tools.demo.showcase --inputs          # the pictures that the commands start from, in examples/pictures

A block of commands with a picture of docs/pictures below it makes this picture: a strip of the pictures that its
commands name (a source, a mask, a guide), then of those they draw, in their order. tests/test_docs.py draws them as
well, and says how far they may be off.
"""

import argparse
import contextlib
import io
import itertools
import os
import re
import shlex
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

import gen_img_diffusers
from tools.demo.render import render
from tools.demo.scenes import Scene, Thing

ROOT = Path(gen_img_diffusers.__file__).resolve().parent
PICTURES = ROOT / "docs" / "pictures"
INPUTS = ROOT / "examples" / "pictures"
PROGRAM = ["python", "gen_img_diffusers.py"]
NAMING_PICTURES = ("--image_path", "--mask_path", "--guide_image_path")  # options whose picture is shown, too
PREPARING = ("printf", "mkdir")  # commands of the shell that write what the program's own ones read
COLUMNS, GAP_PX = 4, 4


@dataclass(frozen=True)
class Block:
    """A block of shell commands in a page."""

    page: Path
    line: int  # of its first command, from 1
    commands: tuple[str, ...]  # each on one line
    picture: str | None  # its name in docs/pictures, without the ending


def pages() -> list[Path]:
    """All that a user reads: the README and docs/, the examples' pages too."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "examples").rglob("*.md"))]


def blocks(page: Path) -> list[Block]:
    """The blocks of shell commands in a page."""
    text = page.read_text(encoding="utf-8")
    found = []
    for match in re.finditer(
        r"^```bash\n(.*?)^```\n(?:\n!\[[^\]]*\]\((?:\S*/)?pictures/([\w-]+)\.png\))?", text, re.M | re.S
    ):
        lines = re.sub(r"\\\n\s*", "", match[1]).splitlines()
        commands = tuple(line for line in lines if line and not line.startswith("#"))
        found.append(Block(page, text.count("\n", 0, match.start()) + 2, commands, match[2]))
    return found


def is_of_program(command: str) -> bool:
    """Whether a command starts the program, as it is printed for an activated environment."""
    return shlex.split(command)[:2] == PROGRAM


def prepare(block: Block) -> None:
    """Run what of a block writes files for the program, in the current folder."""
    for command in block.commands:
        if command.startswith(PREPARING) and PROGRAM[1] not in command:
            subprocess.run(["bash", "-c", command], check=True)


def draw(block: Block) -> Image.Image:
    """Run a block's commands in a folder of their own: a strip of what they name and of what they draw."""
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        Path("examples").symlink_to(ROOT / "examples")
        prepare(block)
        commands = [shlex.split(command)[2:] for command in block.commands if is_of_program(command)]
        named = [path for argv in commands for path in _named_pictures(argv)]
        drawn = [path for argv in commands for path in _drawn(argv)]
        return strip([Image.open(path).convert("RGB") for path in dict.fromkeys([*named, *drawn])])


def _named_pictures(argv: list[str]) -> Iterator[Path]:
    for option, value in itertools.pairwise(argv):
        if option in NAMING_PICTURES:
            yield Path(value)


def _drawn(argv: list[str]) -> Iterator[Path]:
    """Draw; the guides that were saved beside a picture stand before it."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        status = gen_img_diffusers.main(argv)
    if status:
        raise SystemExit(f"{shlex.join(argv)}: exit status {status}")
    for picture in sorted(map(Path, output.getvalue().splitlines())):  # by number; told in the order they are saved
        yield from sorted(picture.parent.glob(f"{picture.stem}_guide*.png"))
        yield picture


def strip(pictures: list[Image.Image]) -> Image.Image:
    """Pictures in rows of COLUMNS, on white."""
    columns = min(COLUMNS, len(pictures))
    rows = [pictures[start : start + columns] for start in range(0, len(pictures), columns)]
    width = max(sum(picture.width + GAP_PX for picture in row) for row in rows) - GAP_PX
    heights = [max(picture.height for picture in row) for row in rows]
    page = Image.new("RGB", (width, sum(heights) + GAP_PX * (len(rows) - 1)), "white")
    top = 0
    for row, height in zip(rows, heights):
        left = 0
        for picture in row:
            page.paste(picture, (left, top))
            left += picture.width + GAP_PX
        top += height + GAP_PX
    return page


def showcases() -> dict[str, Block]:
    """The blocks that make the pictures of docs/pictures, by their names."""
    return {block.picture: block for page in pages() for block in blocks(page) if block.picture}


def write_inputs(folder: Path) -> None:
    """The pictures that commands start from: a rough sketch, a finished picture with a mask, a heart, and a map."""
    sketch = np.full((128, 128, 3), (216, 190, 60), np.uint8)
    cv2.fillPoly(sketch, [np.array([(34, 40), (92, 34), (98, 88), (60, 100), (30, 84)])], (200, 60, 40), cv2.LINE_AA)
    square = Thing("square", "blue", "flat", "medium", "right", 0.74, 0.5, 0.18)
    circle = Thing("circle", "red", "flat", "medium", "left", 0.26, 0.5, 0.18)
    heart = Thing("heart", "red", "flat", "large", "left", 0.36, 0.5, 0.25)
    mask, regions = np.zeros((128, 128), np.uint8), np.zeros((128, 128, 3), np.uint8)
    mask[24:104, 66:124] = 255
    regions[:, :64, 0] = regions[:, 64:, 1] = 255
    made = {
        "sketch": sketch,
        "photo": render(Scene("white", (circle, square))),
        "mask": mask,
        "heart": render(Scene("yellow", (heart,))),
        "left_red_right_green": regions,
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, pixels in made.items():
        Image.fromarray(pixels).save(folder / f"{name}.png", optimize=True)


def main() -> None:
    """Write the pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="pictures, without their ending (default: all)")
    parser.add_argument("--inputs", action="store_true", help="write examples/pictures instead")
    parser.add_argument("--out", type=Path, default=PICTURES, help="folder (default: docs/pictures)")
    args = parser.parse_args()
    if args.inputs:
        write_inputs(INPUTS)
        return
    found = showcases()
    for name in args.names or found:
        draw(found[name]).save(args.out / f"{name}.png", optimize=True)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
