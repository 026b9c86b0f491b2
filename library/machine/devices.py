"""Where and in which precision the model runs, and which attention kernel it runs with."""

import gc
import importlib.util
import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, TypeVar

from library.errors import InputError
from library.files.model_files import ModelFiles
from library.machine import malloc
from library.settings.computing import Computing

if TYPE_CHECKING:
    import torch

    from library.machine.attention import AttentionKernel

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

# The versions this program works with: from the first, before the second
_SUPPORTED_VERSIONS = {
    "torch": ("2.10", "3"),
    "diffusers": ("0.42", "0.43"),
    "transformers": ("5.6", "6"),
    "safetensors": ("0.5", "1"),
}


def check_versions() -> None:
    """Refuse libraries that this program does not work with, before they are imported.

    Raises:
        InputError: naming the version found and the one wanted.
    """
    from packaging.version import Version

    for package, (lowest, beyond) in _SUPPORTED_VERSIONS.items():
        wanted = f"{package} >= {lowest}, < {beyond}"
        advice = "run `pip install -r requirements.txt`"
        try:
            found = version(package)
        except PackageNotFoundError:
            raise InputError(package, f"is not installed, wanted is {wanted}; {advice}") from None
        if not Version(lowest) <= Version(found) < Version(beyond):
            raise InputError(package, f"found version {found}, wanted is {wanted}; {advice}")


def check_torchvision() -> None:
    """Refuse a torchvision that does not load beside this torch: transformers imports any that is installed.

    PyPI's wheel is for PyPI's torch, not for one that is built for CPUs alone.

    Raises:
        InputError: saying that it can go.
    """
    if importlib.util.find_spec("torchvision") is None:
        return
    try:
        importlib.import_module("torchvision")
    except Exception as problem:  # whatever a package built for another version of torch raises
        reason = (str(problem).strip().splitlines() or [type(problem).__name__])[0][:160]
        advice = "run `pip uninstall torchvision`, which this program does not need, or install the one of this torch"
        raise InputError("torchvision", f"is installed, but does not load ({reason}); {advice}") from None


@dataclass(frozen=True)
class Machine:
    """Where and in what a run's models compute."""

    device: "torch.device"
    dtype: "torch.dtype"
    channels_last: bool  # of tensors in memory


def choose_machine(computing: Computing, process: int = 0) -> Machine:
    """What the user asked for, as far as this machine has it; see `choose_device` for `process`.

    Raises:
        InputError: for a type that the device does not compute in.
    """
    device = choose_device(process)
    if device.type == "cuda":
        import torch

        torch.cuda.set_device(device)  # streams, graphs and what memory is left are asked of the current one
    dtype = choose_dtype(device, fp16=computing.fp16, bf16=computing.bf16)
    logger.debug("drawing on %s in %s", device, dtype)
    if computing.low_vram and device.type == "cpu":
        logger.warning("--lowvram: there is no GPU here, it changes nothing")
    return Machine(device, dtype, computing.channels_last or device.type == "cpu")


def choose_device(process: int = 0) -> "torch.device":
    """The first of CUDA, XPU, MPS that this machine has; else the CPU.

    Args:
        process: the number of this process on this machine; each takes a GPU of its own, as far as there are enough.
    """
    import torch

    if torch.cuda.is_available():
        return torch.device("cuda", process % torch.cuda.device_count())
    if torch.xpu.is_available():
        return torch.device("xpu", process % torch.xpu.device_count())
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def choose_dtype(device: "torch.device", *, fp16: bool, bf16: bool) -> "torch.dtype":
    """The type the models run in; `--fp16` on a CPU warns and means float32.

    Raises:
        InputError: for `--bf16` on a device that has no bfloat16.
    """
    import torch

    if fp16 and device.type == "cpu":
        logger.warning("--fp16 is slower than float32 on a CPU; computing in float32 (--bf16 is fast on many CPUs)")
        return torch.float32
    if bf16 and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise InputError("--bf16", f"{torch.cuda.get_device_name(device)} has no bfloat16; use --fp16")
    return torch.float16 if fp16 else torch.bfloat16 if bf16 else torch.float32


def check_openvino(machine: Machine) -> None:
    """Refuse `--engine openvino` beside a GPU.

    Raises:
        InputError: saying that it can be left out.
    """
    if machine.device.type != "cpu":
        problem = f"is for CPUs, and this machine has a GPU ({machine.device.type}), which is faster; leave it out"
        raise InputError("--engine openvino", problem)


def choose_vae_dtype(machine: Machine, model: ModelFiles, *, no_half: bool) -> "torch.dtype":
    """The type that the VAE runs in: the machine's, or one that holds its features where float16 does not.

    Args:
        machine: where it runs.
        model: tells whether its VAE is one that float16 does not hold; a configuration may say that it does.
        no_half: float32 is asked for.
    """
    import torch

    if no_half:
        return torch.float32
    overflows = model.family.vae_overflows and model.vae.config.get("force_upcast") is not False
    if machine.dtype is not torch.float16 or not overflows:
        return machine.dtype
    cuda = machine.device.type == "cuda"
    return torch.bfloat16 if not cuda or torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32


def choose_attention(machine: Machine, *, xformers: bool, gradients: bool = False) -> "AttentionKernel":
    """xFormers' kernel when it is asked for and runs here, else the fastest that PyTorch has.

    Args:
        machine: where the U-Net runs, and in what.
        xformers: whether xFormers is asked for.
        gradients: whether the kernel must be economical with memory when gradients are taken.
    """
    from library.machine.attention import sdpa, xformers_attention
    from library.machine.matmul_attention import matmul_attention

    if not xformers:
        return matmul_attention if _products_are_faster(machine.device, machine.dtype) and not gradients else sdpa
    device = machine.device
    if device.type != "cuda":
        logger.warning("--xformers: xFormers runs on CUDA devices only, this is %s; using PyTorch's SDPA", device.type)
        return sdpa
    try:
        return xformers_attention()
    except Exception as problem:  # whatever a package built for another version of torch raises
        reason = (str(problem).strip().splitlines() or [type(problem).__name__])[0][:160]
        logger.warning("--xformers: xFormers cannot be used (%s); using PyTorch's SDPA", reason)
        return sdpa


def _products_are_faster(device: "torch.device", dtype: "torch.dtype") -> bool:
    """Whether attention by products is faster than PyTorch's own kernel; of bfloat16 with AMX that is not known."""
    import torch

    from library.machine.packed_layers import can_pack

    has = torch.cpu.get_capabilities()
    needed = {torch.float32: "avx512_f", torch.bfloat16: "avx512_bf16"}
    with_tiles = dtype == torch.bfloat16 and has.get("amx_bf16")
    return can_pack(device, dtype) and bool(has.get(needed[dtype])) and not with_tiles


# ---------------------------------------------------------------------------------------------------------------------
# Memory


@contextmanager
def on_device(model: "torch.nn.Module", device: "torch.device") -> Iterator[None]:
    """A block in which a model is on a device, and after which it leaves that for main memory."""
    model.to(device)
    try:
        yield
    finally:
        model.to("cpu")


def sent(tensor: "torch.Tensor", device: "torch.device") -> "torch.Tensor":
    """A tensor of the CPU on a device, without waiting for what a GPU does meanwhile.

    A GPU reads pinned memory by itself; out of other memory it is handed some KB at a time, which would be waited for.
    """
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


@contextmanager
def no_collection() -> Iterator[None]:
    """A block, or a function, without Python's search for cycles of garbage.

    Imports make a million objects that all stay: the search goes through them again and again, a quarter of the time.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


@contextmanager
def single_threaded() -> Iterator[None]:
    """A block in which no operation of PyTorch is shared out, for work that has threads of its own.

    The threads of a shared operation spin for a while after it, on cores that the others want.
    """
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # for this thread, and for those that begin from now on
    try:
        yield
    finally:
        torch.set_num_threads(threads)


# What PyTorch says where it has no type for it: on CPUs (oneDNN, which does convolutions there, says no more than this
# when it gets no memory for its work), and on Apple's GPUs
_OUT_OF_MEMORY = re.compile(
    r"DefaultCPUAllocator: (?:can't allocate|not enough) memory"
    r"|^could not create a (?:primitive|memory object)"
    r"|MPS backend out of memory"
    # and OpenVINO, which begins with where it happened
    r"|^Exception from src/(?s:.*)(?:bad_alloc|Failed to allocate \d+ bytes|can't alloc|could not create a primitive)"
)


def is_out_of_memory(problem: BaseException) -> bool:
    """Tell a lack of memory, which less work at a time may cure, from all other failures."""
    import torch

    if isinstance(problem, torch.OutOfMemoryError | MemoryError):
        return True
    return type(problem) is RuntimeError and _OUT_OF_MEMORY.search(str(problem)) is not None


def try_to_run(work: Callable[[], Result]) -> Result | None:
    """Run something that gives no None; None when the memory does not suffice, with what it had taken given back."""
    import torch

    try:
        return work()
    except (RuntimeError, MemoryError) as problem:
        if not is_out_of_memory(problem):
            raise
    # Out here nothing holds the failed attempt's tensors any more; inside the block its traceback did
    from library.machine import cuda_graphs

    cuda_graphs.give_up_all("out of memory")
    gc.collect()
    malloc.give_back()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None
