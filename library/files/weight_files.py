"""Opening weight files safely, whatever their name ends in, and telling what they hold from their header.

Pickles go through `torch.load(weights_only=True)` alone: no code in a weight file ever runs.
"""

import pickle
import re
import stat
import warnings
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from library.errors import InputError
from library.files.globs import advice_on
from library.files.safetensors_file import SafetensorsFile, type_name
from library.texts import is_text

if TYPE_CHECKING:
    import torch

Shape = tuple[int, ...]

WEIGHT_STEMS = ("diffusion_pytorch_model",)  # how weight files' names begin in a Diffusers folder
TEXT_STEMS = ("model", "pytorch_model")  # and those of text encoders

# Modules whose objects honest training checkpoints carry beside their weights. Their objects are replaced by `_Inert`.
_BYSTANDER_MODULES = (
    "builtins.slice",
    "datetime.",
    "pathlib.",
    "pytorch_lightning.",
    "lightning.",
    "lightning_fabric.",
    "omegaconf.",
    "numpy.",
    "_codecs.",
    "argparse.",
)


class WeightFile(Protocol):
    """Named tensors in a file that was checked; `tensor` reads one of them, all else costs nothing."""

    path: Path
    files: tuple[Path, ...]  # all that it consists of
    shapes: dict[str, Shape]
    types: dict[str, str]  # of the tensors, by their names in safetensors; see `weight_types`
    metadata: dict[str, str]

    def tensor(self, name: str) -> "torch.Tensor":
        """Read one tensor; it may share the file's memory, so whoever keeps it copies it.

        Raises:
            InputError: naming it, when it is of a type that cannot be read.
        """

    def release(self, name: str) -> None:
        """Let go of the memory that reading a tensor took."""

    def close(self) -> None:
        """Let go of all memory; tensors cannot be read any more."""


def open_weights(path: Path) -> WeightFile:
    """Open a weight file by its content.

    Raises:
        InputError: when it is no weight file, is cut short or damaged, or a pickle that asks for more than data.
    """
    try:
        about = path.stat()
        if not stat.S_ISREG(about.st_mode):  # reading a pipe would wait for a writer
            raise InputError(str(path), "is no ordinary file; give a file on a disk")
        size = about.st_size
        with path.open("rb") as file:
            head = file.read(512)
    except OSError as problem:
        raise InputError(str(path), f"cannot be read: {problem.strerror}; {advice_on(path)}") from None
    if head[8:9] == b"{":  # after eight bytes of length, a JSON object
        return SafetensorsFile(path)
    if head.startswith(b"PK\x03\x04"):
        if not _is_torch_zip(path):
            raise InputError(str(path), "is a zip archive, not a weight file; unpack it and give the file inside")
        return PickleFile(path)
    if head.startswith(b"\x80"):
        return PickleFile(path)
    raise InputError(str(path), _what_it_is(head, size))


def scale_of(name: str, weights: WeightFile) -> str | None:
    """The tensor with what a weight in float8 is multiplied by, as ComfyUI writes it; None where there is none."""
    if not weights.types[name].startswith("F8") or not name.endswith(".weight"):
        return None
    module = name.removesuffix("weight")
    return next((scale for end in ("scale_weight", "weight_scale") if (scale := module + end) in weights.shapes), None)


def choose_weights(names: list[str], stems: tuple[str, ...]) -> str | None:
    """Choose a component's weight file: full weights before other variants than fp16, safetensors before pickles."""

    def preference(name: str) -> tuple[bool, bool, str, str]:
        variant = name.removesuffix(".safetensors").removesuffix(".bin").partition(".")[2]
        return variant not in ("", "fp16"), not name.endswith(".safetensors"), variant, name

    pattern = re.compile(rf"(?:{'|'.join(stems)})(?:\.\w+)?\.(?:safetensors|bin)")
    return min((name for name in names if pattern.fullmatch(name)), key=preference, default=None)


def _is_torch_zip(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("data.pkl") for name in archive.namelist())
    except (zipfile.BadZipFile, OSError):
        raise InputError(
            str(path), "is cut short or damaged (its zip directory is missing); download it again"
        ) from None


def _what_it_is(head: bytes, size: int) -> str:
    """Name what a file that holds no weights is instead, and what to do."""
    start = head.lstrip().lower()
    if size == 0:
        return "is an empty file; download it again"
    if head.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the weights; run `git lfs pull` in its folder"
    if start.startswith((b"<!doctype", b"<html", b"<?xml", b"<")):
        return "is a web page, not a weight file; download the file itself"
    if head.startswith(b"GGUF"):
        return "is a GGUF file, which this program does not read; use a .safetensors file"
    return "is no weight file (neither safetensors nor a PyTorch checkpoint); check the path"


# ---------------------------------------------------------------------------------------------------------------------
# Pickles


class _Inert:
    """Takes the place of objects that belong to the training program; holds nothing and does nothing."""

    def __new__(cls, *args: object, **kwargs: object) -> "_Inert":
        return super().__new__(cls)

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass

    def __hash__(self) -> int:
        return id(self)


class _ParameterDict:
    """Takes the place of torch.nn.ParameterDict, of which only the parameters are wanted."""

    def __setstate__(self, state: dict) -> None:
        self.parameters = dict(state.get("_parameters", {}))


_STAND_INS = {"torch.nn.modules.container.ParameterDict": _ParameterDict}


def parameter_dict_tensors(path: Path, name: str) -> "dict[str, torch.Tensor]":
    """The tensors of one entry of a pickle, a dict or a ParameterDict of them; empty when there is no such entry."""
    content = load_pickle(path)
    entry = content.get(name) if isinstance(content, dict) else None
    return dict(_named_tensors(entry.parameters if isinstance(entry, _ParameterDict) else entry))


class PickleFile:
    """A PyTorch checkpoint: its tensors by name, `state_dict` unwrapped, everything else left aside."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.files: tuple[Path, ...] = (path,)
        content = load_pickle(path)
        state = content.get("state_dict", content) if isinstance(content, dict) else {}
        self._tensors = dict(_named_tensors(state))
        self.shapes = {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}
        self.types = {name: type_name(tensor.dtype) for name, tensor in self._tensors.items()}
        self.metadata: dict[str, str] = {}

    def tensor(self, name: str) -> "torch.Tensor":
        """The tensor, mapped from the file where its format allows that."""
        return self._tensors[name]

    def release(self, name: str) -> None:
        """Forget the tensor; a file read into memory gives it back, a mapped one when all of it is forgotten."""
        self._tensors.pop(name, None)

    def close(self) -> None:
        """Forget all tensors."""
        self._tensors.clear()


def _named_tensors(state: object, prefix: str = "") -> Iterator[tuple[str, "torch.Tensor"]]:
    """The tensors of a dictionary, and those of dictionaries in it as `outer.inner`."""
    import torch

    for name, value in state.items() if isinstance(state, dict) else ():
        if isinstance(name, str) and isinstance(value, torch.Tensor):
            yield prefix + name, value
        elif isinstance(name, str) and not prefix:
            yield from _named_tensors(value, f"{name}.")


def load_pickle(path: Path) -> object:
    """Read a PyTorch pickle as plain data.

    Raises:
        InputError: naming what it would have called, or saying how it is damaged.
    """
    import torch

    is_zip = zipfile.is_zipfile(path)
    bystanders = []
    if is_zip:  # the older format cannot be looked into beforehand; there, torch refuses what is not plain data
        try:
            wanted = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        except (RuntimeError, pickle.UnpicklingError, ValueError, EOFError, KeyError, IndexError) as problem:
            raise InputError(
                str(path), f"is a damaged checkpoint ({_first_line(problem)}); download it again"
            ) from None
        bystanders = [name for name in wanted if name.startswith(_BYSTANDER_MODULES)]
        if refused := sorted(set(wanted) - set(bystanders) - set(_STAND_INS)):
            raise InputError(str(path), _refusal(refused[0]))
    while True:
        try:
            return _load_plain(path, bystanders, can_map=is_zip)
        except pickle.UnpicklingError as problem:
            name = _named_global(str(problem))
            if name is None:
                raise InputError(str(path), f"is no plain checkpoint ({_first_line(problem)})") from None
            if name in bystanders or not name.startswith(_BYSTANDER_MODULES):
                raise InputError(str(path), _refusal(name)) from None
            bystanders.append(name)  # one that the older format named only now
        except (RuntimeError, ValueError, EOFError, KeyError, IndexError, TypeError, AttributeError) as problem:
            raise InputError(
                str(path), f"is a damaged checkpoint ({_first_line(problem)}); download it again"
            ) from None


def _load_plain(path: Path, bystanders: list[str], *, can_map: bool) -> object:
    import torch

    with _bystanders_inert(bystanders), path.open("rb") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of the pickle's protocol; what matters is raised
        # torch.load reads the ending of a path before the content, and maps no file whose name is no text, so that
        # such files are handed over open
        misnamed = path.suffix == ".safetensors" or not is_text(path)
        source = file if misnamed else path
        return torch.load(source, map_location="cpu", weights_only=True, mmap=can_map and not misnamed)


@contextmanager
def _bystanders_inert(names: Iterable[str]) -> Iterator[None]:
    import torch

    inert = [(_Inert, name) for name in names]
    with torch.serialization.safe_globals([*inert, *((stand_in, name) for name, stand_in in _STAND_INS.items())]):
        yield


def _refusal(name: str) -> str:
    return (
        f"would run {name} when loaded, so it was not loaded and nothing ran; "
        "get it as .safetensors, or convert it on a machine you can do without"
    )


def _named_global(message: str) -> str | None:
    """The global that torch's refusal names: `… Unsupported global: GLOBAL posix.system was not …`."""
    _, found, rest = message.partition("GLOBAL ")
    return rest.split()[0] if found else None


def _first_line(problem: BaseException) -> str:
    lines = str(problem).strip().splitlines()
    return (lines[0] if lines else type(problem).__name__)[:160]
