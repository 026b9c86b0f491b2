"""Draw the demo's scenes: numpy and OpenCV, four times supersampled, nothing left to chance."""

from __future__ import annotations

import cv2
import numpy as np

from tools.demo.scenes import COLOURS, Scene, Thing

SUPERSAMPLING = 4
DOT_SPACING = 12  # pixels between dots of 8 pixels
SHIFT = 4  # fractional bits of OpenCV's coordinates


def circle(radius: float = 1.0, x: float = 0.0, y: float = 0.0) -> np.ndarray:
    angles = np.linspace(0, 2 * np.pi, 64, endpoint=False)
    return np.stack([x + radius * np.cos(angles), y + radius * np.sin(angles)], 1)


def heart() -> np.ndarray:
    """The classic curve x = 16 sin³t, y = 13 cos t - 5 cos 2t - 2 cos 3t - cos 4t, fitted to the unit box."""
    t = np.linspace(0, 2 * np.pi, 64, endpoint=False)
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack([np.sin(t) ** 3, -(y + 2.5) / 14.5], 1)


def star() -> np.ndarray:
    angles = np.arange(10) * np.pi / 5 - np.pi / 2
    radii = np.where(np.arange(10) % 2 == 0, 1.05, 0.45)
    return np.stack([radii * np.cos(angles), radii * np.sin(angles) + 0.05], 1)


def crescent() -> np.ndarray:
    """A moon open to the right: the outer circle's left part, back along the inner circle."""
    corner = np.arccos(0.35)
    outer = np.linspace(corner, 2 * np.pi - corner, 48)
    inner_x, tip_x, tip_y = 0.55, np.cos(corner), np.sin(corner)
    inner_radius = np.hypot(tip_x - inner_x, tip_y)
    bend = np.arctan2(tip_y, tip_x - inner_x)
    inner = np.linspace(2 * np.pi - bend, bend, 48)
    points = [
        np.stack([np.cos(outer), np.sin(outer)], 1),
        np.stack([inner_x + inner_radius * np.cos(inner), inner_radius * np.sin(inner)], 1),
    ]
    return np.concatenate(points) + np.array((0.3, 0.0))


def cross() -> np.ndarray:
    a = 0.34
    return np.array(
        [(-a, -1), (a, -1), (a, -a), (1, -a), (1, a), (a, a), (a, 1), (-a, 1), (-a, a), (-1, a), (-1, -a), (-a, -a)]
    )


# Outlines in the box -1…1, y downwards; a second one is a hole.
OUTLINES: dict[str, list[np.ndarray]] = {
    "circle": [circle()],
    "square": [np.array([(-0.88, -0.88), (0.88, -0.88), (0.88, 0.88), (-0.88, 0.88)])],
    "triangle": [np.array([(0, -0.95), (1.05, 0.85), (-1.05, 0.85)])],
    "star": [star()],
    "heart": [heart()],
    "ring": [circle(), circle(0.52)],
    "crescent": [crescent()],
    "cross": [cross()],
}


def outline_points(thing: Thing, width: int, height: int) -> list[np.ndarray]:
    """The shape's outlines in supersampled pixels with SHIFT fractional bits."""
    centre = np.array([thing.x * width, thing.y * height])
    scale = SUPERSAMPLING * (1 << SHIFT)
    return [
        np.round((o * thing.radius * min(width, height) + centre) * scale).astype(np.int32)
        for o in OUTLINES[thing.shape]
    ]


def shrink(mask: np.ndarray) -> np.ndarray:
    """Supersampled mask 0…255 → coverage 0…1 at picture size."""
    height, width = mask.shape[0] // SUPERSAMPLING, mask.shape[1] // SUPERSAMPLING
    return cv2.resize(mask, (width, height), interpolation=cv2.INTER_AREA).astype(np.float32) / 255


def coverage(thing: Thing, width: int, height: int) -> np.ndarray:
    """Which share of each pixel the object covers, (height, width)."""
    mask = np.zeros((height * SUPERSAMPLING, width * SUPERSAMPLING), np.uint8)
    cv2.fillPoly(mask, outline_points(thing, width, height), 255, shift=SHIFT)
    return shrink(mask)


def border(thing: Thing, width: int, height: int) -> np.ndarray:
    """Coverage of an 8 pixels wide stroke along the outlines; the fill hides its inner half."""
    mask = np.zeros((height * SUPERSAMPLING, width * SUPERSAMPLING), np.uint8)
    cv2.polylines(mask, outline_points(thing, width, height), True, 255, 8 * SUPERSAMPLING, shift=SHIFT)
    return shrink(mask)


def second_colour(colour: str) -> np.ndarray:
    """What stripes and shading go to: a darker tone, for black a dark grey; no ground is close to any of them."""
    if colour == "black":
        return np.array((78, 78, 78), np.float32)
    return np.array(COLOURS[colour], np.float32) * (0.68 if colour == "white" else 0.6)


def border_colour(thing: Thing, ground: str) -> np.ndarray:
    dark = "black" in (thing.colour, ground)
    return np.array(
        COLOURS["white" if dark and "white" not in (thing.colour, ground) else "grey" if dark else "black"], np.float32
    )


def paint(thing: Thing, width: int, height: int) -> np.ndarray:
    """The object's surface as a whole picture, (height, width, 3) or one colour (3)."""
    first = np.array(COLOURS[thing.colour], np.float32)
    if thing.style in ("flat", "outlined"):
        return first
    rows, columns = np.mgrid[:height, :width].astype(np.float32) + 0.5
    radius = thing.radius * min(width, height)
    rows, columns = rows - thing.y * height, columns - thing.x * width
    if thing.style == "striped":
        mix = np.clip(0.5 + 1.5 * (np.abs((rows / 14) % 1 - 0.5) * 14 - 3.5), 0, 1)
    elif thing.style == "shaded":
        mix = np.clip(0.5 + (rows + columns) / (3 * radius), 0, 1)
    elif thing.style == "dipped":  # into black, up to its middle
        mix = np.clip(0.5 + rows[..., None], 0, 1)
        return first + mix * (np.array(COLOURS["black"], np.float32) - first)
    elif thing.style == "dotted":
        far = np.hypot(columns % DOT_SPACING - DOT_SPACING / 2, rows % DOT_SPACING - DOT_SPACING / 2)
        mix = np.clip(4.0 - far, 0, 1)
        dot = COLOURS["black" if thing.colour in ("white", "yellow", "cyan", "pink") else "white"]
        return first + mix[..., None] * (np.array(dot, np.float32) - first)
    else:
        raise ValueError(f"no such style: {thing.style}")
    return first + mix[..., None] * (second_colour(thing.colour) - first)


def render(scene: Scene) -> np.ndarray:
    """A scene as a picture, uint8 RGB of (height, width, 3)."""
    height, width = scene.height, scene.width
    picture = np.empty((height, width, 3), np.float32)
    picture[:] = COLOURS[scene.ground]
    for thing in scene.things:
        covered = coverage(thing, width, height)[..., None]
        if thing.style == "outlined":
            stroke = border(thing, width, height)[..., None]
            picture += stroke * (border_colour(thing, scene.ground) - picture)
        picture += covered * (paint(thing, width, height) - picture)
    return np.clip(picture + 0.5, 0, 255).astype(np.uint8)
