"""Runs that were cut off: gone on with, they come to the same pictures as a run that was not."""

import json
import os
import random
import re
import shutil
import signal
import time
from itertools import cycle
from pathlib import Path

import pytest
import torch
from child_runs import contents, kill_at, killed, start
from conftest import pictures_in
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import save_file

import gen_img_diffusers
from library.plan.earlier_runs import read_runs
from library.results import writer
from library.run.manifest import Manifest
from tools.latent_upscaler import LatentUpscaler

LINES = "a cat\na dog --n fog\n{red|green|blue} house --w 72\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where the prompts lie, and the run that was drawn without a break."""
    return tmp_path_factory.mktemp("run")


@pytest.fixture
def prompts(folder: Path) -> Path:
    file = folder / "prompts.txt"
    file.write_text(LINES)
    return file


@pytest.fixture
def command(sd1, prompts):
    """A run of six pictures, its files named by their numbers."""
    options = ("--from_file", prompts, "--images_per_prompt", 2, "--seed", 5, "--sequential_file_name")
    return (sd1.folder, *options)


@pytest.fixture
def whole(command, generate, folder) -> dict[str, bytes]:
    """The pictures of the run, drawn without a break, once for all tests."""
    if not (folder / "whole").exists():
        assert generate(*command, outdir=folder / "whole").status == 0
    return contents(folder / "whole")


@pytest.fixture
def made(whole, folder, tmp_path) -> list[Path]:
    """The files of the run, as if it had just been drawn here."""
    return pictures_in(shutil.copytree(folder / "whole", tmp_path / "out"))


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
def test_killed_at_any_moment(command, generate, tmp_path, whole, owner, name, call, after):
    out = tmp_path / "out"
    out.mkdir()
    (out / "im_000001.txt").write_text("not ours")
    assert killed(kill_at(owner, name, call, after=after), *command, outdir=out) == signal.SIGKILL
    before = contents(out)
    result = generate(*command, "--resume", outdir=out)
    assert result.status == 0
    assert contents(out) == whole
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


@pytest.mark.usefixtures("made")
def test_a_torn_line_is_passed_over(command, generate, whole, tmp_path):
    manifest = tmp_path / "out" / "manifest.jsonl"
    manifest.write_bytes(manifest.read_bytes()[:-40])
    assert generate(*command, "--resume").stdout == ""
    assert contents(tmp_path / "out") == whole
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


@pytest.mark.usefixtures("made")
def test_a_finished_run_needs_no_model(command, generate, monkeypatch):
    monkeypatch.setattr(gen_img_diffusers, "load_pipeline", None)
    result = generate(*command, "--resume")
    assert (result.status, result.stdout, result.files) == (0, "", [])
    assert "6 there before" in result.stderr


def test_resuming_nothing_begins(command, generate):
    result = generate(*command, "--resume")
    assert (result.status, len(result.files)) == (0, 6)
    assert "holds no run yet" in result.stderr


@pytest.mark.parametrize(
    ("lines", "more"),
    [
        (LINES + "a bird\n", 2),
        ("a bird\na bee\n" + LINES, 4),
        ("# a remark\na dog --n fog\na cat\n{red|green|blue} house --w 72\n", 0),  # another order changes nothing
    ],
)
def test_added_lines_are_made(command, prompts, generate, tmp_path, whole, made, lines, more):
    assert len(made) == 6
    prompts.write_text(lines)
    result = generate(*command, "--resume")
    assert (result.status, len(result.files)) == (0, more)
    assert whole.items() <= contents(tmp_path / "out").items()
    assert [file.name for file in result.files] == [f"im_{number:06d}.png" for number in range(7, 7 + more)]
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
@pytest.mark.usefixtures("made")
def test_changed_options_are_named(command, generate, changes, message):
    result = generate(*command, "--resume", *changes)
    assert (result.status, result.files) == (2, [])
    assert result.stderr.startswith(f"error: {message}")
    assert "another --outdir" in result.stderr


@pytest.mark.parametrize("options", [["--lowvram"], ["--compile"], ["--opt_channels_last"], ["--vae_slices", 2]])
@pytest.mark.usefixtures("made")
def test_options_for_speed_and_memory_may_change(command, generate, options):
    result = generate(*command, "--resume", *options)
    assert (result.status, result.files) == (0, []), result.stderr


@pytest.mark.usefixtures("made")
def test_changed_prompts_are_named(command, prompts, generate):
    prompts.write_text(LINES.replace("a dog", "a frog"))
    result = generate(*command, "--resume")
    assert (result.status, result.files) == (2, [])
    place = f"{prompts}:{LINES.splitlines().index('a dog --n fog') + 1}"
    said = "the prompt 'a dog --n fog' of the run to resume is changed or gone"
    assert result.stderr.startswith(f"error: --resume ({place}): {said}")
    prompts.write_text(LINES.replace("a dog --n fog\n", ""))
    assert f"--resume (its prompt 2): {said}" in generate(*command, "--resume").stderr


def test_many_pictures_that_are_gone_are_told_in_one_line(command, generate, made):
    for file in made:
        file.unlink()
    result = generate(*command, "--resume")
    told = [line for line in result.stderr.splitlines() if line.startswith("warning: ")]
    assert len(told) == 1
    others = len(made) - 1
    assert f"{others} other pictures are gone or have been changed since they were made" in told[0]
    assert result.files == made


@pytest.mark.usefixtures("made")
def test_another_model_is_named(command, generate, tmp_path, capfd):
    from tools import random_model

    random_model.write_folder(
        random_model.random_networks("sd1", tiny=True, seed=1), tmp_path / "sd1", "epsilon", variant=None
    )
    capfd.readouterr()  # what the writing of the model says
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


def test_pictures_that_went_or_changed_are_made_again(command, generate, whole, made):
    first, second, *_ = made
    first.unlink()
    second.write_bytes(b"mine now")
    result = generate(*command, "--resume")
    assert result.status == 0
    assert [file.name for file in result.files] == [first.name, f"{second.stem}-1.png"]
    assert first.read_bytes() == whole[first.name]
    assert result.files[1].read_bytes() == whole[second.name]
    assert second.read_bytes() == b"mine now"
    assert generate(*command, "--resume").files == []


def test_a_run_at_work_is_not_resumed(command, generate, made, tmp_path):
    (run,) = read_runs(tmp_path / "out")
    made[0].unlink()
    with Manifest(tmp_path / "out", run.record) as other:
        assert other.file.name == "manifest.jsonl"
        result = generate(*command, "--resume")
        assert result.status == 2
        assert "still at work on this run" in result.stderr
        # another run in the folder keeps a manifest of its own
        assert generate(*command).status == 0
        assert (tmp_path / "out" / "manifest-1.jsonl").is_file()
    assert len(read_runs(tmp_path / "out")) == 2


def test_several_runs_in_a_folder(command, sd1, generate, made):
    """The run is found that the command fits."""
    made[0].unlink()
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


def test_an_option_that_the_first_version_lacked_counts_as_not_given(command, generate, made, tmp_path):
    manifest = tmp_path / "out" / "manifest.jsonl"
    run, *pictures = manifest.read_text().splitlines()
    record = json.loads(run)
    del record["options"]["tile"], record["options"]["fill"]
    manifest.write_text("\n".join([json.dumps(record), *pictures]) + "\n")
    made[0].unlink()
    refused = generate(*command, "--resume", "--tile", 64)
    assert (refused.status, refused.files) == (2, [])
    assert "error: --tile 64: the run to resume has no value" in refused.stderr
    assert generate(*command, "--resume").files == made[:1]


def test_the_manifest(made, tmp_path):
    run, *pictures = map(json.loads, (tmp_path / "out" / "manifest.jsonl").read_text().splitlines())
    assert (run["format_version"], run["model"]) == (1, "sd1")
    assert run["versions"]["torch"]
    assert run["options"]["steps"] == 2
    assert run["parts"][0]["lines"] == LINES.splitlines()
    assert [picture["file"] for picture in pictures] == [file.name for file in made]
    assert all(re.fullmatch("[0-9a-f]{64}", picture["sha256"]) for picture in pictures)
    assert [str(picture["seed"]) for picture in pictures] == [Image.open(file).info["seed"] for file in made]


def test_a_full_disk_leaves_a_run_that_can_be_resumed(command, generate, tmp_path, whole, monkeypatch):
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
    assert contents(tmp_path / "out") == whole


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


# ---------------------------------------------------------------------------------------------------------------------
# Paths


@pytest.fixture
def files(sd1, tmp_path, monkeypatch):
    """A folder `run` with what a run can read, in which the program runs; `link` and `other` lead to it."""
    folder = tmp_path / "run"
    for name in ("src", "masks"):
        (folder / name).mkdir(parents=True)
    for name in ("a.png", "b.png"):
        text = PngInfo()
        text.add_text("parameters", "a cat\nSteps: 2, Sampler: DDIM, CFG scale: 7, Seed: 1, Size: 64x64")
        Image.new("RGB", (64, 64), "red").save(folder / "src" / name, pnginfo=text)
        Image.new("L", (64, 64), "white").save(folder / "masks" / name)
    for name in ("src", "masks"):
        (folder / name / "c.png").symlink_to("a.png")
    key = "lora_unet_mid_block_attentions_0_proj_in"
    lora = {f"{key}.lora_down.weight": torch.ones(1, 64, 1, 1), f"{key}.lora_up.weight": torch.ones(64, 1, 1, 1)}
    save_file(lora, folder / "lora.safetensors")
    save_file({"emb_params": torch.ones(1, 64)}, folder / "zorb.safetensors")
    os.link(sd1.safetensors, folder / "model.safetensors")
    (tmp_path / "link").symlink_to("run")
    (folder / "sub").mkdir()
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.chdir(folder)
    return folder


def reading(prefix: str, slash: str = "") -> tuple:
    """Options that name files below a prefix."""
    return (
        *("--image_path", f"{prefix}src{slash}", "--mask_path", f"{prefix}masks{slash}", "--images_per_prompt", 1),
        *("--network_module", "networks.lora", "--network_weights", f"{prefix}lora.safetensors", "--strength", 1),
        *("--textual_inversion_embeddings", f"{prefix}zorb.safetensors", "--vae", f"{prefix}model.safetensors"),
    )


@pytest.mark.parametrize(
    ("begun", "then"),
    [
        ("", ["", "./", "sub/../", "../run/", "../link/", "{folder}/", "~/"]),
        ("../link/", ["", "../link/", "{folder}/"]),
    ],
)
def test_paths_count_by_what_they_mean(files, generate, begun, then):
    made = generate("model.safetensors", *reading(begun))
    assert (made.status, len(made.files)) == (0, 3), made.stderr
    for prefix, slash in zip(then, cycle(["/", "", "//"])):
        made.files[2].unlink()
        command = reading(prefix.format(folder=files), slash)
        result = generate(f"{prefix.format(folder=files)}model.safetensors", *command, "--resume")
        assert (result.status, result.files) == (0, made.files[2:]), (prefix, result.stderr)


def test_paths_begin_at_the_folder_that_the_run_was_begun_in(files, generate, monkeypatch, tmp_path):
    made = generate("model.safetensors", *reading(""))
    monkeypatch.chdir(tmp_path)
    result = generate("run/model.safetensors", *reading("run/"), "--resume")
    assert (result.status, result.files) == (0, []), result.stderr
    # all of it elsewhere, with what is written as it was
    shutil.copytree(tmp_path / "run", tmp_path / "moved", symlinks=True)
    shutil.rmtree(tmp_path / "run")
    monkeypatch.chdir(tmp_path / "moved")
    assert generate("model.safetensors", *reading(""), "--resume").status == 0
    assert len(made.files) == 3


def test_runs_of_older_versions_count_paths_too(files, generate, tmp_path):
    generate("model.safetensors", *reading(""))
    manifest = tmp_path / "out" / "manifest.jsonl"
    first, *rest = manifest.read_text().splitlines(keepends=True)
    record = json.loads(first)
    del record["begun_in"], record["format_version"]
    manifest.write_text("".join([json.dumps(record) + "\n", *rest]))
    for prefix in ("", "./", f"{files}/"):
        result = generate(f"{prefix}model.safetensors", *reading(prefix), "--resume")
        assert (result.status, result.files) == (0, []), result.stderr


def test_other_files_of_the_same_content_are_others(files, generate):
    """What a path means is a file, not what is in it."""
    generate("model.safetensors", *reading(""))
    shutil.copytree(files / "src", files / "copy")
    result = generate("model.safetensors", *reading(""), "--resume", "--image_path", "copy")
    assert result.status == 2
    assert result.stderr.startswith("error: --image_path copy: the run to resume has src;")


def test_a_model_by_another_name_is_the_same(files, generate):
    first = generate("model.safetensors", "--prompt", "a", "--images_per_prompt", 2)
    (files / "current.safetensors").symlink_to("model.safetensors")
    first.files[1].unlink()
    result = generate("current.safetensors", "--prompt", "a", "--images_per_prompt", 2, "--resume")
    assert (result.status, result.files) == (0, first.files[1:]), result.stderr
    assert "Model: model" in Image.open(result.files[0]).info["parameters"]


def test_files_in_arguments_count_by_what_they_mean(sd1, files, generate):
    save_file(LatentUpscaler().state_dict(), files / "upscaler.safetensors")
    how = ("--highres_fix_scale", 0.5, "--highres_fix_steps", 1, "--highres_fix_upscaler", "tools.latent_upscaler")
    command = (sd1.folder, "--prompt", "a", *how, "--highres_fix_upscaler_args")
    assert generate(*command, "weights=upscaler.safetensors").status == 0
    result = generate(*command, f"weights={files}/upscaler.safetensors", "--resume")
    assert (result.status, result.files) == (0, []), result.stderr
