"""What identifies a run, so that it can be gone on with: its options, files, prompt lines, seeds and file names.

A run is planned in parts. The first is what it began with; prompt lines that are added later make further parts, each
with a seed of its own, so that nothing planned before changes. Planning is repeatable: the same part gives the same
pictures under the same names.
"""

import hashlib
import json
import secrets
from argparse import ArgumentTypeError
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime
from functools import cached_property
from operator import attrgetter
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO

from library.plan.job import Job
from library.plan.prompt_syntax import SD_SCRIPTS
from library.plan.run_paths import RunPaths
from library.plan.sources import SourceLine
from library.settings.deep_shrink import DeepShrink
from library.settings.gradual_latent import GradualLatent, Unsharp
from library.settings.options import Options
from library.settings.preprocessing import Preprocess
from library.settings.sampler_names import first_name, sampler_name, schedule_name
from library.settings.sizes import NOT_SAID, ToldSizes
from library.version import versions
from networks.strengths import Strength

FORMAT_VERSION = 1  # of what is written for programs: manifests, and the objects of `--json`
_SAMPLED_BLOCKS, _BLOCK_BYTES = 64, 1 << 16


NameOf = Callable[[Path], str]  # what a run calls a file
_NOT_AT_FIRST = ("begun_in",)  # what the records of older versions lack


def _current_folder() -> str:
    try:
        return str(Path.cwd())
    except OSError:  # it is gone
        return ""


@dataclass(frozen=True)
class Part:
    """Prompt lines that were planned together."""

    seed: int  # what `--seed` says, or stands in for it
    lines: tuple[str, ...]  # by `line_key`
    files: tuple[str, ...] = ()  # names of the pictures, in the order of the run
    jobs: str = ""  # digest of all job ids


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """The first line of a run's manifest."""

    run: str = field(default_factory=lambda: secrets.token_hex(8))
    started: str = field(default_factory=lambda: datetime.now().isoformat(timespec="microseconds"))
    versions: Mapping[str, str] = field(default_factory=versions)
    model: str  # its name
    options: Mapping[str, object]
    files: Mapping[str, str]  # fingerprints of the weights and pictures it draws with
    parts: tuple[Part, ...]
    begun_in: str = field(default_factory=_current_folder)  # what relative paths begin at

    @cached_property
    def paths(self) -> RunPaths:
        """What it calls its files."""
        return RunPaths(self.files, self.begun_in)

    def to_json(self) -> dict[str, object]:
        """As plain data."""
        return {"format_version": FORMAT_VERSION, **asdict(self)}

    def job_id(self, job: Job) -> str:
        """A job's id, by which the run's pictures are told apart."""
        return job_id(job, self.paths.name, usual_sampling(self.options))

    def line_key(self, line: SourceLine) -> str:
        """What makes a prompt line one of the run's; see `line_key`."""
        return line_key(line, self.paths.name)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "RunRecord":
        """From plain data.

        Raises:
            KeyError, TypeError: when it is none.
        """
        known: dict[str, Any] = {each.name: data[each.name] for each in fields(cls) if each.name not in _NOT_AT_FIRST}
        known["begun_in"] = str(data.get("begun_in", ""))
        known["parts"] = tuple(
            Part(part["seed"], tuple(part["lines"]), tuple(part["files"]), part["jobs"]) for part in data["parts"]
        )
        return cls(**known)


# ---------------------------------------------------------------------------------------------------------------------
# Identity


# What a job's id is made of, by name, so that what a job gains later does not change the ids of earlier runs. A field
# that is added to a job, or to settings that it holds (`deep_shrink.x`), belongs into `_LATER` with its usual value,
# and counts where it has another one.
_FIELDS = (
    *("negative_prompt", "width", "height", "steps", "guidance_scale", "negative_scale", "strength"),
    *("network_multipliers", "gradual_latent", "deep_shrink", "clip_prompt", "prompt", "seed", "raw_prompt"),
    *("source", "mask", "regions", "guides", "control_net", "follows", "stage"),
)
_LATER: dict[str, object] = {
    "sizes": NOT_SAID,
    **{"image_guidance": None, "extend": None, "boxes": ()},
    **{"prompt_syntax": SD_SCRIPTS, "steps_before": 0},
    "upscale": 1.0,
    **{"sampler": "ddim", "schedule": "own", "timesteps": (), "eta": None, "s_churn": 0.0},
}
_PARTS: dict[type, tuple[str, ...]] = {  # the first fields of settings that a job holds
    GradualLatent: ("timesteps", "ratio", "ratio_step", "every_n_steps", "s_noise", "unsharp"),
    Unsharp: ("kernel_size", "sigma", "strength", "on_sample"),
    DeepShrink: ("depth_1", "timesteps_1", "depth_2", "timesteps_2", "ratio"),
    ToldSizes: (
        *("original_width", "original_height", "original_width_negative", "original_height_negative"),
        *("crop_top", "crop_left"),
    ),
}


def usual_sampling(compared: Mapping[str, object]) -> dict[str, object]:
    """The sampler and schedule that a run's options (`compared_options`) mean.

    Earlier versions had one of them for all pictures of a run, so that ids tell of others only.
    """
    try:
        named = sampler_name(str(compared.get("sampler", _LATER["sampler"])))
        schedule = named.schedule or first_name(schedule_name(str(compared.get("schedule", _LATER["schedule"]))))
    except ArgumentTypeError:  # those of another version
        return {}
    return {"sampler": named.name, "schedule": schedule}


def job_id(job: Job, name_of: NameOf = str, usual: Mapping[str, object] = MappingProxyType({})) -> str:
    """A hash of all that a picture depends on beside the model; its place in the run and its file are not.

    Args:
        job: the picture.
        name_of: what the run calls its source, mask and guides.
        usual: what is the run's usual value where that is another one than in `_LATER`.
    """
    parameters = {name: getattr(job, name) for name in _FIELDS}
    later = {path: usual.get(path, value) for path, value in _LATER.items()}
    parameters |= {path: value for path, implied in later.items() if (value := attrgetter(path)(job)) != implied}
    parameters |= {"follows": job.follows and job.follows.name, "guide_size": None}  # the latter was once a field
    if job.tags:  # whatever their places in the run are
        parameters["tags"] = {name_of(tag.file): str(tag.strength) for tag in job.tags}

    def as_text(value: object) -> object:
        if isinstance(value, Strength):
            return _as_said(value)
        return name_of(value) if isinstance(value, Path) else _as_text(value)

    text = json.dumps(parameters, sort_keys=True, default=as_text)
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:32]


def _as_said(strength: Strength) -> float | str:
    """A strength as the number that it once was, where a number says it."""
    return str(strength) if strength.number is None else strength.number


def _as_text(value: object) -> str:
    """Settings as version 0.1.0 wrote them into ids, whose runs can be gone on with."""
    names = _PARTS.get(type(value))
    if names is None:
        return str(value)
    fields = ((name, getattr(value, name)) for name in names)
    texts = (f"{name}={_as_text(v) if type(v) in _PARTS else repr(v)}" for name, v in fields)
    return f"{type(value).__name__}({', '.join(texts)})"


def jobs_digest(jobs: Iterable[Job], name_of: NameOf = str, usual: Mapping[str, object] = MappingProxyType({})) -> str:
    """A hash of several jobs, in their order; see `job_id`."""
    return hashlib.sha256("".join(job_id(job, name_of, usual) for job in jobs).encode()).hexdigest()


def line_key(line: SourceLine, name_of: NameOf = str) -> str:
    """What makes a prompt line the same one in a later run: its text, and the picture that it came from."""
    return line.text.strip() if line.parsed is None else f"{name_of(Path(line.where))}: {line.text}"


def compared_options(options: Options) -> dict[str, object]:
    """The options that a run which is gone on with has to agree in, as plain data."""
    return _plain(options.compared())


def usual_options(options: Options) -> dict[str, object]:
    """What these are where they are not given, likewise."""
    return _plain(options.usual())


def _plain(options: Mapping[str, object]) -> dict[str, object]:

    def as_plain(value: object) -> object:
        if isinstance(value, Preprocess) and value.name == "canny":  # as version 0.1.0 wrote it, which had no other
            return "Canny(low={}, high={})".format(*value.numbers)
        return _as_said(value) if isinstance(value, Strength) else str(value)

    return json.loads(json.dumps(options, default=as_plain))


def fingerprints(paths: Iterable[Path]) -> dict[str, str]:
    """Each file's size and a hash of blocks all over it: quick with gigabytes, and other weights show in any block."""
    return {str(path): _fingerprint(path) for path in dict.fromkeys(paths)}


def _fingerprint(path: Path) -> str:
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        for block in sampled_blocks(file, 0, size):
            digest.update(block)
    return digest.hexdigest()


def sampled_blocks(file: BinaryIO, begin: int, size: int) -> Iterator[bytes]:
    """Blocks all over a part of a file; a small part whole."""
    if size <= _SAMPLED_BLOCKS * _BLOCK_BYTES:
        file.seek(begin)
        yield file.read(size)
        return
    for block in range(_SAMPLED_BLOCKS):
        file.seek(begin + block * (size - _BLOCK_BYTES) // (_SAMPLED_BLOCKS - 1))
        yield file.read(_BLOCK_BYTES)
