"""How fast each attention kernel is at the sizes that the U-Nets have, and whether all give the same."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from tools.device_check.processes import Notes

if TYPE_CHECKING:
    import torch

    from library.machine.attention import AttentionKernel

_PROMPTS = 2  # of a picture: the positive and the negative one
_TEXT = 77  # tokens


@dataclass(frozen=True)
class Shape:
    """What a level of a U-Net attends with, for one picture."""

    where: str
    head_size: int
    heads: int
    rows: int  # positions of the picture
    columns: int  # positions that it attends to: its own, or a text's tokens

    @property
    def described(self) -> str:
        """Its place and what it attends to."""
        return f"{self.where}, {'text' if self.columns == _TEXT else 'itself'}"


def _level(where: str, head_size: int, heads: int, rows: int) -> list[Shape]:
    return [Shape(where, head_size, heads, rows, columns) for columns in (rows, _TEXT)]


SHAPES = [
    *_level("SD 1.5, 512²", 40, 8, 64 * 64),
    *_level("SD 1.5, 512²", 80, 8, 32 * 32),
    *_level("SD 1.5, 512²", 160, 8, 16 * 16),
    *_level("XL, 1024²", 64, 10, 64 * 64),
    *_level("XL, 1024²", 64, 20, 32 * 32),
]
TINY_SHAPES = [shape for size in (40, 64, 80, 160) for shape in _level("tiny", size, 2, 64)]


def attention(precision: str, shapes: list[Shape], seconds: float, notes: Notes) -> None:
    """Note for each shape and kernel the milliseconds, and the distance from the exact result as a share of its length.

    Args:
        precision: fp32, fp16 or bf16.
        shapes: what is attended with.
        seconds: for which each is repeated.
        notes: takes a row for each shape, a kernel's failures with it.
    """
    import torch

    from tools.random_model import DTYPES

    device = "cuda" if torch.cuda.is_available() else "cpu"
    kernels, missing = _kernels(device, DTYPES[precision])
    notes.figures(missing=missing)
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        for shape in shapes:
            inputs = [
                torch.randn(_PROMPTS, length, shape.heads, shape.head_size, generator=generator).to(device)
                for length in (shape.rows, shape.columns, shape.columns)
            ]
            exact = _exact(*inputs)
            inputs = [x.to(DTYPES[precision]) for x in inputs]
            results = {name: _measured(kernel, inputs, exact, seconds) for name, kernel in kernels.items()}
            notes.row(shape=shape.described, head_size=shape.head_size, rows=shape.rows, kernels=results)


def _exact(query: "torch.Tensor", key: "torch.Tensor", value: "torch.Tensor") -> "torch.Tensor":
    """Attention by its formula in float32: a head's (B, T, heads, size) as the kernels give it."""
    import torch

    scores = torch.einsum("bthd,bshd->bhts", query, key) * query.shape[-1] ** -0.5
    return torch.einsum("bhts,bshd->bthd", scores.softmax(-1), value)


def _kernels(device: str, dtype: "torch.dtype") -> tuple[dict[str, "AttentionKernel"], dict[str, str]]:
    """The kernels by their names, first the one that the program takes by itself; and why others are missing."""
    import torch
    from torch.nn.attention import SDPBackend

    from library.machine.attention import sdpa, xformers_attention
    from library.machine.matmul_attention import matmul_attention
    from library.machine.packed_layers import can_pack

    backends = {"flash": SDPBackend.FLASH_ATTENTION, "plain": SDPBackend.MATH}
    kernels: dict[str, AttentionKernel] = {"SDPA": sdpa}
    missing = {}
    if device == "cuda":
        backends |= {"efficient": SDPBackend.EFFICIENT_ATTENTION, "cuDNN": SDPBackend.CUDNN_ATTENTION}
        try:
            kernels["xFormers"] = xformers_attention()
        except Exception as problem:  # whatever a package built for another version of torch raises
            missing["xFormers"] = (str(problem).strip().splitlines() or [type(problem).__name__])[0][:160]
    else:
        missing["xFormers"] = "runs on CUDA devices only"
    if can_pack(torch.device(device), dtype):
        kernels["products"] = matmul_attention
    return kernels | {name: partial(_by_backend, backend) for name, backend in backends.items()}, missing


def _by_backend(backend: object, query: "torch.Tensor", key: "torch.Tensor", value: "torch.Tensor") -> "torch.Tensor":
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from library.machine.attention import sdpa

    assert isinstance(backend, SDPBackend)
    with sdpa_kernel(backend):
        return sdpa(query, key, value)


def _measured(
    kernel: "AttentionKernel", inputs: "list[torch.Tensor]", exact: "torch.Tensor", seconds: float
) -> dict[str, object]:
    """A kernel's milliseconds and distance, or why it does not run here."""
    try:
        result = kernel(*inputs)
        distance = ((result.float() - exact).norm() / exact.norm()).item()
        return {"ms": _repeated(lambda: kernel(*inputs), seconds) * 1000, "distance": distance}
    except Exception as problem:  # a kernel that has no code for this card, type or size
        return {"error": (str(problem).strip().splitlines() or [type(problem).__name__])[0][:160]}


def _repeated(call: Callable[[], object], seconds: float) -> float:
    """Seconds of one call among many that the device is given without a pause."""
    from tools.benchmark_child import now

    count = 1
    while True:
        begun = now()
        for _ in range(count):
            call()
        took = now() - begun
        if took >= seconds or count >= 10_000:
            return took / count
        count = max(count * 2, int(count * seconds / max(took, 1e-6)))
