"""LoRA and its relatives: which parts each has in a file, which layer they fit, and how they change its weight.

One table, `KINDS`. A network's multiplier m scales every change: the layer computes with W + m·ΔW. Parts come as
tensors of the type to compute in (float32 in use, float64 in tests), so nothing is rounded before the end. Torch is
imported only where it computes, so that headers can be checked without it.

Sources: LoRA https://arxiv.org/abs/2106.09685, LoHa https://arxiv.org/abs/2108.06098, LoKr and the Tucker forms
https://arxiv.org/abs/2309.14859, GLoRA https://arxiv.org/abs/2306.07967, DoRA https://arxiv.org/abs/2402.09353, IA³
https://arxiv.org/abs/2205.05638, OFT https://arxiv.org/abs/2306.07280, BOFT https://arxiv.org/abs/2311.06243.
"""

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from networks import rotations

if TYPE_CHECKING:
    import torch

    Parts = Mapping[str, torch.Tensor]

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]

_BIAS_PARTS = ("diff_b", "b_norm", "up_bias")  # what is added to a layer's bias; the last by the scale of its LoRA
# DoRA's norms: LyCORIS' by their shape for each output or each input, others' always for each output
_MAGNITUDES = ("dora_scale", "magnitude")


@dataclass(frozen=True)
class Kind:
    """One relative of LoRA.

    Args:
        name: what people call it.
        needed: alternatives of parts, one of which is there in full.
        optional: parts that may come along.
        fits: whether parts of these shapes go with a weight of this shape.
        change: the change ΔW of a weight W (in the shape of W) that the parts make at multiplier 1.
        size: the outputs of a weight that parts of these shapes go with, and its inputs times its window, where the
            parts tell both.
    """

    name: str
    needed: tuple[frozenset[str], ...]
    optional: frozenset[str]
    fits: Callable[[Shapes, Shape], bool]
    change: "Callable[[Parts, torch.Tensor], torch.Tensor]"
    size: Callable[[Shapes], tuple[int, int]] | None = None

    def has(self, parts: Collection[str]) -> bool:
        """Whether these parts make up this kind; a change of the bias may come along with any."""
        return any(needed <= set(parts) <= needed | self.optional | {"diff_b"} for needed in self.needed)

    def takes(self, shapes: Shapes, weight: Shape) -> bool:
        """Whether parts of these shapes make up this kind and go with a weight of this shape, and with its bias."""
        if not self.has(shapes) or not self.fits(shapes, weight):
            return False
        magnitudes = all(math.prod(shapes[name]) in weight[:2] for name in _MAGNITUDES if name in shapes)
        return magnitudes and all(math.prod(shapes[name]) == weight[0] for name in _BIAS_PARTS if name in shapes)


# ---------------------------------------------------------------------------------------------------------------------
# LoRA, LoCon, DyLoRA


def _scale(parts: "Parts", rank: int) -> float:
    """alpha / rank; no alpha (or 0, as LyCORIS reads it) means alpha = rank."""
    alpha = float(parts["alpha"]) if "alpha" in parts else 0.0
    return alpha / rank if alpha else 1.0


def low_rank_pair(parts: "Parts") -> "tuple[torch.Tensor, torch.Tensor]":
    """The scaled pair of a LoRA: down (rank, in[, k, k]) and up (out, rank), ΔW = up @ down.

    A Tucker core `lora_mid` (rank, rank, k, k) between 1×1 projections goes into down: the same rank, no third product.
    """
    import torch

    down, up = parts["lora_down"], parts["lora_up"].flatten(1)
    if "lora_mid" in parts:
        down = torch.einsum("nmkl,mi->nikl", parts["lora_mid"], down.flatten(1))
    return down, up * _scale(parts, up.shape[1])


def _lora_change(parts: "Parts", weight: "torch.Tensor") -> "torch.Tensor":
    down, up = low_rank_pair(parts)
    return (up @ down.flatten(1)).reshape(weight.shape)


def _lora_size(shapes: Shapes) -> tuple[int, int]:
    window = shapes["lora_mid"][2:] if "lora_mid" in shapes else ()
    return shapes["lora_up"][0], math.prod(shapes["lora_down"][1:]) * math.prod(window)


def _lora_fits(shapes: Shapes, weight: Shape) -> bool:
    down, up = shapes["lora_down"], shapes["lora_up"]
    return down[0] == math.prod(up[1:]) and _lora_size(shapes) == _rows_and_columns(weight)


def _rows_and_columns(weight: Shape) -> tuple[int, int]:
    return weight[0], math.prod(weight[1:])


# ---------------------------------------------------------------------------------------------------------------------
# LoHa: Hadamard product of two low-rank matrices


def _loha_factor(a: "torch.Tensor", b: "torch.Tensor", core: "torch.Tensor | None") -> "torch.Tensor":
    """a (out, r) @ b (r, n), or with a Tucker core (r, r, k, k): a (r, out), b (r, in) → (out, in, k, k)."""
    import torch

    return a @ b if core is None else torch.einsum("ijkl,ip,jr->prkl", core, a, b)


def _loha_change(parts: "Parts", weight: "torch.Tensor") -> "torch.Tensor":
    first, second = (
        _loha_factor(parts[f"hada_w{n}_a"], parts[f"hada_w{n}_b"], parts.get(f"hada_t{n}")) for n in (1, 2)
    )
    return _scale(parts, parts["hada_w1_b"].shape[0]) * (first * second).reshape(weight.shape)


def _loha_size(shapes: Shapes) -> tuple[int, int]:
    a, b = shapes["hada_w1_a"], shapes["hada_w1_b"]
    core = shapes.get("hada_t1")
    return (a[0], b[1]) if core is None else (a[1], b[1] * math.prod(core[2:]))


# ---------------------------------------------------------------------------------------------------------------------
# LoKr: Kronecker product


def _lokr_change(parts: "Parts", weight: "torch.Tensor") -> "torch.Tensor":
    import torch

    first = parts["lokr_w1"] if "lokr_w1" in parts else parts["lokr_w1_a"] @ parts["lokr_w1_b"]
    if "lokr_w2" in parts:
        second = parts["lokr_w2"]
    elif "lokr_t2" in parts:
        core, a, b = parts["lokr_t2"], parts["lokr_w2_a"], parts["lokr_w2_b"]
        second = torch.einsum("ijkl,ip,jr->prkl", core, a, b)
    else:
        a, b = parts["lokr_w2_a"], parts["lokr_w2_b"].flatten(1)
        second = (a @ b).unflatten(1, (-1, *weight.shape[2:]))  # (b, d[, k, k])
    ranks = [parts[name].shape[0] for name in ("lokr_w2_b", "lokr_w1_b") if name in parts]
    # two full factors have no rank, and alpha means nothing; PEFT scales them all the same
    scale = _scale(parts, ranks[0]) if ranks else float(parts.get("full_scale", 1.0))
    first = first.reshape(*first.shape, *[1] * (second.dim() - 2))
    return scale * torch.kron(first, second.contiguous()).reshape(weight.shape)


def _lokr_size(shapes: Shapes) -> tuple[int, int]:
    first = shapes.get("lokr_w1") or (shapes["lokr_w1_a"][0], shapes["lokr_w1_b"][1])
    if "lokr_w2" in shapes:
        second = shapes["lokr_w2"]
    elif "lokr_t2" in shapes:
        second = (shapes["lokr_w2_a"][1], shapes["lokr_w2_b"][1], *shapes["lokr_t2"][2:])
    else:
        second = (shapes["lokr_w2_a"][0], *shapes["lokr_w2_b"][1:])
    return first[0] * second[0], first[1] * math.prod(second[1:])


# ---------------------------------------------------------------------------------------------------------------------
# GLoRA: a low-rank pair, and another one that the weight itself goes through


def _glora_parts(parts: "Parts", outputs: int) -> "Parts":
    """The parts as W·a1·a2 + b1·b2 has them; the first files have each pair the other way round."""
    if parts["b1"].shape[0] == outputs:
        return parts
    swapped = {"a1": "a2", "a2": "a1", "b1": "b2", "b2": "b1"}
    return {name: parts[swapped.get(name, name)] for name in parts}


def _glora_change(parts: "Parts", weight: "torch.Tensor") -> "torch.Tensor":
    import torch

    parts = _glora_parts(parts, weight.shape[0])
    names = {"b2": "lora_down", "b1": "lora_up", "bm": "lora_mid", "alpha": "alpha"}
    own = _lora_change({names[name]: part for name, part in parts.items() if name in names}, weight)
    through = parts["a1"].flatten(1) @ parts["a2"].flatten(1)  # (in, in)
    return own + _scale(parts, parts["a2"].shape[0]) * torch.einsum("oi...,ij->oj...", weight, through)


def _glora_fits(shapes: Shapes, weight: Shape) -> bool:
    if len(weight) < 2 or any(len(shapes[name]) < 2 for name in ("a1", "a2", "b1", "b2")):
        return False
    pairs = {name: (shape[0], math.prod(shape[1:])) for name, shape in shapes.items() if len(shape) > 1}
    if pairs["b1"][0] != weight[0]:
        pairs |= {"a1": pairs["a2"], "a2": pairs["a1"], "b1": pairs["b2"], "b2": pairs["b1"]}
    (width, a_rank), (outputs, b_rank), window = pairs["a1"], pairs["b1"], math.prod(shapes.get("bm", ())[2:])
    inputs = (b_rank, math.prod(weight[1:]) // window)
    return outputs == weight[0] and width == weight[1] and pairs["a2"] == (a_rank, width) and pairs["b2"] == inputs


# ---------------------------------------------------------------------------------------------------------------------
# DoRA: any of the above with the weight's norm held apart


def decomposed(
    change: "torch.Tensor", weight: "torch.Tensor", magnitude: "torch.Tensor", *, by_output: bool = False
) -> "torch.Tensor":
    """ΔW of DoRA: W' = V · magnitude / ‖V‖ with V = W + `change`, the norm taken along all axes but the magnitude's.

    The magnitude is (out, 1[, 1, 1]) or a bare (out), or (1, in[, 1, 1]); `by_output` says that it is one for each
    output whatever its shape, as PEFT's of a convolution, (1, out, 1, 1), is.
    """
    direction = weight + change
    sizes = magnitude.shape if magnitude.dim() > 1 else (*magnitude.shape, 1)
    by_input = not by_output and sizes[0] == 1 and sizes[1] == weight.shape[1]
    kept = 1 if by_input or magnitude.numel() != weight.shape[0] else 0
    norm = direction.transpose(0, kept).flatten(1).norm(dim=1)
    shape = [1] * weight.dim()
    shape[kept] = -1
    return direction * (magnitude.flatten() / norm).reshape(shape) - weight


# ---------------------------------------------------------------------------------------------------------------------
# IA³, full differences, norms


def _ia3_change(parts: "Parts", weight: "torch.Tensor") -> "torch.Tensor":
    """W ∘ w along the inputs or the outputs."""
    shape = [1] * weight.dim()
    shape[1 if parts["on_input"].item() else 0] = -1
    return weight * parts["weight"].reshape(shape)


def _ia3_fits(shapes: Shapes, weight: Shape) -> bool:
    return len(weight) > 1 and math.prod(shapes["weight"]) in weight[:2]


def _difference(part: str) -> "Callable[[Parts, torch.Tensor], torch.Tensor]":
    return lambda parts, weight: parts[part].reshape(weight.shape)


def _same_size(part: str) -> Callable[[Shapes, Shape], bool]:
    return lambda shapes, weight: math.prod(shapes[part]) == math.prod(weight)


def _sized(size: Callable[[Shapes], tuple[int, int]]) -> Callable[[Shapes, Shape], bool]:
    return lambda shapes, weight: size(shapes) == _rows_and_columns(weight)


def _nothing(parts: "Parts", weight: "torch.Tensor") -> "torch.Tensor":
    """No change of the weight, where only the bias has one."""
    return weight.new_zeros(weight.shape)


# ---------------------------------------------------------------------------------------------------------------------


def _parts(*alternatives: str) -> tuple[frozenset[str], ...]:
    return tuple(frozenset(names.split()) for names in alternatives)


_DECOMPOSABLE = frozenset({"alpha", *_MAGNITUDES})
LORA = Kind(
    "LoRA", _parts("lora_down lora_up"), _DECOMPOSABLE | {"lora_mid", "up_bias"}, _lora_fits, _lora_change, _lora_size
)
LOHA = Kind(
    "LoHa",
    _parts("hada_w1_a hada_w1_b hada_w2_a hada_w2_b", "hada_w1_a hada_w1_b hada_w2_a hada_w2_b hada_t1 hada_t2"),
    _DECOMPOSABLE,
    _sized(_loha_size),
    _loha_change,
    _loha_size,
)
LOKR = Kind(
    "LoKr",
    _parts(
        *("lokr_w1 lokr_w2", "lokr_w1 lokr_w2_a lokr_w2_b", "lokr_w1_a lokr_w1_b lokr_w2"),
        *("lokr_w1_a lokr_w1_b lokr_w2_a lokr_w2_b",),
    ),
    _DECOMPOSABLE | {"lokr_t2", "full_scale"},
    _sized(_lokr_size),
    _lokr_change,
    _lokr_size,
)
GLORA = Kind("GLoRA", _parts("a1 a2 b1 b2"), frozenset({"alpha", "bm"}), _glora_fits, _glora_change)
IA3 = Kind("IA³", _parts("weight on_input"), frozenset(), _ia3_fits, _ia3_change)
OFT = Kind("OFT", _parts("oft_blocks"), frozenset({"alpha", "rescale"}), rotations.oft_fits, rotations.oft_change)
PEFT_OFT = Kind(
    "PEFT's OFT",
    _parts("oft_R"),
    frozenset({"oft_terms", "oft_bound"}),
    rotations.peft_oft_fits,
    rotations.peft_oft_change,
)
PEFT_BOFT = Kind(
    "PEFT's BOFT",
    _parts("boft_R boft_s", "oft_r oft_s"),
    frozenset(),
    rotations.peft_boft_fits,
    rotations.peft_boft_change,
)
FULL = Kind("full difference", _parts("diff"), frozenset({"diff_b"}), _same_size("diff"), _difference("diff"))
NORM = Kind("norm", _parts("w_norm"), frozenset({"b_norm"}), _same_size("w_norm"), _difference("w_norm"))
BIAS = Kind("bias difference", _parts("diff_b"), frozenset(), lambda shapes, weight: True, _nothing)
KINDS = (LORA, LOHA, LOKR, GLORA, IA3, OFT, PEFT_OFT, PEFT_BOFT, FULL, NORM, BIAS)


def weight_change(kind: Kind, parts: "Parts", weight: "torch.Tensor") -> "torch.Tensor":
    """ΔW of a weight at multiplier 1, in the type of the parts and the shape of the weight."""
    change = kind.change(parts, weight)
    magnitude = next((name for name in _MAGNITUDES if name in parts), None)
    if magnitude is None:
        return change
    return decomposed(change, weight, parts[magnitude], by_output=magnitude == "magnitude")


def bias_changes(parts: "Parts") -> "Iterator[torch.Tensor]":
    """What parts add to a layer's bias at multiplier 1, each (outputs)."""
    for name in _BIAS_PARTS:
        if name in parts:
            yield parts[name].flatten() * (_scale(parts, parts["lora_down"].shape[0]) if name == "up_bias" else 1.0)


def is_plain(parts: Collection[str]) -> bool:
    """Whether parts change the weight alone, and without holding its norm apart."""
    return not {*_MAGNITUDES, *_BIAS_PARTS} & set(parts)
