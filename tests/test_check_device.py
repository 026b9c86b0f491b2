"""tools/check_device.py, from its command line to its report; how fast anything is is not tested."""

import errno
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import gen_img_diffusers
from library.errors import EnvironmentFault
from tools import benchmark_child
from tools.benchmark_child import Case
from tools.check_device import main
from tools.device_check import measures, processes
from tools.device_check.processes import Notes, Processes, Result, Task
from tools.device_check.report import ReportFiles
from tools.device_check.sections import FAILED, GOOD, LOOK, NOT_DONE, section
from tools.device_check.tasks import COMPILED, EAGER, GRAPHS, PARTS, Check, best_batch, model_tasks, tasks

ROOT = Path(__file__).resolve().parent.parent
NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="tells what is done without a GPU")


def check_device(*options: object) -> subprocess.CompletedProcess:
    from child_runs import Forked  # the measurements below import this module once more, each in its process

    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return Forked(command(*options), cwd=ROOT, env=os.environ, **pipes).wait()


def command(*options: object) -> list[str]:
    return [str(argument) for argument in (sys.executable, ROOT / "tools" / "check_device.py", *options)]


def read_report(outdir: Path) -> tuple[str, dict]:
    (markdown,) = outdir.glob("*.md")
    return markdown.read_text(), json.loads(markdown.with_suffix(".json").read_text())


@pytest.fixture
def measured_in_forks(monkeypatch, sd1, generate, tmp_path_factory):
    """Measurements are forked from what has everything imported and the tokenizer read, and measure once."""
    assert generate(sd1.folder, "--prompt", "a", outdir=tmp_path_factory.mktemp("first")).status == 0
    fork = multiprocessing.get_context("fork").Process
    monkeypatch.setattr(processes, "_process", lambda _, arguments: fork(target=processes._in_process, args=arguments))
    for module, name in ((measures, "_BATCHES"), (measures, "_RUNS"), (benchmark_child, "BATCHES")):
        monkeypatch.setattr(module, name, 1)


@pytest.mark.usefixtures("measured_in_forks")
def test_everything_is_tried_with_tiny_models(tmp_path):
    run = check_device("--tiny", "--device", "cpu", "--outdir", tmp_path)
    assert run.returncode == 0, run.stderr
    text, report = read_report(tmp_path)
    assert report["all_well"] and report["tiny"] and report["parts"].keys() == PARTS.keys()
    assert not [result for result in report["results"] if result["error"]]
    not_done = {result["name"]: result["skipped"] for result in report["results"] if result["skipped"]}
    assert not_done["SD 1.5, CUDA graphs"] == "is for CUDA devices"
    assert "left out with --tiny" in not_done["XL, --compile"]
    found = {(result["part"], result["name"]): result for result in report["results"]}
    assert [row["allowed"] for row in found["expected", "float32"]["rows"]] == [True] * 3
    assert [row["batch"] for row in found["speed", "XL, eager"]["rows"]] in ([1], [1, 2])  # or it was not worth it
    for part in PARTS:
        assert f"\n## {part}: " in text and f"\n| {part} | **" in text
    assert "How to send it" in text
    assert str(Path.home()) not in text + json.dumps(report)
    assert set(run.stdout.split()) == {str(file) for file in tmp_path.iterdir()}


@NO_GPU
def test_what_it_cannot_do_here_is_refused_with_what_to_do(tmp_path):
    for options, problem in (
        ((), "--device cpu: models of the published sizes would take hours; give --tiny too"),
        (("--device", "cuda"), "--device cuda: PyTorch finds no CUDA device"),
        (("--only", "sped"), "invalid choice: 'sped'"),
    ):
        run = check_device(*options, "--outdir", tmp_path / "reports")
        assert run.returncode == 2
        assert problem in run.stderr
    assert not (tmp_path / "reports").exists()


def test_ctrl_c_leaves_a_report_of_what_was_done(tmp_path):
    options = ("--tiny", "--device", "cpu", "--only", "attention", "expected", "--outdir", tmp_path)
    with subprocess.Popen(command(*options), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("machine"):
                break
        time.sleep(0.5)  # anywhere in the next part
        process.send_signal(signal.SIGINT)
        process.communicate()
    assert process.returncode == 130
    text, report = read_report(tmp_path)
    by_name = {result["name"]: result for result in report["results"]}
    assert by_name["the machine"]["figures"]["torch"] == torch.__version__
    assert by_name["float32"]["error"] == "interrupted" and not report["all_well"]
    assert {part["verdict"] for part in report["parts"].values()} == {NOT_DONE}  # nothing failed
    assert by_name["kernels"]["skipped"] == "not done, as the check was interrupted"
    assert "- float32: interrupted" in text and f"| torch | {torch.__version__} |" in text


# ---------------------------------------------------------------------------------------------------------------------
# Parts that fail


def finds_and_crashes(notes: Notes) -> None:
    notes.row(batch=1)
    os.abort()


def finds_and_hangs(notes: Notes) -> None:
    notes.figures(start_s=1.5)
    time.sleep(60)


def raises(notes: Notes) -> None:
    notes.row(batch=2)
    raise ValueError("no such kernel\nand much more")


def needs_no_fork(notes: Notes) -> None:
    parent = multiprocessing.parent_process()
    if parent is None or os.getppid() != parent.pid:  # forked from the process that has everything imported
        raise RuntimeError("Cannot re-initialize CUDA in forked subprocess. To use CUDA with multiprocessing, ...")
    notes.figures(begun_anew=True)


def is_refused(notes: Notes) -> None:
    gen_img_diffusers.parse_options(["--ckpt", "model", "--no_such_option", "on"])


def test_a_measurement_that_fails_says_why_and_keeps_what_it_found(tmp_path, monkeypatch):
    monkeypatch.setattr("tools.device_check.processes._IMPORTED_ONCE", ["torch"])  # as much as these need
    started = Processes(tmp_path)

    def run(measure, limit_s: float = 30) -> Result:
        return started.run(Task("speed", measure.__name__, measure, (), limit_s), limit_s)

    crashed, hung, raised, refused = run(finds_and_crashes), run(finds_and_hangs, 6), run(raises), run(is_refused)
    assert crashed.error.startswith("its process was ended by SIGABRT")
    assert "finds_and_crashes" in crashed.traceback  # where it was
    assert crashed.rows == [{"batch": 1}]
    assert hung.error == "stopped after 6 s"
    assert "finds_and_hangs" in hung.traceback
    assert hung.figures == {"start_s": 1.5}
    assert raised.error == "ValueError: no such kernel"
    assert "and much more" in raised.traceback
    assert refused.error == "error: --no_such_option: no such option; --help lists them all"
    begun_anew = run(needs_no_fork, 60)  # where something has touched the GPU before it was forked
    assert not begun_anew.error and begun_anew.figures == {"begun_anew": True}


def test_writing_is_measured_on_pictures_that_are_written(sd1, tmp_path):
    case = Case(str(sd1.folder), "sd1", 64, 64, 2, "fp32", 2, False, str(tmp_path / "new" / "pictures"))
    measures.writing(case, 2, Notes(tmp_path / "notes"))
    figures = json.loads((tmp_path / "notes").read_text())["figures"]
    assert figures["pictures"] == 4  # of a run; four are written, three are not
    assert len(list((tmp_path / "new" / "pictures").glob("*.png"))) == 4 * 4
    assert 0 < figures["handing_over_ms"] < figures["picture_ms"]


# ---------------------------------------------------------------------------------------------------------------------
# What is measured on a GPU, and what the report says of it


def on_gpu(tmp_path: Path) -> Check:
    return Check("cuda", tiny=False, folder=tmp_path)


def test_on_a_gpu_every_way_is_measured_at_its_size(tmp_path):
    planned = list(tasks(on_gpu(tmp_path), []))
    assert not [task for task in planned if task.skipped]
    speed = {(task.family, task.variant): task for task in planned if task.part == "speed"}
    assert len(speed) == 6
    case, sizes = speed["sdxl", GRAPHS].arguments
    assert (case.width, case.height, case.steps, case.precision) == (1024, 1024, 20, "fp16")
    assert case.also == ("--cuda_graphs", "on") and sizes[0] == 1
    assert speed["sd1", EAGER].arguments[0].also == ("--cuda_graphs", "off")
    assert [task.variant for task in planned[-2:]] == [COMPILED] * 2  # what takes minutes


def measured(part: str, family: str, variant: str, *rows: dict, **figures: object) -> Result:
    task = Task(part, f"{family}, {variant}", time.sleep, (), 1, family, variant)
    return Result(task, rows=list(rows), figures=figures)


def paces(batch: int, steps_s: float, pictures_s: float) -> dict:
    return {"batch": batch, "first_s": 0.1, "steps_s": steps_s, "pictures_s": pictures_s, "vae_s": 0.01}


def test_other_ways_are_measured_at_the_best_batch_size(tmp_path):
    eager = measured("speed", "sd1", EAGER, paces(1, 60, 2.5), paces(4, 40, 7.1), paces(8, 19, 7.0))
    assert best_batch("sd1", [eager]) == 4
    graphs = next(t for t in tasks(on_gpu(tmp_path), [eager]) if (t.family, t.variant) == ("sd1", GRAPHS))
    assert graphs.arguments[1] == (1, 4)


def test_speed_is_held_against_the_targets_by_the_best_way():
    eager = measured("speed", "sd1", EAGER, paces(1, 60, 2.5), paces(8, 20, 7.9))
    graphs = measured("speed", "sd1", GRAPHS, paces(1, 106, 4.5), paces(8, 21, 8.1))
    xl = measured("speed", "sdxl", EAGER, paces(1, 29, 1.2))
    assert section("speed", [eager, graphs, xl], tiny=False).verdict == GOOD
    found = section("speed", [eager, xl], tiny=False)
    assert found.verdict == LOOK
    assert "SD 1.5, steps/s, one picture: 60, target at least 105" in found.text
    assert "SD 1.5, pictures/s, batched: 7.9, target at least 8" in found.text
    assert "XL" not in found.text
    assert "SD 1.5, steps/s, one picture: –, target at least 105" in section("speed", [xl], tiny=False).text


def test_memory_is_held_against_the_targets():
    plain = {"sd1": 2.5, "sdxl": 8.6}
    results = [measured("memory", family, "plain", allocated_gb=gb, reserved_gb=9.0) for family, gb in plain.items()]
    found = section("memory", results, tiny=False)
    assert found.verdict == LOOK
    assert "XL, GB allocated, plain: 8.6, target at most 8.5" in found.text and "SD 1.5" not in found.text


def test_a_kernel_that_gives_something_else_is_a_failure():
    kernels = {"SDPA": {"ms": 0.2, "distance": 0.0004}, "xFormers": {"ms": 0.1, "distance": 0.0004}}
    row = {"shape": "XL, 1024², itself", "head_size": 64, "rows": 4096, "kernels": kernels}
    slower = section("attention", [measured("attention", "", "", row)], tiny=False)
    assert slower.verdict == LOOK and "xFormers and SDPA too" in slower.text
    kernels["xFormers"]["distance"] = float("nan")
    assert section("attention", [measured("attention", "", "", row)], tiny=False).verdict == FAILED


def test_pictures_that_are_too_far_off_fail_and_are_named():
    near = {"case": "sd-ddim", "mean": 0.01, "within_one": 1.0, "allowed": True}
    far = {"case": "sd-lora", "mean": 3.0, "within_one": 0.4, "allowed": False}
    halves = measured("expected", "", "float16", far)  # rounds more
    assert section("expected", [measured("expected", "", "float32", near), halves], tiny=False).verdict == GOOD
    found = section("expected", [measured("expected", "", "float32", near, far), halves], tiny=False)
    assert found.verdict == FAILED
    assert "- sd-lora: 3 levels off in the mean, 40.0% of its values within one level" in found.lines


def test_writing_that_holds_the_device_up_is_told():
    figures = {"picture_ms": 100.0, "spread_ms": 1.0, "handing_over_ms": 0.1, "pictures": 16}
    assert section("writing", [measured("writing", "sd1", "", held_up_ms=-0.3, **figures)], tiny=False).verdict == GOOD
    found = section("writing", [measured("writing", "sd1", "", held_up_ms=20.0, **figures)], tiny=False)
    assert found.verdict == LOOK and "writing takes 20 ms of a picture's 100 ms; it should be 0" in found.text


def test_a_report_never_overwrites_an_earlier_one_and_tells_failures(tmp_path):
    first, second = (ReportFiles(tmp_path, "cuda", tiny=False) for _ in range(2))
    failed = measured("speed", "sd1", GRAPHS)
    failed.error, failed.traceback = "RuntimeError: no graphs", f"{Path.home()}/secret.py, line 1"
    left = measured("memory", "sd1", "plain")
    left.skipped = "not done, as the 8 minutes were over; `--only memory` does it"
    first.write([measured("speed", "sd1", EAGER, paces(1, 200, 9)), failed, left])
    second.write([measured("machine", "", "", device="NVIDIA H100")])
    assert len({first.markdown, second.markdown, first.json, second.json}) == 4
    report, text = json.loads(first.json.read_text()), first.markdown.read_text()
    assert report["parts"]["speed"]["verdict"] == FAILED and not first.all_well
    assert report["results"][1]["traceback"] == "~/secret.py, line 1"
    assert report["parts"]["memory"]["verdict"] == NOT_DONE
    assert re.search(r"^- sd1, CUDA graphs: RuntimeError: no graphs$", text, re.MULTILINE)
    assert "# Device check: NVIDIA H100" in second.markdown.read_text()


def test_where_no_report_can_be_written_it_says_so(tmp_path, capsys, monkeypatch):
    (tmp_path / "file").touch()
    for outdir in (tmp_path / "file", tmp_path / "file" / "reports"):
        assert main(["--tiny", "--device", "cpu", "--outdir", str(outdir)]) == 2
        assert f"error: --outdir {outdir}: cannot be written (" in capsys.readouterr().err
    report = ReportFiles(tmp_path, "cpu", tiny=True)
    report.write([measured("machine", "", "", device="CPU")])

    def full(file: Path, *_: object, **__: object) -> None:
        file.touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    before = report.json.read_text()
    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(EnvironmentFault, match=r"\.json: cannot be written \(No space left on device\); make room"):
        report.write([])
    assert report.json.read_text() == before and not list(tmp_path.glob("*.new"))


def test_what_is_interrupted_did_not_fail():
    near = {"case": "sd-ddim", "mean": 0.01, "within_one": 1.0, "allowed": True}
    result = measured("expected", "", "float32", near)
    result.error = "interrupted"
    found = section("expected", [result], tiny=False)
    assert found.verdict == NOT_DONE
    assert "interrupted; of what was measured: all 1 cases" in found.text
    assert "- , float32: interrupted" in found.lines


def test_models_are_made_for_both_families(tmp_path):
    assert [task.family for task in model_tasks(on_gpu(tmp_path))] == ["sd1", "sdxl"]
