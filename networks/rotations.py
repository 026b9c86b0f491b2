"""Relatives of LoRA that rotate what a layer gives or takes: OFT and BOFT, as LyCORIS and PEFT write them.

Sources: OFT https://arxiv.org/abs/2306.07280, BOFT https://arxiv.org/abs/2311.06243; how rows and columns are taken is
theirs who train them, LyCORIS and PEFT.
"""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    Parts = Mapping[str, torch.Tensor]

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]


def _cayley(skew: "torch.Tensor") -> "torch.Tensor":
    """The rotations (I + Q)(I − Q)⁻¹ of skew-symmetric Q (…, size, size)."""
    import torch

    identity = torch.eye(skew.shape[-1], dtype=skew.dtype, device=skew.device)
    return torch.linalg.solve(identity - skew, identity + skew, left=False)


def oft_change(parts: "Parts", weight: "torch.Tensor") -> "torch.Tensor":
    """A rotation of each block of outputs by the Cayley transform R of Q = B − Bᵀ.

    Output j of a block becomes Σᵢ R[i, j]·(output i), as LyCORIS and sd-scripts train it. As there, a positive alpha
    bounds Q's norm to alpha · outputs, and `rescale` stretches each output afterwards. With a fourth axis it is a BOFT:
    several rotations one after the other, of outputs that stand ever farther apart.
    """
    blocks = parts["oft_blocks"]  # ([stages,] blocks, size, size)
    skew = blocks - blocks.transpose(-1, -2)
    limit = float(parts["alpha"]) * weight.shape[0] if "alpha" in parts else 0.0
    if limit > 0 and (norm := skew.norm()) > limit:
        skew = skew * (limit / norm)
    rotations = _cayley(skew)
    if blocks.dim() == 3:
        grouped = weight.flatten(1).unflatten(0, blocks.shape[:2])  # (blocks, size, inputs)
        rotated = (rotations.transpose(1, 2) @ grouped).reshape(weight.shape)
    else:
        rotated = _butterfly(rotations, weight.flatten(1)).reshape(weight.shape)
    if "rescale" in parts:
        rotated = rotated * parts["rescale"].reshape(-1, *[1] * (weight.dim() - 1))
    return rotated - weight


def _butterfly(rotations: "torch.Tensor", rows: "torch.Tensor") -> "torch.Tensor":
    """Rows (outputs, n) rotated in stages: a block of the i-th one takes each 2ⁱ·size/2-th row of a longer stretch."""
    for stage, blocks in enumerate(rotations):
        distance = 2**stage * blocks.shape[1] // 2
        paired = rows.unflatten(0, (-1, 2, distance)).transpose(1, 2)  # (stretches, distance, 2, n)
        turned = blocks @ paired.flatten(0, 2).unflatten(0, blocks.shape[:2])
        rows = turned.flatten(0, 1).unflatten(0, paired.shape[:3]).transpose(1, 2).flatten(0, 2)
    return rows


def oft_fits(shapes: Shapes, weight: Shape) -> bool:
    """Whether the blocks make up the outputs."""
    *stages, blocks, rows, columns = shapes["oft_blocks"] if len(shapes["oft_blocks"]) > 2 else (0, 0, 1)
    if rows != columns or blocks * rows != weight[0] or len(stages) > 1:
        return False
    return not stages or (rows % 2 == 0 and weight[0] % (2 ** (stages[0] - 1) * rows) == 0)


def peft_oft_change(parts: "Parts", weight: "torch.Tensor") -> "torch.Tensor":
    """PEFT's OFT: each block of inputs rotated, W' = W·Rᵀ, by a Q that is held as the numbers above its diagonal.

    R is (I − Q)(I + Q)⁻¹ where `oft_terms` is 0, else so many terms of the other way round, I + 2Q + 2Q² + … + Qⁿ⁻¹.
    """
    import torch

    held = parts["oft_R"]  # (blocks, size · (size − 1) / 2); a single block is every block
    size = _block_size(held.shape[1])
    skew = held.new_zeros(len(held), size, size)
    rows, columns = torch.triu_indices(size, size, 1, device=held.device)
    skew[:, rows, columns] = held
    skew = skew - skew.transpose(1, 2)
    if "oft_bound" in parts:  # on each block's norm
        skew = skew * (float(parts["oft_bound"]) / skew.norm(dim=(1, 2), keepdim=True)).clamp(max=1.0)
    terms = int(parts["oft_terms"]) if "oft_terms" in parts else _PEFT_OFT_TERMS
    rotations = _cayley_series(skew, terms) if terms else _cayley(-skew)
    grouped = weight.flatten(1).unflatten(1, (-1, size))  # (outputs, blocks, size)
    rotated = torch.einsum("obc,brc->obr", grouped, rotations.expand(grouped.shape[1], -1, -1))
    return rotated.reshape(weight.shape) - weight


_PEFT_OFT_TERMS = 5  # where its configuration says nothing


def _cayley_series(skew: "torch.Tensor", terms: int) -> "torch.Tensor":
    """The first terms of (I + Q)(I − Q)⁻¹ as PEFT counts them: with two of them the last one has its whole factor."""
    import torch

    powers = [torch.linalg.matrix_power(skew, n) for n in range(terms if terms < 3 else max(terms, 4))]
    factors = [1, *[2] * (len(powers) - 1)]
    if terms > 2:
        factors[-1] = 1
    return torch.stack([factor * power for factor, power in zip(factors, powers)]).sum(0)


def _block_size(numbers: int) -> int:
    """How large a block is of which so many numbers stand above the diagonal."""
    return (1 + math.isqrt(1 + 8 * numbers)) // 2


def peft_oft_fits(shapes: Shapes, weight: Shape) -> bool:
    """Whether the blocks make up the inputs."""
    if len(shapes["oft_R"]) != 2 or len(weight) < 2:
        return False
    blocks, numbers = shapes["oft_R"]
    size, inputs = _block_size(numbers), math.prod(weight[1:])
    return size * (size - 1) // 2 == numbers and (blocks * size == inputs or (blocks == 1 and inputs % size == 0))


# ---------------------------------------------------------------------------------------------------------------------
# PEFT's BOFT, and its OFT from before the one above


def peft_boft_change(parts: "Parts", weight: "torch.Tensor") -> "torch.Tensor":
    """Inputs rotated in stages, and outputs stretched: W' = s·W·(Bₘ…B₁)ᵀ; OFT is a single stage.

    A block of stage i takes every 2ⁱ-th piece, of half its size, of a longer stretch of inputs. Its rotation is
    (I − Q)(I + Q)⁻¹ with Q = (B − Bᵀ) / 2.
    """
    import torch

    held, stretch = (parts[name] for name in (("boft_R", "boft_s") if "boft_R" in parts else ("oft_r", "oft_s")))
    blocks = held if held.dim() == 4 else held[None]  # (stages, blocks, size, size)
    size, columns = blocks.shape[-1], weight.flatten(1)
    for stage, rotations in enumerate(_cayley((blocks.transpose(-1, -2) - blocks) / 2)):
        # what belongs together stands behind each other first, and pieces are exchanged from the second stage on
        pieces = columns.unflatten(1, (-1, 2, 2**stage, size // 2) if stage else (-1, 1, 1, size)).transpose(2, 3)
        grouped = pieces.flatten(1).unflatten(1, (-1, size))  # (outputs, blocks, size)
        every = rotations.expand(grouped.shape[1], -1, -1)
        turned = torch.einsum("obc,brc->obr", grouped, every)
        columns = turned.reshape(pieces.shape).transpose(2, 3).flatten(1)
    return (columns * stretch.reshape(-1, 1)).reshape(weight.shape) - weight


def peft_boft_fits(shapes: Shapes, weight: Shape) -> bool:
    """Whether the blocks make up the inputs, and there is a factor for each output."""
    held, stretch = (shapes[name] for name in (("boft_R", "boft_s") if "boft_R" in shapes else ("oft_r", "oft_s")))
    if len(held) < 3 or len(weight) < 2 or held[-1] != held[-2] or math.prod(stretch) != weight[0]:
        return False
    blocks, size, inputs = held[-3], held[-1], math.prod(weight[1:])
    stages = held[0] if len(held) == 4 else 1
    if blocks * size != inputs and not (blocks == 1 and inputs % max(size, 1) == 0):
        return False
    return stages == 1 or (size % 2 == 0 and inputs % (size * 2 ** (stages - 1)) == 0)
