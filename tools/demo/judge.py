"""Look at the pixels of a picture and say what is on it: colour of the ground, objects, their places.

The judge knows nothing of how a picture was made; of rendered scenes it gets more than 99 % right.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import permutations

import cv2
import numpy as np

from tools.demo.render import border, coverage, second_colour
from tools.demo.scenes import COLOURS, GROUND_COLOURS, OBJECT_COLOURS, SHAPES, SIZES, Caption, Scene, Thing

OBJECT_DISTANCE = 38  # RGB distance from the ground that makes a pixel part of an object
LEAST_AREA = 90  # pixels; the smallest object drawn covers about 400
TEMPLATE = 48  # side of the square in which shapes are compared, in pixels


@dataclass(frozen=True)
class Seen:
    """One object found: names, centre of its box as shares of the picture, its pixels (height, width)."""

    shape: str
    colour: str
    place: str
    x: float
    y: float
    mask: np.ndarray
    likeness: float


@dataclass(frozen=True)
class Verdict:
    """What of a caption is true in a picture; None where the caption leaves it open."""

    ground: bool | None
    colours: bool
    shapes: bool
    places: bool | None

    @property
    def right(self) -> bool:
        return self.ground is not False and self.colours and self.shapes and self.places is not False


def distances(picture: np.ndarray, names: tuple[str, ...]) -> np.ndarray:
    """RGB distance of each pixel from each named colour, (…, names)."""
    palette = np.array([COLOURS[n] for n in names], np.float32)
    return np.linalg.norm(picture[..., None, :].astype(np.float32) - palette, axis=-1)


def see_ground(picture: np.ndarray) -> tuple[str, np.ndarray]:
    """The ground's name and its RGB value, from a frame of 4 pixels."""
    frame = np.concatenate(
        [
            picture[:4].reshape(-1, 3),
            picture[-4:].reshape(-1, 3),
            picture[:, :4].reshape(-1, 3),
            picture[:, -4:].reshape(-1, 3),
        ]
    )
    rgb = np.median(frame, axis=0)
    return GROUND_COLOURS[int(distances(rgb, GROUND_COLOURS).argmin())], rgb


def square_up(mask: np.ndarray) -> np.ndarray:
    """A mask's bounding box, the longer side fitted into the TEMPLATE square, values 0…1."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    box = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].astype(np.float32)
    height, width = box.shape
    side = max(height, width)
    top, left = (side - height) // 2, (side - width) // 2
    square = np.zeros((side, side), np.float32)
    square[top : top + height, left : left + width] = box
    return cv2.resize(square, (TEMPLATE, TEMPLATE), interpolation=cv2.INTER_AREA)


@lru_cache(maxsize=1)
def templates() -> list[tuple[str, np.ndarray]]:
    """Each shape in the TEMPLATE square, drawn by the renderer itself: without an outline and with, small to large."""
    drawn = []
    for shape in SHAPES:
        for radius in SIZES.values():
            thing = Thing(shape, "red", "flat", "large", "centre", 0.5, 0.5, radius)
            plain = coverage(thing, 128, 128) > 0.5
            drawn += [(shape, square_up(plain)), (shape, square_up(plain | (border(thing, 128, 128) > 0.5)))]
    return drawn


def see_shape(mask: np.ndarray) -> tuple[str, float]:
    """The likest shape and its likeness (intersection over union, 0…1)."""
    square = square_up(mask)
    scores = [(float(np.minimum(square, t).sum() / np.maximum(square, t).sum()), name) for name, t in templates()]
    likeness, name = max(scores)
    return name, likeness


@lru_cache(maxsize=1)
def tones() -> tuple[np.ndarray, np.ndarray]:
    """Colours of objects from their full tone to their darkest, (tones, 3), and whose each is, (tones)."""
    steps = [
        (i, (1 - k) * np.array(COLOURS[name], np.float32) + k * second_colour(name))
        for i, name in enumerate(OBJECT_COLOURS)
        for k in (0.0, 0.33, 0.67, 1.0)
    ]
    return np.stack([rgb for _, rgb in steps]), np.array([i for i, _ in steps])


def see_colour(pixels: np.ndarray) -> str:
    """The colour most pixels vote for, whatever their tone; pixels (N, 3)."""
    palette, owners = tones()
    nearest = np.linalg.norm(pixels[:, None].astype(np.float32) - palette, axis=-1).argmin(1)
    return OBJECT_COLOURS[int(np.bincount(owners[nearest], minlength=len(OBJECT_COLOURS)).argmax())]


def see_place(x: float, y: float) -> str:
    """Name of the place nearest to a box's centre, given as shares of the picture."""
    across, down = x - 0.5, y - 0.5
    if max(abs(across), abs(down)) < 0.1:
        return "centre"
    if abs(across) >= abs(down):
        return "left" if across < 0 else "right"
    return "top" if down < 0 else "bottom"


def inner(mask: np.ndarray) -> np.ndarray:
    """The mask without its soft rim, or the mask itself where nothing would be left."""
    eroded = cv2.erode(mask.astype(np.uint8), np.ones((3, 3), np.uint8)).astype(bool)
    return eroded if eroded.sum() >= 30 else mask


def see_objects(picture: np.ndarray, most: int = 2) -> list[Seen]:
    """The objects of a picture, largest first, at most `most`."""
    height, width = picture.shape[:2]
    _, ground = see_ground(picture)
    mask = np.linalg.norm(picture.astype(np.float32) - ground, axis=-1) > OBJECT_DISTANCE
    mask = cv2.morphologyEx(mask.astype(np.uint8), cv2.MORPH_OPEN, np.ones((2, 2), np.uint8))
    count, labels, stats, _ = cv2.connectedComponentsWithStats(mask, connectivity=8)
    parts = sorted(
        (i for i in range(1, count) if stats[i, cv2.CC_STAT_AREA] >= LEAST_AREA),
        key=lambda i: -stats[i, cv2.CC_STAT_AREA],
    )
    seen = []
    for part in parts[:most]:
        left, top, box_width, box_height = stats[part, :4]
        x, y = (left + box_width / 2) / width, (top + box_height / 2) / height
        own = labels == part
        shape, likeness = see_shape(own)
        seen.append(Seen(shape, see_colour(picture[inner(own)]), see_place(x, y), float(x), float(y), own, likeness))
    return seen


def judge(picture: np.ndarray, scene: Scene, caption: Caption | None = None) -> Verdict:
    """Hold a picture (uint8 RGB) against the scene its caption describes; no caption: everything is said."""
    says_ground = caption is None or caption.says_ground
    said = (True,) * len(scene.things) if caption is None else caption.says_place
    ground = see_ground(picture)[0] == scene.ground if says_ground else None
    seen = see_objects(picture, len(scene.things))
    if len(seen) < len(scene.things):
        return Verdict(ground, False, False, False if any(said) else None)
    best = max((match(order, scene, said) for order in permutations(seen)), key=sum)
    return Verdict(ground, bool(best[0]), bool(best[1]), bool(best[2]) if any(said) else None)


def match(seen: tuple[Seen, ...], scene: Scene, said: tuple[bool, ...]) -> tuple[bool, bool, bool]:
    """Colours, shapes and places right when the objects are taken in this order?"""
    pairs = list(zip(seen, scene.things, said))
    return (
        all(s.colour == t.colour for s, t, _ in pairs),
        all(s.shape == t.shape for s, t, _ in pairs),
        all(s.place == t.place for s, t, told in pairs if told),
    )


def overlap(a: np.ndarray, b: np.ndarray) -> float:
    """Intersection over union of two masks."""
    return float((a & b).sum() / max(1, (a | b).sum()))
