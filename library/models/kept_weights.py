"""A model's weights kept on disk as they are computed with, and mapped into memory from there.

OpenVINO makes weights of its own from them. Mapped ones are read from the file when they are needed and need not stay:
the memory holds one U-Net, not two, and a later run neither reads nor casts the model's.
"""

import contextlib
import ctypes
import hashlib
import json
import logging
import math
import os
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import torch

from library.files.model_files import Component, ModelFiles
from library.files.weight_files import scale_of
from library.machine.compiling import cache_folder
from library.plan.run_record import fingerprints, sampled_blocks

logger = logging.getLogger(__name__)

_FORMAT = 1
_ALIGNED = 64  # bytes: where tensors begin
_HEADER_BYTES = 8  # what says how long the header is
_DONTNEED = 4  # of Linux's madvise
_HALF_WRITTEN = ".part"
_ABANDONED_S = 24 * 3600  # a file takes minutes to write


Places = dict[str, tuple[int, list[int]]]  # where each tensor begins, and its shape


class KeptWeights:
    """The tensors of a kept file; the same as `weight_reading.CastWeights`."""

    def __init__(self, path: Path, header: dict, begin: int, dtype: torch.dtype) -> None:
        self.path, self.device = path, torch.device("cpu")
        self.shapes = {name: tuple(shape) for name, (_, shape) in header["tensors"].items()}
        self._bytes = torch.from_file(str(path), shared=False, size=begin + header["bytes"], dtype=torch.uint8)
        self._offsets = {name: begin + offset for name, (offset, _) in header["tensors"].items()}
        self._dtype = dtype

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor, which lies in the file."""
        shape = self.shapes[name]
        begin = self._offsets[name]
        return self._bytes[begin : begin + math.prod(shape) * self._dtype.itemsize].view(self._dtype).view(shape)

    def release(self, name: str) -> None:
        """Nothing is to be let go of."""

    def close(self) -> None:
        """Likewise: models lie in it."""

    def leave_memory(self) -> None:
        """Let the system have the memory that was read into; what is needed again is read again."""
        if sys.platform == "linux":
            ctypes.CDLL(None).madvise(
                ctypes.c_void_p(self._bytes.data_ptr()), ctypes.c_size_t(self._bytes.nbytes), _DONTNEED
            )


class _Keeper:
    """Keeps the weights of one of a model's components.

    Args:
        part: which, by its name in a Diffusers folder.
        component: its files.
        dtype: that it computes in.
    """

    def __init__(self, part: str, component: Component, dtype: torch.dtype) -> None:
        marks = list(fingerprints(component.weights.files).values())
        key = [_FORMAT, part, str(dtype), marks, sorted(map(str, component.config.items()))]
        if any(scale_of(name, component.weights) for name in component.weights.types):
            key.append("scaled")  # files of before that are not
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

    def keep(self, model: torch.nn.Module) -> KeptWeights | None:
        """Write a loaded component's weights; None where they were not read again as they were written.

        Raises:
            OSError: when that cannot be done.
        """
        tensors: Places = {}
        end = 0
        for name, parameter in model.named_parameters():
            tensors[name] = (end, list(parameter.shape))
            end = _aligned(end + parameter.nbytes)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        _clear_away(self.path.parent)
        descriptor, name = tempfile.mkstemp(dir=self.path.parent, suffix=_HALF_WRITTEN)
        try:
            with os.fdopen(descriptor, "w+b") as file:
                self._write(file, model, tensors, end)
            Path(name).replace(self.path)
        except BaseException:  # Ctrl-C among them: they are gigabytes
            Path(name).unlink(missing_ok=True)
            raise
        return self.find()

    def _write(
        self, file: BinaryIO, model: torch.nn.Module, tensors: dict[str, tuple[int, list[int]]], end: int
    ) -> None:
        def header(mark: str) -> bytes:
            said = {"key": self._key, "bytes": end, "mark": mark, "tensors": tensors}
            text = json.dumps(said).encode()
            return len(text).to_bytes(_HEADER_BYTES, "little") + text

        begin = _aligned(len(header("0" * 64)))
        for name, parameter in model.named_parameters():
            file.seek(begin + tensors[name][0])
            file.write(parameter.detach().contiguous().view(-1).view(torch.uint8).numpy())
        file.truncate(begin + end)
        mark = _mark(file, begin, end)
        file.seek(0)
        file.write(header(mark))
        file.flush()
        os.fsync(file.fileno())


class ModelKeeper:
    """Keeps the weights of a model's components.

    Args:
        files: of the model.
        dtype: that it computes in.
        vae_dtype: that its VAE computes in.
    """

    def __init__(self, files: ModelFiles, dtype: torch.dtype, vae_dtype: torch.dtype) -> None:
        types = {"vae": vae_dtype}
        self._keepers = {
            part: _Keeper(part, component, types.get(part, dtype)) for part, component in files.parts.items()
        }
        self.kept: dict[str, KeptWeights] = {}

    def find(self) -> dict[str, KeptWeights]:
        """What is kept already, by the components' names in a Diffusers folder."""
        found = {part: keeper.find() for part, keeper in self._keepers.items()}
        self.kept = {part: weights for part, weights in found.items() if weights is not None}
        return self.kept

    def keep(self, models: Mapping[str, torch.nn.Module]) -> None:
        """Write what is not kept yet, and let the models' weights lie in the files."""
        missing = [part for part in models if part not in self.kept]
        if not missing:
            return
        gigabytes = sum(each.nbytes for part in missing for each in models[part].parameters()) / 1e9
        folder = self._keepers["unet"].path.parent
        logger.info("keeping the model's %s for later runs in %s (%.1f GB)", ", ".join(missing), folder, gigabytes)
        for part in missing:
            try:
                kept = self._keepers[part].keep(models[part])
            except OSError as problem:
                logger.warning("%s: cannot be written (%s); more memory is taken", folder, problem.strerror)
                return
            if kept is not None:
                self.kept[part] = kept
                for name, parameter in models[part].named_parameters():
                    parameter.data = kept.tensor(name)

    def leave_memory(self) -> None:
        """Let the system have the memory that all were read into."""
        for weights in self.kept.values():
            weights.leave_memory()


def _clear_away(folder: Path) -> None:
    """Remove what runs that were killed left half written: it is gigabytes, and has no other end."""
    for left in folder.glob(f"*{_HALF_WRITTEN}"):
        with contextlib.suppress(OSError):  # another run removes it, too
            if time.time() - left.stat().st_mtime > _ABANDONED_S:
                left.unlink()


def _aligned(place: int) -> int:
    return -(-place // _ALIGNED) * _ALIGNED


def _mark(file: BinaryIO, begin: int, size: int) -> str:
    """A hash of blocks all over the tensors: quick with gigabytes, and other weights show in any block."""
    return hashlib.sha256(b"".join(sampled_blocks(file, begin, size))).hexdigest()
