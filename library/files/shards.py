"""Weights in several files, as Diffusers folders have large ones: an index names the file of each tensor."""

import re
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

from library.errors import InputError
from library.files.json_files import read_json
from library.files.weight_files import WeightFile, open_weights

if TYPE_CHECKING:
    import torch

_INDEX_END = re.compile(r"\.(?:safetensors|bin)\.index(?:\.\w+)?\.json")


class ShardedWeights:
    """The tensors of all files that an index names; see `weight_files.WeightFile`."""

    def __init__(self, index: Path) -> None:
        """Open the index and its files.

        Raises:
            InputError: when it is no index, names a file or a tensor that is not there, or one cannot be used.
        """
        self.path = index
        places = read_json(index).get("weight_map")
        if not (isinstance(places, dict) and places and all(isinstance(name, str) for name in places.values())):
            raise InputError(str(index), "is no index of weights: its weight_map is missing; download it again")
        shards = {name: self._open(name) for name in sorted(set(places.values()))}
        self.files: tuple[Path, ...] = tuple(shard.path for shard in shards.values())
        self._shards = {tensor: shards[name] for tensor, name in places.items()}
        for tensor, shard in self._shards.items():
            if tensor not in shard.shapes:
                raise InputError(str(shard.path), f"lacks {tensor!r}, which {index.name} says it holds; get it again")
        self.shapes = {tensor: shard.shapes[tensor] for tensor, shard in self._shards.items()}
        self.types = {tensor: shard.types[tensor] for tensor, shard in self._shards.items()}
        self.metadata = next(iter(shards.values())).metadata

    def _open(self, name: str) -> WeightFile:
        file = self.path.with_name(Path(name).name)
        if Path(name).name != name or not file.is_file():
            raise InputError(str(self.path), f"names {name!r}, which is not beside it; download that too")
        return open_weights(file)

    def tensor(self, name: str) -> "torch.Tensor":
        """Read one tensor."""
        return self._shards[name].tensor(name)

    def release(self, name: str) -> None:
        """Let go of the memory that reading a tensor took."""
        self._shards[name].release(name)

    def close(self) -> None:
        """Let go of all memory."""
        for shard in self._shards.values():
            shard.close()


def choose_index(names: Collection[str], stems: tuple[str, ...]) -> str | None:
    """Choose an index among a folder's file names: safetensors before pickles, then full weights, then fp16."""

    def preference(name: str) -> tuple[bool, bool, str]:
        return ".safetensors." not in name, "fp16" in name, name

    pattern = re.compile(rf"(?:{'|'.join(stems)})(?:\.\w+)?{_INDEX_END.pattern}")
    return min((name for name in names if pattern.fullmatch(name)), key=preference, default=None)


def shards_of(index: str, names: Collection[str]) -> list[str]:
    """The files that an index of this name is for, told by their names, as far as they are among others."""
    ending = ".safetensors" if ".safetensors." in index else ".bin"
    stem = _INDEX_END.sub("", index)
    variant = re.search(r"\.index\.(\w+)\.json$", index)
    stem += f".{variant[1]}" if variant and not stem.endswith(f".{variant[1]}") else ""
    return [name for name in names if re.fullmatch(rf"{re.escape(stem)}-\d+-of-\d+{re.escape(ending)}", name)]
