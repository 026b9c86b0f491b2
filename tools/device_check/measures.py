"""What is measured with models: pictures, speed, memory. Each runs in a process of its own, see `processes`."""

import os
import platform
import resource
import statistics
import subprocess
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from library.version import VERSION
from tools.benchmark import run_process
from tools.benchmark_child import (
    Case,
    diffusers_steady,
    load_program,
    now,
    processor,
    program_draw,
    program_steady,
    timed_batch,
    write_control_net,
)
from tools.benchmark_child import machine as benchmark_machine
from tools.device_check.processes import ROOT, Notes
from tools.expected_images import ExpectedCase, expected_cases, packs

if TYPE_CHECKING:
    from gen_img_diffusers import Pipeline
    from library.plan.run_plan import RunPlan
    from library.results.metadata import RunFacts

_LIBRARIES = ("torch", "diffusers", "transformers", "safetensors", "xformers", "triton")
_WORTH_IT = 1.03  # a batch size that gives less than this more pictures a second is not worth its memory
_BATCHES = 3  # that a figure is the median of
_RUNS = 3  # with pictures written and without, by turns

# ---------------------------------------------------------------------------------------------------------------------
# The machine, and what there is to measure with


def machine(device: str, notes: Notes) -> None:
    """Note the device and the versions of all that matters."""
    import torch

    notes.figures(
        program=VERSION,
        commit=_said_by("git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"),
        python=platform.python_version(),
        system=platform.platform(),
        processor=processor(),
        cores=os.cpu_count(),
        **{library: _version(library) for library in _LIBRARIES},
    )
    if device == "cpu":
        notes.figures(device="CPU")
        return
    free, total = torch.cuda.mem_get_info()
    card = torch.cuda.get_device_properties(0)
    query = ("nvidia-smi", f"--id=GPU-{card.uuid}", "--format=csv,noheader")
    notes.figures(
        device=card.name,
        capability=f"{card.major}.{card.minor}",
        memory_gb=total / 1e9,
        taken_gb=(total - free) / 1e9,
        driver=_said_by(*query, "--query-gpu=driver_version"),
        cuda=torch.version.cuda,
        cudnn=torch.backends.cudnn.version(),
        power_limit=_said_by(*query, "--query-gpu=power.limit"),
        temperature=_said_by(*query, "--query-gpu=temperature.gpu"),
    )


def _version(library: str) -> str:
    try:
        return version(library)
    except PackageNotFoundError:
        return "none"


def _said_by(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def make_models(case: Case, device: str, tiny: bool, notes: Notes) -> None:
    """Write the case's model, made on the device, a LoRA, a ControlNet and a guide picture."""
    import diffusers
    from safetensors.torch import save_file

    from library.files.model_files import find_model
    from networks.keys import layer_shapes
    from tools.random_model import DTYPES, made_on, random_networks, write_folder
    from tools.random_network import random_lora

    assert case.lora is not None  # as every case that models are made for
    diffusers.utils.logging.set_verbosity_error()
    with made_on(device, DTYPES[case.precision]):
        networks = random_networks(case.family, tiny=tiny, seed=0)
        write_folder(networks, Path(case.ckpt), "epsilon", variant=None)
        write_control_net(case, networks["unet"])
    state = random_lora(layer_shapes(find_model(case.ckpt, v2=False)), 32, alpha=None, convolutions=False, seed=0)
    save_file({key: tensor.half() for key, tensor in state.items()}, case.lora)
    if device != "cpu":
        facts = benchmark_machine(replace(case, control_net=None))
        notes.figures(step_tflop=facts["step_tflop"], matmul_tflops=facts["matmul_tflops"])


# ---------------------------------------------------------------------------------------------------------------------
# Pictures


def expected_images(folder: Path, options: Sequence[str], exact: bool, every: int, notes: Notes) -> None:
    """Note how far each case's pictures are from the expected ones.

    Args:
        folder: takes the packs in full, for all who draw from them, and the pictures.
        options: of the program, beside the case's.
        exact: float32 is float32: convolutions do not use TF32, which PyTorch lets them do on NVIDIA's cards.
        every: one of so many cases is drawn.
        notes: takes a row for each case.
    """
    import torch

    torch.backends.cudnn.allow_tf32 = not exact
    with tempfile.TemporaryDirectory(dir=folder) as pictures:
        for case in list(expected_cases())[::every]:
            full = folder / f"pack-{case.pack.name}"
            if not full.is_dir():
                packs().rebuild_pack(case.pack, Path(pictures) / full.name).rename(full)
            notes.row(case=case.described, **_distance(case, full, options, Path(pictures) / case.described))


def _distance(case: ExpectedCase, full: Path, options: Sequence[str], outdir: Path) -> dict[str, object]:
    """The largest distance of a case's pictures, and whether it is allowed; or why there is none."""
    import gen_img_diffusers as program

    try:
        status = program.main([*case.command_line(full), "--outdir", str(outdir), *options])
        if status:
            return {"error": f"the program ended with status {status}"}
        distances = case.distances(sorted(outdir.glob("*.png")))
    except (SystemExit, ValueError) as problem:
        return {"error": f"{type(problem).__name__}: {problem}"}
    worst = max(distances, key=lambda distance: distance.mean)
    return {"mean": worst.mean, "within_one": worst.within_one, "allowed": all(map(case.allows, distances))}


# ---------------------------------------------------------------------------------------------------------------------
# Speed


def speed(case: Case, sizes: Sequence[int], notes: Notes) -> None:
    """Note the steps and pictures a second at batch sizes, until larger ones are not worth it or do not fit.

    Args:
        case: drawn in batches of the largest size at most.
        sizes: ascending.
        notes: takes a row for each size.
    """
    from library.machine.devices import is_out_of_memory

    begun = now()
    pipeline, plan = load_program(replace(case, batch_size=max(sizes)))
    notes.figures(load_s=now() - begun)
    before = 0.0
    for size in sizes:
        try:
            row = _at_batch_size(pipeline, plan, replace(case, batch_size=size))
        except Exception as problem:
            if size == 1 or not is_out_of_memory(problem):
                raise
            notes.figures(too_large=size)
            return
        notes.row(**row)
        if row["pictures_s"] < before * _WORTH_IT:
            return
        before = row["pictures_s"]


def _at_batch_size(pipeline: "Pipeline", plan: "RunPlan", case: Case) -> dict[str, float]:
    draw = program_draw(pipeline, plan.to_do[: case.batch_size])
    begun = now()
    draw(2, lambda index: None)  # what happens once for a batch size: compiling, capturing graphs
    first_s = now() - begun
    batches = [timed_batch(draw, case) for _ in range(_BATCHES)]
    step_s, image_s, vae_s = (statistics.median(b[name] for b in batches) for name in ("step_s", "image_s", "vae_s"))
    return {
        "batch": case.batch_size,
        "first_s": first_s,
        "steps_s": 1 / step_s,
        "pictures_s": 1 / image_s,
        "vae_s": vae_s,
    }


def memory(case: Case, notes: Notes) -> None:
    """Note the most memory that loading and drawing a batch take."""
    import torch

    on_gpu = torch.cuda.is_available()
    pipeline, plan = load_program(case)
    if on_gpu:
        notes.figures(loading_gb=torch.cuda.max_memory_allocated() / 1e9)
        torch.cuda.reset_peak_memory_stats()
    program_draw(pipeline, plan.to_do)(case.steps, lambda index: None)
    if on_gpu:
        allocated, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        notes.figures(allocated_gb=allocated / 1e9, reserved_gb=reserved / 1e9)
    notes.figures(main_gb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9)


def start(case: Case, notes: Notes) -> None:
    """Note the seconds of a whole run, and those from its start to its first step."""
    ended = run_process(["gen_img_diffusers.py", *case.command_line(), "--verbose"], os.environ)
    notes.figures(**ended.figures())


def program_pace(case: Case, notes: Notes) -> None:
    """Note this program's figures with the model loaded."""
    notes.figures(**program_steady(case))


def diffusers_pace(case: Case, notes: Notes) -> None:
    """Note diffusers' figures with the model loaded."""
    notes.figures(**diffusers_steady(case))


def writing(case: Case, batches: int, notes: Notes) -> None:
    """Note how much longer a run takes whose pictures are written, and how long handing them over takes.

    Args:
        case: one batch of it.
        batches: of a run.
        notes: takes the milliseconds a picture.
    """
    import gen_img_diffusers as program
    from library.results.metadata import run_facts

    Path(case.outdir).mkdir(parents=True, exist_ok=True)
    options = case.command_line()
    place = options.index("--images_per_prompt") + 1
    options[place] = str(case.batch_size * batches)
    plan = program.make_plan(program.parse_options(options))
    pipeline, facts = program.load_pipeline(plan), run_facts(plan)
    _drawn_run(pipeline, plan, facts)  # what happens once
    plain, written, handed = [], [], []
    for _ in range(_RUNS):
        plain.append(_drawn_run(pipeline, plan, None)[0])
        seconds, handing = _drawn_run(pipeline, plan, facts)
        written.append(seconds)
        handed.append(handing)
    in_ms = 1000 / len(plan.to_do)
    notes.figures(
        pictures=len(plan.to_do),
        picture_ms=statistics.median(plain) * in_ms,
        held_up_ms=(statistics.median(written) - statistics.median(plain)) * in_ms,
        spread_ms=(max(plain) - min(plain)) * in_ms,
        handing_over_ms=statistics.median(handed) * in_ms,
    )


def _drawn_run(pipeline: "Pipeline", plan: "RunPlan", facts: "RunFacts | None") -> tuple[float, float]:
    """Seconds until a run's last picture is drawn, and how many of them handing pictures over to be written took.

    Args:
        pipeline: draws.
        plan: of the run.
        facts: for the pictures' metadata; None to write none.
    """
    from library.results.writer import PictureWriter
    from library.run.report import say_failed
    from library.run.runs import BatchDrawer

    drawer = BatchDrawer(pipeline, plan.batch_key, say_failed, lambda timesteps: timesteps)
    handing = 0.0
    with ExitStack() as stack:
        writer = stack.enter_context(PictureWriter(facts, lambda job, file: None)) if facts else None
        begun = now()
        for pictures in drawer.draw(plan.batches(plan.to_do)):
            before = time.perf_counter()
            if writer:
                for job, picture in pictures:
                    writer.write(picture, job)
            handing += time.perf_counter() - before
        seconds = now() - begun  # what still waits to be written holds no device up
    return seconds, handing
