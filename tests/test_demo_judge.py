"""The judge must be right about pictures whose content is known: the renderer's own."""

import itertools
import random

import numpy as np
import pytest

from tools.demo.judge import judge, overlap, see_ground, see_objects, see_place
from tools.demo.render import render
from tools.demo.scenes import BUCKETS, LORA_STYLES, Scene, Thing, caption, draw_scene
from tools.demo.style_judge import STYLE_JUDGES
from tools.demo.train_clip import right_and_wrong
from tools.demo.train_lora import style_scenes


def test_right_on_rendered_scenes():
    rng = random.Random(11)
    scenes = [draw_scene(rng, combinations="all", size=BUCKETS[i % 3]) for i in range(600)]
    right = sum(judge(render(scene), scene).right for scene in scenes)
    assert right >= 0.99 * len(scenes)


def test_wrong_about_another_scene():
    """A judge that says yes to everything would pass the test above."""
    rng = random.Random(12)
    scenes = [draw_scene(rng, combinations="all") for _ in range(200)]
    right = sum(judge(render(a), b).right for a, b in itertools.pairwise(scenes))
    assert right <= 0.02 * len(scenes)


@pytest.mark.parametrize("change", [{"shape": "star"}, {"colour": "green"}, {"place": "right"}])
def test_one_thing_wrong_is_seen(change):
    thing = Thing("circle", "red", "flat", "medium", "left", 0.27, 0.5, 0.19)
    picture = render(Scene("white", (thing,)))
    assert judge(picture, Scene("white", (thing,))).right
    assert not judge(picture, Scene("white", (Thing(**{**vars(thing), **change}),))).right
    assert not judge(picture, Scene("blue", (thing,))).right


def test_an_empty_picture_holds_nothing():
    picture = np.full((128, 128, 3), 250, np.uint8)
    assert see_ground(picture)[0] == "white"
    assert see_objects(picture) == []


def test_places():
    assert [see_place(*p) for p in ((0.27, 0.5), (0.7, 0.55), (0.5, 0.3), (0.45, 0.8), (0.52, 0.47))] == [
        "left",
        "right",
        "top",
        "bottom",
        "centre",
    ]


def test_overlap():
    a, b = np.zeros((4, 4), bool), np.zeros((4, 4), bool)
    a[:2], b[1:3] = True, True
    assert overlap(a, b) == pytest.approx(1 / 3)


@pytest.mark.parametrize("style", LORA_STYLES)
def test_styles_of_the_loras_are_told_from_the_trained_ones(style):
    """A small ring has no room for three dots; hence 90 %."""
    rng = random.Random(13)
    in_style = [STYLE_JUDGES[style](render(s)) for s in style_scenes(style, 100, 14)]
    plain = [STYLE_JUDGES[style](render(draw_scene(rng))) for _ in range(100)]
    assert np.mean(in_style) >= 0.9
    assert np.mean(plain) <= 0.1


def test_captions_say_what_they_claim():
    """A caption names every object's colour and shape, and the ground when it says so."""
    rng = random.Random(15)
    for _ in range(300):
        scene = draw_scene(rng)
        said = caption(rng, scene)
        assert all(f"{t.colour} {t.shape}" in said.text for t in scene.things)
        assert not said.says_ground or scene.ground in said.text


def test_held_out_combinations_stay_out_of_training():
    rng = random.Random(16)
    seen = {(t.colour, t.shape) for _ in range(3000) for t in draw_scene(rng).things}
    assert ("red", "star") not in seen and ("red", "circle") in seen
    assert {("red", "star")} <= {
        (t.colour, t.shape) for _ in range(300) for t in draw_scene(rng, combinations="held out").things
    }


def test_wrong_captions_differ():
    rng = random.Random(17)
    for _ in range(100):
        scene = draw_scene(rng)
        right, wrong, other = right_and_wrong(rng, scene)
        assert right.text != wrong.text
        assert (other.ground != scene.ground) != (other.things != scene.things)
