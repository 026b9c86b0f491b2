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
from library.files.pictures import Found, check_picture, find_pictures, read_mask, read_picture
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


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def test_folders_are_sorted_as_strings(tmp_path):
    for name in ("2.PNG", "10.jpg", "1.webp", "x.jpeg", "y.txt", "[z].png"):
        (tmp_path / name).touch()
    names = [found.path.name for found in find_pictures(str(tmp_path), OPTION)]
    assert names == ["1.webp", "10.jpg", "2.PNG", "[z].png", "x.jpeg"]
    assert find_pictures(str(tmp_path / "[z].png"), OPTION) == [Found(tmp_path / "[z].png")]


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


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "webp"])
def test_what_is_clear_in_a_mask_is_not_repainted(tmp_path, mode):
    """White and half grey, each opaque, half clear and clear: brightness times opacity."""
    path = tmp_path / ("x.webp" if mode == "webp" else "x.png")
    picture = Image.new("RGBA", (48, 8))
    for column, (grey, alpha) in enumerate([(255, 255), (255, 128), (255, 0), (128, 255), (128, 128), (128, 0)]):
        picture.paste((grey, grey, grey, alpha), (column * 8, 0, column * 8 + 8, 8))
    if mode == "webp":
        picture.save(path, lossless=True, exact=True)
    else:
        (picture.quantize(6) if mode == "P" else picture.convert(mode)).save(path)
    row = np.asarray(read_mask(path))[4, 4::8]
    assert row.tolist() == pytest.approx([255, 128, 0, 128, 64, 0], abs=1)


@pytest.mark.parametrize(
    ("depth", "kind", "clear"),
    [(1, 0, 1), (2, 0, 3), (4, 0, 15), (8, 0, 255), (16, 0, 65535), (8, 2, 255), (16, 2, 65535)],
)
def test_a_colour_that_a_png_means_by_clear(tmp_path, depth, kind, clear):
    """Left half black, right half clear white."""
    path, channels = tmp_path / "x.png", 3 if kind == 2 else 1
    bits = "".join(f"{value:0{depth}b}" * channels for value in [0] * 8 + [clear] * 8)
    row = b"\0" + int(bits, 2).to_bytes(len(bits) // 8)
    chunks = [chunk(b"IHDR", struct.pack(">IIBBBBB", 16, 8, depth, kind, 0, 0, 0))]
    chunks += [chunk(b"tRNS", struct.pack(">H", clear) * channels), chunk(b"IDAT", zlib.compress(row * 8))]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks) + chunk(b"IEND", b""))
    assert np.asarray(read_mask(path)).max() == 0
    assert np.asarray(read_picture(path, OPTION))[0, ::15].tolist() == [[0] * 3, [255] * 3]


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


# ---------------------------------------------------------------------------------------------------------------------
# What other programs write


SETTINGS = "Steps: 20, Sampler: Euler a, CFG scale: 7, Seed: 1, Size: 64x64"
GRAPH = '{"3": {"class_type": "KSampler", "inputs": {"seed": 5, "negative_prompt": "x"}}}'


def put_chunks(path: Path, *chunks: bytes) -> Path:
    """Put chunks behind a PNG's header."""
    gradient().save(path)
    content = path.read_bytes()
    path.write_bytes(content[:33] + b"".join(chunks) + content[33:])
    return path


def put_texts(path: Path, texts: dict[str, str]) -> Path:
    return put_chunks(path, *(chunk(b"tEXt", name.encode() + b"\0" + text.encode()) for name, text in texts.items()))


def prompts_of(path: Path) -> tuple[str, str]:
    line = read_prompt(path)
    return line.prompt, line.settings.get("negative_prompt", "")


@pytest.mark.parametrize(
    ("parameters", "prompt", "negative"),
    [
        (f"a cat\nNegative prompt: fog\n{SETTINGS}\nTemplate: a {{cat|dog}}\nNegative Template: fog", "a cat", "fog"),
        (f"a cat\n{SETTINGS}\nTemplate: a, (b:1.1), (c:1.2), (d:1.3)\n\nsecond: line, e: f, g: h", "a cat", ""),
        (f"a cat\nNegative prompt: fog\n{SETTINGS}\n\nUsed embeddings: zorb", "a cat", "fog"),
        ("a cat\nSize: 1x2, Seed: 3, Model: y\nTemplate: z", "a cat", ""),
        (f"a red circle {SETTINGS}", "a red circle", ""),
        (f"a red circle Negative prompt: a dog {SETTINGS}", "a red circle", "a dog"),
        (f"a red circle\tNegative prompt: a dog\t{SETTINGS} Template: a {{red|blue}} circle", "a red circle", "a dog"),
        (f"a red circle Negative prompt: a dog\n{SETTINGS}", "a red circle", "a dog"),
        (f"a red circle\r\rNegative prompt: a dog\r{SETTINGS}", "a red circle", "a dog"),
        ("a red circle\nNegative prompt: a dog", "a red circle", "a dog"),
        (SETTINGS, "", ""),
        ("a" * 200_000, "a" * 200_000, ""),  # at once
    ],
)
def test_settings_wherever_they_stand(tmp_path, parameters, prompt, negative):
    assert prompts_of(put_texts(tmp_path / "x.png", {"parameters": parameters})) == (prompt, negative)


@pytest.mark.parametrize(
    ("problem", "texts"),
    [
        ("has metadata of ComfyUI that is damaged", {"prompt": GRAPH[:60], "workflow": '{"nodes": [], "links": []}'}),
        ("has ComfyUI's workflow and no graph", {"parameters": '{"last_node_id": 9, "nodes": [], "links": []}'}),
        ("has no prompt that can be read", {"prompt": GRAPH}),
        (
            "has the mark of Draw Things and no settings",
            {"XML:com.adobe.xmp": "<x><xmp:CreatorTool>Draw Things</xmp:CreatorTool></x>"},
        ),
        (
            "has the metadata of Easy Diffusion, which",
            {"prompt": "{'prompt': 'a cat', 'use_stable_diffusion_model': 'x'}"},
        ),
        ("has JSON of an unknown program in its metadata", {"prompt": '[{"text": "a cat"}]'}),
        ("has JSON of an unknown program in its metadata", {"parameters": '{"text": "a c'}),
        ("has the mark of SwarmUI and no settings", {"parameters": '{"sui_image_params": {}}'}),
    ],
)
def test_json_without_a_prompt_is_none(tmp_path, problem, texts):
    path = put_texts(tmp_path / "x.png", texts)
    with pytest.raises(InputError, match=rf"^--image_path {path}: {problem}.*; give --prompt or --from_file$"):
        read_prompt(path)


@pytest.mark.parametrize(
    ("texts", "prompt"),
    [
        ({"parameters": '{\n  "sui_image_params": {\n    "prompt": "a Fooocus cat"\n  }\n}'}, "a Fooocus cat"),
        ({"parameters": '{"prompt": "a cat", "metadata_scheme": "fooocus"}', "fooocus_scheme": "fooocus"}, "a cat"),
        ({"parameters": '{"prompt": "a cat", "version": "Fooocus v2.5.5"}'}, "a cat"),
        ({"invokeai_metadata": '{"positive_prompt": "a cat"}'}, "a cat"),
        ({"Dream": '"a cat" -s 20', "sd-metadata": "{}"}, "a cat"),
        ({"Description": "a cat", "Software": "NovelAI", "Comment": '{"prompt": "a cat", "uc": "fog"}'}, "a cat"),
        ({"parameters": '{"c": "a cat", "uc": "fog", "steps": 20}'}, "a cat"),
    ],
)
def test_prompts_in_the_json_of_other_programs(tmp_path, texts, prompt):
    """What more their records say is for `--from_pictures`: see test_recipes.py."""
    assert read_prompt(put_texts(tmp_path / "x.png", texts)).prompt == prompt


@pytest.mark.parametrize("suffix", ["jpg", "webp"])
def test_json_in_exif_is_no_prompt(tmp_path, suffix):
    exif = Image.Exif()
    exif[0x0110], exif[0x010F] = f"prompt:{GRAPH}", 'workflow:{"nodes": []}'
    gradient().save(tmp_path / f"x.{suffix}", exif=exif)
    with pytest.raises(InputError, match="has no prompt that can be read"):
        read_prompt(tmp_path / f"x.{suffix}")
    exif = Image.Exif()
    exif.get_ifd(0x8769)[USER_COMMENT] = b"UNICODE\0" + '{"sui_image_params": {}}'.encode("utf-16-be")
    gradient().save(tmp_path / f"x.{suffix}", exif=exif)
    with pytest.raises(InputError, match="has the mark of SwarmUI"):
        read_prompt(tmp_path / f"x.{suffix}")
    exif = Image.Exif()
    exif[0x010E] = '{"prompt": "a cat", "uc": "fog", "request_type": "x"}'  # NovelAI's
    gradient().save(tmp_path / f"x.{suffix}", exif=exif)
    assert prompts_of(tmp_path / f"x.{suffix}") == ("a cat", "fog")


def test_parameters_beside_a_graph_are_read(tmp_path):
    texts = {"prompt": GRAPH, "workflow": '{"nodes": [], "links": []}', "parameters": PARAMETERS}
    assert prompts_of(put_texts(tmp_path / "x.png", texts)) == ("a cat, (red:1.2)", "a dog, bad")


def test_a_prompt_may_begin_with_brackets(tmp_path):
    for prompt in ("{{{a cat}}}", "[a cat], fog", '["a cat"]', "{a|b}"):
        assert prompts_of(put_texts(tmp_path / "x.png", {"prompt": prompt})) == (prompt, "")


def test_a_negative_prompt_under_another_name(tmp_path):
    assert prompts_of(put_texts(tmp_path / "x.png", {"prompt": "a", "negative_prompt": "b"})) == ("a", "b")


@pytest.mark.parametrize("kind", [b"tEXt", b"zTXt", b"iTXt"])
@pytest.mark.parametrize(("text", "encoding"), [("ein Kätzchen 猫", "utf-8"), ("ein Kätzchen", "latin-1")])
def test_texts_of_png_in_either_encoding(tmp_path, kind, text, encoding):
    raw = text.encode(encoding)
    data = {
        b"tEXt": b"\0" + raw,
        b"zTXt": b"\0\0" + zlib.compress(raw),
        b"iTXt": b"\0\1\0de\0Name\0" + zlib.compress(raw),
    }
    path = put_chunks(tmp_path / "x.png", chunk(kind, b"parameters" + data[kind]))
    assert prompts_of(path) == (text, "")


def test_what_this_program_writes_is_read_as_it_was(sd1, generate, tmp_path):
    """In Latin-1 the first of these has the bytes of `é` in UTF-8."""
    prompts = ["Ã© cat", "é cat", "猫 cat"]
    (tmp_path / "p.txt").write_text("\n".join(prompts), encoding="utf-8")
    files = generate(sd1.folder, "--from_file", tmp_path / "p.txt", "--sequential_file_name").files
    assert [read_prompt(file).prompt for file in files] == prompts


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
@pytest.mark.parametrize(
    ("code", "encoding"),
    [
        (b"", "utf-8"),
        (b"", "utf-16-le"),
        (b"ASCII\0\0\0", "utf-8"),
        (b"\0" * 8, "utf-8"),
        (b"JIS\0\0\0\0\0", "iso2022_jp"),
        (b"JIS\0\0\0\0\0", "cp932"),
        (b"UNICODE\0", "utf-16"),
        (b"UNICODE\0", "utf-16-be"),
        (b"UNICODE\0", "utf-16-le"),
        (b"UNICODE\0", "utf-8"),
        (b"Unicode\0", "utf-16-be"),
    ],
)
def test_user_comments_in_every_encoding(tmp_path, suffix, code, encoding):
    for prompt in ("a red circle", "赤い丸、猫とテーブル"):
        for ending in ("", f"\nNegative prompt: fog\n{SETTINGS}"):
            exif = Image.Exif()
            exif.get_ifd(0x8769)[USER_COMMENT] = code + (prompt + ending).encode(encoding)
            gradient().save(tmp_path / f"x.{suffix}", exif=exif.tobytes())
            if (code, encoding, prompt[0], ending) != (b"", "utf-16-le", "赤", ""):  # nothing tells what it is
                assert prompts_of(tmp_path / f"x.{suffix}") == (prompt, "fog" if ending else "")


# ---------------------------------------------------------------------------------------------------------------------
# What lies beside the pixels


def test_nothing_beside_the_pixels_refuses_a_picture(tmp_path):
    two_mb = bytes(range(256)) * 8000
    profile = chunk(b"iCCP", b"profile\0\0" + zlib.compress(two_mb))
    for number, chunks in enumerate(
        [
            [chunk(b"zTXt", b"workflow\0\0" + zlib.compress(two_mb))],
            [chunk(b"iTXt", b"workflow\0\1\0\0\0" + zlib.compress(b"a" * 70_000_000))],
            [chunk(b"zTXt", b"workflow\0\0not compressed"), chunk(b"tEXt", b"no end of its name")],
            [chunk(b"tEXt", b"x\0y")[:-1] + b"?"],  # its checksum is another's
            [profile],
            [chunk(b"iCCP", b"profile\0\0not compressed")],
            [chunk(b"pHYs", b"12"), chunk(b"gAMA", b""), chunk(b"tIME", b"")],
            [chunk(b"eXIf", b"no TIFF at all")],
            [chunk(b"eXIf", b"MM\0*\0\0\0\x08\0\x09")],
            [chunk(b"acTL", b"\0")],
            [chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(b"no numbers\n\n\nxx"))],
        ]
    ):
        path = put_chunks(tmp_path / f"{number}.png", *chunks)
        assert check_picture(path, OPTION) == (32, 24)
        assert np.array_equal(np.asarray(read_picture(path, OPTION)), np.asarray(gradient()))


def test_a_long_text_beside_the_prompt(tmp_path):
    graph = chunk(b"zTXt", b"workflow\0\0" + zlib.compress(b"{" + b" " * 3_000_000))
    path = put_chunks(tmp_path / "x.png", graph, chunk(b"tEXt", b"parameters\0" + PARAMETERS.encode()))
    assert prompts_of(path) == ("a cat, (red:1.2)", "a dog, bad")


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
@pytest.mark.parametrize(
    "exif", [b"no TIFF at all", b"Exif\0\0rubbish here", b"Exif\0\0MM\0*\0\0\0\x08\0\x09", b"Exif\0\0"]
)
def test_damaged_exif_is_passed_over(tmp_path, suffix, exif):
    gradient().save(tmp_path / f"x.{suffix}", exif=exif)
    assert check_picture(tmp_path / f"x.{suffix}", OPTION) == (32, 24)
    assert read_picture(tmp_path / f"x.{suffix}", OPTION).size == (32, 24)
    with pytest.raises(InputError, match="has no prompt"):
        read_prompt(tmp_path / f"x.{suffix}")


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
@pytest.mark.parametrize(
    ("kind", "count", "value"),
    [
        (2, 2, b"6\0"),  # text
        (2, 13, b"\0\0\0\x1a"),
        (3, 1, b"\0\0"),  # numbers that mean nothing
        (3, 1, b"\0\x09"),
        (5, 1, b"\0\0\0\x1a"),  # a fraction
        (77, 1, b"\0\6"),
    ],
)
def test_orientations_that_are_none(tmp_path, suffix, kind, count, value):
    entry = struct.pack(">HHHI", 1, 0x0112, kind, count) + value.ljust(4, b"\0")
    exif = b"Exif\0\0MM\0*\0\0\0\x08" + entry + b"\0\0\0\0" + b"Rotate 90 CW\0"
    gradient().save(tmp_path / f"x.{suffix}", exif=exif)
    assert check_picture(tmp_path / f"x.{suffix}", OPTION) == (32, 24)
    assert read_picture(tmp_path / f"x.{suffix}", OPTION).size == (32, 24)


def test_what_lies_in_a_folder_beside_the_pictures(tmp_path):
    gradient().save(tmp_path / "x.png")
    (tmp_path / "._x.png").write_bytes(b"\0\5\x16\7\0\2\0\0Mac OS X")
    (tmp_path / "more.png").mkdir()
    assert find_pictures(str(tmp_path), OPTION) == [Found(tmp_path / "x.png")]
    (tmp_path / "x.png").unlink()
    with pytest.raises(InputError, match="holds no pictures"):
        find_pictures(str(tmp_path), OPTION)
    with pytest.raises(InputError, match="cannot be read: File name too long; check the path"):
        find_pictures("a" * 300, OPTION)
