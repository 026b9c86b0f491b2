"""LoRA and its relatives: which parts each has in a file, which layer they fit, and how they change its weight.

One table, `KINDS`. A network's multiplier m scales every change: the layer computes with W + m·ΔW. Parts come as
tensors of the type to compute in (float32 in use, float64 in tests), so nothing is rounded before the end. Torch is
imported only where it computes, so that headers can be checked without it.

Sources: LoRA https://arxiv.org/abs/2106.09685, LoHa https://arxiv.org/abs/2108.06098, LoKr and the Tucker forms
https://arxiv.org/abs/2309.14859, DoRA https://arxiv.org/abs/2402.09353, IA³ https://arxiv.org/abs/2205.05638, OFT
https://arxiv.org/abs/2306.07280.
"""

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    Parts = Mapping[str, torch.Tensor]

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]


@dataclass(frozen=True)
class Kind:
    """One relative of LoRA.

    Args:
        name: what people call it.
        needed: alternatives of parts, one of which is there in full.
        optional: parts that may come along.
        fits: whether parts of these shapes go with a weight of this shape.
        change: the change ΔW of a weight W (in the shape of W) that the parts make at multiplier 1.
    """

    name: str
    needed: tuple[frozenset[str], ...]
    optional: frozenset[str]
    fits: Callable[[Shapes, Shape], bool]
    change: "Callable[[Parts, torch.Tensor], torch.Tensor]"

    def has(self, parts: Collection[str]) -> bool:
        """Whether these parts make up this kind."""
        return any(needed <= set(parts) <= needed | self.optional for needed in self.needed)


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


def _lora_fits(shapes: Shapes, weight: Shape) -> bool:
    down, up = shapes["lora_down"], shapes["lora_up"]
    window = shapes["lora_mid"][2:] if "lora_mid" in shapes else ()
    inputs = math.prod(down[1:]) * math.prod(window)
    return up[0] == weight[0] and down[0] == math.prod(up[1:]) and inputs == math.prod(weight[1:])


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


def _loha_fits(shapes: Shapes, weight: Shape) -> bool:
    a, b = shapes["hada_w1_a"], shapes["hada_w1_b"]
    core = shapes.get("hada_t1")
    outputs, inputs = (a[0], b[1]) if core is None else (a[1], b[1] * math.prod(core[2:]))
    return (outputs, inputs) == (weight[0], math.prod(weight[1:]))


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
    scale = _scale(parts, ranks[0]) if ranks else 1.0  # two full factors have no rank, and alpha means nothing
    first = first.reshape(*first.shape, *[1] * (second.dim() - 2))
    return scale * torch.kron(first, second.contiguous()).reshape(weight.shape)


def _lokr_fits(shapes: Shapes, weight: Shape) -> bool:
    first = shapes.get("lokr_w1") or (shapes["lokr_w1_a"][0], shapes["lokr_w1_b"][1])
    if "lokr_w2" in shapes:
        second = shapes["lokr_w2"]
    elif "lokr_t2" in shapes:
        second = (shapes["lokr_w2_a"][1], shapes["lokr_w2_b"][1], *shapes["lokr_t2"][2:])
    else:
        second = (shapes["lokr_w2_a"][0], *shapes["lokr_w2_b"][1:])
    return first[0] * second[0] == weight[0] and first[1] * math.prod(second[1:]) == math.prod(weight[1:])


# ---------------------------------------------------------------------------------------------------------------------
# DoRA: any of the above with the weight's norm held apart


def decomposed(change: "torch.Tensor", weight: "torch.Tensor", magnitude: "torch.Tensor") -> "torch.Tensor":
    """ΔW of DoRA: W' = V · magnitude / ‖V‖ with V = W + `change`, the norm taken along all axes but the magnitude's.

    The magnitude is (out, 1[, 1, 1]) or a bare (out), or (1, in[, 1, 1]).
    """
    direction = weight + change
    per_input = magnitude.dim() > 1 and magnitude.shape[0] == 1 and magnitude.shape[1] == weight.shape[1]
    kept = 1 if per_input else 0
    norm = direction.transpose(0, kept).flatten(1).norm(dim=1)
    shape = [1] * weight.dim()
    shape[kept] = -1
    return direction * (magnitude.flatten() / norm).reshape(shape) - weight


# ---------------------------------------------------------------------------------------------------------------------
# IA³, OFT, full differences, norms


def _ia3_change(parts: "Parts", weight: "torch.Tensor") -> "torch.Tensor":
    """W ∘ w along the inputs or the outputs."""
    shape = [1] * weight.dim()
    shape[1 if parts["on_input"].item() else 0] = -1
    return weight * parts["weight"].reshape(shape)


def _ia3_fits(shapes: Shapes, weight: Shape) -> bool:
    return len(weight) > 1 and math.prod(shapes["weight"]) in weight[:2]


def _oft_change(parts: "Parts", weight: "torch.Tensor") -> "torch.Tensor":
    """A rotation of each block of outputs by the Cayley transform R = (I + Q)(I − Q)⁻¹ of Q = B − Bᵀ.

    Output j of a block becomes Σᵢ R[i, j]·(output i), as LyCORIS and sd-scripts train it. As there, a positive alpha
    bounds Q's norm to alpha · outputs, and `rescale` stretches each output afterwards.
    """
    import torch

    blocks = parts["oft_blocks"]  # (blocks, size, size)
    skew = blocks - blocks.transpose(1, 2)
    limit = float(parts["alpha"]) * weight.shape[0] if "alpha" in parts else 0.0
    if limit > 0 and (norm := skew.norm()) > limit:
        skew = skew * (limit / norm)
    identity = torch.eye(blocks.shape[1], dtype=skew.dtype, device=skew.device)
    rotation = torch.linalg.solve(identity - skew, identity + skew, left=False)
    grouped = weight.flatten(1).unflatten(0, blocks.shape[:2])  # (blocks, size, inputs)
    rotated = (rotation.transpose(1, 2) @ grouped).reshape(weight.shape)
    if "rescale" in parts:
        rotated = rotated * parts["rescale"].reshape(-1, *[1] * (weight.dim() - 1))
    return rotated - weight


def _oft_fits(shapes: Shapes, weight: Shape) -> bool:
    blocks = shapes["oft_blocks"]
    return len(blocks) == 3 and blocks[1] == blocks[2] and blocks[0] * blocks[1] == weight[0]


def _difference(part: str) -> "Callable[[Parts, torch.Tensor], torch.Tensor]":
    return lambda parts, weight: parts[part].reshape(weight.shape)


def _same_size(part: str) -> Callable[[Shapes, Shape], bool]:
    return lambda shapes, weight: math.prod(shapes[part]) == math.prod(weight)


# ---------------------------------------------------------------------------------------------------------------------


def _parts(*alternatives: str) -> tuple[frozenset[str], ...]:
    return tuple(frozenset(names.split()) for names in alternatives)


_DECOMPOSABLE = frozenset({"alpha", "dora_scale"})
LORA = Kind("LoRA", _parts("lora_down lora_up"), _DECOMPOSABLE | {"lora_mid"}, _lora_fits, _lora_change)
LOHA = Kind(
    "LoHa",
    _parts("hada_w1_a hada_w1_b hada_w2_a hada_w2_b", "hada_w1_a hada_w1_b hada_w2_a hada_w2_b hada_t1 hada_t2"),
    _DECOMPOSABLE,
    _loha_fits,
    _loha_change,
)
LOKR = Kind(
    "LoKr",
    _parts(
        *("lokr_w1 lokr_w2", "lokr_w1 lokr_w2_a lokr_w2_b", "lokr_w1_a lokr_w1_b lokr_w2"),
        *("lokr_w1_a lokr_w1_b lokr_w2_a lokr_w2_b",),
    ),
    _DECOMPOSABLE | {"lokr_t2"},
    _lokr_fits,
    _lokr_change,
)
IA3 = Kind("IA³", _parts("weight on_input"), frozenset(), _ia3_fits, _ia3_change)
OFT = Kind("OFT", _parts("oft_blocks"), frozenset({"alpha", "rescale"}), _oft_fits, _oft_change)
FULL = Kind("full difference", _parts("diff"), frozenset({"diff_b"}), _same_size("diff"), _difference("diff"))
NORM = Kind("norm", _parts("w_norm"), frozenset({"b_norm"}), _same_size("w_norm"), _difference("w_norm"))
KINDS = (LORA, LOHA, LOKR, IA3, OFT, FULL, NORM)

BIAS_PARTS = ("diff_b", "b_norm")  # what is added to a layer's bias


def weight_change(kind: Kind, parts: "Parts", weight: "torch.Tensor") -> "torch.Tensor":
    """ΔW of a weight at multiplier 1, in the type of the parts and the shape of the weight."""
    change = kind.change(parts, weight)
    return decomposed(change, weight, parts["dora_scale"]) if "dora_scale" in parts else change
