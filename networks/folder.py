"""The networks of a folder, found by name: the file's, else the one that its trainer noted in it."""

import os
from collections.abc import Callable, Iterator, Mapping
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path

from library.errors import InputError
from library.files.weight_files import choose_weights, open_weights
from library.texts import readable
from networks.files import FOLDER_STEMS

_SUFFIXES = (".safetensors", ".pt", ".ckpt", ".bin")
_NOTED = "ss_output_name"  # the key of sd-scripts' metadata for the name that a network was trained under


class NetworkFolder:
    """Finds networks anywhere below a folder.

    Args:
        folder: the folder; it is looked through when a name is first asked for.

    Raises:
        InputError: where it is none.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder.expanduser()
        if not self._folder.is_dir():
            raise InputError(f"--network_dir {folder}", "is no folder; give the one that the networks are in")

    def find(self, name: str, subject: str, where: str = "") -> Path:
        """The network of a name: a file's without its ending, a folder's of PEFT or Diffusers, with folders above it
        or without (`sub/name`); else what a file's metadata calls it. Capitals count first, and then they do not.

        Raises:
            InputError: for `subject`, with the nearest names where there is none, or all files where there are several.
        """
        for networks in self._sources():
            for fold in (str, str.casefold):
                if found := _look_up(networks, name.replace("\\", "/"), fold):
                    return self._only_one(found, subject, where)
        known = {path.rpartition("/")[2] for networks in self._sources() for path in networks}
        stem = name.rpartition("/")[2].removesuffix(next(filter(name.endswith, _SUFFIXES), ""))
        near = get_close_matches(stem, sorted(known), n=3, cutoff=0.6)
        hint = f"the nearest: {readable(', '.join(near))}" if near else f"it has {len(self._by_path)} others"
        raise InputError(subject, f"there is no network of that name in {self._folder}; {hint}", where)

    def _only_one(self, found: list[Path], subject: str, where: str) -> Path:
        if len(found) == 1:
            return found[0]
        files = ", ".join(readable(str(path.relative_to(self._folder))) for path in found)
        problem = f"{len(found)} networks have that name: {files}; write a folder before it, or rename one"
        raise InputError(subject, problem, where)

    def _sources(self) -> Iterator[Mapping[str, list[Path]]]:
        """What names are looked for in: paths, and where these do not tell, what files say."""
        yield self._by_path
        yield self._by_note

    @cached_property
    def _by_path(self) -> Mapping[str, list[Path]]:
        """All networks by their paths below the folder, `/` between names, without an ending."""
        networks: dict[str, list[Path]] = {}
        seen: set[str] = set()
        for parent, folders, files in os.walk(self._folder, followlinks=True):
            place = os.path.realpath(parent)
            if place in seen:  # a link that leads back
                folders.clear()
                continue
            seen.add(place)
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            here = Path(parent)
            of_folder = {here / name for name in files if choose_weights([name], FOLDER_STEMS)}
            if here == self._folder:
                of_folder.clear()
            elif of_folder:
                networks.setdefault(here.relative_to(self._folder).as_posix(), []).append(here)
            for file in (here / name for name in sorted(files) if not name.startswith(".")):
                if file.suffix.lower() in _SUFFIXES and file not in of_folder:
                    networks.setdefault(file.relative_to(self._folder).with_suffix("").as_posix(), []).append(file)
        return networks

    @cached_property
    def _by_note(self) -> Mapping[str, list[Path]]:
        """The files that note a name, by it."""
        noted: dict[str, list[Path]] = {}
        for file in (path for paths in self._by_path.values() for path in paths):
            try:
                name = open_weights(file).metadata.get(_NOTED) if file.suffix.lower() == ".safetensors" else None
            except InputError:  # no network; whoever names it is told
                continue
            if name:
                noted.setdefault(name, []).append(file)
        return noted


def _look_up(networks: Mapping[str, list[Path]], name: str, fold: Callable[[str], str]) -> list[Path]:
    """The networks of a name: with these folders right above them, or with any."""
    wanted = fold(name)
    return [file for path, files in networks.items() if f"/{fold(path)}".endswith(f"/{wanted}") for file in files]
