"""Runs that were cut off: gone on with, they come to the same pictures as a run that was not."""

import json
import os
import random
import re
import signal
import time
from pathlib import Path

import pytest
from child_runs import contents, kill_at, killed, start
from conftest import pictures_in
from PIL import Image

import gen_img_diffusers
from library.plan.earlier_runs import read_runs
from library.results import writer
from library.run.manifest import Manifest

LINES = "a cat\na dog --n fog\n{red|green|blue} house --w 72\n"


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.txt"
    file.write_text(LINES)
    return file


@pytest.fixture
def command(sd1, prompts):
    """A run of six pictures, its files named by their numbers."""
    options = ("--from_file", prompts, "--images_per_prompt", 2, "--seed", 5, "--sequential_file_name")
    return (sd1.folder, *options)


@pytest.mark.parametrize(
    ("owner", "name", "call", "after"),
    [
        (os, "fsync", 3, False),  # a temporary file was being written
        (os, "link", 3, False),
        (os, "link", 3, True),  # the picture stands, the manifest does not know it
        (Manifest, "add", 4, True),
        (Manifest, "begin", 1, False),  # nothing was written yet
    ],
)
def test_killed_at_any_moment(command, generate, tmp_path, owner, name, call, after):
    generate(*command, outdir=tmp_path / "whole")
    out = tmp_path / "out"
    out.mkdir()
    (out / "im_000001.txt").write_text("not ours")
    assert killed(kill_at(owner, name, call, after=after), *command, outdir=out) == signal.SIGKILL
    before = contents(out)
    result = generate(*command, "--resume", outdir=out)
    assert result.status == 0
    assert contents(out) == contents(tmp_path / "whole")
    assert before.items() <= contents(out).items()
    assert [path.name for path in out.glob(".*")] == []
    assert len(contents(out)) == 6


def test_killed_at_random_moments(command, generate, tmp_path):
    """Again and again, until it comes through. `KILLS=50 pytest -k random_moments` for a longer while."""
    began = time.monotonic()
    generate(*command, outdir=tmp_path / "whole")
    duration = time.monotonic() - began
    rng = random.Random(0)
    kills = 0
    for number in range(1_000_000):
        out = tmp_path / str(number)
        ended = None
        while ended != 0:
            child = start(*command, "--resume", outdir=out)
            deadline = time.monotonic() + rng.uniform(0, 1.5) * duration
            ended = None
            while ended is None and time.monotonic() < deadline:
                time.sleep(0.002)
                done, status = os.waitpid(child, os.WNOHANG)
                ended = status if done else None
            if ended is None:
                os.kill(child, signal.SIGKILL)
                _, ended = os.waitpid(child, 0)
                kills += 1
        assert contents(out) == contents(tmp_path / "whole")
        assert list(out.glob(".*")) == []
        if kills >= int(os.environ.get("KILLS", 3)):
            break


def test_a_torn_line_is_passed_over(command, generate, tmp_path):
    first = generate(*command)
    manifest = tmp_path / "out" / "manifest.jsonl"
    whole = manifest.read_bytes()
    manifest.write_bytes(whole[:-40])
    assert generate(*command, "--resume").stdout == ""
    assert contents(tmp_path / "out") == {file.name: file.read_bytes() for file in first.files}
    (run,) = read_runs(tmp_path / "out")
    assert len(run.done) == 6


def test_without_a_seed_the_first_runs_seeds_and_time_hold(sd1, prompts, generate, tmp_path):
    out = tmp_path / "out"
    command = (sd1.folder, "--from_file", prompts, "--images_per_prompt", 2, "--shuffle_prompts", "--n_iter", 2)
    assert killed(kill_at(os, "link", 5, after=True), *command, outdir=out) == signal.SIGKILL
    before = contents(out)
    planned = read_runs(out)[0].record.parts[0].files
    assert generate(*command, "--resume").status == 0
    assert sorted(contents(out)) == sorted(planned)
    assert len(planned) == 12
    assert before.items() <= contents(out).items()
    drawn = [(Image.open(file).info["raw-prompt"], Image.open(file).info["seed"]) for file in pictures_in(out)]
    assert len(set(drawn)) == 12


def test_a_finished_run_needs_no_model(command, generate, monkeypatch):
    assert generate(*command).status == 0
    monkeypatch.setattr(gen_img_diffusers, "load_pipeline", None)
    result = generate(*command, "--resume")
    assert (result.status, result.stdout, result.files) == (0, "", [])
    assert "6 there before" in result.stderr


def test_resuming_nothing_begins(command, generate):
    result = generate(*command, "--resume")
    assert (result.status, len(result.files)) == (0, 6)
    assert "holds no run yet" in result.stderr


@pytest.mark.parametrize(
    ("lines", "made"),
    [
        (LINES + "a bird\n", 2),
        ("a bird\na bee\n" + LINES, 4),
        ("# a remark\na dog --n fog\na cat\n{red|green|blue} house --w 72\n", 0),  # another order changes nothing
    ],
)
def test_added_lines_are_made(command, prompts, generate, tmp_path, lines, made):
    first = generate(*command)
    before = contents(tmp_path / "out")
    prompts.write_text(lines)
    result = generate(*command, "--resume")
    assert (result.status, len(result.files)) == (0, made)
    assert before.items() <= contents(tmp_path / "out").items()
    assert [file.name for file in result.files] == [f"im_{number:06d}.png" for number in range(7, 7 + made)]
    assert len(first.files) == 6
    again = generate(*command, "--resume")
    assert (again.status, again.files) == (0, [])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--steps", 3], "--steps 3: the run to resume has 2;"),
        (["--seed", 6], "--seed 6: the run to resume has 5;"),
        (["--bf16"], "--bf16 on: the run to resume has off;"),
        (["--images_per_prompt", 3], "--images_per_prompt 3: the run to resume has 2;"),
    ],
)
def test_changed_options_are_named(command, generate, changes, message):
    generate(*command)
    result = generate(*command, "--resume", *changes)
    assert (result.status, result.files) == (2, [])
    assert result.stderr.startswith(f"error: {message}")
    assert "another --outdir" in result.stderr


@pytest.mark.parametrize("options", [["--lowvram"], ["--compile"], ["--opt_channels_last"], ["--vae_slices", 2]])
def test_options_for_speed_and_memory_may_change(command, generate, options):
    generate(*command)
    result = generate(*command, "--resume", *options)
    assert (result.status, result.files) == (0, []), result.stderr


def test_changed_prompts_are_named(command, prompts, generate):
    generate(*command)
    prompts.write_text(LINES.replace("a dog", "a frog"))
    result = generate(*command, "--resume")
    assert (result.status, result.files) == (2, [])
    assert "the prompt 'a dog --n fog' of the run to resume is changed or gone" in result.stderr


def test_another_model_is_named(command, generate, tmp_path):
    from tools import random_model

    random_model.write_folder(
        random_model.random_networks("sd1", tiny=True, seed=1), tmp_path / "sd1", "epsilon", variant=None
    )
    generate(*command)
    result = generate(tmp_path / "sd1", *command[1:], "--resume")
    assert (result.status, result.files) == (2, [])
    assert result.stderr.startswith("error: --ckpt (unet): has changed since")


def test_changed_source_pictures_are_named(sd1, generate, tmp_path):
    folder = tmp_path / "sources"
    folder.mkdir()
    for name in ("a.png", "b.png"):
        Image.new("RGB", (64, 64), "red").save(folder / name)
    command = (sd1.folder, "--image_path", folder, "--prompt", "a", "--images_per_prompt", 2, "--strength", 1)
    generate(*command)
    Image.new("RGB", (64, 64), "blue").save(folder / "b.png")
    assert "b.png: has changed since the run to resume" in generate(*command, "--resume").stderr
    Image.new("RGB", (64, 64), "red").save(folder / "b.png")
    Image.new("RGB", (64, 64), "red").save(folder / "c.png")
    assert "c.png: is no part of the run to resume" in generate(*command, "--resume").stderr
    (folder / "c.png").unlink()
    assert generate(*command, "--resume").status == 0


def test_pictures_that_went_or_changed_are_made_again(command, generate, tmp_path):
    first, second, *_ = generate(*command).files
    whole = contents(tmp_path / "out")
    first.unlink()
    second.write_bytes(b"mine now")
    result = generate(*command, "--resume")
    assert result.status == 0
    assert [file.name for file in result.files] == [first.name, f"{second.stem}-1.png"]
    assert first.read_bytes() == whole[first.name]
    assert result.files[1].read_bytes() == whole[second.name]
    assert second.read_bytes() == b"mine now"
    assert generate(*command, "--resume").files == []


def test_a_run_at_work_is_not_resumed(command, generate, tmp_path):
    generate(*command)
    (run,) = read_runs(tmp_path / "out")
    pictures_in(tmp_path / "out")[0].unlink()
    with Manifest(tmp_path / "out", run.record) as other:
        assert other.file.name == "manifest.jsonl"
        result = generate(*command, "--resume")
        assert result.status == 2
        assert "still at work on this run" in result.stderr
        # another run in the folder keeps a manifest of its own
        assert generate(*command).status == 0
        assert (tmp_path / "out" / "manifest-1.jsonl").is_file()
    assert len(read_runs(tmp_path / "out")) == 2


def test_several_runs_in_a_folder(command, sd1, generate, tmp_path):
    """The run is found that the command fits."""
    generate(*command)
    pictures_in(tmp_path / "out")[0].unlink()
    generate(sd1.folder, "--prompt", "another")
    result = generate(*command, "--resume")
    assert (result.status, len(result.files)) == (0, 1)
    result = generate(sd1.folder, "--prompt", "another", "--resume")
    assert (result.status, result.files) == (0, [])


def test_equal_jobs_are_two_pictures(sd1, generate):
    command = (sd1.folder, "--prompt", "a --d 1", "--images_per_prompt", 3)
    files = generate(*command).files
    assert len(files) == 3
    files[1].unlink()
    result = generate(*command, "--resume")
    assert result.files == [files[1]]


def test_the_manifest(command, generate, tmp_path):
    files = generate(*command).files
    run, *pictures = map(json.loads, (tmp_path / "out" / "manifest.jsonl").read_text().splitlines())
    assert run["versions"]["torch"]
    assert run["options"]["steps"] == 2
    assert run["parts"][0]["lines"] == LINES.splitlines()
    assert [picture["file"] for picture in pictures] == [file.name for file in files]
    assert all(re.fullmatch("[0-9a-f]{64}", picture["sha256"]) for picture in pictures)
    assert [str(picture["seed"]) for picture in pictures] == [Image.open(file).info["seed"] for file in files]


def test_a_full_disk_leaves_a_run_that_can_be_resumed(command, generate, tmp_path, monkeypatch):
    generate(*command, outdir=tmp_path / "whole")
    real, calls = os.fsync, []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) > 4:  # the settings are one file more
            raise OSError(28, "No space left on device")
        real(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        result = generate(*command)
    assert result.status == 4
    assert re.search(r"^3 pictures made in .*, 3 not made$", result.stderr, re.MULTILINE)
    assert "No space left on device" in result.stderr.splitlines()[-1]
    assert len(result.files) == 3
    assert generate(*command, "--resume").status == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_pictures_are_written_after_their_first_stages(sd1, generate, monkeypatch):
    """Else a run that is cut off between the two would be gone on with as if the first stage were there."""
    saved = []
    save_whole = writer.save_whole

    def slow_for_first_stages(content, file):
        time.sleep(0 if file.stem.startswith("im_1") else 0.3)
        saved.append(file.stem)
        return save_whole(content, file)

    monkeypatch.setattr(writer, "save_whole", slow_for_first_stages)
    highres = ("--highres_fix_scale", 0.5, "--highres_fix_steps", 2, "--highres_fix_save_1st")
    command = (sd1.folder, "--prompt", "a", "--images_per_prompt", 2, "--sequential_file_name")
    assert generate(*command, *highres).status == 0
    assert len(saved) == 4
    assert all(saved.index(f"im_000000{number}") < saved.index(f"im_100000{number}") for number in (1, 2)), saved


def test_first_stages_are_not_saved_twice(sd1, generate, tmp_path):
    highres = ("--highres_fix_scale", 0.5, "--highres_fix_steps", 2, "--highres_fix_save_1st")
    command = (sd1.folder, "--prompt", "a", "--seed", 1, "--images_per_prompt", 2, "--sequential_file_name", *highres)
    generate(*command, outdir=tmp_path / "whole")
    out = tmp_path / "out"
    assert killed(kill_at(writer, "save_whole", 1, after=True), *command, outdir=out) == signal.SIGKILL
    assert len(contents(out)) in (1, 2)  # two writers
    result = generate(*command, "--resume")
    assert result.status == 0
    assert contents(out) == contents(tmp_path / "whole")
    assert len(contents(out)) == 4
