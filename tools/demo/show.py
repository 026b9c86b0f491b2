"""Draw the pictures of the results page: a strip for the README and sheets for a look with the eye.

python -m tools.demo.show --model examples/shapes --out examples/shapes
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

from tools.demo.drawing import Drawer
from tools.demo.evaluate import FRESH_SEED, draw_all, fresh

STRIP = (
    "a red circle in the centre, on a white background",
    "a large striped blue star, on a yellow background",
    "an outlined orange heart on a black background",
    "a shaded cyan ring in the centre, on a brown background",
    "a yellow crescent at the top, blue background",
    "a red square on the left, a green triangle on the right, on a white background",
)


def tile(pictures: list[np.ndarray], columns: int, gap: int = 4) -> Image.Image:
    """Pictures of one size in rows of `columns` on white."""
    height, width = pictures[0].shape[:2]
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), "white")
    for i, picture in enumerate(pictures):
        sheet.paste(Image.fromarray(picture), (i % columns * (width + gap), i // columns * (height + gap)))
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sheet", type=int, default=0, help="also sheet.png of so many fresh captions")
    args = parser.parse_args()
    drawer = Drawer.load(args.model)
    tile(list(drawer.draw(list(STRIP), [7] * len(STRIP))), len(STRIP)).save(args.out / "strip.png")
    if args.sheet:
        tasks = fresh(args.sheet, FRESH_SEED)
        tile(draw_all(drawer, tasks), 8).save(args.out / "sheet.png")
        for i, (_, said) in enumerate(tasks):
            print(i, said.text)


if __name__ == "__main__":
    main()
