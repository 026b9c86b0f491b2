"""The manifest beside a run's pictures, `manifest.jsonl`: what the run is, then a line for each picture that is done.

Lines are only ever added, each in one write after its picture stands complete. A process holds a lock on the file it
adds to for as long as it lives; others that draw into the same folder take `manifest-1.jsonl` and so on.
"""

import hashlib
import json
import logging
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from library.errors import EnvironmentFault, InputError
from library.files.picture_files import TEMPORARY, standing_picture
from library.plan.file_names import numbered
from library.plan.jobs import Job
from library.plan.run_record import RunRecord, job_id
from library.results.output import RunFacts, metadata
from library.settings.highres import stages

if TYPE_CHECKING:
    from library.plan.planning import RunPlan

try:
    import fcntl
except ImportError:  # Windows: two processes must not add to one manifest there
    fcntl = None

logger = logging.getLogger(__name__)

_NAME = "manifest.jsonl"


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


def lock(descriptor: int) -> bool:
    """Take the lock of an open file without waiting; False when another process has it."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return True
    return True


def _open_locked(file: Path) -> int | None:
    """Open a file to add to and take its lock; None when another process has it."""
    while True:
        descriptor = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        if not lock(descriptor):
            os.close(descriptor)
            return None
        if os.fstat(descriptor).st_nlink:
            return descriptor
        os.close(descriptor)  # the process that had it took it away, empty, in between


class Manifest:
    """The manifest that a process adds to.

    Args:
        folder: where the pictures go.
        record: the run.

    Raises:
        EnvironmentFault: when the folder does not take it.
    """

    def __init__(self, folder: Path, record: RunRecord) -> None:
        self._record = record
        self._begun = False
        self._writing = threading.Lock()
        try:
            for file in numbered(folder / _NAME):
                descriptor = _open_locked(file)
                if descriptor is not None:
                    self._descriptor = descriptor
                    break
            content = file.read_bytes()
        except OSError as problem:
            raise _unwritable(folder, problem) from None
        self.file = file
        self.pictures_before = len(_pictures(content))  # that earlier processes noted in it
        self._torn = content[-1:] not in (b"", b"\n")  # the last line was not written to its end

    def __enter__(self) -> "Manifest":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the file free; an empty one is taken away."""
        if os.fstat(self._descriptor).st_size == 0:
            with suppress(OSError):
                self.file.unlink()
        os.close(self._descriptor)

    def begin(self, model_hash: str | None) -> None:
        """Write the run's line, once, before its first picture."""
        with self._writing:
            if not self._begun:
                self._write({**self._record.to_json(), "model_hash": model_hash})
                self._begun = True

    def add(self, job: Job, file: Path, sha256: str) -> None:
        """Write a finished picture's line."""
        line = {"job": job_id(job), "file": file.name, "sha256": sha256, "seed": job.seed}
        with self._writing:
            self._write(line)

    def _write(self, line: dict[str, object]) -> None:
        data = (b"\n" if self._torn else b"") + json.dumps(line).encode() + b"\n"
        self._torn = True
        try:
            while data:
                data = data[os.write(self._descriptor, data) :]
        except OSError as problem:
            raise _unwritable(self.file, problem) from None
        self._torn = False


def ended(file: Path) -> bool:
    """Whether the process that adds to a manifest is gone."""
    try:
        with file.open("rb") as stream:
            return lock(stream.fileno())
    except OSError:
        return True


def jobs_noted(file: Path, skip: int) -> list[str]:
    """The ids of the jobs that a manifest tells of, without so many first ones; none when it cannot be read."""
    try:
        return [done.job for done in _pictures(file.read_bytes())[skip:]]
    except OSError:
        return []


def _unwritable(path: Path, problem: OSError) -> EnvironmentFault:
    return EnvironmentFault(str(path), f"cannot be written ({problem.strerror}); make room or give another --outdir")


# ---------------------------------------------------------------------------------------------------------------------
# Reading


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


def _pictures(content: bytes) -> list[DonePicture]:
    return [_picture(line) for line in _lines(content) if "parts" not in line]


def finished(run: KnownRun, folder: Path, jobs: Sequence[Job]) -> dict[int, Path]:
    """The places of the jobs that a run has made, each with its file, which is still the one that was made."""
    if run.places is not None:
        return {place: folder / name for place, name in run.places.items()}
    by_job: dict[str, dict[str, DonePicture]] = {}
    for done in run.done:
        by_job.setdefault(done.job, {})[done.file] = done
    places: dict[int, Path] = {}
    # equal jobs keep the files that were planned for them, as far as these were made
    for take_any in (False, True):
        for place, job in enumerate(jobs):
            waiting = by_job.get(job_id(job))
            if place in places or not waiting:
                continue
            name = job.file.name if job.file.name in waiting else next(iter(waiting)) if take_any else None
            if name is not None and _is_same(folder / name, waiting.pop(name).sha256):
                places[place] = folder / name
    return places


def _is_same(file: Path, sha256: str) -> bool:
    try:
        with file.open("rb") as stream:
            same = hashlib.file_digest(stream, "sha256").hexdigest() == sha256
    except OSError:
        same = False
    if not same:
        logger.warning("%s is gone or has been changed since it was made; --resume makes it again", file)
    return same


def recover(plan: "RunPlan", manifest: Manifest, facts: RunFacts) -> dict[int, Path]:
    """Clean up after the process that a run was cut off in; gives the pictures that are done, by their places.

    A picture that stands complete but was not noted yet is noted, temporary files of the run are taken away.
    """
    done = dict(plan.done)
    known = {path.name for path in done.values()}
    for place, job in enumerate(plan.jobs):
        if place in done or not job.file.exists():
            continue
        standing = standing_picture(job.file, metadata(job, facts))
        if standing is not None and standing.name not in known:
            known.add(standing.name)
            done[place] = standing
            manifest.begin(facts.model_hash())
            manifest.add(job, standing, hashlib.sha256(standing.read_bytes()).hexdigest())
    _remove_temporary_files(plan)
    return done


def _remove_temporary_files(plan: "RunPlan") -> None:
    stems = {stage.file.stem for job in plan.jobs for stage in stages(job, plan.highres)}
    for leftover in plan.outdir.glob(".*.tmp"):
        if (match := TEMPORARY.fullmatch(leftover.name)) and match[1] in stems:
            leftover.unlink(missing_ok=True)
