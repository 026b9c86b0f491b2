"""The manifest beside a run's pictures, `manifest.jsonl`: what the run is, then a line for each picture that is done.

Lines are only ever added, each in one write after its picture stands complete. A process holds a lock on the file it
adds to for as long as it lives; others that draw into the same folder take `manifest-1.jsonl` and so on.
"""

import hashlib
import json
import os
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from library.errors import EnvironmentFault
from library.files.file_locks import lock
from library.files.picture_files import TEMPORARY, numbered, standing_picture, temporary_mark
from library.plan.job import Job
from library.plan.run_plan import RunPlan
from library.plan.run_record import RunRecord
from library.plan.stages import stages
from library.results.metadata import RunFacts, metadata

_NAME = "manifest.jsonl"


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
        line = {"job": self._record.job_id(job), "file": file.name, "sha256": sha256, "seed": job.seed}
        with self._writing:
            self._write(line)

    def _write(self, line: Mapping[str, object]) -> None:
        data = (b"\n" if self._torn else b"") + json.dumps(line).encode() + b"\n"
        self._torn = True
        try:
            while data:
                data = data[os.write(self._descriptor, data) :]
        except OSError as problem:
            raise _unwritable(self.file, problem) from None
        self._torn = False


def _unwritable(path: Path, problem: OSError) -> EnvironmentFault:
    return EnvironmentFault(str(path), f"cannot be written ({problem.strerror}); make room or give another --outdir")


def recover(plan: RunPlan, manifest: Manifest, facts: RunFacts) -> dict[int, Path]:
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


def _remove_temporary_files(plan: RunPlan) -> None:
    files = [stage.file for job in plan.jobs for stage in stages(job, plan.highres)]
    marks = {*map(temporary_mark, files), *(file.stem for file in files)}  # version 0.1.0 took stems
    for leftover in plan.output.folder.glob(".*.tmp"):
        if (match := TEMPORARY.fullmatch(leftover.name)) and match[1] in marks:
            leftover.unlink(missing_ok=True)
