"""The U-Net's attention: a kernel of the machine's, with cross-attention's keys and values kept over the steps."""

import itertools
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from diffusers import ControlNetModel, ControlNetUnionModel, UNet2DConditionModel
from diffusers.models.attention_processor import Attention

from library.draw.text_conditions import TextConditions, xti_layer
from library.machine.attention import AttentionKernel
from library.machine.packed_layers import plus

AttendingModel = UNet2DConditionModel | ControlNetModel | ControlNetUnionModel

_numbers = itertools.count()  # of processors


class AttentionProcessor:
    """How one attention layer of the U-Net computes.

    The text does not change while a batch is denoised, so cross-attention takes the keys and values that `keep_text`
    has made of it, and makes its own of a text without them.

    Args:
        kernel: computes the attention.
        layer: the name of a cross-attention among those that may have a text of their own, else None.
    """

    adds = True  # what it is given as `added`

    def __init__(self, kernel: AttentionKernel, layer: str | None = None) -> None:
        self.kernel = kernel
        self.layer = layer
        self.number = next(_numbers)

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: TextConditions | None = None,
        attention_mask: None = None,
        added: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend from `hidden_states` (B, T, C) to the text (B, S, D), or to themselves without one; plus `added`.

        With regions the text has rows for each part of the prompt, see `regions.Regions`.
        Diffusers passes `attention_mask`; the U-Nets of Stable Diffusion have none.
        """
        query = _heads(attn, attn.to_q(hidden_states))
        if encoder_hidden_states is None:
            key, value = _keys_and_values(attn, hidden_states)
            return _output(attn, self.kernel(query, key, value), added)
        text, regions = encoder_hidden_states, encoder_hidden_states.regions
        kept = text.kept.get(self.number)
        key, value = _keys_and_values(attn, text.for_layer(self.layer)) if kept is None else kept
        if regions is None:
            return _output(attn, self.kernel(query, key, value), added)
        attended = self.kernel(regions.spread(query), key, value)
        average = regions.average(_output(attn, attended, None))
        return average if added is None else average + added


def _keys_and_values(attn: Attention, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return _heads(attn, attn.to_k(states)), _heads(attn, attn.to_v(states))


def _output(attn: Attention, attended: torch.Tensor, added: torch.Tensor | None) -> torch.Tensor:
    layer, attended = attn.to_out[0], attended.flatten(2)
    return layer(attended) if added is None else plus(layer, attended, added)


def _heads(attn: Attention, x: torch.Tensor) -> torch.Tensor:
    return x.unflatten(2, (attn.heads, -1))  # (B, T, heads, size)


def use_kernel(model: AttendingModel, kernel: AttentionKernel) -> None:
    """Give every attention layer of a model a processor of its own."""
    model.set_attn_processor({name: AttentionProcessor(kernel, xti_layer(name)) for name in model.attn_processors})


def keep_text(text: TextConditions, *models: AttendingModel) -> TextConditions:
    """The text with the keys and values that the models' cross-attentions make of it, for all steps to come."""
    kept = {
        layer.processor.number: _keys_and_values(layer, text.for_layer(layer.processor.layer))
        for model in models
        for layer in _cross_attentions(model)
    }
    return replace(text, kept=kept)


_found: WeakKeyDictionary[AttendingModel, list[Any]] = WeakKeyDictionary()


def _cross_attentions(model: AttendingModel) -> list[Any]:
    """A model's cross-attentions (`Attention`), looked for once: that goes through all of its modules."""
    if model not in _found:
        _found[model] = [layer for path, layer in model.named_modules() if path.endswith(".attn2")]
    return _found[model]
