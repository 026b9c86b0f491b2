"""Draw what the preprocessings of `--control_net_preps` make of one picture, for docs/control.md.

python -m tools.demo.preprocessing --out examples/preprocessing

The picture is a landscape that this script paints, with light, shade, texture and straight and crooked outlines.
"""

import argparse
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from library.draw.preprocessing import preprocessed
from library.settings.preprocessing import PREPROCESSORS, preprocessing

WIDTH, HEIGHT = 384, 288
SHOWN = (192, 144)  # (width, height) of one in the strip
LABEL_PX = 16
COLUMNS = 4
# the picture itself, then lines, then what keeps its brightness or colours
STRIPS = {
    "lines": ("none", "canny", "scribble", "softedge", "lineart", "mlsd", "threshold"),
    "surfaces": ("gray", "invert", "tile", "blur", "shuffle", "inpaint"),
}


def noise(rng: np.random.Generator, cell_px: int, octaves: int = 4) -> np.ndarray:
    """Cloudy noise (height, width) from 0 to 1: finer and finer, fainter and fainter."""
    total = np.zeros((HEIGHT, WIDTH), np.float32)
    for octave in range(octaves):
        cell = max(1, cell_px >> octave)
        grid = rng.random((HEIGHT // cell + 2, WIDTH // cell + 2), dtype=np.float32)
        size = (grid.shape[1] * cell, grid.shape[0] * cell)
        total += cv2.resize(grid, size, interpolation=cv2.INTER_CUBIC)[:HEIGHT, :WIDTH] / 2**octave
    return (total - total.min()) / np.ptp(total)


def photograph(seed: int = 7) -> np.ndarray:
    """A house on a meadow before mountains: (height, width, 3) uint8."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH].astype(np.float32)
    scene = _mixed((96, 150, 214), (214, 228, 236), y / 150)
    clouds = np.clip(noise(rng, 96) * 2.4 - 1.1, 0, 1) * np.clip(1 - y / 150, 0, 1)
    scene = _over(scene, (250, 250, 248), clouds)
    for base, rise, colour in ((120, 70, (120, 136, 164)), (150, 44, (70, 98, 92))):
        crest = base - rise * noise(rng, 80, 5)[0]
        light = 0.75 + 0.5 * noise(rng, 24)
        scene = np.where((y > crest)[..., None], np.array(colour) * light[..., None], scene)
    meadow = _mixed((150, 164, 74), (70, 112, 44), (y - 168) / 120) * (0.7 + 0.6 * noise(rng, 6, 3))[..., None]
    scene = np.where((y > 168 + 5 * np.sin(x / 40))[..., None], meadow, scene)
    scene = np.clip(scene, 0, 255).astype(np.uint8)
    _house(scene, rng)
    _tree(scene, rng)
    _ball(scene)
    grain = rng.normal(0, 2, scene.shape)
    return np.clip(cv2.GaussianBlur(scene, (0, 0), 0.6) + grain, 0, 255).astype(np.uint8)


def _mixed(first: tuple[int, ...], second: tuple[int, ...], share: np.ndarray) -> np.ndarray:
    share = np.clip(share, 0, 1)[..., None]
    return np.array(first) * (1 - share) + np.array(second) * share


def _over(scene: np.ndarray, colour: tuple[int, ...], opacity: np.ndarray) -> np.ndarray:
    return scene * (1 - opacity[..., None]) + np.array(colour) * opacity[..., None]


def _house(scene: np.ndarray, rng: np.random.Generator) -> None:
    def face(points: list[tuple[int, int]], colour: tuple[int, int, int]) -> None:
        cv2.fillPoly(scene, [np.array(points)], colour, cv2.LINE_AA)

    face([(86, 214), (330, 226), (300, 240), (96, 232)], (58, 80, 36))  # its shadow
    face([(96, 150), (200, 150), (200, 228), (96, 224)], (226, 214, 190))
    face([(200, 150), (262, 142), (262, 212), (200, 228)], (168, 152, 130))
    face([(84, 154), (112, 98), (212, 98), (208, 154)], (164, 74, 52))
    face([(208, 154), (212, 98), (272, 146)], (124, 54, 40))
    face([(124, 106), (124, 78), (138, 78), (138, 106)], (110, 76, 66))
    for row in range(104, 152, 7):  # tiles of the roof
        cv2.line(scene, (110 - (row - 98) // 2, row), (211, row), (140, 60, 44), 1, cv2.LINE_AA)
    for left in (108, 168):
        face([(left, 168), (left + 20, 168), (left + 20, 194), (left, 194)], (66, 84, 104))
        cv2.rectangle(scene, (left, 168), (left + 20, 194), (246, 244, 236), 2)
        cv2.line(scene, (left + 10, 168), (left + 10, 194), (246, 244, 236), 1)
    face([(138, 178), (158, 178), (158, 227), (138, 226)], (92, 58, 38))
    face([(222, 166), (244, 163), (244, 188), (222, 192)], (50, 62, 76))
    scene[150:228, 96:262] = np.clip(scene[150:228, 96:262] + rng.normal(0, 3, (78, 166, 3)), 0, 255)


def _tree(scene: np.ndarray, rng: np.random.Generator) -> None:
    cv2.fillPoly(scene, [np.array([(306, 232), (313, 150), (321, 150), (330, 232)])], (84, 62, 44), cv2.LINE_AA)
    for _ in range(420):  # leaves, lit from the left above
        angle, reach = rng.uniform(0, 2 * np.pi), np.sqrt(rng.random())
        dx, dy = 44 * reach * np.cos(angle), 52 * reach * np.sin(angle)
        light = 0.75 - (dx / 44 + dy / 52) * 0.28 + rng.uniform(-0.12, 0.12)
        colour = tuple(int(min(255, channel * light)) for channel in (96, 138, 56))
        cv2.ellipse(scene, (int(317 + dx), int(112 + dy)), (7, 4), float(rng.uniform(0, 180)), 0, 360, colour, -1)


def _ball(scene: np.ndarray) -> None:
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH].astype(np.float32)
    cv2.ellipse(scene, (72, 262), (30, 8), 0, 0, 360, (52, 76, 34), -1, cv2.LINE_AA)
    dx, dy = (x - 56) / 26, (y - 240) / 26
    inside = dx**2 + dy**2 < 1
    depth = np.sqrt(np.clip(1 - dx**2 - dy**2, 0, 1))
    light = np.clip(0.25 + 0.75 * (depth * 0.6 - dx * 0.5 - dy * 0.6), 0.15, 1.2)[..., None]
    striped = (np.abs(dx * 0.8 + dy * 0.6) < 0.3)[..., None]
    colours = np.where(striped, (244, 240, 230), (208, 44, 40)) * light
    scene[inside] = np.clip(colours, 0, 255).astype(np.uint8)[inside]


def strip(names: tuple[str, ...], picture: np.ndarray) -> Image.Image:
    """What each makes of the picture, under its name."""
    rows = -(-len(names) // COLUMNS)
    width, height = SHOWN
    page = Image.new("RGB", (COLUMNS * (width + 4) - 4, rows * (height + LABEL_PX + 4) - 4), "white")
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(12)
    for place, name in enumerate(names):
        left, top = place % COLUMNS * (width + 4), place // COLUMNS * (height + LABEL_PX + 4)
        pen.text((left, top), "the picture" if name == "none" else name, "black", font)
        shown = Image.fromarray(made(name, picture)).resize(SHOWN, Image.Resampling.LANCZOS)
        page.paste(shown, (left, top + LABEL_PX))
    return page.quantize(96, dither=Image.Dither.NONE)


def made(name: str, picture: np.ndarray) -> np.ndarray:
    """The picture preprocessed, as it is saved: what is masked for `inpaint` is the ball."""
    chosen = preprocessing(name)
    if chosen is None:
        return picture
    by = PREPROCESSORS[name]
    mask = cv2.circle(np.zeros(picture.shape[:2], np.uint8), (58, 242), 40, 255, -1)
    further = [*([1] if by.by_seed else []), *([mask] if by.by_mask else [])]
    return np.clip(preprocessed(picture, chosen, *further), 0, 255).astype(np.uint8)


def main() -> None:
    """Write the strips."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    picture = photograph()
    for name, names in STRIPS.items():
        strip(names, picture).save(args.out / f"{name}.png", optimize=True)


if __name__ == "__main__":
    main()
