"""Redrawing parts of pictures: the masked area alone, new borders, and how masks are read, as a user runs them."""

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageChops, ImageDraw, ImageFilter

from library.draw.guides import Guide
from library.draw.model_inputs import MaskedPicture
from library.draw.sources import Start, filled
from library.plan.canvas import Box, Canvas, View, _in_shape, cut, find_boxes
from library.plan.job import Job
from library.settings.masks import MaskSettings
from library.settings.preprocessing import preprocessing

BOX = (60, 10, 80, 26)  # what the mask marks of a picture of 160 × 96
ALONE = ("--inpaint_area", "mask", "--inpaint_padding", 6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A picture of 160 × 96, a mask of one region and one of two."""
    folder = tmp_path_factory.mktemp("in")
    pixels = np.random.default_rng(0).integers(0, 255, (12, 20, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((160, 96), Image.Resampling.BICUBIC).save(folder / "p.png")
    mask = Image.new("L", (160, 96))
    mask.paste(255, BOX)
    mask.save(folder / "one.png")
    mask.paste(255, (110, 60, 126, 76))
    mask.save(folder / "two.png")
    return folder


def draw(generate, model, folder, mask, *options, picture="p.png", **more):
    """Draw over a picture at 64 × 64."""
    masked = ("--mask_path", folder / mask) if mask else ()
    options = ("--image_path", folder / picture, *masked, "--prompt", "a --d 1", *options)
    result = generate(model.folder, *options, **more)
    assert result.status == 0, result.stderr
    return result


def by_hand(generate, model, folder, mask, box, tmp_path, picture="p.png"):
    """A picture whose box is cut out, drawn over by plain inpainting, and put back."""
    source, marked = Image.open(folder / picture), Image.open(folder / mask)
    cut_out = tmp_path / "cut"
    cut_out.mkdir(exist_ok=True)
    source.resize((64, 64), Image.Resampling.LANCZOS, box=box).save(cut_out / "p.png")
    marked.crop(box).save(cut_out / "m.png")
    drawn = draw(generate, model, cut_out, "m.png", outdir=tmp_path / f"drawn{box[0]}").files[0]
    size = (box[2] - box[0], box[3] - box[1])
    source.paste(Image.open(drawn).resize(size, Image.Resampling.LANCZOS), box[:2], marked.crop(box))
    return source


# ---------------------------------------------------------------------------------------------------------------------
# The masked area alone


def test_the_masked_area_is_cut_out_drawn_and_put_back(sd1, generate, folder, tmp_path):
    result = draw(generate, sd1, folder, "one.png", *ALONE)
    # 20 × 16 pixels and 6 on each side are 32 × 28, of the shape of 64 × 64 are 32 × 32, which the top moves down
    expected = by_hand(generate, sd1, folder, "one.png", (54, 2, 86, 34), tmp_path)
    assert np.array_equal(result.pictures[0], np.asarray(expected))
    changed = np.abs(result.pictures[0] - np.asarray(Image.open(folder / "p.png"))).max(axis=2) > 0
    marked = np.asarray(Image.open(folder / "one.png")) > 0
    assert not changed[~marked].any()
    assert changed[marked].mean() > 0.9
    said = Image.open(result.files[0]).info["parameters"]
    assert "Inpaint area: Only masked, Masked area padding: 6, Picture size: 160x96" in said


def test_separate_regions_are_drawn_in_turn(sd1, generate, folder, tmp_path):
    picture = draw(generate, sd1, folder, "two.png", *ALONE, "--inpaint_regions", "each").pictures[0]
    first = by_hand(generate, sd1, folder, "one.png", (54, 2, 86, 34), tmp_path)
    first.save(folder / "first.png")
    marked = Image.open(folder / "two.png")
    marked.paste(0, BOX)
    marked.save(folder / "other.png")
    second = by_hand(generate, sd1, folder, "other.png", (104, 54, 132, 82), tmp_path, picture="first.png")
    assert np.array_equal(picture, np.asarray(second))


def test_a_batch_of_areas_equals_them_alone(sd1, generate, folder, tmp_path):
    masks, pictures = tmp_path / "masks", tmp_path / "pictures"
    masks.mkdir()
    pictures.mkdir()
    for number in range(3):  # pictures of different sizes
        picture = Image.open(folder / "p.png").crop((number * 8, 0, 160, 96))
        picture.save(pictures / f"{number}.png")
        mask = Image.new("L", picture.size)
        mask.paste(255, (60 - number * 16, 10, 90, 40))
        mask.save(masks / f"{number}.png")
    options = ("--prompt", "a --d 1", *ALONE, "--W", 128, "--H", 128, "--sequential_file_name")
    common = ("--image_path", pictures, "--mask_path", masks, "--images_per_prompt", 3, *options)
    together = generate(sd1.folder, *common, "--batch_size", 3).pictures
    assert [picture.shape for picture in together] == [(96, 160, 3), (96, 152, 3), (96, 144, 3)]
    paths = ("--image_path", pictures / "1.png", "--mask_path", masks / "1.png")
    alone = generate(sd1.folder, *paths, *options, outdir=tmp_path / "alone").pictures[0]
    assert np.abs(alone - together[1]).max() <= 1  # the order of sums in a batch of another size


def test_a_soft_mask_keeps_its_fill_to_itself(sd1, folder):
    """What is put back outside the mask, and what an inpainting model is shown of it, is the source's."""
    flat = Image.new("RGB", (64, 64), (200, 200, 200))
    flat.save(folder / "flat.png")
    soft = Image.new("L", (64, 64))
    soft.paste(255, (20, 20, 40, 40))
    soft.save(folder / "hard.png")
    settings = MaskSettings(blur_px=6, fill="black")
    start = Start(View(Canvas(folder / "flat.png", folder / "hard.png", None, settings), (64, 64)))
    assert start.picture.getcolors() == [(64 * 64, (200, 200, 200))]
    assert start.filled.getpixel((30, 30))[0] < 60
    shown = MaskedPicture.of(start, (64, 64))
    assert shown.start.picture.getcolors() == [(64 * 64, (200, 200, 200))]


def test_a_mask_that_is_changed_is_read_anew(folder):
    """In the loop, between prompts."""
    file = folder / "changed.png"
    found = []
    for left in (10, 90):
        mask = Image.new("L", (160, 96))
        mask.paste(255, (left, 10, left + 20, 30))
        mask.save(file)
        os.utime(file, (left, left))
        canvas = Canvas(folder / "p.png", file, None, MaskSettings(masked_area=True, padding_px=0))
        found += find_boxes(canvas, (160, 96), (64, 64), "")
    assert found == [Box(10, 10, 30, 30), Box(90, 10, 110, 30)]
    assert Start(View(canvas, (64, 64))).key != Start(View(replace(canvas, mask_file=folder / "one.png"), (64, 64))).key


def test_what_programs_are_told(sd1, generate, folder):
    options = (*ALONE, "--inpaint_regions", "each", "--mask_blur", 1.5, "--dry_run", "--json")
    told = json.loads(draw(generate, sd1, folder, "two.png", *options).stdout)
    assert (told["width"], told["height"], told["drawn_size"]) == (160, 96, [64, 64])
    assert len(told["boxes"]) == 2
    assert (told["mask_blur"], told["inpaint_padding"], told["inpaint_regions"]) == (1.5, 6, "each")


def test_an_area_is_as_large_as_the_model_draws_where_nothing_else_is_said(sd1, folder, run_plan_sizes):
    assert run_plan_sizes(sd1, folder) == (512, 512)


@pytest.fixture
def run_plan_sizes():
    import gen_img_diffusers
    from library.plan.planning import make_plan

    def sizes(model, folder):
        argv = ["--ckpt", model.folder, "--prompt", "a", "--image_path", folder / "p.png"]
        argv += ["--mask_path", folder / "one.png", "--inpaint_area", "mask"]
        (job,) = make_plan(gen_img_diffusers.make_parser().parse([str(each) for each in argv])).jobs
        return job.width, job.height

    return sizes


@pytest.mark.parametrize(
    ("area", "padding", "size", "expected"),
    [
        (Box(40, 40, 60, 60), 0, (64, 64), Box(40, 40, 60, 60)),
        (Box(40, 40, 60, 60), 10, (64, 64), Box(30, 30, 70, 70)),
        (Box(40, 40, 60, 60), 0, (128, 64), Box(30, 40, 70, 60)),  # brought to the shape
        (Box(0, 0, 20, 20), 10, (64, 64), Box(0, 0, 40, 40)),  # moved into the picture
        (Box(80, 80, 100, 100), 10, (64, 64), Box(60, 60, 100, 100)),
        (Box(0, 40, 100, 60), 0, (64, 64), Box(0, 0, 100, 100)),
        (Box(0, 0, 100, 100), 0, (64, 128), Box(0, -50, 100, 150)),  # in the middle where it does not fit in
    ],
)
def test_boxes(area, padding, size, expected):
    assert _in_shape(area, padding, size, (100, 100)) == expected


def test_beyond_the_picture_its_outermost_pixels_go_on():
    picture = Image.fromarray(np.arange(12, dtype=np.uint8).reshape(3, 4))
    shown = np.asarray(cut(picture, (-2, -1, 6, 5), (8, 6), Image.Resampling.BILINEAR))
    assert shown[0].tolist() == shown[1].tolist() == [0, 0, 0, 1, 2, 3, 3, 3]
    assert shown[:, 0].tolist() == [0, 0, 4, 8, 8, 8]


def test_a_guide_is_cut_alike(folder):
    """Also one of another size than the picture, and its mask for `inpaint`."""
    large = Image.open(folder / "p.png").resize((320, 192), Image.Resampling.NEAREST)
    large.save(folder / "guide.png")
    box = (54, 2, 86, 34)
    masks = MaskSettings(masked_area=True)
    job = Job(
        prompt="",
        seed=1,
        raw_prompt="",
        where="",
        file=Path("x.png"),
        width=64,
        height=64,
        canvas=(160, 96),
        source=folder / "p.png",
        mask=folder / "one.png",
        guides=(folder / "guide.png",),
        boxes=(Box(*box),),
    )
    part = large.resize((64, 64), Image.Resampling.LANCZOS, box=tuple(2 * side for side in box))
    assert np.array_equal(Guide.of(0, job, None, masks).prepare(), np.asarray(part))
    hidden = Guide.of(0, job, preprocessing("inpaint"), masks).prepare()
    marked = np.asarray(Image.open(folder / "one.png").crop(box).resize((64, 64), Image.Resampling.BILINEAR)) >= 128
    assert (hidden[marked] == -255).all()
    assert np.array_equal(hidden[~marked], np.asarray(part)[~marked])


# ---------------------------------------------------------------------------------------------------------------------
# Masks


def test_masks_from_transparency_inverted_and_blurred(sd1, generate, folder, tmp_path):
    mask = Image.open(folder / "one.png")
    clear = Image.open(folder / "p.png").convert("RGBA")
    clear.putalpha(ImageChops.invert(mask))
    clear.save(folder / "clear.png")
    Image.alpha_composite(Image.new("RGBA", clear.size, "white"), clear).convert("RGB").save(folder / "white.png")
    ImageChops.invert(mask).save(folder / "inverted.png")
    mask.filter(ImageFilter.GaussianBlur(3)).save(folder / "soft.png")
    size = ("--W", 160, "--H", 96)

    def same(first, second):
        pictures = [
            draw(generate, sd1, folder, mask, *size, *options, picture=picture, outdir=tmp_path / f"o{place}").pictures
            for place, (picture, mask, options) in enumerate((first, second))
        ]
        assert np.array_equal(*(pictures_of[-1] for pictures_of in pictures))
        for part in ("o0", "o1"):
            for file in (tmp_path / part).glob("*"):
                file.unlink()

    same(("clear.png", None, ["--mask_from_alpha"]), ("white.png", "one.png", []))
    same(("p.png", "one.png", ["--mask_invert"]), ("p.png", "inverted.png", []))
    same(("p.png", "one.png", ["--mask_blur", 3]), ("p.png", "soft.png", []))


def test_what_is_under_the_mask(sd1, generate, folder):
    picture = Image.new("RGB", (64, 64), (200, 40, 10))
    mask = Image.new("L", (64, 64))
    ImageDraw.Draw(mask).ellipse((10, 10, 50, 50), fill=255)
    ImageDraw.Draw(picture).ellipse((10, 10, 50, 50), fill=(0, 0, 255))
    assert filled(picture, mask, "original") is picture
    assert filled(picture, mask, "black").getpixel((30, 30)) == (0, 0, 0)
    assert filled(picture, mask, "black").getpixel((2, 2)) == (200, 40, 10)
    assert filled(picture, mask, "blur").getcolors() == [(64 * 64, (200, 40, 10))]  # the ground alone goes on
    large = Image.new("RGB", (2048, 2048), (200, 40, 10))  # where a blur by large windows took minutes
    large.paste((0, 0, 255), (300, 300, 1700, 1700))
    hole = Image.new("L", large.size)
    hole.paste(255, (300, 300, 1700, 1700))
    assert filled(large, hole, "blur").getcolors() == [(2048 * 2048, (200, 40, 10))]
    fills = [draw(generate, sd1, folder, "one.png", "--fill", fill).pictures[-1] for fill in ("original", "noise")]
    again = draw(generate, sd1, folder, "one.png", "--fill", "noise").pictures[-1]
    assert np.abs(fills[0] - fills[1]).mean() > 1
    assert np.array_equal(fills[1], again)


# ---------------------------------------------------------------------------------------------------------------------
# New borders


def test_a_canvas_grows(sd1, generate, folder, tmp_path):
    small = Image.open(folder / "p.png").crop((0, 0, 64, 48))
    small.save(folder / "small.png")
    large = Image.fromarray(np.pad(np.asarray(small), ((8, 0), (0, 16), (0, 0)), mode="edge"))
    large.save(folder / "large.png")
    mask = Image.new("L", (80, 56), 255)
    mask.paste(0, (0, 8, 64, 56))
    mask.save(folder / "border.png")
    # without --W and --H, a picture has the size of what it is drawn over
    argv = [sd1.folder, "--prompt", "a --d 1 --w 80 --h 56", "--keep_unmasked"]
    grown = generate(*argv, "--image_path", folder / "small.png", "--extend", "0,8,16,0", outdir=tmp_path / "a")
    by_hand = ("--image_path", folder / "large.png", "--mask_path", folder / "border.png")
    expected = generate(*argv, *by_hand, outdir=tmp_path / "b").pictures[0]
    assert np.array_equal(grown.pictures[0], expected)
    assert np.array_equal(grown.pictures[0][8:, :64], np.asarray(small))
    assert 'Extend: "0,8,16,0"' in Image.open(grown.files[0]).info["parameters"]


# ---------------------------------------------------------------------------------------------------------------------
# What is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--inpaint_area", "mask"], "--inpaint_area: is for masks; give --mask_path, --mask_from_alpha or --extend"),
        (["--inpaint_area", "masks"], "--inpaint_area masks: there is none of that name; write picture or mask"),
        (["--mask_path", "one.png", "--inpaint_padding", 4], "--inpaint_padding: is for redrawing the masked area"),
        (["--mask_path", "one.png", "--inpaint_regions", "each"], "--inpaint_regions: is for redrawing the masked"),
        (["--mask_path", "black.png", *ALONE], "black.png: redraws nothing, so that there is no area to draw"),
        (["--mask_path", "specks.png", *ALONE, "--inpaint_regions", "each"], "has 120 separate regions, more than 100"),
        (
            ["--mask_path", "one.png", "--mask_from_alpha"],
            "--mask_path and --mask_from_alpha: are two ways of giving masks",
        ),
        (["--mask_from_alpha"], "p.png: has nothing transparent, so that nothing would be redrawn"),
        (["--mask_invert"], "--mask_invert: needs a mask"),
        (["--fill", "black"], "--fill: is for masks"),
        (["--mask_blur", -1, "--mask_path", "one.png"], "--mask_blur -1: out of range"),
        (["--extend", "0,0,0,0"], "--extend 0,0,0,0: adds nothing"),
        (["--extend", "8,8"], "--extend 8,8: must be four numbers"),
        (["--extend=-8,0,0,0"], "--extend -8,0,0,0: out of range"),
        (["--extend", "16384,0,0,0"], "--extend 16384,0,0,0: makes p.png 16544 x 96 pixels, more than 16384 a side"),
        (["--mask_path", "one.png", *ALONE, "--prompt", "a AND b"], "--inpaint_area mask: draws a part of the picture"),
        (
            ["--mask_path", "one.png", "--mask_invert", "--prompt", "a AND b"],
            "--mask_invert: is for masks",
        ),
        (
            ["--image_path", "clear.png", "--mask_from_alpha", "--prompt", "a AND b"],
            "gives a mask, and",
        ),
        (["--mask_path", "dot.png", "--mask_blur", 16], "--mask_blur 16: leaves nothing of dot.png; blur it less"),
        (
            ["--mask_path", "one.png", "--inpaint_area", "mask", "--W", 8, "--H", 16384],
            "in the shape of 8 x 16384 would be",
        ),
        (["--image_path", "none.png", "--mask_from_alpha", "--mask_invert"], "none.png: is transparent all over"),
    ],
)
def test_what_cannot_be_redrawn(sd1, generate, folder, monkeypatch, options, message):
    monkeypatch.chdir(folder)
    Image.new("L", (160, 96)).save(folder / "black.png")
    specks = Image.new("L", (160, 96))
    for place in range(120):
        specks.putpixel((place % 40 * 4, place // 40 * 4), 255)
    specks.save(folder / "specks.png")
    dot = Image.new("L", (160, 96))
    dot.putpixel((80, 40), 255)
    dot.save(folder / "dot.png")
    Image.new("RGBA", (160, 96)).save(folder / "none.png")
    Image.merge("RGBA", (*Image.open("p.png").split(), Image.open("one.png"))).save(folder / "clear.png")
    result = generate(sd1.folder, "--image_path", "p.png", "--prompt", "a", *options)
    assert result.status == 2
    assert message in result.stderr
    assert result.stderr.splitlines()[-1].startswith("error: ")


def test_a_mask_of_another_shape_is_told(sd1, generate, folder):
    Image.open(folder / "one.png").crop((0, 0, 96, 96)).save(folder / "square.png")
    said = draw(generate, sd1, folder, "square.png", "--dry_run").stderr
    assert "square.png: is 96 x 96 pixels and is stretched over p.png, 160 x 96" in said
