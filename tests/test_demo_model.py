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
