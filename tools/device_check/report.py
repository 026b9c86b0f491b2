"""The report: one Markdown file for people, one JSON file with all figures and tracebacks."""

import itertools
import json
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from library.errors import EnvironmentFault, InputError
from tools.device_check.processes import INTERRUPTED, ROOT, Result
from tools.device_check.sections import FAILED, Section, section, table
from tools.device_check.tasks import MACHINE, MODELS, PARTS

_MACHINE_NAMES = {
    "device": "device",
    "memory_gb": "its memory, GB",
    "taken_gb": "taken at the start, GB",
    "capability": "compute capability",
    "driver": "driver",
    "cuda": "CUDA",
    "cudnn": "cuDNN",
    "power_limit": "power limit",
    "temperature": "temperature at the start, °C",
    "processor": "processor",
    "cores": "its cores",
    "system": "system",
    "python": "Python",
    "program": "this program",
    "commit": "its commit",
}
_SEND = """Open an issue of this project, name the card in its title, and attach this file and the JSON file beside it.
They hold what stands here, and tracebacks; your home folder is written `~`. Read them before you send them."""
_CANNOT = "cannot be written"
_TAKEN_GB = 2.0  # of the card, at the start; this program and a desktop take less


class ReportFiles:
    """A pair of files that is new, and is written again whenever more is known.

    Args:
        folder: of the reports; made if it is not there.
        device: cuda or cpu.
        tiny: of tiny models, whose figures mean nothing.

    Raises:
        InputError: when there can be no files in the folder.
    """

    def __init__(self, folder: Path, device: str, *, tiny: bool) -> None:
        self._device, self._tiny = device, tiny
        self._begun = datetime.now(UTC)
        self._sections: dict[str, Section] = {}
        self._prepared = True  # the machine was looked at, the models were made, and nothing was interrupted
        try:
            self._take_names(folder)
        except OSError as problem:
            raise InputError(f"--outdir {folder}", f"{_CANNOT} ({problem.strerror}); give another folder") from None

    def _take_names(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for number in itertools.count(1):
            self.markdown = folder / f"device-{self._begun:%Y-%m-%d}-{number:03}.md"
            self.json = self.markdown.with_suffix(".json")
            if self.json.exists():
                continue
            try:
                self.markdown.touch(exist_ok=False)
                return
            except FileExistsError:
                continue

    @property
    def all_well(self) -> bool:
        """Whether nothing failed, and nothing was interrupted."""
        return self._prepared and all(part.verdict != FAILED for part in self._sections.values())

    def write(self, results: Sequence[Result]) -> None:
        """Write what is known by now.

        Raises:
            EnvironmentFault: when the files cannot be written any more; those before stay.
        """
        parts = [part for part in PARTS if any(result.task.part == part for result in results)]
        self._sections = {part: section(part, _of(results, part), tiny=self._tiny) for part in parts}
        before = (MACHINE, MODELS)
        self._prepared = not any(
            result.error and (result.task.part in before or result.error == INTERRUPTED) for result in results
        )
        head: dict[str, Any] = {"report": "check_device", "format": 1, "device": self._device, "tiny": self._tiny}
        head |= {"begun": self._begun.isoformat(timespec="seconds"), "seconds": self._seconds()}
        verdicts = {name: {"verdict": found.verdict, "text": found.text} for name, found in self._sections.items()}
        content = head | {"all_well": self.all_well, "parts": verdicts, "results": [each.as_json() for each in results]}
        texts = {self.json: json.dumps(content, indent=2), self.markdown: "\n".join(self._lines(results))}
        for file, text in texts.items():
            new = file.with_name(f"{file.name}.new")
            try:
                new.write_text(_without_names(text) + "\n", encoding="utf-8")
                new.replace(file)  # what stands there stays whole until then
            except OSError as problem:
                new.unlink(missing_ok=True)
                advice = "make room, or give another --outdir"
                raise EnvironmentFault(str(file), f"{_CANNOT} ({problem.strerror}); {advice}") from None

    def _seconds(self) -> float:
        return round((datetime.now(UTC) - self._begun).total_seconds(), 1)

    def _lines(self, results: Sequence[Result]) -> list[str]:
        facts = next((result.figures for result in results if result.task.part == MACHINE), {})
        kind = "Tiny models, which try the tool and say nothing of the device. " if self._tiny else ""
        lines = [f"# Device check: {facts.get('device', self._device)}", ""]
        when = f"{self._begun:%Y-%m-%d %H:%M} UTC, {self._seconds() / 60:.1f} minutes"
        lines += [f"{kind}{when}. Random weights, nothing downloaded.", ""]
        verdicts = [[part, f"**{found.verdict}**: {found.text}"] for part, found in self._sections.items()]
        lines += [*table(("part", "verdict"), verdicts), ""]
        lines += self._machine(facts, results)
        for part, found in self._sections.items():
            lines += [f"## {part}: {PARTS[part]}", "", f"**{found.verdict}**: {found.text}", ""]
            lines += [*itertools.dropwhile(lambda line: not line, found.lines), ""]
        return [*lines, "## How to send it", "", _SEND]

    def _machine(self, facts: dict[str, Any], results: Sequence[Result]) -> list[str]:
        rows = [[title, _plain(facts[name])] for name, title in _MACHINE_NAMES.items() if name in facts]
        rows += [[name, value] for name, value in facts.items() if name not in _MACHINE_NAMES]
        matmul = [made.figures["matmul_tflops"] for made in _of(results, MODELS) if "matmul_tflops" in made.figures]
        rows += [["a large matmul, TFLOP/s", _plain(max(matmul))]] if matmul else []
        lines = ["## The machine", "", *table(("", ""), rows), ""]
        if facts.get("taken_gb", 0) > _TAKEN_GB:
            lines += ["Another program holds memory of the card: figures may be too low. Close it and check again.", ""]
        made = [*_of(results, MACHINE), *_of(results, MODELS)]
        failed = [f"- {each.task.name}: {each.error or each.skipped}" for each in made if each.error or each.skipped]
        lines += ["Failed before anything was measured:", *failed, ""] if failed else []
        return lines


def _of(results: Sequence[Result], part: str) -> list[Result]:
    return [result for result in results if result.task.part == part]


def _plain(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _without_names(text: str) -> str:
    """A text in which folders of this user are told in general."""
    return text.replace(str(ROOT), ".").replace(str(Path.home()), "~")
