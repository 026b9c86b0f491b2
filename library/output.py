"""Pictures to files: names that collide with nothing, metadata from the picture's own job, and whole files or none."""

import hashlib
import json
import os
import re
import secrets
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, fields
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from library.errors import EnvironmentFault, InputError
from library.guidance_files import NO_GUIDANCE, GuidanceSettings
from networks.files import NetworkPlan

if TYPE_CHECKING:
    import numpy as np
    from PIL.PngImagePlugin import PngInfo

    from library.highres import HighresFix
    from library.jobs import Job
    from library.samplers import Sampler

# zlib's 4 makes files of the same size as PNG's usual 6 in a third of the time
_PNG_COMPRESSION = 4
_WRITERS = 2
_WAITING_PICTURES = 32  # pictures that may wait for a writer before the run waits for them


class FileNames:
    """Names for the pictures of a run, chosen before they are made.

    Args:
        folder: where they go; it need not exist yet.
        sequential: `im_000001.png` on, after the highest there is, instead of time, number and seed.
        original: the name of the source picture.
        now: the run's time.
        two_stages: numbers begin with a 1, which is a 0 in the name of a first stage's picture.
    """

    def __init__(
        self, folder: Path, *, sequential: bool, now: datetime, original: bool = False, two_stages: bool = False
    ) -> None:
        self.folder = folder
        self._stage = "1" if two_stages else ""
        self._sequential = sequential
        self._original = original
        self._time = now.strftime("%Y%m%d%H%M%S")
        self._taken = {entry.name for entry in os.scandir(folder)} if folder.is_dir() else set()
        stage = "[01]" if two_stages else ""
        numbers = (re.fullmatch(rf"im_{stage}(\d{{6,}})(?:-\d+)?\.png", name) for name in self._taken)
        self._count = max((int(match[1]) for match in numbers if match), default=0) if sequential else -1

    def next(self, seed: int, source: Path | None = None) -> Path:
        """The next picture's file, different from all others and from those that are there."""
        self._count += 1
        if self._original and source is not None:
            stem = source.stem
        else:
            number = f"{self._stage}{self._count:06d}" if self._sequential else f"{self._stage}{self._count:03d}_{seed}"
            stem = f"im_{number}" if self._sequential else f"im_{self._time}_{number}"
        name = next(name for name in _numbered(stem) if name not in self._taken)
        self._taken.add(name)
        return self.folder / name


def _numbered(stem: str):
    """`stem.png`, `stem-1.png`, `stem-2.png`, …"""
    yield f"{stem}.png"
    number = 0
    while True:
        number += 1
        yield f"{stem}-{number}.png"


def check_folder(folder: Path, option: str) -> None:
    """Refuse an output folder that pictures cannot go to; `make_folder` makes it once everything else is checked.

    Raises:
        InputError: when it is a file, or it or the folder it will be made in cannot be written to.
    """
    try:
        existing = folder
        while not os.path.lexists(existing) and existing.parent != existing:
            existing = existing.parent
        if not existing.is_dir():
            raise InputError(f"{option} {folder}", f"{existing} is no folder; give another one")
        if not os.access(existing, os.W_OK | os.X_OK):
            raise InputError(f"{option} {folder}", f"{existing} cannot be written to; give another folder")
    except (OSError, ValueError) as problem:
        raise InputError(f"{option} {folder}", f"cannot be used ({problem}); give another folder") from None


def make_folder(folder: Path, option: str) -> None:
    """Make the output folder; a folder that cannot take files after all is an `InputError`."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as problem:
        raise InputError(
            f"{option} {folder}", f"cannot be written to ({problem.strerror}); give another folder"
        ) from None


# ---------------------------------------------------------------------------------------------------------------------
# Metadata


@dataclass(frozen=True)
class RunFacts:
    """What a picture's metadata says of its run rather than of its job."""

    sampler: "Sampler"
    model_name: str
    clip_skip: int
    model_hash: Callable[[], str | None]  # called when the first picture is written
    highres: "HighresFix | None" = None
    networks: NetworkPlan = field(default_factory=NetworkPlan)
    guidance: GuidanceSettings = NO_GUIDANCE


class FileHash:
    """The SHA-256 of a file, worked out in the background; its first ten digits are what other tools call the hash."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._digits: str | None = None
        self._thread = threading.Thread(target=self._work_out, daemon=True)  # leaving the program does not wait for it
        self._thread.start()

    def __call__(self) -> str | None:
        """The hash; None for a folder, which has none, and for a file that went away."""
        self._thread.join()
        return self._digits

    def _work_out(self) -> None:
        with suppress(OSError), self._path.open("rb") as file:
            self._digits = hashlib.file_digest(file, "sha256").hexdigest()[:10]


def metadata(job: "Job", facts: RunFacts) -> dict[str, str]:
    """A picture's metadata: the names of sd-scripts, and `parameters` as AUTOMATIC1111's web UI writes them."""
    values = {
        "prompt": job.prompt,
        "negative-prompt": job.negative_prompt,
        "seed": job.seed,
        "sampler": facts.sampler.name,
        "steps": job.steps,
        "scale": job.guidance_scale,
        "negative-scale": job.negative_scale if job.branches == 3 else None,
        "networks": facts.networks.describe(job.network_multipliers),
        "clip-prompt": job.clip_prompt if facts.guidance.clip_scale else None,
        "raw-prompt": job.raw_prompt,
    }
    texts = {name: str(value) for name, value in values.items() if value is not None and value != ""}
    return texts | {"parameters": _a1111_parameters(job, facts)}


def _a1111_parameters(job: "Job", facts: RunFacts) -> str:
    settings: dict[str, object] = {
        "Steps": job.steps,
        "Sampler": facts.sampler.a1111_name,
        "CFG scale": _number(job.guidance_scale),
        "Seed": job.seed,
        "Size": f"{job.width}x{job.height}",
        "Model hash": facts.model_hash(),
        "Model": facts.model_name,
    }
    if job.source is not None or (facts.highres is not None and job.stage != 1):
        settings["Denoising strength"] = _number(job.strength)
    if facts.highres is not None and job.stage != 1:
        first, _ = facts.highres.stages(job)
        settings["First stage"] = f"{first.width}x{first.height}"
        settings["First stage steps"] = first.steps
        settings["Upscaler"] = facts.highres.method
    if facts.clip_skip > 1:
        settings["Clip skip"] = facts.clip_skip
    if job.negative_scale is not None and job.branches == 3:
        settings["Negative scale"] = _number(job.negative_scale)
    if job.gradual_latent.timesteps is not None:
        settings["Gradual Latent"] = _parts(job.gradual_latent)
    if job.deep_shrink.depth_1 is not None:
        settings["Deep Shrink"] = _parts(job.deep_shrink)
    settings["Networks"] = facts.networks.describe(job.network_multipliers) or None
    settings |= _guidance_parameters(job, facts.guidance)
    lines = [job.prompt]
    if job.negative_prompt:
        lines.append(f"Negative prompt: {job.negative_prompt}")
    lines.append(", ".join(f"{key}: {_quoted(str(value))}" for key, value in settings.items() if value is not None))
    return "\n".join(lines)


def _parts(settings: object) -> str:
    """The fields of a settings object that are set: `name value, name value`."""
    values = {field.name: getattr(settings, field.name) for field in fields(settings)}
    return ", ".join(f"{name} {value}" for name, value in values.items() if value is not None)


def _guidance_parameters(job: "Job", guidance: GuidanceSettings) -> dict[str, object]:
    """Guidance by CLIP and VGG16, and the guide picture's name."""
    settings: dict[str, object] = {}
    if guidance.clip_scale:
        settings["CLIP guidance scale"] = _number(guidance.clip_scale)
    guide = job.guides[0] if job.guides else job.follows
    if guidance.uses_guide and guide is not None:
        if guidance.clip_image_scale:
            settings["CLIP image guidance scale"] = _number(guidance.clip_image_scale)
        if guidance.vgg16_scale:
            settings["VGG16 guidance scale"] = _number(guidance.vgg16_scale)
            settings["VGG16 guidance layer"] = guidance.vgg16_layer
        settings["Guide image"] = guide.name
    return settings


def _number(value: float) -> str:
    """A number in full, without a needless `.0`."""
    return str(int(value)) if value == int(value) else repr(value)


def _quoted(value: str) -> str:
    return json.dumps(value, ensure_ascii=False) if re.search(r"[,:\n]", value) else value


def _png_info(texts: Mapping[str, str]) -> "PngInfo":
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    for name, text in texts.items():
        info.add_text(name, text)
    return info


# ---------------------------------------------------------------------------------------------------------------------
# Files


def save_png(pixels: "np.ndarray", file: Path, texts: Mapping[str, str]) -> Path:
    """Save a picture (H, W, 3) uint8 with its metadata, whole or not at all, over nothing.

    It is written under a temporary name in the same folder and then linked to its own; a name that has been taken
    meanwhile gets `-1`, `-2`, ….

    Returns:
        The file it became.

    Raises:
        EnvironmentFault: when the folder or the disk does not take it.
    """
    from PIL import Image

    temporary = file.with_name(f".{file.stem}.{secrets.token_hex(8)}.tmp")
    try:
        try:
            with temporary.open("xb") as stream:
                info = _png_info(texts)
                Image.fromarray(pixels).save(stream, "PNG", compress_level=_PNG_COMPRESSION, pnginfo=info)
                stream.flush()
                os.fsync(stream.fileno())
            return _place(temporary, file)
        finally:
            with suppress(OSError):
                temporary.unlink()
    except OSError as problem:
        raise EnvironmentFault(
            str(file), f"cannot be written ({problem.strerror or problem}); make room or give another --outdir"
        ) from problem


def _place(temporary: Path, file: Path) -> Path:
    """Give a finished file its name without replacing anything."""
    for name in _numbered(file.stem):
        target = file.with_name(name)
        try:
            _link(temporary, target)
            return target
        except FileExistsError:
            continue
    raise AssertionError("names do not run out")


def _link(temporary: Path, target: Path) -> None:
    """Link a file to a second name; FileExistsError when that is taken."""
    try:
        os.link(temporary, target)
    except FileExistsError:
        raise
    except (OSError, AttributeError, NotImplementedError):  # a file system without hard links
        content = temporary.read_bytes()
        stream = target.open("xb")
        try:
            with stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
        except OSError:
            target.unlink()  # made by this very call
            raise


class PictureWriter:
    """Writes pictures in the background, a bounded number at a time; use as a context manager.

    A failure to write is raised by the next `write`, or at the end of the block. Files that are waiting are written
    before the block is left, also after an error.
    """

    def __init__(self, facts: RunFacts, on_saved: Callable[["Job", Path], None]) -> None:
        self._facts = facts
        self._on_saved = on_saved
        self._pool = ThreadPoolExecutor(max_workers=_WRITERS, thread_name_prefix="writer")
        self._pending: deque[Future[None]] = deque()
        self._report = threading.Lock()

    def __enter__(self) -> "PictureWriter":
        return self

    def __exit__(self, error_type: type | None, *rest: object) -> None:
        self._pool.shutdown(wait=True)
        if error_type is None:
            self.wait()

    def write(self, pixels: "np.ndarray", job: "Job") -> None:
        """Hand over a picture (H, W, 3) uint8 of a job."""
        while self._pending and (self._pending[0].done() or len(self._pending) >= _WAITING_PICTURES):
            self._pending.popleft().result()
        self._pending.append(self._pool.submit(self._save, pixels, job))

    def wait(self) -> None:
        """Wait until everything handed over is written."""
        while self._pending:
            self._pending.popleft().result()

    def _save(self, pixels: "np.ndarray", job: "Job") -> None:
        file = save_png(pixels, job.file, metadata(job, self._facts))
        with self._report:
            self._on_saved(job, file)
