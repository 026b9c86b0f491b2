"""Where source pictures, masks and guides come from: globs, lists, and formats beside PNG, JPEG and WebP."""

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image, features

from library.files.pictures import check_picture, read_picture

OPTIONS = ("--W", 64, "--H", 64, "--steps", 2, "--prompt", "a", "--dry_run", "--json")


@pytest.fixture
def pics(tmp_path, monkeypatch):
    """Pictures of three grey levels in `pics`, and one in a folder below."""
    monkeypatch.chdir(tmp_path)
    for name in ("1.png", "10.png", "2.png", "deep/3.png"):
        file = tmp_path / "pics" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64, 64), (len(name) * 9,) * 3).save(file)
    return tmp_path / "pics"


def planned(generate, model, *options, count=4) -> list[dict]:
    result = generate(model.folder, *OPTIONS, "--images_per_prompt", count, *options)
    assert result.status == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


def refused(generate, model, *options) -> str:
    result = generate(model.folder, *OPTIONS, *options)
    assert result.status == 2
    return result.stderr.removesuffix("\n")


def sources(facts) -> list[str]:
    return [os.path.relpath(fact["source"], "pics") if fact["source"] else "" for fact in facts]


def test_globs(sd1, generate, pics):
    assert sources(planned(generate, sd1, "--image_path", "pics/*.png")) == ["1.png", "10.png", "2.png", "1.png"]
    everywhere = planned(generate, sd1, "--image_path", "pics/**/*.png", "--mask_path", "pics/2*.png")
    assert sources(everywhere) == ["1.png", "10.png", "2.png", "deep/3.png"]
    assert {Path(fact["mask"]).name for fact in everywhere} == {"2.png"}
    (pics / "deep.png").mkdir()  # no picture
    assert sources(planned(generate, sd1, "--image_path", f"{pics}/d*/*", count=1)) == ["deep/3.png"]
    Image.new("RGB", (64, 64)).save(pics / "[12].png")  # a name that is there comes first
    assert sources(planned(generate, sd1, "--image_path", "pics/[12].png", count=2)) == ["[12].png"] * 2
    nothing = refused(generate, sd1, "--image_path", "pics/*.jpg")
    assert nothing == "error: --image_path pics/*.jpg: matches no files; check the pattern"


def test_natural_order(sd1, generate, pics):
    (pics / "10.png").rename(pics / "a10b9.png")
    for name in ("a2b11.png", "a10b10.png", "a2.png", "02.png"):
        Image.new("RGB", (64, 64)).save(pics / name)
    natural = ["1.png", "02.png", "2.png", "a2.png", "a2b11.png", "a10b9.png", "a10b10.png"]
    for given in ("pics", "pics/*.png"):
        assert sources(planned(generate, sd1, "--image_path", given, count=7)) == sorted(natural)
        assert sources(planned(generate, sd1, "--image_path", given, "--natural_order", count=7)) == natural
    message = "error: --natural_order: sorts pictures; give --image_path, --mask_path or --guide_image_path too"
    assert refused(generate, sd1, "--natural_order").startswith(message)


def test_lists(sd1, generate, pics, tmp_path, monkeypatch):
    (pics / "list.txt").write_text("# frames\n\ndeep/3.png\r\n 10.png \n10.png\n../pics/1.png\n", encoding="utf-8-sig")
    expected = ["deep/3.png", "10.png", "10.png", "1.png"]
    for folder in (tmp_path, pics.parent.parent):  # paths are relative to the list, not to where the program runs
        monkeypatch.chdir(folder)
        facts = planned(generate, sd1, "--image_path", pics / "list.txt", "--natural_order")
        assert [os.path.relpath(fact["source"], pics) for fact in facts] == expected


@pytest.mark.parametrize("option", ["--image_path", "--mask_path", "--guide_image_path"])
def test_faults_in_lists_are_told_with_their_lines(sd1, generate, pics, option):
    list_file = Path("list.txt")
    beside = {"--mask_path": ("--image_path", "pics/1.png"), "--guide_image_path": ("--vgg16_guidance_scale", 1)}
    given = (option, "list.txt", *beside.get(option, ()))
    list_file.write_text("# none\n\n")
    message = f"error: {option} list.txt: names no picture; write a path a line"
    assert refused(generate, sd1, *given) == message
    list_file.write_text("pics/1.png\n\npics/4.png\npics\n")
    assert refused(generate, sd1, *given).splitlines() == [
        f"error: {option} pics/4.png (list.txt:3): no such file; check the path",
        f"error: {option} pics (list.txt:4): is a folder; write the path of a picture",
    ]
    list_file.write_text("pics/1.png\npics/broken.png\n")
    (pics / "broken.png").write_bytes(b"no picture")
    problem = "is no picture that can be read; save it as PNG, JPEG or WebP"
    assert refused(generate, sd1, *given) == f"error: {option} pics/broken.png (list.txt:2): {problem}"


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow reads no AVIF")
def test_avif(sd1, generate, pics):
    exif = Image.Exif()
    exif[0x0112] = 6  # on its side
    Image.new("RGB", (96, 64), "red").save(pics / "3.avif", exif=exif)
    facts = planned(generate, sd1, "--image_path", "pics")
    assert sources(facts) == ["1.png", "10.png", "2.png", "3.avif"]
    assert check_picture(pics / "3.avif", "--image_path") == (64, 96)
    red, green, blue = read_picture(pics / "3.avif", "--image_path").getpixel((32, 90))
    assert red > 250 > 5 > max(green, blue)  # its coder rounds


def test_heic_names_its_package_where_that_is_missing(sd1, generate, pics, monkeypatch):
    head = b"\0\0\0\x1cftypmif1\0\0\0\0mif1miafheic" + b"\0" * 40
    (pics / "photo.jpg").write_bytes(head)  # told by what it is, not by its name
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    message = "is HEIC, which needs a package; pip install pillow-heif, or save it as PNG"
    assert refused(generate, sd1, "--image_path", "pics/photo.jpg") == f"error: --image_path pics/photo.jpg: {message}"
    (pics / "photo.jpg").rename(pics / "0.HEIC")
    assert refused(generate, sd1, "--image_path", "pics") == f"error: --image_path pics/0.HEIC: {message}"
    learnt = []
    monkeypatch.setitem(sys.modules, "pillow_heif", SimpleNamespace(register_heif_opener=lambda: learnt.append(1)))
    assert "0.HEIC: is no picture that can be read" in refused(generate, sd1, "--image_path", "pics")
    assert learnt
    (pics / "0.HEIC").write_bytes(head.replace(b"heic", b"avif"))  # which Pillow reads, were it whole
    assert "HEIC, which" not in refused(generate, sd1, "--image_path", "pics")
