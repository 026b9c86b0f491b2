"""Each measurement in a process of its own: what it takes of the device is its own, and its end is nobody else's.

The processes are forked from one that has imported PyTorch and diffusers and has not touched the device, which saves
each of them seconds. What a process finds it writes down at once, so that what it found stands when it is stopped.
"""

import faulthandler
import json
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.context import ForkServerProcess, SpawnProcess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
_IMPORTED_ONCE = [
    "torch",
    "diffusers.models.unets.unet_2d_condition",
    "diffusers.models.autoencoders.autoencoder_kl",
    "diffusers.models.controlnets.controlnet",
    "transformers.models.clip.modeling_clip",
    "transformers.models.clip.tokenization_clip",
]
# What PyTorch says where the process that was forked had touched the device, whatever made it do so
_FORKED_TOO_LATE = "Cannot re-initialize CUDA in forked subprocess"
INTERRUPTED = "interrupted"  # the error of a task that Ctrl-C ended
_TAIL = 40  # lines of what a process said that are kept when it fails


class Notes:
    """Where a measurement writes down what it finds.

    Args:
        file: takes a line of JSON for each note.
    """

    def __init__(self, file: Path) -> None:
        self._file = file

    def figures(self, **figures: object) -> None:
        """Note figures by their names."""
        self._add({"figures": figures})

    def row(self, **row: object) -> None:
        """Note one of several results of the same kind."""
        self._add({"row": row})

    def failure(self, error: str, trace: str) -> None:
        """Note why the measurement ended early."""
        self._add({"error": error, "traceback": trace})

    def _add(self, note: dict[str, Any]) -> None:
        with self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(note) + "\n")


def environment(folder: Path) -> dict[str, str]:
    """What is to be set before the first process begins; a folder takes what `--compile` keeps."""
    return {
        "PYTORCH_NVML_BASED_CUDA_CHECK": "1",  # asking for a device is not touching it
        "TRANSFORMERS_VERBOSITY": "error",
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "compiled"),  # so that it begins anew
        # processes that are stopped leave things behind, which multiprocessing cleans up and would tell of
        "PYTHONWARNINGS": "ignore::UserWarning:multiprocessing.resource_tracker",
    }


Measure = Callable[..., None]  # called with a task's arguments, then `Notes`
_LOOK_S = 0.1  # so often it is looked whether somebody has pressed Ctrl-C


@dataclass(frozen=True)
class Task:
    """A measurement that is to be made."""

    part: str
    name: str  # what is measured, for the report
    measure: Measure
    arguments: tuple[Any, ...]
    limit_s: float
    family: str = ""
    variant: str = ""
    needs_models: bool = True
    skipped: str = ""  # why it is not made, if it is not


@dataclass
class Result:
    """What came of a task."""

    task: Task
    seconds: float = 0.0
    figures: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    error: str = ""  # one line; what was found before it stands all the same
    traceback: str = ""
    skipped: str = ""

    def as_json(self) -> dict[str, Any]:
        """For the report's JSON."""
        of_task = {name: getattr(self.task, name) for name in ("part", "name", "family", "variant")}
        return of_task | {name: value for name, value in vars(self).items() if name != "task"}


class Processes:
    """Runs tasks, one at a time.

    Args:
        folder: takes what the processes note and say.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._method = "forkserver"
        self._count = 0
        self.interrupted = False  # from then on nothing is waited for
        multiprocessing.set_forkserver_preload(_IMPORTED_ONCE)

    def run(self, task: Task, limit_s: float) -> Result:
        """Run a task to its end, to its limit in seconds, or until it is `interrupted`."""
        result = self._run(task, limit_s)
        if self._method == "forkserver" and _FORKED_TOO_LATE in result.error:
            self._method = "spawn"
            result = self._run(task, limit_s)
        return result

    def _run(self, task: Task, limit_s: float) -> Result:
        self._count += 1
        notes, log = (self._folder / f"{self._count}.{ending}" for ending in ("notes", "log"))
        started = time.perf_counter()
        process = _process(self._method, (task.measure, task.arguments, notes, log, limit_s))
        process.start()
        problem = ""
        while process.is_alive() and not self.interrupted and time.perf_counter() < started + limit_s:
            process.join(_LOOK_S)
        if process.is_alive():
            problem = INTERRUPTED if self.interrupted else f"stopped after {limit_s:.0f} s"
        _end(process)
        result = Result(task, time.perf_counter() - started)
        _read(notes, result)
        problem = problem or _ending(process.exitcode or 0)
        if problem and not result.error:
            result.error, result.traceback = problem, _tail(log)
        return result


def one_line(problem: BaseException, said: str) -> str:
    """The cause of an error, in one line: of a program that left, what it said last."""
    text = str(problem)
    if isinstance(problem, SystemExit) and isinstance(problem.code, int):
        lines = [line for line in said.splitlines() if "error" in line.lower()] or said.splitlines()
        return lines[-1].strip() if lines else f"ended with status {problem.code}"
    if isinstance(problem, SystemExit):  # a process that was run, with the end of what it said
        return text.strip().splitlines()[-1]
    first = (text.strip().splitlines() or [""])[0]
    return f"{type(problem).__name__}: {first}"[:300]


def _process(method: str, arguments: tuple[Any, ...]) -> "ForkServerProcess | SpawnProcess":
    kind = ForkServerProcess if method == "forkserver" else SpawnProcess
    return kind(target=_in_process, args=arguments)


def _in_process(measure: Measure, arguments: Sequence[Any], notes_file: Path, log: Path, limit_s: float) -> None:
    os.setsid()  # what it starts is ended with it
    with log.open("w", encoding="utf-8") as stream:
        for number in (1, 2):
            os.dup2(stream.fileno(), number)
        faulthandler.enable(stream)
        faulthandler.dump_traceback_later(limit_s - min(5, limit_s / 2), file=stream)  # where it is, if it is stopped
        notes, status = Notes(notes_file), 0
        try:
            measure(*arguments, notes)
        except BaseException as problem:  # whatever it is, the next one runs
            sys.stderr.flush()
            said = _tail(log)
            notes.failure(one_line(problem, said), f"{traceback.format_exc()}\n{said}".strip())
            status = 1
        os._exit(status)  # a device that has failed may fail once more when everything is taken down


def _end(process: "ForkServerProcess | SpawnProcess") -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid or 0, signal.SIGKILL)
    if process.is_alive():  # it had no group of its own yet
        process.kill()
    process.join()


def _read(notes: Path, result: Result) -> None:
    lines = notes.read_text(encoding="utf-8").splitlines() if notes.exists() else []
    for line in lines:
        with suppress(json.JSONDecodeError):  # half a line, of a process that was killed
            note = json.loads(line)
            result.figures |= note.get("figures", {})
            result.rows += [note["row"]] if "row" in note else []
            result.error = note.get("error", result.error)
            result.traceback = note.get("traceback", result.traceback)


def _tail(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else []
    return "\n".join(lines[-_TAIL:])


def _ending(status: int) -> str:
    if not status:
        return ""
    if status < 0:
        return f"its process was ended by {signal.Signals(-status).name}; the JSON has what it said"
    return f"its process ended with status {status}; the JSON has what it said"
