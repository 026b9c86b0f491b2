#!/usr/bin/env python3
"""Measure this program and diffusers' own pipeline in turn, on the same weights, and write one table.

    python tools/benchmark.py                                   # SD 1.5's size, 512 x 512, 20 steps, bfloat16
    python tools/benchmark.py --device cpu --fp32 --W 256 --H 256 --steps 4 --rounds 1
    python tools/benchmark.py --family sdxl --steps 3 --rounds 1  # 1024 x 1024
    python tools/benchmark.py --peer diffusers openvino --also="--engine openvino"
    python tools/benchmark.py --ckpt /models/sd15 --batch_size 4 --lora --json figures.json

Without --ckpt a model of random weights is made in a temporary folder (4 GB for the full size, XL 7), as are LoRA and
ControlNet. Each round starts each program as a process that loads the model, draws and saves one batch and ends, and
once more to draw with the model loaded; the table holds the medians. Runs on Linux. Close other programs first.
"""

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from library import values
from library.files.families import FAMILIES, SD1, TEXT_PARTS
from library.files.json_files import read_json
from tools.benchmark_child import Case

ROOT = Path(__file__).resolve().parent.parent
PROGRAM, DIFFUSERS, OPENVINO = "this program", "diffusers", "OpenVINO"
PEERS = {"diffusers": DIFFUSERS, "openvino": OPENVINO}
# What both programs write on standard error when the first batch is begun: its files' names
FIRST_STEP = "drawing im_"
ROWS = {
    "step_s": "s/step",
    "vae_s": "VAE, s/image",
    "image_s": "s/image, model loaded",
    "process_s": "whole process, s",
    "start_s": "start to first step, s",
    "peak_gb": "peak memory, GB",
    "gpu_gb": "peak GPU memory, GB",
    "tflops": "U-Net, TFLOP/s",
    "share": "share of a large matmul's TFLOP/s",
}
_SAVED_AS = {"sdxl": ("--dtype", "bf16")}  # 7 GB, as most such models come; 14 in float32
Figures = dict[str, dict[str, float]]  # program → figure → value


@dataclass(frozen=True)
class Ended:
    """A process that has ended well."""

    process_s: float
    start_s: float | None  # from its start to its first step; None when it said nothing of one
    peak_gb: float  # of resident memory
    output: str

    def figures(self) -> dict[str, float]:
        """What is known of a whole process from outside."""
        assert self.start_s is not None  # as of every process that draws
        return {"process_s": self.process_s, "start_s": self.start_s, "peak_gb": self.peak_gb}


def run_process(command: Sequence[object], environment: Mapping[str, str]) -> Ended:
    """Run a process to its end and measure it from outside.

    Raises:
        SystemExit: when it fails, with what it said last.
    """
    arguments = [str(argument) for argument in (sys.executable, *command)]
    start, first_step, said = time.perf_counter(), None, []
    with subprocess.Popen(
        arguments, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stderr is not None  # they are pipes
        for line in process.stderr:
            if first_step is None and FIRST_STEP in line:
                first_step = time.perf_counter() - start
            said.append(line)
        output = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)  # the only way to learn this one child's peak
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{shlex.join(arguments)}\nended with status {process.returncode}:\n{''.join(said[-20:])}")
    return Ended(seconds, first_step, usage.ru_maxrss * 1024 / 1e9, output)


class Bench:
    """Runs the processes of a benchmark, one at a time.

    Args:
        case: what is measured.
        environment: of the processes.
    """

    def __init__(self, case: Case, environment: Mapping[str, str]) -> None:
        self._case = case
        self._environment = environment

    def child(self, measurement: str) -> Ended:
        """A process of tools/benchmark_child.py."""
        return self._run(measurement, "tools/benchmark_child.py", measurement, json.dumps(asdict(self._case)))

    def ask(self, measurement: str) -> dict[str, Any]:
        """What a measurement of tools/benchmark_child.py gives."""
        return json.loads(self.child(measurement).output.splitlines()[-1])

    def openvino(self, measurement: str) -> Ended:
        """A process of tools/benchmark_openvino.py."""
        case = json.dumps(asdict(self._case))
        return self._run(f"openvino_{measurement}", "tools/benchmark_openvino.py", measurement, case)

    def round(self, peers: Sequence[str] = ("diffusers",)) -> Figures:
        """Each program's figures, measured once; the peers are named as in `PEERS`."""
        program = self._run("program_once", "gen_img_diffusers.py", *self._case.command_line(), "--verbose").figures()
        figures = {PROGRAM: program}
        if "diffusers" in peers:
            figures[DIFFUSERS] = self.child("diffusers_once").figures()
        program |= self.ask("program_steady")
        if "diffusers" in peers:
            figures[DIFFUSERS] |= self.ask("diffusers_steady")
        if "openvino" in peers:
            ended = self.openvino("steady")
            figures[OPENVINO] = json.loads(ended.output.splitlines()[-1]) | {"peak_gb": ended.peak_gb}
        return figures

    def _run(self, name: str, *command: str) -> Ended:
        ended = run_process(command, self._environment)
        print(f"  {name}: {ended.process_s:.1f} s", file=sys.stderr)
        return ended


# ---------------------------------------------------------------------------------------------------------------------
# What is measured


def make_case(options: argparse.Namespace, folder: Path, environment: Mapping[str, str]) -> Case:
    """Make what the user did not give, in a folder, and put the case together."""

    def make(tool: str, *arguments: object) -> None:
        print(f"  {tool}", file=sys.stderr)
        run_process([f"tools/{tool}.py", *arguments], environment)

    ckpt = options.ckpt or folder / "model"
    family = options.family
    size_px = next(record.size_px for record in FAMILIES if record.configs == family)
    if not options.ckpt:
        tiny = ["--tiny"] if options.tiny else []
        make("random_model", ckpt, "--family", family, "--layout", "folder", *tiny, *_SAVED_AS.get(family, ()))
    case = Case(
        *(str(ckpt), family, options.W or size_px, options.H or size_px, options.steps),
        *(options.precision, options.batch_size),
        *(options.compile, str(folder)),
        also=tuple(shlex.split(options.also)),
    )
    if options.lora:
        case = replace(case, lora=str(folder / "lora.safetensors"))
        make("random_network", ckpt, case.lora, *(["--v2"] if family == "sd2" else []))
    if options.control_net:
        case = replace(case, control_net=str(folder / "control_net"), guide=str(folder / "guide.png"))
        Bench(case, environment).child("make_control_net")
    return case


def diffusers_folder(text: str) -> Path:
    """Convert the path of a Diffusers folder, which both programs read without converting it."""
    path = Path(text).resolve()
    if not (path / "model_index.json").is_file():
        raise argparse.ArgumentTypeError(f"{text} is no Diffusers folder; give the one with model_index.json")
    return path


def family_in(folder: Path) -> str | None:
    """The family of a Diffusers folder, told by its text encoders; None where they are no family's."""
    files = {part: folder / part / "config.json" for part in TEXT_PARTS}
    configs = {part: read_json(file) for part, file in files.items() if file.is_file()}
    return next((record.configs for record in FAMILIES if record.fits_texts(configs)), None)


def parse_options(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options, converted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    model = parser.add_mutually_exclusive_group()
    model.add_argument("--ckpt", type=diffusers_folder, metavar="FOLDER", help="Diffusers folder to measure with")
    model.add_argument("--tiny", action="store_true", help="a tiny model, to try this tool")
    parser.add_argument("--family", choices=[record.configs for record in FAMILIES],
                        help="default sd1; a folder's own tells it")  # fmt: skip
    parser.add_argument("--W", type=values.size_px, metavar="PIXELS", help="default 512, XL: 1024")
    parser.add_argument("--H", type=values.size_px, metavar="PIXELS", help="likewise")
    parser.add_argument("--steps", type=values.whole_number(2), default=20, metavar="N", help="of DDIM (default 20)")
    parser.add_argument("--batch_size", type=values.whole_number(1), default=1, metavar="N")
    precision = parser.add_mutually_exclusive_group()
    for name in ("bf16", "fp16", "fp32"):
        precision.add_argument(f"--{name}", dest="precision", action="store_const", const=name, default="bf16")
    parser.add_argument("--lora", action="store_true", help="with a LoRA of rank 32; diffusers needs peft for it")
    parser.add_argument("--control_net", action="store_true", help="with a ControlNet")
    parser.add_argument("--compile", action="store_true", help="this program's --compile; torch.compile for diffusers")
    parser.add_argument("--also", default="", metavar="OPTIONS", help='more options for this program: "--lowvram"')
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
    parser.add_argument("--peer", choices=list(PEERS), nargs="+", default=["diffusers"],
                        help="what it is measured beside (default diffusers); openvino: its own conversion, U-Net and "
                        'VAE alone. --also="--engine openvino" lets this program use it')  # fmt: skip
    parser.add_argument("--rounds", type=values.whole_number(1), default=3, metavar="N", help="default 3")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures to a file, too")
    options = parser.parse_args(argv)
    own = family_in(options.ckpt) if options.ckpt else None
    if own and options.family not in (None, own):
        parser.error(f"--family {options.family}: {options.ckpt} holds an {own} model; leave --family out")
    options.family = own or options.family or SD1.configs
    if "openvino" in options.peer and (options.lora or options.control_net):
        parser.error("--peer openvino measures the plain model; leave --lora and --control_net out")
    return options


# ---------------------------------------------------------------------------------------------------------------------
# What came of it


def summarise(rounds: Sequence[Figures], step_tflop: float, matmul_tflops: float) -> Figures:
    """The medians over the rounds, what follows from them, and this program's ratio to each peer."""
    medians = {}
    for program, first in rounds[0].items():
        figures = {name: statistics.median(each[program][name] for each in rounds) for name in first}
        tflops = step_tflop / figures["step_s"]
        medians[program] = figures | {"tflops": tflops, "share": tflops / matmul_tflops}
    program, *peers = medians
    for peer in peers:
        own, others = medians[program], medians[peer]
        ratios = {name: value / others[name] for name, value in own.items() if name in others}
        medians["ratio" if peer == DIFFUSERS else f"ratio to {peer}"] = ratios
    return medians


def as_table(medians: Figures) -> str:
    """A Markdown table with a row for each figure."""
    lines = ["| | " + " | ".join(medians) + " |", "|---" * (len(medians) + 1) + "|"]
    for name, title in ROWS.items():
        if name in medians[PROGRAM]:
            values = [f"{figures[name]:.3g}" if name in figures else "–" for figures in medians.values()]
            lines.append(f"| {title} | " + " | ".join(values) + " |")
    return "\n".join(lines)


def describe(case: Case, machine: Mapping[str, object], options: argparse.Namespace) -> str:
    """What the table was measured with, in one line."""
    model = options.ckpt or f"{options.family}{', tiny' if options.tiny else ''}, random weights"
    parts = [f"{machine['device']}", f"{machine['threads']} threads", f"torch {machine['torch']}"]
    parts += [f"diffusers {machine['diffusers']}", f"{model}", f"{case.width} x {case.height}"]
    parts += [f"{case.steps} steps of DDIM", f"{machine['dtype']}", f"batches of {case.batch_size}"]
    parts += [name for name in ("lora", "control_net", "compile") if getattr(options, name)]
    parts += [" ".join(case.also)] if case.also else []
    parts += ["LoRA left out on diffusers' side, which needs peft for it"] if case.lora and not machine["peft"] else []
    return f"{'; '.join(parts)}; medians of {options.rounds}. A large matmul: {machine['matmul_tflops']:.3g} TFLOP/s."


def main(argv: Sequence[str] | None = None) -> None:
    """Run the tool."""
    options = parse_options(argv)
    environment = os.environ | ({"CUDA_VISIBLE_DEVICES": ""} if options.device == "cpu" else {})
    with tempfile.TemporaryDirectory(prefix="benchmark_") as folder:
        case = make_case(options, Path(folder), environment)
        bench = Bench(case, environment)
        if "openvino" in options.peer:
            bench.openvino("convert")
        rounds, machines = [], []
        for number in range(options.rounds):
            print(f"round {number + 1} of {options.rounds}", file=sys.stderr)
            machines.append(bench.ask("machine"))
            if options.device not in (None, machines[0]["device_type"]):
                sys.exit(f"--device {options.device}: there is none, PyTorch sees {machines[0]['device_type']}")
            rounds.append(bench.round(options.peer))
    machine = machines[0]
    machine["matmul_tflops"] = statistics.median(each["matmul_tflops"] for each in machines)
    medians = summarise(rounds, machine["step_tflop"], machine["matmul_tflops"])
    print(f"{describe(case, machine, options)}\n\n{as_table(medians)}")
    if options.json:
        report = {"case": asdict(case), "machine": machine, "medians": medians, "rounds": rounds}
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
