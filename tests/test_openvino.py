"""`--engine openvino`: the same pictures as PyTorch's, what is kept on disk, and what is left to PyTorch."""

import importlib.util
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from loading import load_all
from network_runs import find, networks, refused, same
from PIL import Image
from safetensors.torch import save_file

import gen_img_diffusers
from library.files.model_inputs import EDITING
from library.machine import devices, openvino_engine
from library.models import kept_weights
from networks.keys import layer_shapes
from tools.random_network import random_lora

# at 64 pixels the tiny model normalises groups of two numbers, which makes a rounding error a change of sign
SIZE = ("--W", 128, "--H", 128)
OPENVINO = ("--engine", "openvino")
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path_factory):
    """The folder of what is kept, for all tests of this file, which draw with the same models."""
    folder = tmp_path_factory.getbasetemp() / "openvino-cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder / "gen_img_diffusers" / "openvino"


@pytest.fixture
def compiled(monkeypatch):
    """The sizes that graphs were compiled for, as they come."""
    shapes, real = [], openvino_engine.Compiled._compile

    def compile(self, shape):
        shapes.append(shape)
        return real(self, shape)

    monkeypatch.setattr(openvino_engine.Compiled, "_compile", compile)
    return shapes


@pytest.fixture
def compare(generate, compiled):
    """Draw with both engines: the result of OpenVINO's, whose pictures have to be PyTorch's."""

    def run(*options, by=same):
        plain = generate(*options)
        assert plain.status == 0, plain.stderr
        assert not compiled
        result = generate(*options, *OPENVINO)
        assert result.status == 0, result.stderr
        assert by(plain.pictures, result.pictures)
        return result

    return run


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_pictures_are_pytorchs(request, compare, compiled, family):
    model = request.getfixturevalue(family)
    result = compare(model.folder, *model.options, *SIZE, "--prompt", "a cat --n fog --d 1")
    unet, vae = compiled
    # XL's branches are told different things from the beginning, those of the others are alike up to the text
    assert (unet.own_rows, unet.rows) == ((2, 2) if family == "sdxl" else (1, 2))
    assert vae == (1, 4, 16, 16)
    assert "drawn by torch" not in result.stderr


def test_in_bfloat16_they_are_no_farther_from_float32_than_pytorchs(sd1, generate):
    options = (sd1.folder, *SIZE, "--prompt", "a cat --n fog --d 1")
    exact = generate(*options).pictures[0]
    by_torch, by_openvino = (
        np.abs(generate(*options, "--bf16", *engine).pictures[0] - exact).mean() for engine in ((), OPENVINO)
    )
    assert 0 < by_openvino < 2 * by_torch  # both are what rounding comes to, which is a matter of chance


def test_one_run_of_several_sizes_lengths_and_scales(sd1, compare, compiled, tmp_path):
    """The first size has a graph of its own, all others one together; 136 pixels are not halved evenly, and what is
    compiled for these is for all that follow.
    """
    lines = tmp_path / "lines.txt"
    long = "cat, " * 60
    lines.write_text(
        "\n".join(
            [f"{text} --n fog --d {seed} --w {w} --h {h} --l {scale}"
             for seed, (text, w, h, scale) in enumerate([("a cat", 128, 128, 7), ("a dog", 192, 128, 7),
                                                         (long, 128, 192, 1),
                                                         ("an owl", 136, 152, 7), ("a bee", 192, 128, 7)])]
        )
    )  # fmt: skip
    compare(sd1.folder, "--from_file", lines, "--max_embeddings_multiples", 3)
    sizes = [(shape.height, shape.halves_evenly) for shape in compiled if isinstance(shape, openvino_engine.UnetShape)]
    assert sizes == [(16, True), (-1, True), (-1, False)]


def test_batches_and_steps_without_guidance(sd1, compare):
    options = ("--prompt", "a cat --n fog", "--images_per_prompt", 2, "--batch_size", 2, "--guidance_end", 0.5)
    assert len(compare(sd1.folder, *SIZE, *options, "--seed", 1).files) == 2


def test_edit_models_whose_branches_see_other_pictures(with_inputs, compare, tmp_path):
    model = with_inputs("sd1", EDITING)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (128, 128, 3), np.uint8)).save(tmp_path / "source.png")
    compare(model.folder, *SIZE, "--image_path", tmp_path / "source.png", "--prompt", "make it blue --d 1")


def test_gradual_latent(sd1, compare):
    growing = ("--gradual_latent_timesteps", 750, "--gradual_latent_ratio_step", 0.5)
    compare(sd1.folder, *SIZE, "--sampler", "euler_a", "--steps", 5, *growing, "--prompt", "a cat --d 1")


def test_tiles(sd1, compare):
    compare(sd1.folder, "--W", 192, "--H", 128, "--tile", 128, "--prompt", "a cat --d 1")


# ---------------------------------------------------------------------------------------------------------------------
# Networks and ControlNets


@pytest.fixture(scope="module")
def lora_file(sd1, tmp_path_factory):
    file = tmp_path_factory.mktemp("networks") / "style.safetensors"
    save_file(random_lora(layer_shapes(find(sd1)), 4, alpha=None, convolutions=True, seed=1), file)
    return file


@pytest.mark.parametrize("how", [(), ("--network_merge",), ("--network_pre_calc",)])
def test_networks(sd1, compare, lora_file, tmp_path, how):
    """In each of the ways of using them; strengths that change are folded in anew."""
    lines = tmp_path / "lines.txt"
    strengths = [""] if how else ["--am 0.5", "--am 1"]
    lines.write_text("\n".join(f"a cat --n fog --d 1 {strength}" for strength in strengths))
    drawn = compare(sd1.folder, *SIZE, "--from_file", lines, *networks(lora_file), *how).pictures
    assert len({picture.tobytes() for picture in drawn}) == len(strengths)


def test_networks_that_act_in_some_steps_are_left_to_pytorch(sd1, generate, compiled, lora_file):
    options = (sd1.folder, *SIZE, "--prompt", "a cat --d 1", *networks(lora_file, mul=["1@0-0.5"]))
    plain, result = generate(*options), generate(*options, *OPENVINO)
    assert "all pictures are drawn by torch: networks that act in some steps" in result.stderr
    assert same(plain.pictures, result.pictures)
    assert [isinstance(shape, tuple) for shape in compiled] == [True]  # the VAE's alone


def test_control_nets(sd1, compare, tmp_path):
    """One that works in the first step alone: what is not added counts as nothing."""
    unet = UNet2DConditionModel.from_pretrained(sd1.folder / "unet")
    torch.manual_seed(0)
    model = ControlNetModel.from_unet(unet)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "control")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (128, 128, 3), np.uint8)).save(tmp_path / "guide.png")
    options = ("--control_net_models", tmp_path / "control", "--guide_image_path", tmp_path / "guide.png")
    compare(sd1.folder, *SIZE, "--steps", 3, *options, "--control_net_ratios", 0.1, "--prompt", "a cat --n fog --d 1")


# ---------------------------------------------------------------------------------------------------------------------
# What is kept


def test_what_is_kept_is_read_in_place_of_the_model(sd1, generate, cache, monkeypatch):
    options = (sd1.safetensors, *SIZE, "--prompt", "a cat --d 1", *OPENVINO)
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache.parent.parent / "own"))
    first = generate(*options)
    assert "keeping the model's unet, vae, text_encoder for later runs" in first.stderr
    kept = cache.parent.parent / "own" / "gen_img_diffusers" / "openvino"
    assert len(list(kept.iterdir())) == 3  # U-Net, VAE, text encoder; no half-written file
    written = []
    monkeypatch.setattr(kept_weights._Keeper, "_write", lambda *arguments: written.append(arguments))
    second = generate(*options)
    assert "keeping" not in second.stderr
    assert not written
    assert (first.pictures[0] == second.pictures[0]).all()


@pytest.mark.parametrize("harm", ["cut", "emptied", "another", "changed"])
def test_a_file_that_is_not_whole_is_made_anew(sd1, cache, monkeypatch, harm):
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache / harm))
    models, files = load_all(find(sd1)), find(sd1)
    weights = {name: parameter.clone() for name, parameter in models.unet.named_parameters()}
    keeper = kept_weights.ModelKeeper(files, torch.float32, torch.float32)
    keeper.keep(models.parts)
    assert len(kept_weights.ModelKeeper(files, torch.float32, torch.float32).find()) == 3
    assert not kept_weights.ModelKeeper(files, torch.bfloat16, torch.bfloat16).find()
    for file in (cache / harm / "gen_img_diffusers" / "openvino").iterdir():
        content = file.read_bytes()
        spoilt = bytes([content[-1] ^ 1])
        harmed = {"cut": content[:-100], "emptied": b"", "another": b"PK" + content, "changed": content[:-1] + spoilt}
        file.with_suffix(".new").write_bytes(harmed[harm])
        file.with_suffix(".new").replace(file)  # models lie in the one that was there
    keeper = kept_weights.ModelKeeper(files, torch.float32, torch.float32)
    assert not keeper.find()
    keeper.keep(models.parts)
    keeper.leave_memory()
    assert all((parameter == weights[name]).all() for name, parameter in models.unet.named_parameters())


def test_without_a_home_folder_it_is_said_what_to_set(sd1, generate, monkeypatch):
    def unknown():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(kept_weights.Path, "home", unknown)
    result = generate(sd1.folder, "--prompt", "a", *OPENVINO)
    assert result.status == 2
    assert "error: XDG_CACHE_HOME: is not set, and no home folder is known; set it to a folder" in result.stderr


def test_nothing_half_written_is_left_by_ctrl_c(sd1, cache, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache / "interrupted"))

    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(kept_weights.os, "fsync", interrupted)
    models = load_all(find(sd1))
    with pytest.raises(KeyboardInterrupt):
        kept_weights.ModelKeeper(find(sd1), torch.float32, torch.float32).keep(models.parts)
    assert not list((cache / "interrupted" / "gen_img_diffusers" / "openvino").iterdir())


def test_what_killed_runs_left_half_written_goes(sd1, cache, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache / "killed"))
    folder = cache / "killed" / "gen_img_diffusers" / "openvino"
    folder.mkdir(parents=True)
    abandoned, of_another_run = folder / "tmpa.part", folder / "tmpb.part"
    for file in (abandoned, of_another_run):
        file.write_bytes(b"half")
    two_days_ago = time.time() - 2 * 24 * 3600
    os.utime(abandoned, (two_days_ago, two_days_ago))
    kept_weights.ModelKeeper(find(sd1), torch.float32, torch.float32).keep(load_all(find(sd1)).parts)
    assert len(list(folder.glob("*.weights"))) == 3
    assert of_another_run.exists()
    assert not abandoned.exists()


def test_too_little_memory_is_met_as_with_pytorch(sd1, compare, compiled, monkeypatch):
    """The VAE decodes one by one; what failed is compiled anew, as it would fail at all that comes."""
    real = openvino_engine.Compiled._run

    def lacking(self, request, inputs):
        if len(inputs) == 1 and len(inputs[0]) > 1:
            place = "Exception from src/inference/src/cpp/infer_request.cpp:224:\n"
            raise RuntimeError(f"{place}[CPU] Convolution node: Failed to allocate 2359296 bytes of memory\n\n")
        return real(self, request, inputs)

    monkeypatch.setattr(openvino_engine.Compiled, "_run", lacking)
    result = compare(sd1.folder, *SIZE, "--prompt", "a cat --d 1", "--images_per_prompt", 2, "--batch_size", 2)
    assert "out of memory in the VAE; decoding pictures one by one" in result.stderr
    assert [shape for shape in compiled if isinstance(shape, tuple)] == [(2, 4, 16, 16), (-1, 4, -1, -1)]


def test_without_room_for_it_pictures_are_drawn_all_the_same(sd1, generate, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    result = generate(sd1.folder, *SIZE, "--prompt", "a cat --d 1", *OPENVINO)
    assert result.status == 0
    assert "cannot be written (Not a directory); more memory is taken" in result.stderr


# ---------------------------------------------------------------------------------------------------------------------
# What it cannot do


def test_regions_and_deep_shrink_are_left_to_pytorch(sd1, generate, compiled, tmp_path):
    Image.new("RGB", (128, 128), (255, 0, 0)).save(tmp_path / "map.png")
    lines = tmp_path / "lines.txt"
    lines.write_text("a cat AND a dog --d 1\na cat --d 2 --dsd1 1\na cat --d 3\n")
    options = (sd1.folder, *SIZE, "--from_file", lines, "--mask_path", tmp_path / "map.png")
    plain, result = generate(*options), generate(*options, *OPENVINO)
    assert "2 of 3 pictures are drawn by torch: regions, Deep Shrink" in result.stderr
    assert same(plain.pictures, result.pictures)
    assert sum(isinstance(shape, openvino_engine.UnetShape) for shape in compiled) == 1


def test_the_plan_says_so_already(sd1, generate):
    planned = generate(sd1.folder, "--prompt", "a cat --dsd1 1", *OPENVINO, "--dry_run")
    assert "--engine openvino: all pictures are drawn by torch: Deep Shrink" in planned.stderr


def test_in_the_loop_it_is_said_at_the_first_such_picture(sd1, generate, monkeypatch):
    lines = iter(["a cat --dsd1 1", "a dog --dsd1 1"])

    def answer(*_):
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", answer)
    result = generate(sd1.folder, "--interactive", "--no_preview", *OPENVINO)
    assert len(result.files) == 2
    assert result.stderr.count("--engine openvino: this picture is drawn by torch: Deep Shrink") == 1


def test_without_openvino_it_is_refused(sd1, generate, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "openvino" else real(name))
    line = refused(generate, sd1.folder, *OPENVINO)
    advice = "OpenVINO is not installed; run `pip install -r requirements-openvino.txt`"
    assert line == f"error: --engine openvino: {advice}"


def test_what_does_not_go_together(sd1, generate):
    assert "do not go together; give one" in refused(generate, sd1.folder, *OPENVINO, "--compile")
    assert "write torch or openvino" in refused(generate, sd1.folder, "--engine", "onnx")


def test_beside_a_gpu_it_is_refused(sd1, generate, monkeypatch):
    machine = devices.Machine(torch.device("cuda", 0), torch.float16, False)
    monkeypatch.setattr(devices, "choose_machine", lambda *arguments: machine)
    result = generate(sd1.folder, "--prompt", "a", *OPENVINO)
    assert result.status == 2
    assert "error: --engine openvino: is for CPUs, and this machine has a GPU (cuda)" in result.stderr


def test_the_other_engine_never_imports_it(sd1, generate, monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    assert gen_img_diffusers.make_parser().table["engine"].default == "torch"
    assert generate(sd1.folder, "--prompt", "a cat").status == 0


def test_openvino_tells_its_makers_nothing(tmp_path):
    """Left to itself it sends an event when it is imported, and keeps a number for this user."""
    importing = re.compile(r"^\s*(import|from) openvino\b", re.M)
    files = [file for wing in ("library", "tools") for file in (ROOT / wing).rglob("*.py")]
    assert [file.stem for file in files if importing.search(file.read_text(encoding="utf-8"))] == ["openvino_itself"]
    code = "import sys, library.machine.openvino_itself; print([n for n in sys.modules if 'telemetry.' in n])"
    environment = os.environ | {"HOME": str(tmp_path)}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=ROOT)
    assert (run.returncode, run.stdout) == (0, "[]\n"), run.stderr
    assert not (tmp_path / "intel").exists()
