"""Prompts mean something: what the program draws with the demo model, told from the pixels by the judge."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from library.settings.samplers import SAMPLERS
from tools.demo.judge import Seen, overlap, see_ground, see_objects
from tools.demo.render import render
from tools.demo.scenes import COLOURS, SHAPES, Scene, Thing

MODEL = Path(__file__).parents[1] / "examples" / "shapes"
Draw = Callable[..., list[np.ndarray]]


@pytest.fixture
def draw(generate, tmp_path: Path) -> Draw:
    """Draw prompt lines with the demo model, uint8 pictures of 128×128 in the lines' order."""

    def run(*lines: str, options: tuple = (), steps: int = 20) -> list[np.ndarray]:
        file = tmp_path / "lines.txt"
        file.write_text("\n".join(lines))
        settings = ("--W", 128, "--H", 128, "--steps", steps, "--scale", 5, "--batch_size", len(lines), "--seed", 1)
        result = generate(MODEL, "--from_file", file, *settings, "--sequential_file_name", *options)
        assert result.status == 0, result.stderr
        return [picture.astype(np.uint8) for picture in result.pictures]

    return run


def thing(picture: np.ndarray) -> Seen:
    """The largest object of a picture."""
    seen = see_objects(picture, 1)
    assert seen, "an empty picture"
    return seen[0]


def test_a_prompt_says_ground_colour_shape_and_place(draw: Draw) -> None:
    pictures = draw(
        "a large red circle on a white background --d 1",
        "a green triangle on the left, on a black background --d 3",
        "a white heart at the bottom, on a blue background --d 4",
        "a yellow crescent at the top, on a blue background --d 7",
    )
    assert [see_ground(picture)[0] for picture in pictures] == ["white", "black", "blue", "blue"]
    assert [thing(picture).colour for picture in pictures] == ["red", "green", "white", "yellow"]
    assert [thing(picture).shape for picture in pictures] == ["circle", "triangle", "heart", "crescent"]
    assert [thing(picture).place for picture in pictures[1:]] == ["left", "bottom", "top"]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_draws_what_the_prompt_says(draw: Draw, sampler: str) -> None:
    line = "a large red circle on a white background --d 2"
    [picture] = draw(line, options=("--sampler", sampler), steps=10)  # of which none needs more
    assert (see_ground(picture)[0], thing(picture).colour, thing(picture).shape) == ("white", "red", "circle")


def test_another_seed_draws_the_same_thing_elsewhere(draw: Draw) -> None:
    first, second = draw(*(f"a large red circle on a white background --d {seed}" for seed in (1, 2)))
    assert (thing(first).colour, thing(first).shape) == (thing(second).colour, thing(second).shape) == ("red", "circle")
    assert overlap(thing(first).mask, thing(second).mask) < 0.9


@pytest.mark.parametrize("size", [(192, 128), (128, 192)])
def test_other_sizes_draw_what_the_prompt_says(draw: Draw, size: tuple[int, int]) -> None:
    width, height = size
    [picture] = draw(f"a large blue circle on a white background --d 1 --w {width} --h {height}")
    assert picture.shape == (height, width, 3)
    assert (see_ground(picture)[0], thing(picture).colour, thing(picture).shape) == ("white", "blue", "circle")


@pytest.mark.parametrize("seed", [1, 3, 4])
def test_a_negative_prompt_keeps_things_away(draw: Draw, seed: int) -> None:
    """What the prompt leaves open is drawn one way, and another way when that way is named as unwanted."""
    any_colour = f"a large circle in the centre, on a black background --d {seed}"
    any_ground = f"a large red circle in the centre --d {seed}"
    coloured, grounded = draw(any_colour, any_ground)
    other_colour, other_ground = draw(
        f"{any_colour} --n a {thing(coloured).colour} circle",
        f"{any_ground} --n on a {see_ground(grounded)[0]} background",
    )
    assert thing(other_colour).colour != thing(coloured).colour
    assert see_ground(other_ground)[0] != see_ground(grounded)[0]
    assert thing(other_ground).colour == "red"


def red_pixels(picture: np.ndarray) -> int:
    red, green, blue = picture.transpose(2, 0, 1)
    return int(((red > 150) & (green < 110) & (blue < 110)).sum())


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_weights_make_words_count_more_or_less(draw: Draw, seed: int) -> None:
    red_rules, blue_rules, strong, weak, small, large = draw(
        f"a large (red:1.5) and (blue:0.5) circle on a white background --d {seed}",
        f"a large (blue:1.5) and (red:0.5) circle on a white background --d {seed}",
        f"a large (red:1.6) circle on a white background --d {seed}",
        f"a large (red:0.4) circle on a white background --d {seed}",
        f"a (small:1.5) (large:0.5) red circle on a white background --d {seed}",
        f"a (small:0.5) (large:1.5) red circle on a white background --d {seed}",
    )
    assert (thing(red_rules).colour, thing(blue_rules).colour) == ("red", "blue")
    assert red_pixels(strong) > red_pixels(weak)
    assert thing(small).mask.sum() < 0.9 * thing(large).mask.sum()


def test_a_prompt_of_more_than_75_tokens_still_means_what_it_says(draw: Draw) -> None:
    filler = ", a picture" * 30
    [picture] = draw(f"a large red circle on a white background{filler} --d 1")
    assert (see_ground(picture)[0], thing(picture).colour) == ("white", "red")


def test_guidance_makes_pictures_follow_their_prompts(draw: Draw) -> None:
    wanted = [(colour, shape) for colour in ("red", "purple") for shape in SHAPES]
    line = "a small {} {} at the top, on a blue background --d {} --l {}"

    def right(scale: int) -> int:
        lines = [line.format(*said, seed, scale) for seed, said in enumerate(wanted)]
        seen = [[(one.colour, one.shape) for one in see_objects(picture, 1)] for picture in draw(*lines)]
        return sum(objects == [said] for objects, said in zip(seen, wanted, strict=True))

    assert right(1) < right(5) >= 14


# ---------------------------------------------------------------------------------------------------------------------
# The web UI's syntax

WEBUI = ("--prompt_syntax", "webui")


def test_a_prompt_that_changes_early_or_late_is_the_one_or_the_other(draw: Draw) -> None:
    """In the last six of 20 steps the model still settles corners, but no colour."""
    lines = [
        f"[a red circle:a blue square:{when}] on a white background --d {s}" for when in (0.3, 0.7) for s in range(4)
    ]
    seen = [(thing(picture).colour, thing(picture).shape) for picture in draw(*lines, options=WEBUI)]
    assert seen[:4] == [("blue", "square")] * 4
    assert [colour for colour, _ in seen[4:]] == ["red"] * 4


def test_weights_of_composed_parts_shift_the_mix(draw: Draw) -> None:
    line = "a large red circle on a white background :{} AND a large blue circle on a white background :{} --d {}"
    weights = ((1, 0.3), (1, 1), (0.3, 1))
    pictures = draw(*(line.format(*pair, seed) for pair in weights for seed in (1, 2)), options=WEBUI)
    assert [thing(picture).colour for picture in pictures] == ["red"] * 2 + ["purple"] * 2 + ["blue"] * 2
    assert {thing(picture).shape for picture in pictures} == {"circle"}


def test_a_star_is_drawn_into_the_masked_area_alone(generate, tmp_path: Path) -> None:
    """On a canvas four times as wide as what the model draws, sharp: judged at its own size."""
    canvas = Image.new("RGB", (512, 128), COLOURS["blue"])
    mask = Image.new("L", canvas.size)
    mask.paste(255, (336, 16, 432, 112))
    canvas.save(tmp_path / "canvas.png")
    mask.save(tmp_path / "mask.png")
    options = ("--image_path", tmp_path / "canvas.png", "--mask_path", tmp_path / "mask.png", "--inpaint_area", "mask")
    prompt = "a large yellow star in the centre, on a blue background --d 1,2,3"
    settings = ("--W", 128, "--H", 128, "--steps", 20, "--scale", 5, "--batch_size", 3)
    pictures = generate(MODEL, *options, *settings, "--prompt", prompt).pictures
    assert [picture.shape for picture in pictures] == [(128, 512, 3)] * 3
    seen = [thing(picture[:, 320:448].astype(np.uint8)) for picture in pictures]
    assert [(each.shape, each.colour) for each in seen] == [("star", "yellow")] * 3
    assert all(np.array_equal(p[:, :336], np.asarray(canvas)[:, :336]) for p in pictures)


def test_new_borders_go_on_with_the_ground(draw: Draw, tmp_path: Path) -> None:
    grounds = ("green", "pink", "brown")
    things = (Thing("circle", "red", "flat", "medium", "centre", 0.5, 0.5, 0.2),)
    sources = tmp_path / "sources"
    sources.mkdir()
    for number, ground in enumerate(grounds):
        Image.fromarray(render(Scene(ground, things))).save(sources / f"{number}.png")
    lines = [f"a red circle on a {ground} background --w 192 --d {number}" for number, ground in enumerate(grounds)]
    pictures = draw(*lines, options=("--image_path", sources, "--extend", "0,0,64,0"))
    assert [see_ground(picture[:, 128:])[0] for picture in pictures] == list(grounds)
    for number, picture in enumerate(pictures):
        source = np.asarray(Image.open(sources / f"{number}.png")).astype(int)
        assert np.abs(picture[:, :120] - source[:, :120]).mean() < 2  # what the VAE's round trip makes of flat colours
