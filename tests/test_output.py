"""Files: their metadata, saved whole, over nothing."""

import hashlib
import json
import os
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from child_runs import Child
from PIL import Image
from safetensors.torch import save_file

from library.errors import EnvironmentFault, InputError
from library.files.picture_files import save_whole
from library.plan.job import Job
from library.results import writer
from library.results.metadata import FileHash, RunFacts, metadata
from library.texts import readable, shell_word

SMALL = ("--W", 64, "--H", 64, "--steps", 1)
FACTS = RunFacts("my model", 2, lambda: "0123456789")


def make_job(**changes) -> Job:
    values = {"prompt": "a (cat:1.2)", "seed": 7, "raw_prompt": "raw", "where": "f:1", "file": Path("x.png")}
    return Job(**(values | {"width": 512, "height": 512} | changes))


def test_metadata_in_both_forms():
    texts = metadata(
        make_job(negative_prompt="a dog, bad", negative_scale=3.0, steps=20, width=64, height=96, sampler="euler_a"),
        FACTS,
    )
    assert texts == {
        "prompt": "a (cat:1.2)",
        "negative-prompt": "a dog, bad",
        "seed": "7",
        "sampler": "euler_a",
        "steps": "20",
        "scale": "7.5",
        "negative-scale": "3.0",
        "raw-prompt": "raw",
        "parameters": "a (cat:1.2)\nNegative prompt: a dog, bad\n"
        "Steps: 20, Sampler: Euler a, CFG scale: 7.5, Seed: 7, Size: 64x96, Model hash: 0123456789, Model: my model, "
        "Clip skip: 2, Negative scale: 3",
    }


def test_metadata_without_what_was_not_used():
    facts = RunFacts("a, b: c", 1, lambda: None)
    texts = metadata(make_job(), facts)
    assert "negative-prompt" not in texts
    assert "negative-scale" not in texts
    settings = 'Steps: 50, Sampler: DDIM, CFG scale: 7.5, Seed: 7, Size: 512x512, Model: "a, b: c"'
    assert texts["parameters"] == f"a (cat:1.2)\n{settings}"


def test_every_picture_tells_its_own_job(sd1, generate, tmp_path):
    file = tmp_path / "p.txt"
    file.write_text("ein Kätzchen 猫 --d 5 --n x\na {dog|frog} --d 6 --w 72 --s 3 --l 4\n", encoding="utf-8")
    result = generate(sd1.safetensors, "--from_file", file, "--batch_size", 2)
    first, second = (Image.open(path).info for path in result.files)
    sha256 = hashlib.sha256(sd1.safetensors.read_bytes()).hexdigest()[:10]
    assert first["prompt"] == "ein Kätzchen 猫"
    assert first["raw-prompt"] == "ein Kätzchen 猫 --d 5 --n x"
    assert f"Seed: 5, Size: 64x64, Model hash: {sha256}, Model: sd1" in first["parameters"]
    assert second["prompt"] in ("a dog", "a frog")
    assert second["raw-prompt"] == "a {dog|frog} --d 6 --w 72 --s 3 --l 4"
    assert "Steps: 3, Sampler: DDIM, CFG scale: 4, Seed: 6, Size: 72x64" in second["parameters"]


def test_a_folder_has_no_hash(tmp_path):
    assert FileHash(tmp_path)() is None


def test_a_taken_name_gets_a_number(tmp_path):
    for expected in ("x.png", "x-1.png", "x-2.png"):
        assert save_whole(b"a picture", tmp_path / "x.png") == tmp_path / expected
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x-1.png", "x-2.png", "x.png"]
    assert (tmp_path / "x-2.png").read_bytes() == b"a picture"


def test_file_systems_without_links(tmp_path, monkeypatch):
    def no_links(*_):
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    assert [save_whole(b"a picture", tmp_path / "x.png").name for _ in range(2)] == ["x.png", "x-1.png"]
    assert (tmp_path / "x-1.png").read_bytes() == b"a picture"


def test_a_vanished_folder(tmp_path):
    with pytest.raises(EnvironmentFault, match=r"x\.png: cannot be written"):
        save_whole(b"a picture", tmp_path / "gone" / "x.png")


def test_a_full_disk_leaves_no_fragment(sd1, tmp_path):
    """The limit on a file's size stands for the disk; the picture's is bigger."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "im_000001.png").write_bytes(b"mine")
    argv = ("--ckpt", sd1.folder, "--outdir", out, "--sequential_file_name", *SMALL, "--prompt", "a")

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))

    done = Child(*argv, prepare=limit).wait()
    assert done.returncode == 4
    assert "cannot be written (File too large)" in done.stderr.splitlines()[-1]
    assert [(p.name, p.read_bytes()) for p in out.glob("im_*")] == [("im_000001.png", b"mine")]


def test_existing_files_are_left_alone(sd1, generate, tmp_path):
    for _ in range(2):
        assert generate(sd1.folder, "--prompt", "a", "--sequential_file_name").status == 0
    assert sorted(p.name for p in (tmp_path / "out").glob("*.png")) == ["im_000001.png", "im_000002.png"]
    assert len(generate(sd1.folder, "--prompt", "a --d 1", "--images_per_prompt", 2).files) == 2


def test_two_processes_in_one_folder(sd1, tmp_path):
    argv = ("--ckpt", sd1.folder, "--outdir", tmp_path / "out", "--sequential_file_name", *SMALL)
    both = [Child(*argv, "--prompt", "a", "--images_per_prompt", 3) for _ in range(2)]
    ended = [each.wait() for each in both]
    assert [each.returncode for each in ended] == [0, 0]
    named = [line for each in ended for line in each.stdout.splitlines()]
    assert sorted(named) == sorted(str(path) for path in (tmp_path / "out").glob("*.png"))
    assert len(set(named)) == 6


def test_writing_failures_end_the_run(sd1, generate, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    result = generate(sd1.folder, "--prompt", "a", "--images_per_prompt", 3)
    assert result.status == 4
    assert "No space left on device" in result.stderr
    assert list((tmp_path / "out").glob("*.png")) == []


# ---------------------------------------------------------------------------------------------------------------------
# Limits of formats and file systems


def test_a_format_that_takes_no_such_size_is_refused_before_anything_is_drawn(sd1, generate, tmp_path):
    for options, problem in (
        (("--W", 16384, "--format", "webp"), "16384 x 64 pixels: WEBP takes 16383 a side; use 16376 or less, or"),
        (("--highres_fix_scale", 0.5, "--H", 16384, "--format", "webp"), "64 x 16384 pixels: WEBP takes 16383"),
    ):
        result = generate(sd1.folder, "--prompt", "a", *options, "--dry_run")
        assert (result.status, result.stderr.startswith(f"error: {problem}")) == (2, True), result.stderr
    line = generate(sd1.folder, "--prompt", "a --w 16384", "--format", "webp")
    assert line.stderr.startswith("error: 16384 x 64 pixels: WEBP takes")
    assert generate(sd1.folder, "--prompt", "a", "--W", 16376, "--format", "webp", "--dry_run").status == 0
    assert generate(sd1.folder, "--prompt", "a", "--W", 16384, "--dry_run").status == 0


def test_a_large_source_that_a_jpeg_cannot_be_is_refused(sd1, generate, tmp_path):
    Image.new("1", (65_504, 64)).save(tmp_path / "x.png")
    argv = ("--ckpt", sd1.folder, "--outdir", tmp_path / "out", "--dry_run", "--prompt", "a")
    large = ("--image_path", tmp_path / "x.png", "--allow_large_pictures")  # which holds for all of a process
    done = [Child(*argv, *large, "--format", name).wait() for name in ("jpg", "png")]
    assert [each.returncode for each in done] == [2, 0]
    assert done[0].stderr.splitlines()[-1].startswith("error: 65504 x 64 pixels: JPEG takes 65500 a side")


def test_a_picture_that_cannot_be_encoded_fails_alone(sd1, generate, tmp_path, monkeypatch):
    real = writer.encode

    def encode(pixels, suffix, texts, quality):
        if texts["seed"] == "2":
            raise OSError("encoder error -2 when writing image file")
        return real(pixels, suffix, texts, quality)

    monkeypatch.setattr(writer, "encode", encode)
    command = (sd1.folder, "--prompt", "a --d 1,2,3", "--images_per_prompt", 3, "--sequential_file_name")
    result = generate(*command)
    assert result.status == 3
    assert [file.name for file in result.files] == ["im_000001.png", "im_000003.png"]
    problem = "error: im_000002.png (seed 2): cannot be made a .png (encoder error -2 when writing image file)"
    assert result.stderr.count(problem) == 1
    assert "2 pictures made" in result.stderr and "1 failed" in result.stderr
    (failed,) = (tmp_path / "out").glob("failed_*.txt")
    assert failed.read_text().splitlines()[1:] == ["a --d 2"]
    monkeypatch.undo()
    assert [file.name for file in generate(*command, "--resume").files] == ["im_000002.png"]


@pytest.mark.parametrize("stem", ["n" * 251, "é" * 125 + "n"])
def test_names_as_long_as_the_file_system_takes(sd1, generate, tmp_path, stem):
    source = tmp_path / f"{stem}.png"
    Image.effect_noise((64, 64), 60).save(source)
    command = (sd1.folder, "--image_path", source, "--prompt", "a", "--use_original_file_name")
    assert [file.name for file in generate(*command).files] == [source.name]
    for more, length in (
        (("--images_per_prompt", 2), 257),  # the second would have a number
        (("--grid",), 260),
        (("--format", "webp"), 256),
    ):
        result = generate(*command, *more, "--dry_run", outdir=tmp_path / "other")
        assert result.status == 2
        problem = (
            f"would need names of {length} bytes, the file system takes 255; give the source picture a shorter name"
        )
        assert problem in result.stderr
    assert generate(*command, "--dry_run").status == 2  # its own name is taken now


def test_a_folder_whose_name_is_too_long(sd1, generate, tmp_path):
    for folder in (tmp_path / ("n" * 256), tmp_path / "new" / ("é" * 128) / "x"):
        result = generate(sd1.folder, "--prompt", "a", "--dry_run", "--outdir", folder)
        assert (result.status, "names may have 255 bytes here; give a shorter one" in result.stderr) == (2, True)
    for depth in (20, 30):
        folder = tmp_path.joinpath(*["n" * 195] * depth)
        result = generate(sd1.folder, "--prompt", "a", "--dry_run", "--outdir", folder)
        assert (result.status, "leaves no room for names of files in the 4096 bytes" in result.stderr) == (2, True)


def test_a_name_that_turns_out_too_long_is_that_pictures_fault(tmp_path):
    file = tmp_path / f"{'n' * 251}.png"
    assert save_whole(b"a picture", file) == file
    with pytest.raises(InputError, match="has a name that is too long for the file system"):
        save_whole(b"another", file)
    assert list(tmp_path.iterdir()) == [file]


def test_temporary_files_of_a_run_are_taken_away(sd1, generate, tmp_path, monkeypatch):
    """Those of version 0.1.0, too, which have the stem in their names; others' stay."""
    command = (sd1.folder, "--prompt", "a", "--sequential_file_name", "--seed", 1)
    assert generate(*command).status == 0
    names = [".im_000001.0123456789abcdef.tmp", ".im_000002.0123456789abcdef.tmp", ".x.tmp"]
    for name in names:
        (tmp_path / "out" / name).touch()
    assert generate(*command, "--resume").status == 0
    assert sorted(file.name for file in (tmp_path / "out").glob(".*")) == names[1:]


# ---------------------------------------------------------------------------------------------------------------------
# Names that are no text

SHIFT_JIS = os.fsdecode("表示".encode("cp932"))  # what an archive from Japan may hold
AS_TEXT = SHIFT_JIS.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def badly_named(path: Path, name: str) -> Path:
    """Give a file a name that is no UTF-8."""
    return path.rename(path.with_name(name))


@pytest.fixture
def badly_named_source(tmp_path):
    Image.effect_noise((64, 64), 60).convert("RGB").save(tmp_path / "x.png")
    return badly_named(tmp_path / "x.png", f"{SHIFT_JIS}.png")


def test_texts_of_names():
    assert "\ufffd" in AS_TEXT
    assert readable(SHIFT_JIS) == AS_TEXT
    assert readable("猫 a") == "猫 a"
    assert readable("\ud83d x") == "\ufffd x"
    assert readable("猫".encode().decode("ascii", "surrogateescape")) == "猫"  # as the locale C has it
    assert shell_word("a b") == shlex.quote("a b")
    assert "猫\udc8e\ud83d".encode("ascii", "bytes_or_escaped") == b"\\u732b\x8e\\ud83d"  # to standard output
    echoed = subprocess.run(
        ["bash", "-c", f"printf %s {shell_word(SHIFT_JIS + chr(39) + chr(92))}"], capture_output=True
    )
    assert echoed.stdout == os.fsencode(SHIFT_JIS) + b"'\\"


@pytest.mark.parametrize("suffix", ["png", "webp", "jpg"])
def test_a_source_whose_name_is_no_text(sd1, generate, tmp_path, badly_named_source, suffix):
    masks = tmp_path / "masks"
    masks.mkdir()
    Image.new("L", (64, 64), 255).save(masks / "m.png")
    mask = badly_named(masks / "m.png", f"m{SHIFT_JIS}.png")
    options = ("--image_path", badly_named_source, "--mask_path", mask, "--prompt", "a --d 1", "--format", suffix)
    command = (sd1.folder, *options, "--use_original_file_name", "--grid", "--html")
    result = generate(*command)
    assert (result.status, [file.name for file in result.files if file.suffix == f".{suffix}"][-1:]) == (
        0, [f"{SHIFT_JIS}.{suffix}"],
    )  # fmt: skip
    again = generate(*command, "--resume")
    assert (again.status, again.stdout) == (0, "")
    page = (tmp_path / "out" / "index.html").read_text(encoding="utf-8")
    assert f"<dt>Source image<dd>{AS_TEXT}.png<dt>Mask<dd>m{AS_TEXT}.png" in page
    assert f'src="%95%5C%8E%A6.{suffix}"' in page
    assert f"--image_path {shell_word(str(badly_named_source))}".replace("'", "&#x27;") in page
    settings = tomllib.loads((tmp_path / "out" / "settings.toml").read_text(encoding="utf-8"))
    assert settings["image_path"] == readable(badly_named_source)


def test_a_badly_named_source_that_is_lost_and_resumed(sd1, generate, tmp_path, badly_named_source, monkeypatch):
    """It is listed as any other, the run goes on, and `--resume` makes it."""
    folder = tmp_path / "in"
    folder.mkdir()
    shutil.copy(badly_named_source, folder)
    shutil.copy(badly_named_source, folder / "z.png")
    options = ("--prompt", "a", "--images_per_prompt", 2, "--use_original_file_name", "--seed", 1)
    command = (sd1.folder, "--image_path", folder, *options)
    real = writer.encode
    monkeypatch.setattr(writer, "encode", lambda *rest: 1 / 0 if AS_TEXT in rest[2]["parameters"] else real(*rest))
    first = generate(*command)
    assert (first.status, [file.name for file in first.files]) == (3, ["z.png"])
    (failed,) = (tmp_path / "out").glob("failed_*.txt")
    assert f"# --image_path {readable(shell_word(str(folder / f'{SHIFT_JIS}.png')))}" in failed.read_text(
        encoding="utf-8"
    )
    monkeypatch.undo()
    second = generate(*command, "--resume")
    assert (second.status, [file.name for file in second.files]) == (0, [f"{SHIFT_JIS}.png"])
    assert f"Source image: {AS_TEXT}.png" in Image.open(second.files[0]).info["parameters"]


def test_every_file_of_a_run_may_be_badly_named(sd1, generate, tmp_path):
    """The model's folder and file, an embedding in both formats, a map, the prompt file, the output folder."""
    folder = shutil.copytree(sd1.folder, tmp_path / f"model{SHIFT_JIS}")
    pickled = shutil.copy(sd1.ckpt, tmp_path / f"{SHIFT_JIS}.ckpt")
    width = json.loads((sd1.folder / "text_encoder/config.json").read_text())["hidden_size"]
    save_file({"emb_params": torch.ones(1, width)}, tmp_path / "e")
    embedding = badly_named(tmp_path / "e", f"e{SHIFT_JIS}.safetensors")
    torch.save({"string_to_param": {"*": torch.ones(1, width)}}, tmp_path / "p")
    other = badly_named(tmp_path / "p", f"p{SHIFT_JIS}.pt")
    Image.fromarray(np.full((64, 64, 3), 255, np.uint8)).save(tmp_path / "m.png")
    regions = badly_named(tmp_path / "m.png", f"{SHIFT_JIS}.png")
    (tmp_path / "l").write_text("a AND b --d 1\n")
    lines = badly_named(tmp_path / "l", f"{SHIFT_JIS}.txt")
    options = ("--textual_inversion_embeddings", embedding, other, "--mask_path", regions, "--from_file", lines)
    cache = ("--tokenizer_cache_dir", tmp_path / f"cache{SHIFT_JIS}")
    for ckpt in (folder, pickled, pickled):
        result = generate(ckpt, *options, *cache, "--json", outdir=tmp_path / f"out{SHIFT_JIS}")
        assert result.status == 0, result.stderr
        assert f"Regions: {AS_TEXT}.png" in Image.open(result.files[0]).info["parameters"]
        assert json.loads(result.stdout)["file"] == str(result.files[0])
    assert list(cache[1].iterdir())


@pytest.mark.parametrize("environment", [{}, {"PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}])
def test_standard_output_has_the_bytes_of_names_in_the_locale_c(sd1, tmp_path, environment):
    """Of those that are no text and of those that are; settings with the latter can be read."""
    folder, out, names = tmp_path / SHIFT_JIS, tmp_path / "猫é", (SHIFT_JIS, "猫é")
    folder.mkdir()
    for name in names:
        Image.effect_noise((64, 64), 60).convert("RGB").save(folder / "x.png")
        badly_named(folder / "x.png", f"{name}.png")
    argv = [sys.executable, "gen_img_diffusers.py", "--ckpt", sd1.folder, "--outdir", out, "--steps", "2"]
    argv += ["--image_path", folder, "--prompt", "猫 é --d 1", "--images_per_prompt", "2"]
    argv += ["--use_original_file_name", "--html", "--grid"]
    in_c = {"env": os.environ | {"LC_ALL": "C"} | environment, "capture_output": True}
    done = subprocess.run(argv, **in_c)
    assert done.returncode == 0, done.stderr
    pictures = [out / f"{name}.png" for name in names]
    assert sorted(done.stdout.splitlines()) == sorted(map(os.fsencode, pictures))
    for name, picture in zip(names, pictures, strict=True):
        info = Image.open(picture).info
        assert (info["prompt"], f"Source image: {readable(name)}.png" in info["parameters"]) == ("猫 é", True)
    config = [*argv[:2], "--config", out / "settings.toml", "--prompt", "猫", "--dry_run"]
    other = ["--image_path", shutil.copy(pictures[1], tmp_path / "猫.png")]
    for more, status in (([], 2), (other, 0)):
        again = subprocess.run([*config, *more], **in_c)
        assert again.returncode == status, again.stderr
