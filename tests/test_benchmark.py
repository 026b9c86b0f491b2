"""tools/benchmark.py, from its command line to its table; how fast anything is is not tested."""

import importlib.util
import io
import json
import os
import runpy
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from child_runs import Forked
from diffusers import StableDiffusionXLPipeline

import tools.benchmark
from library.files.families import SD1, SDXL
from tools.benchmark import DIFFUSERS, OPENVINO, PROGRAM, ROWS, Bench, Ended, as_table, main, parse_options, summarise
from tools.benchmark_child import Case, load_diffusers, program_steady, step_operations

ROOT = Path(__file__).resolve().parent.parent
SMALL = ["--W", 64, "--H", 64, "--steps", 2, "--rounds", 1, "--fp32", "--device", "cpu"]
OF_A_GPU = {"gpu_gb"}


@pytest.fixture
def benchmark(monkeypatch):
    """Run the tool here; the processes that it measures are forked."""
    monkeypatch.setattr(tools.benchmark, "subprocess", SimpleNamespace(Popen=Forked, PIPE=subprocess.PIPE))
    return lambda *options: main([str(option) for option in options])


def test_both_programs_are_measured_with_everything_they_can_be_given(sd1, tmp_path, benchmark, capsys):
    options = ("--batch_size", 2, "--lora", "--control_net", "--json", tmp_path / "figures.json")
    benchmark("--ckpt", sd1.folder, *SMALL, *options)
    table = capsys.readouterr().out
    report = json.loads((tmp_path / "figures.json").read_text())
    medians = report["medians"]
    for program in (PROGRAM, DIFFUSERS):
        figures = medians[program]
        assert figures.keys() == ROWS.keys() - OF_A_GPU
        assert all(value > 0 for value in figures.values())
        assert figures["start_s"] < figures["process_s"]
        assert figures["vae_s"] < figures["image_s"]
        assert 0.1 < figures["peak_gb"] < 10  # PyTorch alone takes 0.2 GB
        assert figures["share"] == pytest.approx(figures["tflops"] / report["machine"]["matmul_tflops"])
    for name, ratio in medians["ratio"].items():
        assert ratio == pytest.approx(medians[PROGRAM][name] / medians[DIFFUSERS][name])
        assert ROWS[name] in table
    assert ("LoRA left out on diffusers' side" in table) == (importlib.util.find_spec("peft") is None)


def test_the_family_of_a_folder_is_told(sd1, sd2, sdxl, capsys):
    for models, family in ((sd1, "sd1"), (sd2, "sd2"), (sdxl, "sdxl")):
        assert parse_options(["--ckpt", str(models.folder)]).family == family
    assert parse_options([]).family == "sd1"
    with pytest.raises(SystemExit):
        parse_options(["--ckpt", str(sdxl.folder), "--family", "sd1"])
    assert "holds an sdxl model; leave --family out" in capsys.readouterr().err


def test_xl_is_measured_beside_diffusers_pipeline_for_it(sdxl, tmp_path):
    case = Case(str(sdxl.folder), "sdxl", 64, 64, 2, "fp32", 1, False, str(tmp_path))
    pipeline, arguments = load_diffusers(case)
    assert isinstance(pipeline, StableDiffusionXLPipeline)
    assert len(pipeline(**arguments, num_inference_steps=2).images) == 1
    assert program_steady(case)["step_s"] > 0


def test_operations_of_a_step_of_xl_are_counted(tmp_path):
    """13.5 TFLOP for 1024 x 1024 pixels and two samples."""
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "config.json").write_text(json.dumps(SDXL.config("unet")))
    case = Case(str(tmp_path), "sdxl", 1024, 1024, 20, "bf16", 1, False, str(tmp_path))
    assert step_operations(case) == pytest.approx(13.52e12, rel=0.01)


def test_a_run_that_fails_ends_the_benchmark_with_what_it_said(sd1, benchmark, capsys):
    with pytest.raises(SystemExit, match="--stepps: no such option"):  # a text, which makes the status 1
        benchmark("--ckpt", sd1.folder, *SMALL, "--also=--stepps 3")
    assert not capsys.readouterr().out


def test_operations_of_a_step_are_counted(tmp_path):
    """1.61 TFLOP for 512 x 512 pixels and two samples; a ControlNet is about the encoder, a third to a half of that."""
    for part in ("unet", "control_net"):
        (tmp_path / part).mkdir()
    unet = SD1.config("unet")
    (tmp_path / "unet" / "config.json").write_text(json.dumps(unet))
    names = ("in_channels", "block_out_channels", "down_block_types", "cross_attention_dim", "attention_head_dim")
    shared = {name: unet[name] for name in names if name in unet}
    (tmp_path / "control_net" / "config.json").write_text(json.dumps(shared))
    case = Case(str(tmp_path), "sd1", 512, 512, 20, "bf16", 1, False, str(tmp_path))
    plain = step_operations(case)
    assert plain == pytest.approx(1.61e12, rel=0.01)
    assert step_operations(replace(case, batch_size=2)) == pytest.approx(2 * plain, rel=0.01)
    controlled = step_operations(replace(case, control_net=str(tmp_path / "control_net")))
    assert 1.3 * plain < controlled < 1.5 * plain


def run_here(command: Sequence[str], environment: Mapping[str, str]) -> Ended:
    """`run_process` without a process."""
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as said:
        patch.setattr(sys, "argv", list(command))
        runpy.run_path(str(ROOT / command[0]), run_name="__main__")
    return Ended(1.0, None, 1.0, said.getvalue())


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_openvino_is_measured_beside_them(family, two_levels, monkeypatch, tmp_path):
    monkeypatch.setattr(tools.benchmark, "run_process", run_here)
    case = Case(str(two_levels(family)), family, 64, 64, 2, "fp32", 1, False, str(tmp_path))
    bench = Bench(case, os.environ)
    bench.openvino("convert")
    figures = {PROGRAM: {"step_s": 1.0, "start_s": 2.0}, OPENVINO: json.loads(bench.openvino("steady").output)}
    assert figures[OPENVINO].keys() == {"step_s", "vae_s"}
    medians = summarise([figures], 1.0, 1.0)
    assert medians[f"ratio to {OPENVINO}"]["step_s"] == pytest.approx(1 / figures[OPENVINO]["step_s"])
    assert "| start to first step, s | 2 | – | – |" in as_table(medians)


def test_openvino_is_measured_with_the_plain_model_alone(capsys):
    with pytest.raises(SystemExit):
        parse_options(["--peer", "openvino", "--lora"])
    assert "leave --lora and --control_net out" in capsys.readouterr().err
