"""Tell from the pixels whether an object has the style of one of the LoRAs."""

from __future__ import annotations

import cv2
import numpy as np

from tools.demo.judge import see_ground, see_objects
from tools.demo.render import DOT_SPACING, SHADOW_LIGHT, SHADOW_OFFSET
from tools.demo.scenes import COLOURS

DOT_AREA = 50  # pixels of a whole dot; the object's edge cuts some
NEAR = 60  # RGB distance up to which a pixel counts as dot or shadow


def is_dotted(picture: np.ndarray) -> bool:
    """Does the largest object hold several separate dots in black or white?"""
    seen = see_objects(picture, 1)
    if not seen:
        return False
    contours, _ = cv2.findContours(seen[0].mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    filled = cv2.drawContours(np.zeros(picture.shape[:2], np.uint8), contours, -1, 1, cv2.FILLED)
    filled = cv2.erode(filled, np.ones((3, 3), np.uint8))  # without the soft rim, which blends into the ground
    colour = np.array(COLOURS[seen[0].colour], np.float32)
    for name in {"white", "black"} - {seen[0].colour}:
        way = np.array(COLOURS[name], np.float32) - colour
        towards = (picture.astype(np.float32) - colour) @ way / (way @ way)  # 0 is the object, 1 the dot's middle
        _, _, stats, _ = cv2.connectedComponentsWithStats((towards > 0.5).astype(np.uint8) & filled, connectivity=4)
        areas = stats[1:, cv2.CC_STAT_AREA]
        if ((areas >= DOT_AREA / 4) & (areas <= DOT_SPACING**2 / 1.5)).sum() >= 3:
            return True
    return False


def is_shadowed(picture: np.ndarray) -> bool:
    """Is there, below the objects, the ground in a darker tone?"""
    _, ground = see_ground(picture)
    if ground.max() < NEAR:
        return False
    pixels = picture.astype(np.float32)
    light = pixels @ ground / (ground @ ground)  # (height, width), 1 is the ground itself
    same_hue = np.linalg.norm(pixels - light[..., None] * ground, axis=-1) < NEAR * 0.6
    shadow = same_hue & (light > 0.5 * SHADOW_LIGHT) & (light < 0.75)
    things = (np.linalg.norm(pixels - ground, axis=-1) > NEAR) & ~shadow
    things = cv2.morphologyEx(things.astype(np.uint8), cv2.MORPH_OPEN, np.ones((5, 5), np.uint8)).astype(bool)
    expected = np.zeros_like(things)
    expected[SHADOW_OFFSET:] = things[:-SHADOW_OFFSET]
    expected &= ~cv2.dilate(things.astype(np.uint8), np.ones((3, 3), np.uint8)).astype(bool)
    return bool(expected.sum() >= 20 and shadow[expected].mean() >= 0.5)


STYLE_JUDGES = {"dotted": is_dotted, "shadow": is_shadowed}
