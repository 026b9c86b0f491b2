"""What `--control_net_preps` makes of guides without a model."""

import json

import cv2
import numpy as np
import pytest
from diffusers import ControlNetModel, UNet2DConditionModel
from PIL import Image

from library.draw import control_net
from library.draw.guides import Guide
from library.draw.preprocessing import preprocessed
from library.settings.preprocessing import PREPROCESSORS, preprocessing

PROMPT = ("--W", 64, "--H", 64, "--steps", 1, "--prompt", "a")


@pytest.fixture(scope="module")
def net(sd1, tmp_path_factory):
    unet = UNet2DConditionModel.from_pretrained(sd1.folder / "unet")
    folder = tmp_path_factory.mktemp("net")
    ControlNetModel.from_unet(unet).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    path = tmp_path_factory.mktemp("photo") / "photo.png"
    Image.effect_noise((64, 64), 90).convert("RGB").save(path)
    return path


def made(name: str, pixels: np.ndarray, *further) -> np.ndarray:
    chosen = preprocessing(name)
    assert chosen is not None
    return preprocessed(pixels, chosen, *further)


def square(ground=(0, 0, 0), colour=(255, 255, 255), size=96) -> np.ndarray:
    """A square of 48 pixels, from 24 to 72."""
    pixels = np.full((size, size, 3), ground, np.uint8)
    pixels[24:72, 24:72] = colour
    return pixels


@pytest.mark.parametrize("name", PREPROCESSORS)
def test_any_size_stays_as_it_is(name):
    for height, width in ((8, 8), (40, 168)):
        pixels = np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8)
        further = {"shuffle": [1], "inpaint": [pixels[..., 0]]}.get(name, [])
        result = made(name, pixels, *further)
        assert (result.shape, result.dtype) == (pixels.shape, np.int16 if name == "inpaint" else np.uint8)
        assert result.max() <= 255


@pytest.mark.parametrize("name", ["canny", "scribble", "softedge", "lineart", "mlsd"])
def test_lines_are_white_where_the_outline_is(name):
    lines = made(name, square())
    near = np.ones((96, 96), bool)
    near[:18, :] = near[78:, :] = near[:, :18] = near[:, 78:] = False
    near[30:66, 30:66] = False
    assert lines[~near].max() <= 4  # where the blur of soft edges ends
    for side in (lines[40:56, 18:30], lines[40:56, 66:78], lines[18:30, 40:56], lines[66:78, 40:56]):
        assert side.max() > 128
    assert made(name, np.full((96, 96, 3), 40, np.uint8)).max() == 0  # dark grounds are no ink


def test_lines_between_colours_of_one_brightness():
    """Red and green that are equally grey."""
    coloured = square((196, 0, 0), (0, 100, 0))
    assert np.ptp(cv2.cvtColor(coloured, cv2.COLOR_RGB2GRAY)) <= 1
    for name in ("scribble", "lineart"):
        assert made(name, coloured).max() > 128


def test_numbers_count():
    faint = square((100, 100, 100), (130, 130, 130))
    large = np.kron(faint, np.ones((6, 6, 1), np.uint8))  # where pixels are fine enough to hit the peaks
    assert made("scribble_25", large).max() == 255 > made("lineart_25", large).max() > 0
    assert made("scribble_35", large).max() == made("lineart_35", large).max() == 0
    assert made("mlsd_40", square()).any()
    assert not made("mlsd_60", square()).any()
    assert set(np.unique(made("threshold_99", faint))) == {255}
    assert np.array_equal(made("threshold_100", faint)[..., 0] == 255, faint[..., 0] == 130)
    assert made("blur_1", square())[48, 12].max() == 0 < made("blur_12", square())[48, 12].min()
    block = made("tile_48", square())
    assert block.min() > 0  # the square is smeared over the cells beside it
    assert block.mean() == pytest.approx(square().mean(), abs=8)  # cubic overshoot is cut off


def test_soft_edges_are_brighter_the_more_sizes_and_thresholds_see_them():
    strong, faint = made("softedge", square()), made("softedge", square((100, 100, 100), (135, 135, 135)))
    assert 0 < faint.max() < strong.max()


def test_colours():
    pixels = square((10, 20, 30), (200, 100, 50))
    assert np.array_equal(made("invert", made("invert", pixels)), pixels)
    assert tuple(made("invert", pixels)[0, 0]) == (245, 235, 225)
    expected = np.asarray(Image.fromarray(pixels).convert("L")).astype(int)
    assert np.abs(made("gray", pixels) - expected[..., None]).max() <= 1  # Rec. 601, rounded otherwise


def test_shuffled_content_is_the_seeds():
    rows = np.broadcast_to(np.linspace(0, 255, 128).astype(np.uint8)[:, None, None], (128, 128, 3))
    one, again, two = (made("shuffle", rows, seed).astype(int) for seed in (1, 1, 2))
    assert np.array_equal(one, again)
    assert np.abs(one - two).mean() > 20
    assert np.abs(one - rows).mean() > 20
    assert np.ptp(one) > 200  # from all over the picture
    assert np.abs(np.diff(one, axis=0)).max() < 20  # and it is bent, not torn
    large = made("shuffle", np.asarray(Image.fromarray(np.ascontiguousarray(rows)).resize((256, 256))), 1)
    smaller = np.asarray(Image.fromarray(large).resize((128, 128), Image.Resampling.BOX)).astype(int)
    assert np.abs(smaller - one).mean() < 3  # the same at another size, as in Highres. fix


def test_shuffled_guides_depend_on_their_own_seed_alone(sd1, net, photo, generate, tmp_path):
    steered = ("--control_net_models", net, "--guide_image_path", photo, "--control_net_preps", "shuffle_3")
    steered += (*PROMPT, "--control_net_save_guides", "--sequential_file_name")
    batch = generate(sd1.folder, *steered[:-3], "a --d 5,6", "--images_per_prompt", 2, "--batch_size", 2, *steered[-2:])
    alone = generate(sd1.folder, *steered[:-3], "a --d 6", *steered[-2:], outdir=tmp_path / "alone")
    assert [file.name for file in batch.files] == [
        f"im_00000{n}{end}.png" for n in (1, 2) for end in ("", "_guide1")
    ]  # fmt: skip
    assert np.array_equal(batch.pictures[3], alone.pictures[1])
    assert not np.array_equal(batch.pictures[3], batch.pictures[1])
    assert "steps 0 to 1, shuffle 3, guide photo.png" in Image.open(alone.files[0]).text["parameters"]


def test_both_stages_of_highres_fix_see_one_shuffled_guide(sd1, net, photo, generate, monkeypatch):
    seeds = []
    real = Guide.prepare
    monkeypatch.setattr(Guide, "prepare", lambda guide: seeds.append(guide.seed) or real(guide))
    steered = ("--control_net_models", net, "--guide_image_path", photo, "--control_net_preps", "shuffle")
    result = generate(
        sd1.folder, *steered, "--W", 128, "--H", 128, "--highres_fix_scale", 0.5, "--steps", 2, "--prompt", "a --d 5"
    )
    assert (result.status, seeds) == (0, [5, 5]), result.stderr


def test_what_is_masked_is_minus_one_and_saved_black(sd1, net, photo, generate, tmp_path, monkeypatch):
    hints = []
    real = control_net.ControlNet.embed

    def embed(self, guide):
        block, self._hint_block = self._hint_block, lambda hint: hint
        hints.append(real(self, guide)[0].permute(1, 2, 0).numpy())
        self._hint_block = block
        return real(self, guide)

    monkeypatch.setattr(control_net.ControlNet, "embed", embed)
    mask = np.full((64, 64), 127, np.uint8)  # below a half
    mask[16:32, 8:24] = 128
    Image.fromarray(mask).save(tmp_path / "mask.png")
    steered = ("--control_net_models", net, "--guide_image_path", photo, "--control_net_preps", "inpaint")
    masked = ("--image_path", photo, "--strength", 1, "--mask_path", tmp_path / "mask.png")
    result = generate(sd1.folder, *steered, *masked, *PROMPT, "--control_net_save_guides")
    assert result.status == 0, result.stderr
    expected = np.asarray(Image.open(photo)).astype(np.float32) / 255
    expected[16:32, 8:24] = -1
    assert len(hints) == 1
    assert np.array_equal(hints[0], expected)
    assert np.array_equal(result.pictures[1], (expected.clip(0) * 255).round())


def test_what_runs_remember_and_tell(sd1, net, photo, generate):
    """Canny is written into manifests as ever, so that runs of earlier versions can be gone on with."""
    steered = ("--control_net_models", net, "--guide_image_path", photo, *PROMPT)
    result = generate(sd1.folder, *steered, "--control_net_preps", "canny_20")
    (manifest,) = result.files[0].parent.glob("manifest*.jsonl")
    options = json.loads(manifest.read_text().splitlines()[0])["options"]
    assert options["control_net_preps"] == ["Canny(low=20, high=191)"]
    facts = json.loads(generate(sd1.folder, *steered, "--control_net_preps", "blur", "--dry_run", "--json").stdout)
    assert facts["control_nets"][0]["preprocess"] == {"name": "blur", "sigma": 9}
    assert facts["control_nets"][0]["canny"] is None


@pytest.mark.parametrize(
    ("prep", "message"),
    [
        ("scrible", "scrible: no such preprocessing; did you mean scribble? known are none, canny,"),
        ("blur_0", "blur_0: sigma is out of range; write 1 to 200"),
        ("blur_2_3", "blur_2_3: its numbers cannot be used; write blur or blur_SIGMA (blur_9)"),
        ("tile_x", "tile_x: its numbers cannot be used; write tile or tile_FACTOR (tile_8)"),
        ("invert_1", "invert_1: its numbers cannot be used; write invert, which takes no numbers"),
        ("inpaint", "inpaint: needs the picture's mask; give --image_path and --mask_path, and no prompt with AND"),
    ],
)
def test_what_cannot_be_made_is_refused(sd1, net, photo, generate, prep, message):
    steered = ("--control_net_models", net, "--guide_image_path", photo, "--control_net_preps", prep)
    result = generate(sd1.folder, *steered, *PROMPT)
    assert (result.status, result.stderr.count("\n")) == (2, 1)
    assert f"error: --control_net_preps {message}" in result.stderr
