"""Attention Couple: prompts with parts, their regions, and what cross-attention makes of them."""

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image

from library.draw.attention import AttentionProcessor, use_kernel
from library.draw.regions import Regions, load_regions
from library.draw.text_conditions import TextConditions
from library.machine.attention import sdpa

# at 64 pixels the tiny model normalises groups of two numbers, which makes a rounding error a change of sign
SIZE = ("--W", 128, "--H", 128, "--steps", 2)


def write_map(path, *colours, size=(128, 64)):
    """A map of vertical stripes."""
    picture = Image.new("RGB", size)
    for number, colour in enumerate(colours):
        stripe = size[0] // len(colours)
        picture.paste(colour, (number * stripe, 0, (number + 1) * stripe, size[1]))
    picture.save(path)
    return path


@pytest.fixture
def halves(tmp_path):
    """Red on the left, green on the right."""
    return write_map(tmp_path / "halves.png", (255, 0, 0), (0, 255, 0))


def largest(first, second) -> int:
    assert len(first) == len(second) > 0
    return max(int(np.abs(a - b).max()) for a, b in zip(first, second))


# ---------------------------------------------------------------------------------------------------------------------
# Maps


def test_channels_are_regions(tmp_path):
    path = write_map(tmp_path / "map.png", (255, 0, 0), (100, 200, 0), size=(4, 2))
    regions = load_regions(path, 4)
    assert regions[:, 0].tolist() == [[255, 255, 100, 100], [0, 0, 200, 200], [255] * 4, [255] * 4]
    assert load_regions(None, 2).tolist() == [[[255]], [[255]]]


def test_colours_are_regions(tmp_path):
    colours = [(255, 0, 0), (0, 255, 0), (255, 255, 0), (0, 0, 255), (255, 0, 255), (254, 0, 0)]
    path = write_map(tmp_path / "map.png", *colours, size=(6, 1))
    rows = load_regions(path, 7, color_codes=6)[:, 0] // 255
    assert rows[:5].tolist() == [[int(place == part) for place in range(6)] for part in range(5)]
    assert rows[5].tolist() == [1] * 6  # cyan is nowhere
    assert rows[6].tolist() == [1] * 6  # no colour is read for it
    assert (load_regions(path, 2, color_codes=1)[1] == 255).all()


def write_clear_map(path, *colours):
    """A map of one row, a pixel of red, green, blue and opacity each."""
    Image.fromarray(np.array([colours], np.uint8)).save(path)
    return path


def test_what_is_clear_in_a_map_belongs_to_no_region(tmp_path):
    red, green = (255, 0, 0), (0, 255, 0)
    path = write_clear_map(
        tmp_path / "map.png", (*red, 255), (*red, 100), (*red, 0), (*green, 0), (200, 100, 0, 51), (0, 0, 255, 0)
    )
    assert load_regions(path, 3)[:, 0].tolist() == [[255, 100, 0, 0, 40, 0], [0, 0, 0, 0, 20, 0], [255] * 6]
    path = write_clear_map(
        tmp_path / "map.png", (*red, 255), (*red, 100), (*red, 0), (*green, 255), (*green, 0), (254, 0, 0, 255)
    )
    assert load_regions(path, 3, color_codes=3)[:, 0].tolist() == [
        [255, 100, 0, 0, 0, 0],
        [0, 0, 0, 255, 0, 0],
        [255] * 6,
    ]
    white = write_clear_map(tmp_path / "map.png", (*red, 255), (255, 255, 255, 0))
    assert load_regions(white, 7, color_codes=7)[[0, 6], 0].tolist() == [[255, 0], [255, 255]]


def test_a_colour_that_a_map_lacks_is_warned_of(sd1, generate, tmp_path):
    """Once, and where a part wants it; an empty channel is the whole picture without a word."""
    path = write_clear_map(tmp_path / "map.png", *[(255, 0, 0, 255), (0, 255, 0, 0), (0, 0, 255, 255)] * 8)
    Image.open(path).resize((24, 8), Image.Resampling.NEAREST).save(path)
    codes = ("--mask_path", path, "--network_regional_mask_max_color_codes", 4, "--dry_run", "--images_per_prompt", 2)
    result = generate(sd1.folder, *codes, "--prompt", "a AND b AND c")
    assert result.status == 0
    lines = [line for line in result.stderr.splitlines() if line.startswith("warning")]
    assert lines == [
        f"warning: --mask_path {path}: has no pure (0, 255, 0), so that part 2 is for the whole picture",
        f"warning: --mask_path {path}: has no pure (255, 255, 0), so that part 3 is for the whole picture",
    ]
    assert "warning" not in generate(sd1.folder, *codes[:2], "--dry_run", "--prompt", "a AND b AND c").stderr


def test_a_map_whose_colours_are_clear_is_refused(sd1, generate, tmp_path):
    Image.new("RGBA", (16, 16), (255, 0, 0, 0)).save(tmp_path / "map.png")
    options = ("--network_regional_mask_max_color_codes", 2, "--prompt", "a AND b")
    result = generate(sd1.folder, "--mask_path", tmp_path / "map.png", *options)
    assert (result.status, result.stderr.count("has none of the pure colours")) == (2, 1)


def test_a_map_without_its_colours_is_refused(sd1, generate, tmp_path):
    """A JPEG's red is not pure red."""
    Image.new("RGB", (16, 16), (254, 0, 0)).save(tmp_path / "map.jpg")
    options = ("--network_regional_mask_max_color_codes", 2, "--prompt", "a AND b")
    result = generate(sd1.folder, "--mask_path", tmp_path / "map.jpg", *options)
    assert result.status == 2
    assert "has none of the pure colours (255, 0, 0), (0, 255, 0)" in result.stderr


# ---------------------------------------------------------------------------------------------------------------------
# Attention


@pytest.fixture(scope="module")
def unet(sd1):
    unet = UNet2DConditionModel.from_pretrained(sd1.folder / "unet").requires_grad_(False)
    use_kernel(unet, sdpa)
    return unet


@pytest.mark.parametrize("branches", [1, 2, 3])
def test_cross_attention_is_averaged_by_region(unet, branches):
    """Two pictures, three parts: each part attended to by itself, outcomes weighted where regions overlap."""
    attention = unet.down_blocks[0].attentions[0].transformer_blocks[0].attn2
    width, text_width, (height, columns) = attention.to_q.in_features, attention.to_k.in_features, (2, 4)
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(branches * 2, height * columns, width, generator=rng)
    text = torch.randn((branches + 2) * 2, 77, text_width, generator=rng)
    masks = [torch.randint(0, 256, (3, height, columns), generator=rng, dtype=torch.uint8) for _ in range(2)]
    masks[0][:, 0, 0] = 0
    processor = AttentionProcessor(sdpa)
    plain = AttentionProcessor(sdpa)
    regions = Regions(masks, torch.device("cpu"))
    regions.token_size = (height, columns)
    result = processor(attention, x, TextConditions(text, regions=regions))
    assert result.shape == x.shape
    first = 2 * (branches > 1)  # the prompt's first row
    for picture in range(2):
        outcomes = [
            plain(attention, x[first + picture][None], TextConditions(text[first + 2 * part + picture][None]))
            for part in range(3)
        ]
        weights = (masks[picture].float() / 255).flatten(1)[:, :, None]
        expected = sum(w * outcome[0] for w, outcome in zip(weights, outcomes)) / (weights.sum(0) + 1e-4)
        torch.testing.assert_close(result[first + picture], expected)
    for row in [row for row in range(branches * 2) if not first <= row < first + 2]:
        of_text = row if row < first else row + 4  # the parts' surplus rows stand between
        torch.testing.assert_close(result[row], plain(attention, x[row][None], TextConditions(text[of_text][None]))[0])
    if branches == 1:
        assert result[0, 0].abs().max() == 0  # no region, no share


def test_feature_maps_of_every_shape(unet):
    """Sizes are those of the feature maps: 8 × 2 and 2 × 8 have equally many tokens."""
    masks = torch.zeros(2, 64, 16, dtype=torch.uint8)
    masks[0, :32], masks[1, 32:] = 255, 255
    regions = Regions([masks], torch.device("cpu"))
    text = TextConditions(torch.randn(3, 77, unet.config.cross_attention_dim), regions=regions)
    with torch.inference_mode(), regions.attached(unet):
        for size in ((16, 4), (4, 16), (10, 6)):
            assert unet(torch.randn(2, 4, *size), 500, encoder_hidden_states=text).sample.shape[2:] == size
    assert {(16, 4), (4, 16), (10, 6), (5, 3)} <= set(regions._at_size)
    assert regions.masks((16, 4))[0, 0, :, 0].tolist() == [1] * 8 + [0] * 8


def test_detaching_leaves_the_model_as_it_was(unet):
    x, text = torch.randn(2, 4, 16, 16), TextConditions(torch.randn(2, 77, unet.config.cross_attention_dim))
    regions = Regions([torch.full((2, 1, 1), 255, dtype=torch.uint8)], torch.device("cpu"))
    with torch.inference_mode():
        before = unet(x, 500, encoder_hidden_states=text).sample
        with regions.attached(unet):
            parts = torch.randn(3, 77, unet.config.cross_attention_dim)
            unet(x, 500, encoder_hidden_states=TextConditions(parts, regions=regions))
        after = unet(x, 500, encoder_hidden_states=text).sample
    assert torch.equal(before, after)
    assert not any(module._forward_pre_hooks for module in unet.modules())


# ---------------------------------------------------------------------------------------------------------------------
# Runs


def test_equal_parts_are_one(sd1, generate, halves):
    """Wherever the regions are, two equal texts draw what one draws; only 1 / 1.0001 is between them."""
    plain = generate(sd1.folder, *SIZE, "--prompt", "a cat --n fog --d 1").pictures
    options = ("--mask_path", halves, "--prompt", "a cat AND a cat --n fog --d 1")
    assert largest(plain, generate(sd1.folder, *SIZE, *options).pictures) <= 1


def test_a_batch_equals_pictures_alone(sd1, generate, tmp_path):
    """Each picture has its own map, through three branches and texts of different lengths."""
    maps = tmp_path / "maps"
    maps.mkdir()
    write_map(maps / "0.png", (255, 0, 0), (0, 255, 0))
    write_map(maps / "1.png", (0, 255, 0), (255, 0, 0), (255, 255, 0), size=(30, 90))
    long = ("--max_embeddings_multiples", 2, "--negative_scale", 2)
    prompt = f"a cat AND {'very ' * 80}blue AND a dog --n fog"
    options = ("--prompt", f"{prompt} --d 1,2", "--images_per_prompt", 2, "--batch_size", 2, "--mask_path", maps)
    together = generate(sd1.folder, *SIZE, *long, *options).pictures
    options = ("--prompt", f"{prompt} --d 2", "--mask_path", maps / "1.png")
    alone = generate(sd1.folder, *SIZE, *long, *options, outdir=tmp_path / "alone").pictures
    assert largest(alone, together[1:]) <= 1
    options = ("--prompt", f"{prompt} --d 2", "--mask_path", maps / "0.png")
    assert largest(alone, generate(sd1.folder, *SIZE, *long, *options, outdir=tmp_path / "other").pictures) > 3


def test_three_parts_with_soft_masks_and_an_empty_channel(sd1, generate, tmp_path):
    """Equal parts are one prompt under any masks; an empty channel is the whole picture."""
    write_map(tmp_path / "soft.png", (255, 40, 0), (120, 180, 0), (30, 255, 0))
    options = ("--mask_path", tmp_path / "soft.png", "--negative_scale", 2)
    plain = generate(sd1.folder, *SIZE, "--negative_scale", 2, "--prompt", "a cat --n fog --d 1").pictures
    equal = ("--prompt", "a cat AND a cat AND a cat --n fog --d 1")
    assert largest(plain, generate(sd1.folder, *SIZE, *options, *equal).pictures) <= 1
    unlike = ("--prompt", "a cat AND (a dog:1.4) AND a bird --n fog --d 1")
    soft = generate(sd1.folder, *SIZE, *options, *unlike).pictures
    filled = write_map(tmp_path / "filled.png", (255, 40, 255), (120, 180, 255), (30, 255, 255))
    assert largest(soft, generate(sd1.folder, *SIZE, "--mask_path", filled, *options[2:], *unlike).pictures) == 0
    assert largest(soft, plain) > 3


def test_with_img2img_and_highres_fix(sd1, generate, halves, tmp_path):
    """The map fits every size: equal parts are one prompt in both stages, and over a source picture."""
    Image.effect_noise((128, 128), 60).convert("RGB").save(tmp_path / "source.png")
    for more in (
        ("--image_path", tmp_path / "source.png", "--strength", 1),
        ("--highres_fix_scale", 0.75, "--highres_fix_steps", 2, "--strength", 0.5),
    ):
        plain = generate(sd1.folder, *SIZE, *more, "--prompt", "a cat --n fog --d 1").pictures
        regions = (*more, "--mask_path", halves, "--prompt")
        equal = generate(sd1.folder, *SIZE, *regions, "a cat AND a cat --n fog --d 1").pictures
        assert np.abs(plain[0] - equal[0]).mean() < 0.5  # rounding, drawn over once more
        unlike = generate(sd1.folder, *SIZE, *regions, "a cat AND a dog --n fog --d 1").pictures
        assert np.abs(plain[0] - unlike[0]).mean() > 1


def test_without_a_map_parts_are_blended(sd1, generate, halves):
    result = generate(sd1.folder, *SIZE, "--prompt", "a cat AND a dog --d 1")
    assert result.status == 0
    assert result.stderr.count("parts (AND) have no map of regions (--mask_path)") == 1
    plain = generate(sd1.folder, *SIZE, "--prompt", "a cat --d 1").pictures
    assert largest(result.pictures, plain) > 3


def test_a_mask_repaints_or_divides(sd1, generate, tmp_path):
    """With a source picture a black mask repaints nothing; with AND it is a map of regions, and all is repainted."""
    Image.effect_noise((64, 64), 60).convert("RGB").save(tmp_path / "source.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "black.png")
    options = ("--image_path", tmp_path / "source.png", "--mask_path", tmp_path / "black.png", "--keep_unmasked")
    source = np.asarray(Image.open(tmp_path / "source.png")).astype(int)
    assert np.array_equal(generate(sd1.folder, *options, "--prompt", "a cat").pictures[0], source)
    assert not np.array_equal(generate(sd1.folder, *options, "--prompt", "a cat AND a dog").pictures[0], source)


def test_the_prompt_stays_whole_in_metadata(sd1, generate, halves):
    result = generate(sd1.folder, "--mask_path", halves, "--scale", 1, "--prompt", "a cat AND (a dog:1.2)")
    assert Image.open(result.files[0]).info["prompt"] == "a cat AND (a dog:1.2)"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--mask_path", "{halves}", "--prompt", "a cat"], "is for inpainting or for prompts with AND"),
        (["--mask_path", "nowhere", "--prompt", "a AND b"], "--mask_path nowhere: no such file or folder"),
        (["--network_regional_mask_max_color_codes", 2, "--prompt", "a AND b"], "give --mask_path too"),
        (["--mask_path", "{halves}", "--network_regional_mask_max_color_codes", 8, "--prompt", "a AND b"], "1 to 7"),
    ],
)
def test_bad_options(sd1, generate, halves, options, message):
    result = generate(sd1.folder, *(str(option).format(halves=halves) for option in options))
    assert result.status == 2
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1
