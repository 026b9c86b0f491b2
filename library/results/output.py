"""What a picture's file says of it, from its own job, and writing pictures in the background."""

import hashlib
import json
import re
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING

from library.files.picture_files import DEFAULT_QUALITY, encode, save_whole, standing_picture
from library.settings.cfg_interval import WHOLE_RUN, GuidanceInterval
from library.settings.loss_guidance import NO_GUIDANCE, GuidanceSettings
from networks.files import NetworkPlan

if TYPE_CHECKING:
    import numpy as np

    from library.plan.jobs import Job
    from library.run.manifest import Manifest
    from library.settings.control_net import ControlNetSpec
    from library.settings.highres import HighresFix
    from library.settings.samplers import Sampler

_WRITERS = 2
_WAITING_PICTURES = 32  # pictures that may wait for a writer before the run waits for them


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
    control_nets: "tuple[ControlNetSpec, ...]" = ()
    guidance_interval: GuidanceInterval = WHOLE_RUN


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


def shown_settings(job: "Job", facts: RunFacts) -> dict[str, str]:
    """A picture's settings by the names that AUTOMATIC1111's web UI has for them."""
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
    if job.branches > 1 and (start := facts.guidance_interval.start) > 0:
        settings["Guidance start"] = _number(start)
    if job.branches > 1 and (end := facts.guidance_interval.end) < 1:
        settings["Guidance end"] = _number(end)
    if job.gradual_latent.timesteps is not None:
        settings["Gradual Latent"] = _parts(job.gradual_latent)
    if job.deep_shrink.depth_1 is not None:
        settings["Deep Shrink"] = _parts(job.deep_shrink)
    for name, file in (("Source image", job.source), ("Mask", job.mask), ("Regions", job.regions)):
        settings[name] = None if file is None else file.name
    if facts.control_nets and job.guides:
        used = zip(facts.control_nets, job.guides)
        settings["ControlNet"] = "; ".join(f"{spec.describe()}, guide {guide.name}" for spec, guide in used)
    settings["Networks"] = facts.networks.describe(job.network_multipliers) or None
    settings |= _guidance_parameters(job, facts.guidance)
    return {name: str(value) for name, value in settings.items() if value is not None}


def _a1111_parameters(job: "Job", facts: RunFacts) -> str:
    lines = [job.prompt]
    if job.negative_prompt:
        lines.append(f"Negative prompt: {job.negative_prompt}")
    lines.append(", ".join(f"{name}: {_quoted(value)}" for name, value in shown_settings(job, facts).items()))
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


# ---------------------------------------------------------------------------------------------------------------------
# Writing


class PictureWriter:
    """Writes pictures in the background, a bounded number at a time; use as a context manager.

    A failure to write is raised by the next `write`, or at the end of the block. Files that are waiting are written
    before the block is left, also after an error.

    Args:
        facts: what the metadata says of the run.
        on_saved: called with each picture's job and file once it stands.
        manifest: takes note of the pictures.
        quality: of JPEG and WebP.
        resumed: first stages' pictures may be there already, from before the run was cut off.
    """

    def __init__(
        self,
        facts: RunFacts,
        on_saved: Callable[["Job", Path], None],
        manifest: "Manifest | None" = None,
        quality: int = DEFAULT_QUALITY,
        resumed: bool = False,
    ) -> None:
        self._facts = facts
        self._on_saved = on_saved
        self._manifest = manifest
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

    def write(self, pixels: "np.ndarray", job: "Job") -> None:
        """Hand over a picture (H, W, 3) uint8 of a job."""
        while self._pending and (self._pending[0].done() or len(self._pending) >= _WAITING_PICTURES):
            self._pending.popleft().result()
        # A picture is done for --resume once it stands, so it is written after its first stage, handed over before it
        self._first_stages = [future for future in self._first_stages if not future.done() or future.exception()]
        waits_for = () if job.stage == 1 else tuple(self._first_stages)
        self._pending.append(self._pool.submit(self._save, pixels, job, waits_for))
        if job.stage == 1:
            self._first_stages.append(self._pending[-1])

    def wait(self) -> None:
        """Wait until everything handed over is written."""
        while self._pending:
            self._pending.popleft().result()

    def _save(self, pixels: "np.ndarray", job: "Job", waits_for: Sequence[Future[None]]) -> None:
        for future in waits_for:
            future.result()
        texts = metadata(job, self._facts)
        if self._resumed and job.stage == 1 and standing_picture(job.file, texts):
            return
        content = encode(pixels, job.file.suffix, texts, self._quality)
        if self._manifest is not None:
            self._manifest.begin(self._facts.model_hash())
        file = save_whole(content, job.file)
        if self._manifest is not None and job.stage != 1:
            self._manifest.add(job, file, hashlib.sha256(content).hexdigest())
        with self._report:
            self._on_saved(job, file)
