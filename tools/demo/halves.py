"""Two texts, each for one half of a picture: what Attention Couple does, as a lesson for the U-Net."""

from __future__ import annotations

import math
import random

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from torch.nn.functional import interpolate, scaled_dot_product_attention

from tools.demo.scenes import Scene, ground_words, name_thing


class HalvesAttention:
    """Attention in which each half of the picture may attend to a text of its own."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: None = None,
        halves: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend from a square picture (B, T, C) to its text (B, S, D), or to itself without one.

        With `halves` (B, 2, h, w), 1 where a text counts and 0 elsewhere, there are two texts a picture, (2B, S, D).
        """
        alone = encoder_hidden_states is None
        text = hidden_states if alone else encoder_hidden_states
        query, key, value = (
            x.unflatten(2, (attn.heads, -1)).transpose(1, 2)
            for x in (attn.to_q(hidden_states), attn.to_k(text), attn.to_v(text))
        )
        if halves is None or alone:
            attended = scaled_dot_product_attention(query, key, value)
        else:
            each = scaled_dot_product_attention(query.repeat_interleave(2, 0), key, value).unflatten(0, (-1, 2))
            side = math.isqrt(hidden_states.shape[1])
            shares = interpolate(halves, (side, side), mode="area").flatten(2)  # (B, 2, T)
            attended = (each * shares[:, :, None, :, None]).sum(1)
        return attn.to_out[0](attended.transpose(1, 2).flatten(2))


def allow_halves(unet: UNet2DConditionModel) -> None:
    """Let the U-Net take `cross_attention_kwargs={"halves": …}`; without them it computes what it always did."""
    unet.set_attn_processor(HalvesAttention())


def halves_words(rng: random.Random, scene: Scene) -> list[str]:
    """A text for each of two objects, without a place; both name the ground, or none does."""
    ground = f", {ground_words(rng, scene.ground)}" if rng.random() < 0.5 else ""
    return [name_thing(rng, thing) + ground for thing in scene.things]


def halves_masks(scenes: list[Scene], side: int = 16) -> torch.Tensor:
    """Where each object's half is, (scenes, 2, side, side) of 0 and 1."""
    masks = torch.zeros(len(scenes), 2, side, side)
    for scene, pair in zip(scenes, masks):
        for thing, mask in zip(scene.things, pair):
            rows, columns = slice(None), slice(None)
            if thing.place in ("left", "right"):
                columns = slice(side // 2) if thing.place == "left" else slice(side // 2, None)
            else:
                rows = slice(side // 2) if thing.place == "top" else slice(side // 2, None)
            mask[rows, columns] = 1
    return masks
