"""The expected images of a prompt file with an ancestral sampler and a batch size of 2.

Where two neighbouring lines had equal settings, the program that made these images drew the sampler's noise for both
from one generator, that of the second seed. Here every picture has its own: alone, in any batch, in any order.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import gen_img_diffusers
from library.settings.samplers import draw_noise

GOLDEN = Path(__file__).resolve().parents[2] / "shared" / "golden"
OPTIONS = (
    "--W",
    128,
    "--H",
    128,
    "--steps",
    8,
    "--sampler",
    "k_euler_a",
    "--from_file",
    GOLDEN / "assets" / "prompts.txt",
)

pytestmark = pytest.mark.skipif(not GOLDEN.is_dir(), reason="needs the expected images beside the repository")


def expected(number: int) -> np.ndarray:
    return np.asarray(Image.open(GOLDEN / "expected" / "from_file" / f"im_{number:06d}.png")).astype(int)


def test_pictures_that_had_a_batch_to_themselves(generate):
    pictures = generate(GOLDEN / "models" / "sd1-tiny", *OPTIONS, "--batch_size", 2, "--sequential_file_name").pictures
    assert len(pictures) == 5
    for number in (1, 2, 5):
        # rounding to levels after sums in another order
        assert np.abs(pictures[number - 1] - expected(number)).max() <= 1


def test_pictures_that_shared_one_generator(generate, monkeypatch):
    """With the second picture's generator for both, they are the expected ones: nothing else differs."""

    def shared(*arguments):
        noise = draw_noise(*arguments)
        return replace(noise, generators=noise.generators[-1])

    monkeypatch.setattr(gen_img_diffusers, "draw_noise", shared)
    options = (*OPTIONS, "--batch_size", 2, "--sequential_file_name")
    pictures = generate(GOLDEN / "models" / "sd1-tiny", *options).pictures
    for number in (3, 4):
        assert np.abs(pictures[number - 1] - expected(number)).max() <= 1
