"""Files: their metadata, saved whole, over nothing."""

import hashlib
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from library.errors import EnvironmentFault
from library.files.picture_files import save_whole
from library.plan.job import Job
from library.results.metadata import FileHash, RunFacts, metadata
from library.settings.samplers import SAMPLERS

FACTS = RunFacts(SAMPLERS["euler_a"], "my model", 2, lambda: "0123456789")


def make_job(**changes) -> Job:
    values = {"prompt": "a (cat:1.2)", "seed": 7, "raw_prompt": "raw", "where": "f:1", "file": Path("x.png")}
    return Job(**(values | {"width": 512, "height": 512} | changes))


def test_metadata_in_both_forms():
    texts = metadata(make_job(negative_prompt="a dog, bad", negative_scale=3.0, steps=20, width=64, height=96), FACTS)
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
    facts = RunFacts(SAMPLERS["ddim"], "a, b: c", 1, lambda: None)
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
    argv = [sys.executable, "gen_img_diffusers.py", "--ckpt", sd1.folder, "--outdir", out, "--sequential_file_name"]
    argv += ["--W", "64", "--H", "64", "--steps", "1", "--prompt", "a"]

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))

    done = subprocess.run(argv, preexec_fn=limit, capture_output=True, text=True)
    assert done.returncode == 4
    assert "cannot be written (File too large)" in done.stderr.splitlines()[-1]
    assert [(p.name, p.read_bytes()) for p in out.glob("im_*")] == [("im_000001.png", b"mine")]


def test_existing_files_are_left_alone(sd1, generate, tmp_path):
    for _ in range(2):
        assert generate(sd1.folder, "--prompt", "a", "--sequential_file_name").status == 0
    assert sorted(p.name for p in (tmp_path / "out").glob("*.png")) == ["im_000001.png", "im_000002.png"]
    assert len(generate(sd1.folder, "--prompt", "a --d 1", "--images_per_prompt", 2).files) == 2


def test_two_processes_in_one_folder(sd1, tmp_path):
    argv = [sys.executable, "gen_img_diffusers.py", "--ckpt", sd1.folder, "--outdir", tmp_path / "out"]
    argv += [
        "--sequential_file_name",
        "--W",
        "64",
        "--H",
        "64",
        "--steps",
        "1",
        "--prompt",
        "a",
        "--images_per_prompt",
        "3",
    ]
    processes = [subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    named = [line for stdout, _ in outputs for line in stdout.splitlines()]
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
