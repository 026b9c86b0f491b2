"""Compiling the U-Net: minutes at the start of a run for faster steps, which long runs win back."""

import os
import shutil
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from library.errors import EnvironmentFault, InputError

if TYPE_CHECKING:
    import torch
    from torch import nn

_CACHE = "TORCHINDUCTOR_CACHE_DIR"  # PyTorch's name for where it keeps what it has compiled
_MOST_SHAPES = 64  # versions of the U-Net in one run; beyond, PyTorch would go on without compiling


def cache_folder() -> Path:
    """The program's folder among the user's caches.

    Raises:
        InputError: where nothing tells which that is, as in containers for users without a name.
    """
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gen_img_diffusers"
    except RuntimeError:
        raise InputError("XDG_CACHE_HOME", "is not set, and no home folder is known; set it to a folder") from None


def keep_compiled() -> None:
    """Keep what is compiled in the user's cache folder for later runs; before PyTorch's compiler is imported."""
    if _CACHE not in os.environ:
        os.environ[_CACHE] = str(cache_folder())


def compile_unet(unet: "nn.Module", device: "torch.device", *, constant: bool) -> None:
    """Let a U-Net be compiled when it is first called, and once more for each size and batch size.

    Args:
        unet: finished; its forward hooks are compiled with it.
        device: where it runs. On CUDA its calls become CUDA graphs.
        constant: its weights will not change; they are compiled in.

    Raises:
        InputError: on a CPU without a C++ compiler.
    """
    import torch

    # of caches of Diffusers' that hold what does not change
    warnings.filterwarnings("ignore", message="Dynamo detected a call to a `functools.lru_cache`")
    torch._dynamo.config.recompile_limit = _MOST_SHAPES  # ty: ignore[invalid-assignment]  # typed by its default
    if device.type != "cpu":
        unet.compile(dynamic=False, mode="reduce-overhead" if device.type == "cuda" else None)
        return
    compiler = os.environ.get("CXX", "g++")
    if not any(map(shutil.which, (compiler, "clang++"))):
        raise InputError("--compile", f"needs a C++ compiler; install {compiler}, or leave it out")
    unet.compile(dynamic=False, options={"freezing": constant})


def compile_fault(problem: Exception) -> EnvironmentFault | None:
    """What to say of an error of PyTorch's compiler, such as a file left half written when a run was killed."""
    if not type(problem).__module__.startswith(("torch._inductor", "torch._dynamo")):
        return None
    reason = (str(problem).strip().splitlines() or [type(problem).__name__])[0][:160]
    return EnvironmentFault("--compile", f"failed ({reason}); delete {os.environ[_CACHE]}, or leave it out")
