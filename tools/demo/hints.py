"""What encoders are asked beside their own task: what stands where.

Left to the noise's error, or to telling captions apart, a place, which matters only together with a position, and the
binding of colours and shapes to places stay drowned by the colours alone for thousands of steps. The answers are
fixed directions of the embedding, so nothing is added to a model.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch.nn.functional import cross_entropy

from tools.demo.scenes import GROUND_COLOURS, OBJECT_COLOURS, PLACES, SHAPES, Caption, Scene

NOTHING = len(OBJECT_COLOURS)  # the colour of a place where no object is
ANSWERS = NOTHING + 1 + len(SHAPES)
UNTOLD = -1
NOTHING_TOLD = [(UNTOLD, UNTOLD)] * len(PLACES)


def told(scene: Scene, said: Caption) -> list[tuple[int, int]]:
    """For each of PLACES the indices of the colour and the shape that the text puts there."""
    if not all(said.says_place):
        return NOTHING_TOLD
    there = {t.place: (OBJECT_COLOURS.index(t.colour), SHAPES.index(t.shape)) for t in scene.things}
    return [there.get(place, (NOTHING, UNTOLD)) for place in PLACES]


@lru_cache(maxsize=2)
def directions(width: int, count: int) -> torch.Tensor:
    """Orthogonal directions, (count, width)."""
    return torch.linalg.qr(torch.randn(width, count, generator=torch.Generator().manual_seed(0)))[0].T


def errors(scores: torch.Tensor, answers: torch.Tensor) -> torch.Tensor:
    """Cross entropies of colour and shape together: scores (…, ANSWERS), answers (…, 2) → (…), 0 where untold."""
    colours, shapes = scores.split((NOTHING + 1, len(SHAPES)), dim=-1)
    of_colour, of_shape = (
        cross_entropy(s.flatten(0, -2), a.flatten(), ignore_index=UNTOLD, reduction="none")
        for s, a in ((colours, answers[..., 0]), (shapes, answers[..., 1]))
    )
    return (of_colour + of_shape).view(answers.shape[:-1])


def token_errors(text: torch.Tensor, behind: torch.Tensor, answers: torch.Tensor) -> torch.Tensor:
    """How wrong the tokens behind texts, end and padding, are: they take turns to answer for one of PLACES each.

    Args:
        text: embeddings (B, n, width).
        behind: which tokens are behind the text, (B, n) bool.
        answers: what `told` says, (B, places, 2).

    Returns the mean of each text, (B).
    """
    turns = torch.arange(text.shape[1]) % len(PLACES)
    wrong = errors(text @ directions(text.shape[-1], ANSWERS).T, answers[:, turns])
    return (wrong * behind).sum(1) / behind.sum(1).clamp(min=1)


def whole_errors(pooled: torch.Tensor, grounds: torch.Tensor, answers: torch.Tensor) -> torch.Tensor:
    """How wrong one embedding each, (B, width), is about the ground (B), or UNTOLD, and all of PLACES: (B)."""
    ground, places = len(GROUND_COLOURS), len(PLACES)
    scores = pooled @ directions(pooled.shape[-1], ground + places * ANSWERS).T
    ground_error = cross_entropy(scores[:, :ground], grounds, ignore_index=UNTOLD, reduction="none")
    return ground_error + errors(scores[:, ground:].unflatten(1, (places, ANSWERS)), answers).sum(1)


def patch_answers(scene: Scene, side: int) -> list[tuple[int, int]]:
    """The colour and the shape of the object in whose box the middle of each of side×side patches is, row by row."""
    answers = []
    for row in range(side):
        for column in range(side):
            x, y = (column + 0.5) / side, (row + 0.5) / side
            inside = [t for t in scene.things if max(abs(x - t.x), abs(y - t.y)) < t.radius]
            known = [(OBJECT_COLOURS.index(t.colour), SHAPES.index(t.shape)) for t in inside]
            answers.append(known[0] if known else (NOTHING, UNTOLD))
    return answers


def patch_errors(patches: torch.Tensor, answers: torch.Tensor) -> torch.Tensor:
    """How wrong the tokens of a picture's patches (B, patches, width) are about `patch_answers`: (B, patches)."""
    return errors(patches @ directions(patches.shape[-1], ANSWERS).T, answers)
