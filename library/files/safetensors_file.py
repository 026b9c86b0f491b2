"""safetensors files, whose format is told at https://huggingface.co/docs/safetensors.

They are read tensor by tensor from a memory map whose pages are given back after each tensor, so that loading needs one
copy of the weights in the type they are used in.
"""

import json
import math
import mmap
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from library.errors import InputError

if TYPE_CHECKING:
    import torch

# The types that can be read: safetensors' name → torch's
READ = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
}
# Names of types tell the bits of an element, also of those that the format gains: F8_E8M0, F4, F6_E2M3
_TYPE = re.compile(r"(?:F|BF|I|U)(\d{1,3})(?:_\w+)?|C(64|128)|BOOL")
FLOATING = frozenset(name for name, of_torch in READ.items() if "float" in of_torch)  # what weights are stored in
_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
ADVICE = "use a file in float32, float16 or bfloat16"


def type_name(dtype: "torch.dtype") -> str:
    """safetensors' name of a type of torch; of one that it has no name for, torch's own."""
    of_torch = str(dtype).removeprefix("torch.")
    return next((name for name, read in READ.items() if read == of_torch), of_torch)


@dataclass(frozen=True)
class _Entry:
    dtype: str  # safetensors' name
    shape: tuple[int, ...]
    start: int  # bytes from the beginning of the file
    end: int


class SafetensorsFile:
    """A safetensors file whose header was checked against its size.

    Tensors of types that cannot be read are left where they are: files carry such for other programs.

    Raises:
        InputError: for a damaged header, data that is cut short, and when none of the tensors can be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.files: tuple[Path, ...] = (path,)
        self._entries, self.metadata = _read_header(path)
        self.shapes = {name: entry.shape for name, entry in self._entries.items()}
        self.types = {name: entry.dtype for name, entry in self._entries.items()}
        self._map: mmap.mmap | None = None
        if self.types and READ.keys().isdisjoint(self.types.values()):
            raise self._unknown(next(iter(self.types)))

    def tensor(self, name: str) -> "torch.Tensor":
        """Read one tensor as a view of the memory map.

        Raises:
            InputError: when it is of a type that cannot be read.
        """
        import torch

        entry = self._entries[name]
        if entry.dtype not in READ:
            raise self._unknown(name)
        dtype = getattr(torch, READ[entry.dtype])
        if entry.start == entry.end:
            return torch.empty(entry.shape, dtype=dtype)
        flat = torch.frombuffer(self._mapped(), dtype=torch.uint8, offset=entry.start, count=entry.end - entry.start)
        if entry.start % dtype.itemsize:  # headers need not be padded to the element size
            flat = flat.clone()
        return flat.view(dtype).view(entry.shape)

    def release(self, name: str) -> None:
        """Drop the tensor's pages from this process; the system's file cache keeps them."""
        entry = self._entries[name]
        start = entry.start - entry.start % mmap.PAGESIZE
        if hasattr(mmap, "MADV_DONTNEED") and entry.end > start:
            self._mapped().madvise(mmap.MADV_DONTNEED, start, entry.end - start)

    def close(self) -> None:
        """Let go of the memory map; it goes when no tensor uses it."""
        self._map = None

    def _unknown(self, name: str) -> InputError:
        return InputError(str(self.path), f"{name!r} is of the unknown type {self.types[name]}; {ADVICE}")

    def _mapped(self) -> mmap.mmap:
        if self._map is None:
            with self.path.open("rb") as file:
                # torch wants memory that can be written to; nothing does, and the file would not change
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        return self._map


def _read_header(path: Path) -> tuple[dict[str, _Entry], dict[str, str]]:
    """Read and check the header: 8 bytes of little-endian length, JSON, then the data without gaps."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > min(_MAX_HEADER_BYTES, size - 8):
            raise InputError(
                str(path),
                f"is damaged or cut short: its header claims {length:,} bytes, the file has {size:,}; get it again",
            )
        raw = file.read(length)
    try:
        header = json.loads(raw, object_pairs_hook=_unique_keys)
        told = header.pop("__metadata__", None)  # null says that there is none, too
        metadata = {} if told is None else {str(k): str(v) for k, v in told.items()}
        data_start = 8 + length
        entries = {name: _read_entry(name, info, data_start) for name, info in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as problem:
        raise InputError(str(path), f"has a damaged safetensors header ({problem}); download it again") from None
    _check_extent(path, entries, data_start, size)
    return entries, metadata


def _unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    unique = dict(pairs)
    if len(unique) != len(pairs):
        raise ValueError("a key stands twice")
    return unique


def _read_entry(name: str, info: dict, data_start: int) -> _Entry:
    dtype, shape, (start, end) = info["dtype"], tuple(info["shape"]), info["data_offsets"]
    if (told := _TYPE.fullmatch(dtype)) is None:
        raise ValueError(f"{name!r} has the unknown type {dtype}")
    if not all(type(n) is int and n >= 0 for n in (*shape, start, end)):
        raise ValueError(f"{name!r} has a size or place that is no whole number")
    bits = int(told[1] or told[2] or 8)
    if 8 * (end - start) != math.prod(shape) * bits:
        raise ValueError(f"{name!r} has {end - start:,} bytes, which do not fit its shape {list(shape)}")
    return _Entry(dtype, shape, data_start + start, data_start + end)


def _check_extent(path: Path, entries: dict[str, _Entry], data_start: int, size: int) -> None:
    """Check that the tensors lie one behind the other and end where the file ends."""
    expected = data_start
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)):
        if entry.start != expected:
            problem = "overlap" if entry.start < expected else "leave a gap"
            raise InputError(
                str(path), f"has a damaged safetensors header (tensors {problem} at {name!r}); download it again"
            )
        expected = entry.end
    if size < expected:
        raise InputError(str(path), f"is cut short: expected {expected:,} bytes, found {size:,}; download it again")
    if size > expected:
        raise InputError(
            str(path),
            f"has {size - expected:,} bytes after its last tensor, as safetensors files never do; download it again",
        )
