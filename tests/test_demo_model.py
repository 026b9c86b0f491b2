"""Prompts mean something: what the program draws with the demo model, told from the pixels by the judge."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from library.samplers import SAMPLERS
from tools.demo.judge import Seen, see_ground, see_objects

MODEL = Path(__file__).parents[1] / "examples" / "shapes"
Draw = Callable[..., list[np.ndarray]]


@pytest.fixture
def draw(generate, tmp_path: Path) -> Draw:
    """Draw prompt lines with the demo model, uint8 pictures of 128×128 in the lines' order."""

    def run(*lines: str, options: tuple = ()) -> list[np.ndarray]:
        file = tmp_path / "lines.txt"
        file.write_text("\n".join(lines))
        settings = ("--W", 128, "--H", 128, "--steps", 20, "--scale", 5, "--batch_size", len(lines), "--seed", 1)
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
        "a large blue square on a yellow background --d 2",
        "a green triangle on the left, on a black background --d 3",
        "a white heart at the bottom, on a blue background --d 4",
    )
    assert [see_ground(picture)[0] for picture in pictures] == ["white", "yellow", "black", "blue"]
    assert [thing(picture).colour for picture in pictures] == ["red", "blue", "green", "white"]
    assert [thing(picture).shape for picture in pictures] == ["circle", "square", "triangle", "heart"]
    assert [thing(picture).place for picture in pictures[2:]] == ["left", "bottom"]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_draws_what_the_prompt_says(draw: Draw, sampler: str) -> None:
    [picture] = draw("a large red circle on a white background --d 1", options=("--sampler", sampler))
    assert (see_ground(picture)[0], thing(picture).colour, thing(picture).shape) == ("white", "red", "circle")


def test_another_seed_draws_the_same_thing_elsewise(draw: Draw) -> None:
    first, second = draw(*(f"a large green square on a white background --d {seed}" for seed in (1, 2)))
    assert (
        (thing(first).colour, thing(first).shape) == (thing(second).colour, thing(second).shape) == ("green", "square")
    )
    assert (np.abs(first.astype(int) - second).max(-1) > 40).sum() > 100  # pixels that are another colour


@pytest.mark.parametrize("size", [(192, 128), (128, 192)])
def test_other_sizes_draw_what_the_prompt_says(draw: Draw, size: tuple[int, int]) -> None:
    width, height = size
    [picture] = draw(f"a large blue circle on a white background --d 1 --w {width} --h {height}")
    assert picture.shape == (height, width, 3)
    assert (see_ground(picture)[0], thing(picture).colour, thing(picture).shape) == ("white", "blue", "circle")


def test_guidance_makes_the_prompt_count(draw: Draw) -> None:
    """Without text's pull the same noise turns into the same picture, whatever the prompt."""
    weak = draw("a large red circle on a white background --d 1 --l 0", "a blue star on a black background --d 1 --l 0")
    strong = draw(
        "a large red circle on a white background --d 1 --l 5", "a blue star on a black background --d 1 --l 5"
    )
    apart = [np.abs(a.astype(int) - b).mean() for a, b in (weak, strong)]
    assert apart[0] < apart[1]
