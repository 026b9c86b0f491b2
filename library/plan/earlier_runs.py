"""Runs that a folder's manifests tell of, and the one among them that a command goes on with."""

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from library.errors import InputError
from library.files.file_locks import lock
from library.plan.job import Job
from library.plan.run_paths import agree
from library.plan.run_record import RunRecord, compared_options, usual_options
from library.plan.sources import SourceLine
from library.settings.options import Options

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DonePicture:
    """A picture that a manifest names."""

    job: str
    file: str
    sha256: str


@dataclass
class KnownRun:
    """A run found in a folder: its latest record, and the pictures it has made."""

    record: RunRecord
    done: list[DonePicture] = field(default_factory=list)
    active: bool = False  # a process is at work on it
    places: Mapping[int, str] | None = None  # files by their places in the run, where another process found them


# ---------------------------------------------------------------------------------------------------------------------
# Reading manifests


def read_runs(folder: Path) -> list[KnownRun]:
    """The runs that the manifests of a folder tell of. Lines that were torn off are passed over.

    Raises:
        InputError: when a manifest cannot be read.
    """
    runs: dict[str, KnownRun] = {}
    if not folder.is_dir():
        return []
    for path in sorted(folder.glob("manifest*.jsonl")):
        try:
            with path.open("rb") as file:
                active = not lock(file.fileno())
                content = file.read()
        except OSError as problem:
            raise InputError(str(path), f"cannot be read ({problem.strerror}); check its permissions") from None
        current = None
        for line in _lines(content):
            if "parts" in line:
                try:
                    record = RunRecord.from_json(line)
                except (KeyError, TypeError):
                    logger.warning("%s: holds a run of another version of this program; it is left alone", path)
                    current = None
                    continue
                current = runs.setdefault(record.run, KnownRun(record))
                if len(record.parts) > len(current.record.parts):
                    current.record = record
            elif current is not None:
                current.done.append(_picture(line))
        if current is not None:
            current.active |= active
    return list(runs.values())


def _lines(content: bytes) -> Iterator[dict]:
    for raw in content.split(b"\n"):
        try:
            line = json.loads(raw)
            if "parts" in line or {"job", "file", "sha256"} <= line.keys():
                yield line
        except (ValueError, TypeError, AttributeError):
            continue


def _picture(line: Mapping[str, str]) -> DonePicture:
    return DonePicture(line["job"], line["file"], line["sha256"])


def noted_pictures(content: bytes) -> list[DonePicture]:
    """The pictures that a manifest's content tells of."""
    return [_picture(line) for line in _lines(content) if "parts" not in line]


def finished(run: KnownRun, folder: Path, jobs: Sequence[Job]) -> dict[int, Path]:
    """The places of the jobs that a run has made, each with its file, which is still the one that was made."""
    if run.places is not None:
        return {place: folder / name for place, name in run.places.items()}
    by_job: dict[str, dict[str, DonePicture]] = {}
    for done in run.done:
        by_job.setdefault(done.job, {})[done.file] = done
    places: dict[int, Path] = {}
    gone: list[Path] = []
    # equal jobs keep the files that were planned for them, as far as these were made
    for take_any in (False, True):
        for place, job in enumerate(jobs):
            waiting = by_job.get(run.record.job_id(job))
            if place in places or not waiting:
                continue
            name = job.file.name if job.file.name in waiting else next(iter(waiting)) if take_any else None
            if name is not None and _is_same(folder / name, waiting.pop(name).sha256):
                places[place] = folder / name
            elif name is not None:
                gone.append(folder / name)
    if len(gone) == 1:
        logger.warning("%s is gone or has been changed since it was made; --resume makes it again", gone[0])
    elif gone:
        others = f"{gone[0]} and {len(gone) - 1} other pictures are gone or have been changed since they were made"
        logger.warning("%s; --resume makes them again", others)
    return places


def _is_same(file: Path, sha256: str) -> bool:
    try:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest() == sha256
    except OSError:
        return False


# ---------------------------------------------------------------------------------------------------------------------
# Going on with a run


def find_run(options: Options, lines: Sequence[SourceLine]) -> KnownRun | None:
    """The run in the output folder that `--resume` goes on with; None when nothing was made yet.

    Raises:
        InputError: when these options and lines go on with none of them, or a process is at work on it.
    """
    runs = read_runs(options.outdir)
    if not runs:
        logger.warning("--resume: %s holds no run yet; beginning one", options.outdir)
        return None
    known = [run.record for run in runs]
    chosen = choose_run(known, compared_options(options), usual_options(options), lines)
    known = next(run for run in runs if run.record is chosen)
    if known.active:
        raise InputError("--resume", f"a process is still at work on this run in {options.outdir}; wait until it ends")
    return known


def shared_run(plan: Mapping[str, Any]) -> KnownRun:
    """The run that the first of several processes has planned."""
    places = {int(place): name for place, name in plan["done"].items()}
    return KnownRun(RunRecord.from_json(plan["record"]), places=places)


def choose_run(
    runs: Sequence[RunRecord],
    options: Mapping[str, object],
    usual: Mapping[str, object],
    lines: Sequence[SourceLine],
) -> RunRecord:
    """The latest of a folder's runs that these options and prompt lines go on with.

    Args:
        runs: of the folder.
        options: by name, as plain data.
        usual: what they are where they are not given, which they were in runs of versions that lacked them.
        lines: the prompt lines.

    Raises:
        InputError: when there is none, naming what differs from the latest run.
    """
    newest_first = sorted(runs, key=lambda run: run.started, reverse=True)
    differences = [_difference(run, options, usual, lines) for run in newest_first]
    for run, difference in zip(newest_first, differences):
        if difference is None:
            return run
    raise next(filter(None, differences))


# of version 0.1.0, which knew no family with another clip skip, and drew one picture whatever seeds a line named
_FORMER_DEFAULTS = (("clip_skip", 1), ("images_per_prompt", 1))


def _difference(
    run: RunRecord, now: Mapping[str, object], usual: Mapping[str, object], lines: Sequence[SourceLine]
) -> InputError | None:
    for name in now:
        before = run.options.get(name, usual[name])
        usual_once = (name, before) in _FORMER_DEFAULTS and now[name] is None
        if not usual_once and not agree(before, now[name], run.begun_in):
            return InputError(
                f"--{name} {_shown(now[name])}",
                f"the run to resume has {_shown(before)}; give the same, or another --outdir for a new run",
            )
    gone = Counter(text for part in run.parts for text in part.lines) - Counter(map(run.line_key, lines))
    if gone:
        text = next(iter(gone))
        return InputError(
            "--resume",
            f"the prompt {text[:80]!r} of the run to resume is changed or gone; put it back, "
            "or give another --outdir for a new run (lines may be added)",
            _place_of_changed(text, run, lines),
        )
    return None


def _place_of_changed(text: str, run: RunRecord, lines: Sequence[SourceLine]) -> str:
    """Where a prompt of a run is now changed: the new line that is most like it, or else which of the run's it was."""
    before = [each for part in run.parts for each in part.lines]
    known = set(before)
    added = {key: line.where for line in lines if (key := run.line_key(line)) not in known}
    near = get_close_matches(text, list(added)[:_MOST_COMPARED], n=1)
    return next((added[each] for each in near if added[each]), f"its prompt {before.index(text) + 1}")


_MOST_COMPARED = 500  # lines, which take a moment each


def _shown(value: object) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value))
    return "no value" if value is None else "on" if value is True else "off" if value is False else str(value)
