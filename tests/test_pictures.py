"""Source pictures: found, refused when broken, read upright and opaque, with the prompts in their metadata."""

import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from library.errors import InputError
from library.files.pictures import check_picture, find_pictures, load_mask, load_source, read_picture
from library.plan.picture_prompts import read_prompt

OPTION = "--image_path"
PARAMETERS = (
    "a cat, (red:1.2)\nNegative prompt: a dog,\nbad\nSteps: 20, Sampler: Euler a, CFG scale: 7, Seed: 1, Size: 64x64"
)
USER_COMMENT = 0x9286


def refusal(path: Path) -> str:
    with pytest.raises(InputError) as error:
        check_picture(path, OPTION)
    assert str(error.value).startswith(f"--image_path {path}: ")
    return str(error.value)


def gradient(width=32, height=24) -> Image.Image:
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 0] = np.linspace(0, 255, width)
    pixels[..., 1] = np.linspace(0, 255, height)[:, None]
    return Image.fromarray(pixels)


def test_folders_are_sorted_as_strings(tmp_path):
    for name in ("2.PNG", "10.jpg", "1.webp", "x.jpeg", "y.txt", "[z].png"):
        (tmp_path / name).touch()
    names = [path.name for path in find_pictures(str(tmp_path), OPTION)]
    assert names == ["1.webp", "10.jpg", "2.PNG", "[z].png", "x.jpeg"]
    assert find_pictures(str(tmp_path / "[z].png"), OPTION) == [tmp_path / "[z].png"]


def test_nothing_found(tmp_path):
    with pytest.raises(InputError, match="holds no pictures"):
        find_pictures(str(tmp_path), OPTION)
    with pytest.raises(InputError, match="no such file or folder"):
        find_pictures(str(tmp_path / "x"), OPTION)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_pictures_cut_short_are_refused(tmp_path, suffix):
    path = tmp_path / f"x.{suffix}"
    Image.effect_noise((64, 64), 80).convert("RGB").save(path)
    assert check_picture(path, OPTION) == (64, 64)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert "damaged" in refusal(path)


@pytest.mark.parametrize(("size", "message"), [((1, 1), "8 a side at least"), ((7, 5000), "8 a side at least")])
def test_pictures_of_unusable_sizes(tmp_path, size, message):
    path = tmp_path / "x.png"
    Image.new("L", size).save(path)
    assert message in refusal(path)


def test_a_huge_picture_is_refused_from_its_header(tmp_path):
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    path = tmp_path / "x.png"
    header = struct.pack(">IIBBBBB", 30_000, 30_000, 1, 0, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b""))
    assert "is 30000 x 30000 pixels, more than 16384 a side; shrink it, or give --allow_large_pictures" in refusal(path)


def test_a_large_picture_is_taken_when_allowed(sd1, generate, tmp_path):
    path = tmp_path / "long.png"
    Image.new("1", (17_000, 16)).save(path)
    options = ("--image_path", path, "--prompt", "a")
    assert generate(sd1.folder, *options).status == 2
    assert generate(sd1.folder, *options, "--allow_large_pictures").status == 0


def test_other_files_named_like_pictures(tmp_path):
    path = tmp_path / "x.png"
    path.write_text("hello")
    assert "is no picture that can be read" in refusal(path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes")
def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "x.png")
    assert "is no ordinary file" in refusal(tmp_path / "x.png")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientations_are_applied(tmp_path, orientation):
    inverse = {5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE}
    inverse |= {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM}
    inverse |= {8: Image.Transpose.ROTATE_270}
    upright = gradient()
    stored = upright.transpose(inverse[orientation]) if orientation in inverse else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "x.png", exif=exif)
    assert check_picture(tmp_path / "x.png", OPTION) == upright.size
    assert np.array_equal(np.asarray(read_picture(tmp_path / "x.png", OPTION)), np.asarray(upright))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_white(tmp_path, mode):
    path = tmp_path / "x.png"
    picture = Image.new("RGBA", (16, 16), (255, 0, 0, 0))
    picture.paste((0, 0, 0, 255), (0, 0, 8, 16))
    if mode == "P":
        picture = picture.quantize(4)
    picture.convert(mode).save(path)
    pixels = np.asarray(read_picture(path, OPTION))
    assert pixels[0, 15].tolist() == [255, 255, 255]
    assert pixels[0, 0].max() < 8


def test_sixteen_bits_and_four_inks(tmp_path):
    deep = np.linspace(0, 65535, 16 * 16).reshape(16, 16).astype(np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    pixels = np.asarray(read_picture(tmp_path / "deep.png", OPTION))
    assert np.array_equal(pixels[..., 0], deep // 257)
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "inks.jpg", quality=95)
    assert np.asarray(read_picture(tmp_path / "inks.jpg", OPTION))[0, 0].tolist() == pytest.approx([255, 0, 0], abs=3)


def test_of_an_animation_the_first_frame(tmp_path):
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "x.webp", save_all=True, append_images=frames[1:], lossless=True)
    assert np.asarray(read_picture(tmp_path / "x.webp", OPTION))[0, 0].tolist() == [255, 0, 0]


def test_sizes(tmp_path):
    gradient(50, 40).save(tmp_path / "x.png")
    assert load_source(tmp_path / "x.png", (48, 40)).size == (48, 40)
    mask = load_mask(tmp_path / "x.png", (6, 5))
    assert (mask.size, mask.mode) == ((6, 5), "L")


# ---------------------------------------------------------------------------------------------------------------------


def test_prompts_of_this_program_and_sd_scripts(tmp_path):
    info = PngInfo()
    info.add_text("prompt", "a cat,\r\n\r\nred")
    info.add_text("negative-prompt", "ein Kätzchen 猫\n")
    gradient().save(tmp_path / "x.png", pnginfo=info)
    line = read_prompt(tmp_path / "x.png")
    assert (line.prompt, line.settings) == ("a cat, red", {"negative_prompt": "ein Kätzchen 猫"})


def test_prompts_of_the_web_ui_in_png(tmp_path):
    info = PngInfo()
    info.add_text("parameters", PARAMETERS)
    gradient().save(tmp_path / "x.png", pnginfo=info)
    line = read_prompt(tmp_path / "x.png")
    assert (line.prompt, line.settings) == ("a cat, (red:1.2)", {"negative_prompt": "a dog, bad"})


@pytest.mark.parametrize("suffix", ["jpg", "webp"])
@pytest.mark.parametrize("encoding", ["utf-16-be", "utf-16-le"])
def test_prompts_of_the_web_ui_in_exif(tmp_path, suffix, encoding):
    exif = Image.Exif()
    exif.get_ifd(0x8769)[USER_COMMENT] = b"UNICODE\0" + PARAMETERS.encode(encoding)
    gradient().save(tmp_path / f"x.{suffix}", exif=exif)
    line = read_prompt(tmp_path / f"x.{suffix}")
    assert (line.prompt, line.settings) == ("a cat, (red:1.2)", {"negative_prompt": "a dog, bad"})


@pytest.mark.parametrize(
    ("parameters", "prompt", "negative"),
    [
        ("a cat", "a cat", ""),
        ("a: b, c: d", "a: b, c: d", ""),  # two pairs are no settings yet
        ("Steps: 20, Sampler: Euler, Seed: 1", "", ""),
        ('x\nSteps: 20, Model: "a, b: \\"c\\"", Seed: 1', "x", ""),
        ("one\ntwo\nNegative prompt: three\nSteps: 1, Seed: 2, Size: 3x4", "one two", "three"),
    ],
)
def test_parameters_are_split(tmp_path, parameters, prompt, negative):
    info = PngInfo()
    info.add_text("parameters", parameters)
    gradient().save(tmp_path / "x.png", pnginfo=info)
    line = read_prompt(tmp_path / "x.png")
    assert (line.prompt, line.settings.get("negative_prompt", "")) == (prompt, negative)


def test_a_picture_without_a_prompt(tmp_path):
    gradient().save(tmp_path / "x.png")
    with pytest.raises(InputError, match="has no prompt in its metadata; give --prompt or --from_file"):
        read_prompt(tmp_path / "x.png")
