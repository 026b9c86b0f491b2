#!/usr/bin/env python3
"""Check this program on a GPU and write a report: right pictures, speed, memory, beside diffusers' own pipeline.

    python tools/check_device.py                          # all of it, within eight minutes
    python tools/check_device.py --only speed memory      # some parts
    python tools/check_device.py --tiny                   # on any machine, in a minute: tries the tool itself

It downloads nothing: models of the published sizes are made of random weights, in a temporary folder that is removed
(13 GB; TMPDIR says where). The report is one Markdown and one JSON file; docs/check-device.md tells how to read it.
Runs on Linux. Close other programs first.
"""

import argparse
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from library import values
from library.errors import ProgramError
from tools.device_check.processes import Processes, Result, Task, environment
from tools.device_check.report import ReportFiles
from tools.device_check.tasks import FAMILIES, MODELS, PARTS, Check, machine_task, model_tasks, tasks

_WORTH_STARTING_S = 10  # less time than this is not enough for anything
_INTERRUPTED = 130


class Run:
    """Goes through the tasks and writes the report after each.

    Args:
        check: what is checked.
        only: parts that are wanted.
        minutes: that all of it may take.
        report: where it is written.
    """

    def __init__(self, check: Check, only: Sequence[str], minutes: float, report: ReportFiles) -> None:
        self.results: list[Result] = []
        self._check, self._only, self._minutes, self._report = check, only, minutes, report
        self._processes = Processes(check.folder)
        self._deadline = time.monotonic() + 60 * minutes

    def go(self) -> None:
        """Do everything; after Ctrl-C the rest is told as not done."""
        for task in self._tasks():
            result = self._do(task)
            self.results.append(result)
            _say(result)
            self._report.write(self.results)

    @property
    def interrupted(self) -> bool:
        """Whether Ctrl-C was pressed."""
        return self._processes.interrupted

    def interrupt(self, number: int, frame: FrameType | None) -> None:
        """What Ctrl-C does: it is noted, as an exception that comes at the wrong time can get lost."""
        self._processes.interrupted = True

    def _tasks(self) -> Iterator[Task]:
        yield machine_task(self._check)
        wanted = [task for task in tasks(self._check, []) if task.part in self._only and not task.skipped]
        families = {task.family for task in wanted if task.needs_models}
        yield from (task for task in model_tasks(self._check) if task.family in families)
        yield from (task for task in tasks(self._check, self.results) if task.part in self._only)

    def _do(self, task: Task) -> Result:
        left_s = self._deadline - time.monotonic()
        if skipped := task.skipped or self._obstacle(task, left_s):
            return Result(task, skipped=skipped)
        return self._processes.run(task, min(task.limit_s, left_s))

    def _obstacle(self, task: Task, left_s: float) -> str:
        """Why a task cannot be done any more, if it cannot."""
        if self._processes.interrupted:
            return "not done, as the check was interrupted"
        unmade = {result.task.family for result in self.results if result.task.part == MODELS and result.error}
        if task.family in unmade and task.part != MODELS:
            return f"not done, as the model {FAMILIES[task.family]} could not be made"
        if left_s < _WORTH_STARTING_S:
            return f"not done, as the {self._minutes:g} minutes were over; `--only {task.part}` does it"
        return ""


def _say(result: Result) -> None:
    task = result.task
    outcome = result.skipped or f"{result.error or 'done'} ({result.seconds:.0f} s)"
    print(f"{task.part}, {task.name}: {outcome}", file=sys.stderr, flush=True)


def parse_options(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options, converted."""
    parts = "\n".join(f"  {name:10} {what}" for name, what in PARTS.items())
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=f"parts:\n{parts}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--device", choices=["cuda", "cpu"], help="default: cuda where there is one")
    add("--tiny", action="store_true", help="tiny models and pictures: tries the tool, tells nothing of the device")
    add("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help="see below")
    add(
        "--minutes", type=values.number(0, above=True), default=8, metavar="N", help="that it takes at most (default 8)"
    )
    add("--outdir", type=Path, default=Path("device_reports"), metavar="DIR",
        help="folder of the reports (default device_reports); earlier ones stay")  # fmt: skip
    options = parser.parse_args(argv)
    if options.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    import torch

    there = "cuda" if torch.cuda.is_available() else "cpu"
    if options.device not in (None, there):
        advice = "`python -m torch.utils.collect_env` shows what it sees"
        parser.error(f"--device {options.device}: PyTorch finds no CUDA device; {advice}")
    if there == "cpu" and not options.tiny:
        advice = "give --tiny too to try the tool, or measure a CPU with tools/benchmark.py"
        parser.error(f"--device cpu: models of the published sizes would take hours; {advice}")
    options.device = there
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; returns its exit status: 1 when something failed or is not as it must be."""
    options = parse_options(argv)
    try:
        return check_device(options, ReportFiles(options.outdir, options.device, tiny=options.tiny))
    except ProgramError as problem:
        print(f"error: {problem}", file=sys.stderr)
        return problem.exit_status


def check_device(options: argparse.Namespace, report: ReportFiles) -> int:
    """Check everything that is wanted; returns the exit status.

    Raises:
        ProgramError: when the report cannot be written.
    """
    with tempfile.TemporaryDirectory(prefix="check_device_", ignore_cleanup_errors=True) as folder:
        os.environ.update(environment(Path(folder)))
        check = Check(options.device, options.tiny, Path(folder))
        run = Run(check, options.only, options.minutes, report)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, run.interrupt)
        run.go()
    print(f"{report.markdown}\n{report.json}")
    return _INTERRUPTED if run.interrupted else 0 if report.all_well else 1


if __name__ == "__main__":
    sys.exit(main())
