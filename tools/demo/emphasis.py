"""Weights on words, written and applied as the program does: a lesson for the text encoder and the U-Net.

A text of this world names each thing once, and what the tokens behind it hold carries no weight. Without lessons a
weight on a colour therefore changes little: the picture follows the tokens that nobody can weight.
"""

from __future__ import annotations

import random
import re

import torch

from library.plan.tokens import PromptTokens, WeightedTokens
from tools.demo.scenes import OBJECT_COLOURS, SHAPES, Scene

HEAVY, LIGHT = (1.2, 1.8), (0.2, 0.8)
RIVALS = 0.7  # share of texts in which two colours, or two shapes, stand before one place


def emphasised(rng: random.Random, scene: Scene, text: str) -> str:
    """The text with a weight on a word of one object; often a lighter rival, which is not in the picture, beside it."""
    thing = rng.choice(scene.things)
    word, kind = rng.choice(((thing.colour, OBJECT_COLOURS), (thing.shape, SHAPES)))
    if rng.random() >= RIVALS:
        weighted = f"({word}:{rng.uniform(LIGHT[1], HEAVY[1]):.2f})"
    else:
        present = {scene.ground, *(t.colour for t in scene.things), *(t.shape for t in scene.things)}
        rival = rng.choice([w for w in kind if w not in present])
        pair = [f"({word}:{rng.uniform(*HEAVY):.2f})", f"({rival}:{rng.uniform(*LIGHT):.2f})"]
        weighted = rng.choice((" ", " and ")).join(rng.sample(pair, 2))
    return re.sub(rf"\b{word}\b", weighted, text, count=1)


def padded(prompts: PromptTokens, texts: list[WeightedTokens], length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids with begin, end and padding, and their weights: (texts, length) each; what is too long is cut off."""
    ids = torch.full((len(texts), length), prompts.pads[0])
    weights = torch.ones(ids.shape)
    ids[:, 0] = prompts.begin
    for row, its_weights, text in zip(ids, weights, texts):
        end = 1 + min(len(text.ids), length - 2)
        row[1:end] = torch.tensor(text.ids[: end - 1])
        row[end] = prompts.end
        its_weights[1:end] = torch.tensor(text.weights[: end - 1])
    return ids, weights
