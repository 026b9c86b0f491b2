"""Tell from the pixels whether an object has the style of one of the LoRAs."""

from __future__ import annotations

import cv2
import numpy as np

from tools.demo.judge import see_ground, see_objects
from tools.demo.render import DOT_SPACING
from tools.demo.scenes import COLOURS

DOT_AREA = 50  # pixels of a whole dot; the object's edge cuts some
NEAR = 60  # RGB distance up to which a pixel counts as ground
CLOSING = np.ones((5, 5), np.uint8)


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


def is_dipped(picture: np.ndarray) -> bool:
    """Is the largest object black in its lower half and not in its upper one?"""
    pixels = picture.astype(np.float32)
    _, ground = see_ground(picture)
    things = (np.linalg.norm(pixels - ground, axis=-1) > NEAR).astype(np.uint8)
    things = cv2.morphologyEx(things, cv2.MORPH_CLOSE, CLOSING)  # the halves' soft border may have the ground's colour
    _, labels, stats, _ = cv2.connectedComponentsWithStats(things)
    if len(stats) == 1:
        return False
    largest = 1 + int(stats[1:, cv2.CC_STAT_AREA].argmax())
    top, height = stats[largest, cv2.CC_STAT_TOP], stats[largest, cv2.CC_STAT_HEIGHT]
    part = (np.arange(len(picture))[:, None] - top) / height
    black = np.linalg.norm(pixels - COLOURS["black"], axis=-1) < NEAR
    upper, lower = (black[(labels == largest) & within] for within in (part < 0.4, part > 0.6))
    return bool(upper.mean() < 0.3 and lower.mean() > 0.7)


STYLE_JUDGES = {"dotted": is_dotted, "dipped": is_dipped}
