"""What workers read: paths that mean the same on their node, and files that are the same there or are sent along."""

import io
import os
import pickle
import shutil
import tempfile
import time
from collections.abc import Iterable, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import huggingface_hub.constants
import ray

import library
from library.errors import EnvironmentFault
from library.files.file_locks import lock
from library.files.hub import fetch_again
from library.plan.run_plan import RunPlan
from library.plan.run_record import fingerprints
from library.plan.sweep import NO_SWEEP

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ray import ObjectRef

# A path as all nodes know it: which root it is below, and its path from there. The program's data and the Hub's cache
# may lie elsewhere on another node, all other files lie at the same place, models beside the script among them.
Place = tuple[str, str]
_PROGRAM, _HUB, _ELSEWHERE = "program", "hub", "files"
_CHUNK_BYTES = 1 << 26  # of a file, in the object store
_POLL_S = 0.2


def _roots() -> dict[str, Path]:
    (package,) = library.__path__
    return {
        _PROGRAM: Path(package),
        _HUB: Path(huggingface_hub.constants.HF_HUB_CACHE),
        _ELSEWHERE: Path(os.path.abspath(os.sep)),  # noqa: PTH100  # without the folder in hand, which may be gone
    }


def place_of(path: Path) -> Place:
    """Where a path is, for other nodes."""
    absolute = Path(os.path.abspath(path))  # noqa: PTH100  # links stay, and what is not there is no fault
    name, root = next((name, root) for name, root in _roots().items() if absolute.is_relative_to(root))
    return name, absolute.relative_to(root).as_posix()


def path_at(place: Place) -> Path:
    """The path of a place on this node."""
    root, path = place
    return _roots()[root] / path


# ---------------------------------------------------------------------------------------------------------------------
# Plans and jobs, as bytes


class _Packer(pickle.Pickler):
    """Writes paths as places, and notes them."""

    def __init__(self, stream: io.BytesIO) -> None:
        super().__init__(stream, protocol=pickle.HIGHEST_PROTOCOL)
        self.paths: set[Path] = set()

    def persistent_id(self, thing: object) -> Place | None:
        if not isinstance(thing, Path):
            return None
        self.paths.add(thing)
        return place_of(thing)


class _Unpacker(pickle.Unpickler):
    """Reads places as the paths that they are on this node: of what was sent to it, if it was."""

    def __init__(self, data: bytes, sent: Path | None) -> None:
        super().__init__(io.BytesIO(data))
        self._sent = sent

    def persistent_load(self, place: Place) -> Path:
        if self._sent and (sent := self._sent / place[0] / place[1]).exists():
            return sent
        return path_at(place)


def pack(thing: object) -> bytes:
    """A plan or jobs as bytes that other nodes can read."""
    stream = io.BytesIO()
    _Packer(stream).dump(thing)
    return stream.getvalue()


def unpack(data: bytes, sent: Path | None) -> Any:
    """What was packed; `sent` is the folder of the files that this node was sent."""
    return _Unpacker(data, sent).load()


def pack_plan(plan: RunPlan) -> tuple[bytes, list[Path]]:
    """What a worker needs of a plan, and the files that the run reads."""
    text = replace(plan.text, tokenizer_cache_dir=None)  # made anew: without the tokenizer that it may have loaded
    needed = replace(
        plan,
        **{"text": text, "options": plan.options.only("guidance_rescale"), "jobs": (), "done": {}},
        **{"record": replace(plan.record, parts=()), "sweep": NO_SWEEP, "keyboard": None, "fleet": None},
        output=replace(plan.output, folder=Path()),
    )
    packer = _Packer(stream := io.BytesIO())
    packer.dump(needed)
    paths = packer.paths
    for job in plan.to_do:
        paths.update(filter(None, (job.source, job.mask, job.regions, *job.guides)))
    if plan.upscaler:
        paths.update(Path(value).expanduser() for _, value in plan.upscaler.arguments)
    return stream.getvalue(), _files(paths)


def _files(paths: Iterable[Path]) -> list[Path]:
    """The files among paths, and those in folders that are tokenizers."""
    found: set[Path] = set()
    for path in paths:
        with suppress(OSError):
            if path.is_file():
                found.add(path)
            elif (path / "vocab.json").is_file() or (path / "tokenizer.json").is_file():
                found.update(file for file in path.iterdir() if file.is_file())
    return sorted(found)


# ---------------------------------------------------------------------------------------------------------------------
# Files on other nodes


def marks(files: Iterable[Path]) -> dict[Place, str]:
    """What files have to be on other nodes: the fingerprint of each, by its place; the program brings its own."""
    found = {place_of(Path(path)): mark for path, mark in fingerprints(files).items()}
    return {place: mark for place, mark in found.items() if place[0] != _PROGRAM}


def lacking(wanted: Mapping[Place, str]) -> dict[Place, str]:
    """What is wrong with files on this node, by their places; what lacks of the Hub's cache is fetched first."""
    wrong = {}
    for place, mark in wanted.items():
        path = path_at(place)
        if place[0] == _HUB and not path.exists():
            fetch_again(place[1])
        if not path.is_file():
            wrong[place] = f"{path} is not there"
        elif _mark(path) != mark:
            wrong[place] = f"{path} is another file there"
    return wrong


def _mark(path: Path) -> str | None:
    with suppress(OSError):
        return fingerprints([path])[str(path)]
    return None


def put(place: Place) -> list["ObjectRef"]:
    """Put a file into Ray's object store, in parts."""
    parts = []
    with path_at(place).open("rb") as file:
        while part := file.read(_CHUNK_BYTES):
            parts.append(ray.put(part))
    return parts


def sent_folder(run: str) -> Path:
    """Where a node keeps what it was sent for a run."""
    return Path(tempfile.gettempdir()) / f"gen_img_diffusers-{run}"


def receive(folder: Path, files: Mapping[Place, list["ObjectRef"]], wanted: Mapping[Place, str]) -> None:
    """Write files out of the object store, once for all workers of a node.

    Raises:
        EnvironmentFault: when the node has no room for them.
    """
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        with _locked(folder / ".lock"):
            for place, parts in files.items():
                path = folder / place[0] / place[1]
                if path.is_file() and _mark(path) == wanted[place]:
                    continue
                path.parent.mkdir(parents=True, exist_ok=True)
                with path.open("wb") as file:
                    for part in parts:
                        file.write(ray.get(part))
    except OSError as problem:
        raise EnvironmentFault(str(folder), f"does not take the files of --ray_ship ({problem.strerror})") from None


@contextmanager
def _locked(path: Path) -> "Iterator[None]":
    with path.open("w") as file:
        while not lock(file.fileno()):
            time.sleep(_POLL_S)
        yield


def forget(run: str) -> None:
    """Take away what this node was sent for a run."""
    shutil.rmtree(sent_folder(run), ignore_errors=True)
