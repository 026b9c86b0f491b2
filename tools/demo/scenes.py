"""The demo model's world: coloured shapes on coloured grounds, as data, with captions in varying words.

A scene is drawn by `render.py`, described by `caption` here, and recognised again by `judge.py`.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

COLOURS = {
    "red": (215, 35, 40),
    "orange": (245, 140, 25),
    "yellow": (250, 225, 50),
    "green": (35, 155, 65),
    "cyan": (70, 215, 220),
    "blue": (40, 75, 215),
    "purple": (130, 45, 165),
    "pink": (250, 150, 195),
    "white": (248, 248, 248),
    "black": (20, 20, 20),
    "grey": (140, 140, 140),
    "brown": (100, 60, 30),
}
OBJECT_COLOURS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink", "white", "black")
GROUND_COLOURS = ("white", "black", "grey", "yellow", "green", "blue", "pink", "brown")
SHAPES = ("circle", "square", "triangle", "star", "heart", "ring", "crescent", "cross")
STYLES = ("flat", "outlined", "striped", "shaded")  # what the model is trained on
LORA_STYLES = ("dotted", "dipped")  # what only the LoRAs know
PLACES = ("left", "right", "top", "bottom", "centre")
SIZES = {"small": 0.16, "medium": 0.205, "large": 0.26}  # radius as a share of the shorter side
PAIR_RADIUS = 0.19  # at most this large do two objects side by side keep clear of each other, outlines and all
BUCKETS = ((128, 128), (128, 192), (192, 128))  # (width, height) in pixels

# Every shape is kept out of training in one colour: 8 of 80 combinations.
HELD_OUT = frozenset((OBJECT_COLOURS[(3 * i + 1) % len(OBJECT_COLOURS)], s) for i, s in enumerate(SHAPES))

PLACE_CENTRES = {
    "left": (0.26, 0.5),
    "right": (0.74, 0.5),
    "top": (0.5, 0.26),
    "bottom": (0.5, 0.74),
    "centre": (0.5, 0.5),
}  # of the object's box, as shares of width and height
PLACE_WORDS = {
    "left": ("on the left", "at the left", "on the left side"),
    "right": ("on the right", "at the right", "on the right side"),
    "top": ("at the top", "on top"),
    "bottom": ("at the bottom", "below"),
    "centre": ("in the centre", "in the middle", "in the center"),
}
OPPOSITE = {"left": "right", "right": "left", "top": "bottom", "bottom": "top"}


@dataclass(frozen=True)
class Thing:
    """One object: `x`, `y` are the centre of its box and `radius` half its box, see SIZES for the units."""

    shape: str
    colour: str
    style: str
    size: str
    place: str
    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class Scene:
    ground: str
    things: tuple[Thing, ...]
    width: int = 128
    height: int = 128


@dataclass(frozen=True)
class Caption:
    """A text and what it says: a judge must not ask for what the text left open."""

    text: str
    says_ground: bool
    says_place: tuple[bool, ...]


def draw_thing(
    rng: random.Random,
    place: str,
    grounds: tuple[str, ...],
    sizes: tuple[str, ...],
    combinations: str,
    styles: tuple[str, ...] = STYLES,
    paired: bool = False,
) -> Thing:
    """Draw one object; `combinations` is "seen", "held out" or "all" (colour with shape)."""
    while True:
        shape, colour = rng.choice(SHAPES), rng.choice(OBJECT_COLOURS)
        held_out = (colour, shape) in HELD_OUT
        wanted = combinations == "all" or held_out == (combinations == "held out")
        if wanted and colour not in grounds:
            break
    style = rng.choice(styles) if styles != STYLES or rng.random() < 0.55 else "flat"
    size = rng.choice(sizes)
    radius = SIZES[size] * rng.uniform(0.94, 1.06)
    if paired:
        radius = min(radius, PAIR_RADIUS)
    stray = 0.015 if paired else 0.03
    inset = max(0.26, 1.05 * radius + 0.03)  # a large object keeps clear of the edge
    x, y = (min(max(c, inset), 1 - inset) + rng.uniform(-stray, stray) for c in PLACE_CENTRES[place])
    return Thing(shape, colour, style, size, place, x, y, radius)


def draw_scene(
    rng: random.Random,
    things: int | None = None,
    combinations: str = "seen",
    size: tuple[int, int] = (128, 128),
    styles: tuple[str, ...] = STYLES,
) -> Scene:
    """Draw a scene of one or two objects (`things` None: two in 35 % of them)."""
    ground = rng.choice(GROUND_COLOURS)
    if things is None:
        things = 2 if rng.random() < 0.35 else 1
    if things == 1:
        drawn = (draw_thing(rng, rng.choice(PLACES), (ground,), tuple(SIZES), combinations, styles),)
        return Scene(ground, drawn, *size)
    place = rng.choice(tuple(OPPOSITE))
    first = draw_thing(rng, place, (ground,), ("small", "medium"), combinations, styles, True)
    taken = (ground, first.colour)
    second = draw_thing(rng, OPPOSITE[place], taken, ("small", "medium"), combinations, styles, True)
    return Scene(ground, (first, second), *size)


def article(phrase: str) -> str:
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


def name_thing(rng: random.Random, thing: Thing) -> str:
    """Words for one object without its place: "a large striped red circle"."""
    words = [thing.colour, thing.shape]
    if thing.style != "flat" or rng.random() < 0.15:
        words.insert(0, thing.style)
    if thing.size != "medium":
        words.insert(
            0 if rng.random() < 0.8 else len(words) - 2,
            {"small": rng.choice(("small", "little")), "large": rng.choice(("large", "big"))}[thing.size],
        )
    phrase = " ".join(words)
    return article(phrase) if rng.random() < 0.9 else phrase


def ground_words(rng: random.Random, ground: str) -> str:
    return rng.choice(
        (
            f"on {article(ground)} background",
            f"on {article(ground)} background",
            f"on {article(ground)} ground",
            f"on {ground}",
            f"{ground} background",
        )
    )


def caption(rng: random.Random, scene: Scene) -> Caption:
    """Describe a scene; order and wording vary, and a place or the ground may stay unsaid."""
    says_ground = rng.random() < 0.95
    if len(scene.things) == 1:
        body, said = single_words(rng, scene.things[0])
    else:
        body, said = pair_words(rng, scene.things)
    if not says_ground:
        return Caption(body, False, said)
    ground = ground_words(rng, scene.ground)
    if rng.random() < 0.12:
        return Caption(f"{ground}, {body}", True, said)
    comma = "," if len(scene.things) == 2 or rng.random() < 0.5 or not ground.startswith("on") else ""
    return Caption(f"{body}{comma} {ground}", True, said)


def single_words(rng: random.Random, thing: Thing) -> tuple[str, tuple[bool, ...]]:
    name, place = name_thing(rng, thing), rng.choice(PLACE_WORDS[thing.place])
    kind = rng.random()
    if kind < 0.2:
        return name, (False,)
    if kind < 0.3:
        return f"{place}, {name}", (True,)
    return f"{name} {place}", (True,)


def pair_words(rng: random.Random, things: tuple[Thing, ...]) -> tuple[str, tuple[bool, ...]]:
    first, second = things if rng.random() < 0.5 else things[::-1]
    a, b = name_thing(rng, first), name_thing(rng, second)
    kind = rng.random()
    if kind < 0.15:
        return f"{a} and {b}", (False, False)
    if kind < 0.3:
        relation = {"left": "left of", "right": "right of", "top": "above", "bottom": "below"}[first.place]
        return f"{a} {relation} {b}", (True, True)
    joint = rng.choice((", ", " and "))
    return f"{a} {rng.choice(PLACE_WORDS[first.place])}{joint}{b} {rng.choice(PLACE_WORDS[second.place])}", (True, True)


def vocabulary() -> list[str]:
    """Every word a caption can hold, and a few more that make good prompts. Their order is that of trained tokens."""
    words = set(COLOURS) | set(SHAPES) | set(STYLES) | set(SIZES)
    for texts in PLACE_WORDS.values():
        words.update(" ".join(texts).split())
    words.update(
        (
            "dotted",
            "shadow",
            "a",
            "an",
            "and",
            "of",
            "above",
            "below",
            "background",
            "ground",
            "little",
            "big",
            "with",
            "picture",
            "drawing",
            "shape",
            "object",
            "no",
        )
    )
    return sorted(words)
