"""Writing pictures in the background."""

import hashlib
import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from library import console
from library.errors import InputError
from library.files.picture_files import DEFAULT_QUALITY, encode, save_whole, standing_picture
from library.plan.job import Job
from library.results.metadata import RunFacts, metadata

if TYPE_CHECKING:
    import numpy as np

logger = logging.getLogger(__name__)

_WRITERS = 2
_WAITING_PICTURES = 32  # pictures that may wait for a writer before the run waits for them


class Ledger(Protocol):
    """What takes note of pictures that stand; `run.manifest.Manifest` does."""

    def begin(self, model_hash: str | None) -> None:
        """Note the run, once, before its first picture."""

    def add(self, job: Job, file: Path, sha256: str) -> None:
        """Note a finished picture."""


def encoded(pixels: "np.ndarray", job: Job, facts: RunFacts, quality: int) -> bytes | None:
    """A picture (H, W, 3) uint8 of a job as its file's content; None, once that is told, where its format fails."""
    texts = metadata(job, facts)
    try:
        return encode(pixels, job.file.suffix, texts, quality)
    except Exception as problem:  # whatever a format's encoder raises
        name = job.file.suffix
        logger.error("%s: cannot be made a %s (%s); try another --format", job.described, name, problem)
        return None


class PictureWriter:
    """Writes pictures in the background, a bounded number at a time; use as a context manager.

    A picture that cannot be encoded is told of and left out. A failure to write is raised by the next `write`, or at
    the end of the block. Files that are waiting are written before the block is left, also after an error.

    Args:
        facts: what the metadata says of the run.
        on_saved: called with each picture's job and file once it stands.
        ledger: takes note of the pictures.
        quality: of JPEG and WebP.
        resumed: first stages' pictures may be there already, from before the run was cut off.
    """

    def __init__(
        self,
        facts: RunFacts,
        on_saved: Callable[[Job, Path], None],
        ledger: Ledger | None = None,
        quality: int = DEFAULT_QUALITY,
        resumed: bool = False,
    ) -> None:
        self._facts = facts
        self._on_saved = on_saved
        self._ledger = ledger
        self._quality = quality
        self._resumed = resumed
        self._pool = ThreadPoolExecutor(max_workers=_WRITERS, thread_name_prefix="writer")
        self._pending: deque[Future[None]] = deque()
        self._first_stages: list[Future[None]] = []
        self._report = threading.Lock()

    def __enter__(self) -> "PictureWriter":
        return self

    def __exit__(self, error_type: type | None, *rest: object) -> None:
        self._pool.shutdown(wait=True)
        if error_type is None:
            self.wait()

    def write(self, picture: "np.ndarray | bytes", job: Job) -> None:
        """Hand over a picture of a job: (H, W, 3) uint8, or its file's content."""
        while self._pending and (self._pending[0].done() or len(self._pending) >= _WAITING_PICTURES):
            self._pending.popleft().result()
        # A picture is done for --resume once it stands, so it is written after its first stage, handed over before it
        self._first_stages = [future for future in self._first_stages if not future.done() or future.exception()]
        waits_for = () if job.stage == 1 else tuple(self._first_stages)
        self._pending.append(self._pool.submit(self._save, picture, job, waits_for))
        if job.stage == 1:
            self._first_stages.append(self._pending[-1])

    def wait(self) -> None:
        """Wait until everything handed over is written."""
        while self._pending:
            self._pending.popleft().result()

    def _save(self, picture: "np.ndarray | bytes", job: Job, waits_for: Sequence[Future[None]]) -> None:
        for future in waits_for:
            future.result()
        if self._resumed and job.stage == 1 and standing_picture(job.file, metadata(job, self._facts)):
            return
        content = picture if isinstance(picture, bytes) else encoded(picture, job, self._facts, self._quality)
        if content is None:
            return
        if self._ledger is not None:
            self._ledger.begin(self._facts.model_hash())
        try:
            file = save_whole(content, job.file)
        except InputError as problem:
            console.error(f"{job.described}: {problem}")
            return
        if self._ledger is not None and job.stage != 1:
            self._ledger.add(job, file, hashlib.sha256(content).hexdigest())
        with self._report:
            self._on_saved(job, file)
