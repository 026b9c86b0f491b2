"""What identifies a run, so that it can be gone on with: its options, files, prompt lines, seeds and file names.

A run is planned in parts. The first is what it began with; prompt lines that are added later make further parts, each
with a seed of its own, so that nothing planned before changes. Planning is repeatable: the same part gives the same
pictures under the same names. Knows no torch.
"""

import argparse
import hashlib
import json
import logging
import secrets
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime
from pathlib import Path

from library.errors import InputError
from library.plan.jobs import Job, SourceLine
from library.version import versions

logger = logging.getLogger(__name__)

# Options that change no picture, or that are compared in another way: the model and the prompts by their content.
_NOT_COMPARED = {
    *("ckpt", "prompt", "from_file", "interactive", "no_preview", "outdir", "tokenizer_cache_dir"),
    *("batch_size", "vae_batch_size", "vae_slices", "xformers", "diffusers_xformers", "sdpa"),
    *("opt_channels_last", "compile", "lowvram"),
    *("config", "dry_run", "resume", "json", "quiet", "verbose", "debug", "grid", "html"),
    *("network_show_meta", "control_net_save_guides"),
}
_SAMPLED_BLOCKS, _BLOCK_BYTES = 64, 1 << 16


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

    def to_json(self) -> dict[str, object]:
        """As plain data."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, object]) -> "RunRecord":
        """From plain data.

        Raises:
            KeyError, TypeError: when it is none.
        """
        known = {each.name: data[each.name] for each in fields(cls)}
        parts = tuple(
            Part(part["seed"], tuple(part["lines"]), tuple(part["files"]), part["jobs"]) for part in data["parts"]
        )
        return cls(**known | {"parts": parts})


# ---------------------------------------------------------------------------------------------------------------------
# Identity


def job_id(job: Job) -> str:
    """A hash of all that a picture depends on beside the model; its place in the run and its file are not."""
    parameters = {each.name: getattr(job, each.name) for each in fields(job) if each.name not in ("file", "where")}
    parameters["follows"] = job.follows and job.follows.name
    text = json.dumps(parameters, sort_keys=True, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:32]


def jobs_digest(jobs: Iterable[Job]) -> str:
    """A hash of several jobs, in their order."""
    return hashlib.sha256("".join(map(job_id, jobs)).encode()).hexdigest()


def line_key(line: SourceLine) -> str:
    """What makes a prompt line the same one in a later run: its text, and the picture that it came from."""
    return line.text.strip() if line.parsed is None else f"{line.where}: {line.text}"


def compared_options(options: argparse.Namespace) -> dict[str, object]:
    """The options that change pictures, as plain data."""
    values = {name: value for name, value in vars(options).items() if name not in _NOT_COMPARED}
    return json.loads(json.dumps(values, default=str))


def option_files(options: argparse.Namespace) -> list[Path]:
    """The files that options which change pictures name."""
    found = []
    for value in compared_options(options).values():
        for text in value if isinstance(value, list) else [value]:
            try:
                if isinstance(text, str) and (path := Path(text).expanduser()).is_file():
                    found.append(path)
            except (OSError, RuntimeError, ValueError):
                continue  # no path
    return found


def fingerprints(paths: Iterable[Path]) -> dict[str, str]:
    """Each file's size and a hash of blocks all over it: quick with gigabytes, and other weights show in any block."""
    return {str(path): _fingerprint(path) for path in dict.fromkeys(paths)}


def _fingerprint(path: Path) -> str:
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        if size <= _SAMPLED_BLOCKS * _BLOCK_BYTES:
            digest.update(file.read())
        else:
            for block in range(_SAMPLED_BLOCKS):
                file.seek(block * (size - _BLOCK_BYTES) // (_SAMPLED_BLOCKS - 1))
                digest.update(file.read(_BLOCK_BYTES))
    return digest.hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# Going on with a run


def choose_run(runs: Sequence[RunRecord], options: Mapping[str, object], lines: Sequence[SourceLine]) -> RunRecord:
    """The latest of a folder's runs that these options and prompt lines go on with.

    Raises:
        InputError: when there is none, naming what differs from the latest run.
    """
    newest_first = sorted(runs, key=lambda run: run.started, reverse=True)
    differences = [_difference(run, options, lines) for run in newest_first]
    for run, difference in zip(newest_first, differences):
        if difference is None:
            return run
    raise differences[0]


def _difference(run: RunRecord, options: Mapping[str, object], lines: Sequence[SourceLine]) -> InputError | None:
    for name, before in run.options.items():
        if name in options and options[name] != before:
            return InputError(
                f"--{name} {_shown(options[name])}",
                f"the run to resume has {_shown(before)}; give the same, or another --outdir for a new run",
            )
    gone = Counter(text for part in run.parts for text in part.lines) - Counter(map(line_key, lines))
    if gone:
        text = next(iter(gone))
        return InputError(
            "--resume",
            f"the prompt {text[:80]!r} of the run to resume is changed or gone; put it back, "
            "or give another --outdir for a new run (lines may be added)",
        )
    return None


def _shown(value: object) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value))
    return "no value" if value is None else "on" if value is True else "off" if value is False else str(value)


def check_files(run: RunRecord, files: Mapping[str, str], model: str) -> None:
    """Refuse to go on with a run whose weights or pictures are other ones now.

    Raises:
        InputError: naming the first.
    """
    advice = "give another --outdir for a new run"
    now = versions()
    if other := [name for name, version in run.versions.items() if now.get(name, version) != version]:
        logger.warning("--resume: the run was begun with another version of %s; pictures may differ", ", ".join(other))
    if model != run.model:
        raise InputError("--ckpt", f"is {model!r}, the run to resume has {run.model!r}; give the same, or {advice}")
    for path, before in run.files.items():
        if path not in files:
            raise InputError(path, f"is part of the run to resume and not there now; put it back, or {advice}")
        if files[path] != before:
            raise InputError(path, f"has changed since the run to resume was begun; put it back, or {advice}")
    if added := [path for path in files if path not in run.files]:
        raise InputError(added[0], f"is no part of the run to resume; leave it out, or {advice}")


def split_lines(begun: Sequence[Part], lines: Sequence[SourceLine]) -> list[list[SourceLine]]:
    """The prompt lines of each part of a run, and after them those that are new."""
    places: dict[str, list[SourceLine]] = {}
    for line in lines:
        places.setdefault(line_key(line), []).append(line)
    parts = [[places[text].pop(0) for text in part.lines] for part in begun]
    left = {id(line) for waiting in places.values() for line in waiting}
    return [*parts, [line for line in lines if id(line) in left]]
