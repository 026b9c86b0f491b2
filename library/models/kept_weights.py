"""A U-Net's weights kept on disk as they are computed with, and mapped into memory from there.

OpenVINO makes weights of its own from them. Mapped ones are read from the file when they are needed and need not stay:
the memory holds one U-Net, not two, and a later run neither reads nor casts the model's.
"""

import ctypes
import hashlib
import json
import logging
import math
import os
import sys
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import torch

from library.files.model_files import Component
from library.machine.compiling import cache_folder
from library.plan.run_record import fingerprints

logger = logging.getLogger(__name__)

_FORMAT = 1
_ALIGNED = 64  # bytes: where tensors begin
_HEADER_BYTES = 8  # what says how long the header is
_SAMPLED_BLOCKS, _BLOCK_BYTES = 64, 1 << 16
_DONTNEED = 4  # of Linux's madvise


class KeptWeights:
    """The tensors of a kept file; the same as `weight_reading.CastWeights`."""

    def __init__(self, path: Path, header: dict, begin: int, dtype: torch.dtype) -> None:
        self.path, self.device = path, torch.device("cpu")
        self.shapes = {name: tuple(shape) for name, (_, shape) in header["tensors"].items()}
        self._storage = torch.UntypedStorage.from_file(str(path), shared=False, nbytes=begin + header["bytes"])
        self._offsets = {name: begin + offset for name, (offset, _) in header["tensors"].items()}
        self._dtype = dtype

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor, which lies in the file."""
        shape = self.shapes[name]
        strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
        place = self._offsets[name] // self._dtype.itemsize
        return torch.empty(0, dtype=self._dtype).set_(self._storage, place, shape, strides)

    def release(self, name: str) -> None:
        """Nothing is to be let go of."""

    def close(self) -> None:
        """Likewise: models lie in it."""

    def leave_memory(self) -> None:
        """Let the system have the memory that was read into; what is needed again is read again."""
        if sys.platform == "linux":
            ctypes.CDLL(None).madvise(
                ctypes.c_void_p(self._storage.data_ptr()), ctypes.c_size_t(self._storage.nbytes()), _DONTNEED
            )


class WeightKeeper:
    """Keeps the weights of one U-Net in one type.

    Args:
        unet: the model's files.
        dtype: that they are computed in.
    """

    def __init__(self, unet: Component, dtype: torch.dtype) -> None:
        marks = list(fingerprints(unet.weights.files).values())
        key = [_FORMAT, str(dtype), marks, sorted(map(str, unet.config.items()))]
        self._key = hashlib.sha256(json.dumps(key).encode()).hexdigest()
        self._dtype = dtype
        self.path = cache_folder() / "openvino" / f"{self._key[:32]}.weights"

    def find(self) -> KeptWeights | None:
        """The kept weights; None where there are none, or a file that is not whole."""
        try:
            with self.path.open("rb") as file:
                length = int.from_bytes(file.read(_HEADER_BYTES), "little")
                size = self.path.stat().st_size
                header = json.loads(file.read(length)) if length < size else {}
                begin = _aligned(_HEADER_BYTES + length)
                if header.get("key") != self._key or size != begin + header["bytes"]:
                    return None
                if header["mark"] != _mark(file, begin, header["bytes"]):
                    return None
        except (OSError, ValueError, KeyError, AttributeError):
            return None
        return KeptWeights(self.path, header, begin, self._dtype)

    def keep(self, unet: torch.nn.Module) -> KeptWeights | None:
        """Write a loaded U-Net's weights; None where that cannot be done."""
        tensors, end = {}, 0
        for name, parameter in unet.named_parameters():
            tensors[name] = (end, list(parameter.shape))
            end = _aligned(end + parameter.nbytes)
        logger.info("keeping the U-Net's weights for later runs: %s (%.1f GB)", self.path, end / 1e9)
        written = None
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            descriptor, name = tempfile.mkstemp(dir=self.path.parent)
            written = Path(name)
            with os.fdopen(descriptor, "w+b") as file:
                self._write(file, unet, tensors, end)
            written.replace(self.path)
        except OSError as problem:
            if written is not None:
                with suppress(OSError):
                    written.unlink()
            logger.warning("%s: cannot be written (%s); the U-Net is held twice", self.path, problem.strerror)
            return None
        return self.find()

    def _write(self, file: BinaryIO, unet: torch.nn.Module, tensors: dict[str, tuple[int, list[int]]], end: int) -> None:
        def header(mark: str) -> bytes:
            said = {"key": self._key, "bytes": end, "mark": mark, "tensors": tensors}
            text = json.dumps(said).encode()
            return len(text).to_bytes(_HEADER_BYTES, "little") + text

        begin = _aligned(len(header(_mark_of([]))))
        for name, parameter in unet.named_parameters():
            file.seek(begin + tensors[name][0])
            file.write(parameter.detach().contiguous().view(-1).view(torch.uint8).numpy())
        file.truncate(begin + end)
        mark = _mark(file, begin, end)
        file.seek(0)
        file.write(header(mark))
        file.flush()
        os.fsync(file.fileno())


def fill_from(unet: torch.nn.Module, weights: KeptWeights) -> None:
    """Let a loaded U-Net's weights lie in the file that they are kept in."""
    for name, parameter in unet.named_parameters():
        parameter.data = weights.tensor(name)


def _aligned(place: int) -> int:
    return -(-place // _ALIGNED) * _ALIGNED


def _mark(file: BinaryIO, begin: int, size: int) -> str:
    """A hash of blocks all over the tensors: quick with gigabytes, and other weights show in any block."""
    blocks = []
    for block in range(_SAMPLED_BLOCKS):
        file.seek(begin + block * max(0, size - _BLOCK_BYTES) // (_SAMPLED_BLOCKS - 1))
        blocks.append(file.read(min(size, _BLOCK_BYTES)))
    return _mark_of(blocks)


def _mark_of(blocks: Iterable[bytes]) -> str:
    return hashlib.sha256(b"".join(blocks)).hexdigest()
