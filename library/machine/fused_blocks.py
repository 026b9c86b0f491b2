"""A model's blocks on a CPU, with what is small computed along with what is large.

Diffusers' blocks go through their features once more for each activation, product and sum, and bring transformers'
results into another order: an eighth of XL's U-Net with AMX. oneDNN does some of that where it writes a layer's
results, and others overwrite what nothing else reads. The results are the same, but for where they are rounded.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.activations import GEGLU
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import nn

from library.machine.packed_layers import WHOLE, PackedForward, Parts, others_act_at, plus

Module = Any  # one of diffusers'; type checkers take parts of modules for tensors


def fuse_blocks(model: nn.Module) -> None:
    """Let a model's blocks compute as told above. Gradients cannot be taken any more.

    Args:
        model: a U-Net, ControlNet or VAE, on the CPU; see `packed_layers.can_pack`.
    """
    blocks: list[Module] = list(model.modules())
    for block in blocks:
        if isinstance(block, Transformer2DModel) and block.is_input_continuous:
            vars(block)["_get_output_for_continuous_inputs"] = partial(_transformer_output, block)
        elif isinstance(block, BasicTransformerBlock) and _is_plain_transformer(block):
            vars(block)["forward"] = partial(_transformer_block, block)
        elif isinstance(block, ResnetBlock2D) and _is_plain_resnet(block):
            vars(block)["forward"] = partial(_resnet, block)


def feed_forward_parts(model: nn.Module) -> dict[nn.Module, Parts]:
    """How to pack a model's feed-forward layers for gating at once: in parts as wide as their blocks.

    Features of a part then stay in the processor's cache, and oneDNN multiplies such matrices faster than larger ones.
    """
    blocks: list[Module] = list(model.modules())
    parts = {}
    for net in (block.ff.net for block in blocks if _has_gate(block)):
        gate, out = net[0].proj, net[2]
        number = out.in_features // out.out_features
        parts |= {gate: Parts(2 * number), out: Parts(number, of_inputs=True)}
    return parts


def _has_gate(block: Module) -> bool:
    return isinstance(block, BasicTransformerBlock) and type(block.ff.net[0]) is GEGLU


def _is_plain_transformer(block: Module) -> bool:
    """Whether it is of the kind that U-Nets have; diffusers has others by this name."""
    plain = block.norm_type == "layer_norm" and block.pos_embed is None and not block.only_cross_attention
    return plain and block.attn2 is not None and _has_gate(block)


def _is_plain_resnet(block: Module) -> bool:
    told = block.time_embedding_norm == "default" and not block.skip_time_act
    resized = block.upsample is not None or block.downsample is not None
    return told and not resized and block.output_scale_factor == 1 and isinstance(block.nonlinearity, nn.SiLU)


def _transformer_output(
    model: Module,
    hidden_states: torch.Tensor,
    residual: torch.Tensor,
    batch_size: int,
    height: int,
    width: int,
    inner_dim: int,
) -> torch.Tensor:
    """(B, h * w, C) and what the transformer began with, (B, C, h, w) → likewise; channels stay last in memory."""
    if model.use_linear_projection:
        tokens = plus(model.proj_out, hidden_states, residual.movedim(1, -1).flatten(1, 2))
        return tokens.unflatten(1, (height, width)).movedim(-1, 1)
    return plus(model.proj_out, hidden_states.unflatten(1, (height, width)).movedim(-1, 1), residual)


def _transformer_block(
    block: Module,
    x: torch.Tensor,
    attention_mask: None = None,
    encoder_hidden_states: object = None,
    **unused: object,
) -> torch.Tensor:
    """(B, T, C) → likewise; the text as `draw.attention.AttentionProcessor` takes it."""
    x = _attended(block.attn1, block.norm1(x), None, x)
    x = _attended(block.attn2, block.norm2(x), encoder_hidden_states, x)
    normed, (gate, _, out) = block.norm3(x), block.ff.net
    layers = gate.proj.forward, out.forward
    packed = all(isinstance(each, PackedForward) for each in layers)
    if not packed or layers[0].parts == WHOLE or any(map(others_act_at, (block.ff, gate, gate.proj, out))):
        return block.ff(normed) + x
    return layers[1].summed(layers[0].gated(normed), x)


def _attended(layer: Module, x: torch.Tensor, text: object, added: torch.Tensor) -> torch.Tensor:
    """(B, T, C), the text, and what is added, likewise → likewise"""
    if others_act_at(layer) or not getattr(layer.processor, "adds", False):  # others' processors do not know of it
        return layer(x, encoder_hidden_states=text) + added
    return layer(x, encoder_hidden_states=text, added=added)


def _resnet(block: Module, x: torch.Tensor, temb: Any, *unused: object) -> torch.Tensor:
    """(B, C, h, w), and what the block is told of the time, (B, E) → (B, C', h, w)"""
    h = block.conv1(F.silu(block.norm1(x), inplace=True))
    if block.time_emb_proj is not None:
        h += block.time_emb_proj(F.silu(temb))[..., None, None]
    shortcut = x if block.conv_shortcut is None else block.conv_shortcut(x)
    return plus(block.conv2, F.silu(block.norm2(h), inplace=True), shortcut)
