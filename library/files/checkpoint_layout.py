"""How the original Stable Diffusion checkpoints name what diffusers and transformers name otherwise, and what their
tensors' shapes tell of the model's sizes. Pure data: names and shapes, no weights, no torch.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

Shapes = Mapping[str, tuple[int, ...]]

# Of a U-Net's configuration, beside diffusers' own: by how many each level's blocks are counted on. It is one more than
# the level has layers, but Diffusers' conversion counts by three where there is one layer, too, and leaves gaps.
BLOCKS_PER_LEVEL = "original_blocks_per_level"
UNET_PREFIX = "model.diffusion_model."
VAE_PREFIX = "first_stage_model."
CONTROL_PREFIX = "control_model."

# Parts of a residual block: diffusers' name → the original's
UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_VAE_RESNET = {"norm1": "norm1", "conv1": "conv1", "norm2": "norm2", "conv2": "conv2", "conv_shortcut": "nin_shortcut"}
# Parts of the VAE's attention: today's name → those of the original and of older diffusers files
VAE_ATTENTION = {
    "group_norm": ("norm", "group_norm"),
    "to_q": ("q", "query"),
    "to_k": ("k", "key"),
    "to_v": ("v", "value"),
    "to_out.0": ("proj_out", "proj_attn"),
}
# OpenCLIP's text transformer: transformers' name → OpenCLIP's
_OPENCLIP_TOP = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
}
_OPENCLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
# OpenCLIP's projection of the pooled vector, which stands transposed in its files: it is multiplied from the right
TEXT_PROJECTION = "text_projection.weight"
OPENCLIP_PROJECTION = "text_projection"
_STACKED = ("q_proj", "k_proj", "v_proj")  # in this order in OpenCLIP's in_proj


def unet_modules(config: Mapping) -> dict[str, str]:
    """Map the U-Net's module paths from diffusers' to the original's (without `UNET_PREFIX`).

    Attention blocks map as a whole: inside them both name things alike.
    """
    levels, layers = len(config["block_out_channels"]), config["layers_per_block"]
    stride = config.get(BLOCKS_PER_LEVEL) or layers + 1
    names = {
        "conv_in": "input_blocks.0.0",
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "add_embedding.linear_1": "label_emb.0.0",
        "add_embedding.linear_2": "label_emb.0.2",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
    }

    def resnet(path: str, original: str) -> None:
        names.update({f"{path}.{part}": f"{original}.{name}" for part, name in UNET_RESNET.items()})

    for level in range(levels):
        for layer in range(layers):
            block = 1 + level * stride + layer
            resnet(f"down_blocks.{level}.resnets.{layer}", f"input_blocks.{block}.0")
            names[f"down_blocks.{level}.attentions.{layer}"] = f"input_blocks.{block}.1"
        names[f"down_blocks.{level}.downsamplers.0.conv"] = f"input_blocks.{(level + 1) * stride}.0.op"
        for layer in range(layers + 1):
            block = level * stride + layer
            resnet(f"up_blocks.{level}.resnets.{layer}", f"output_blocks.{block}.0")
            names[f"up_blocks.{level}.attentions.{layer}"] = f"output_blocks.{block}.1"
        place = 2 if "CrossAttn" in config["up_block_types"][level] else 1
        names[f"up_blocks.{level}.upsamplers.0.conv"] = f"output_blocks.{(level + 1) * stride - 1}.{place}.conv"
    resnet("mid_block.resnets.0", "middle_block.0")
    names["mid_block.attentions.0"] = "middle_block.1"
    resnet("mid_block.resnets.1", "middle_block.2")
    return names


def unet_convolutions(config: Mapping) -> dict[str, tuple[int, ...]]:
    """The shapes of the weights of a U-Net's residual blocks and samplers, by diffusers' paths and a configuration."""
    widths, layers = config["block_out_channels"], config["layers_per_block"]
    shapes: dict[str, tuple[int, ...]] = {}

    def resnet(path: str, inputs: int, outputs: int) -> None:
        shapes[f"{path}.conv1"] = (outputs, inputs, 3, 3)
        shapes[f"{path}.time_emb_proj"] = (outputs, 4 * widths[0])
        shapes[f"{path}.conv2"] = (outputs, outputs, 3, 3)
        if inputs != outputs:
            shapes[f"{path}.conv_shortcut"] = (outputs, inputs, 1, 1)

    before, skips = widths[0], [widths[0]]
    for level, width in enumerate(widths):
        for layer in range(layers):
            resnet(f"down_blocks.{level}.resnets.{layer}", before, width)
            before = width
            skips.append(width)
        if level < len(widths) - 1:
            shapes[f"down_blocks.{level}.downsamplers.0.conv"] = (width, width, 3, 3)
            skips.append(width)
    for layer in range(2):
        resnet(f"mid_block.resnets.{layer}", before, before)
    for level, width in enumerate(reversed(widths)):
        for layer in range(layers + 1):
            resnet(f"up_blocks.{level}.resnets.{layer}", before + skips.pop(), width)
            before = width
        if level < len(widths) - 1:
            shapes[f"up_blocks.{level}.upsamplers.0.conv"] = (width, width, 3, 3)
    return shapes


def control_net_modules(unet_config: Mapping, hint_blocks: int) -> dict[str, str]:
    """Map a ControlNet's module paths from diffusers' to the original's (without `CONTROL_PREFIX`).

    Args:
        unet_config: of the U-Net that it belongs to, whose encoder it copies.
        hint_blocks: convolutions between the first and the last one of its hint block.
    """
    names = unet_modules(unet_config) | {"controlnet_mid_block": "middle_block_out.0"}
    residuals = len(unet_config["block_out_channels"]) * (unet_config["layers_per_block"] + 1)
    names |= {f"controlnet_down_blocks.{place}": f"zero_convs.{place}.0" for place in range(residuals)}
    # every second module of the original's hint block is an activation
    hint = ["conv_in", *(f"blocks.{place}" for place in range(hint_blocks)), "conv_out"]
    names |= {f"controlnet_cond_embedding.{name}": f"input_hint_block.{2 * place}" for place, name in enumerate(hint)}
    return names


def vae_modules(config: Mapping) -> dict[str, str]:
    """Map the VAE's module paths from diffusers' to the original's (without `VAE_PREFIX`)."""
    levels, layers = len(config["block_out_channels"]), config["layers_per_block"]
    names = {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}

    def resnet(path: str, original: str) -> None:
        names.update({f"{path}.{part}": f"{original}.{name}" for part, name in _VAE_RESNET.items()})

    for half in ("encoder", "decoder"):
        names |= {f"{half}.conv_in": f"{half}.conv_in", f"{half}.conv_out": f"{half}.conv_out"}
        names[f"{half}.conv_norm_out"] = f"{half}.norm_out"
        resnet(f"{half}.mid_block.resnets.0", f"{half}.mid.block_1")
        resnet(f"{half}.mid_block.resnets.1", f"{half}.mid.block_2")
        for part, (original, _) in VAE_ATTENTION.items():
            names[f"{half}.mid_block.attentions.0.{part}"] = f"{half}.mid.attn_1.{original}"
    for level in range(levels):
        for layer in range(layers):
            resnet(f"encoder.down_blocks.{level}.resnets.{layer}", f"encoder.down.{level}.block.{layer}")
        names[f"encoder.down_blocks.{level}.downsamplers.0.conv"] = f"encoder.down.{level}.downsample.conv"
        mirrored = levels - 1 - level  # the original counts the decoder's levels from the fine end
        for layer in range(layers + 1):
            resnet(f"decoder.up_blocks.{level}.resnets.{layer}", f"decoder.up.{mirrored}.block.{layer}")
        names[f"decoder.up_blocks.{level}.upsamplers.0.conv"] = f"decoder.up.{mirrored}.upsample.conv"
    return names


def original_name(name: str, modules: Mapping[str, str]) -> str | None:
    """The original's name of a parameter, looked up by the longest module path in `modules`; None when it has none."""
    path = name
    while path:
        if path in modules:
            return modules[path] + name[len(path) :]
        path = path.rpartition(".")[0]
    return None


def openclip_name(name: str) -> tuple[str, int | None]:
    """OpenCLIP's name of a text encoder parameter, and which third of it (of q, k, v) where it is stacked."""
    if name in _OPENCLIP_TOP:
        return _OPENCLIP_TOP[name], None
    match = re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)", name)
    if match is None:
        raise KeyError(name)
    layer, part = match.groups()
    module, _, kind = part.rpartition(".")
    block = f"transformer.resblocks.{layer}"
    projection = module.rpartition(".")[2]
    if projection in _STACKED:
        return f"{block}.attn.in_proj_{kind}", _STACKED.index(projection)
    return f"{block}.{_OPENCLIP_LAYER[module]}.{kind}", None


# ---------------------------------------------------------------------------------------------------------------------
# Sizes read from shapes


def unet_sizes(shapes: Shapes) -> dict[str, Any]:
    """The part of a diffusers U-Net configuration that an original checkpoint's shapes tell (`UNET_PREFIX` cut off)."""
    widths: list[int] = []
    down: list[list[int]] = []  # by level, the depth of each layer's attention: see `_depth`
    new_level = True
    for block in range(1, 1 + _count(shapes, r"input_blocks\.(\d+)\.")):
        if f"input_blocks.{block}.0.op.weight" in shapes:
            new_level = True
        elif (convolution := shapes.get(f"input_blocks.{block}.0.in_layers.2.weight")) is not None:
            if new_level:
                widths.append(convolution[0])
                down.append([])
                new_level = False
            down[-1].append(_depth(shapes, f"input_blocks.{block}.1"))
    if not down:
        raise KeyError("input_blocks.1.0.in_layers.2.weight")
    layers = len(down[0])
    samplers = (block for block in range(1, 20) if f"input_blocks.{block}.0.op.weight" in shapes)
    stride = next(samplers, layers + 1)
    up = [
        [_depth(shapes, f"output_blocks.{level * stride + layer}.1") for layer in range(layers + 1)]
        for level in range(len(down))
    ]
    return {
        BLOCKS_PER_LEVEL: stride,
        "in_channels": shapes["input_blocks.0.0.weight"][1],
        "block_out_channels": widths,
        "layers_per_block": layers,
        "down_block_types": ["CrossAttnDownBlock2D" if any(level) else "DownBlock2D" for level in down],
        "up_block_types": ["CrossAttnUpBlock2D" if any(level) else "UpBlock2D" for level in up],
        "cross_attention_dim": _first(shapes, ".transformer_blocks.0.attn2.to_k.weight")[1],
        "use_linear_projection": len(_first(shapes, ".1.proj_in.weight")) == 2,
        "norm_num_groups": math.gcd(32, *widths),
        **_depths(shapes, down, up),
    }


def _depths(shapes: Shapes, down: Sequence[Sequence[int]], up: Sequence[Sequence[int]]) -> dict[str, Any]:
    """How many transformer blocks each attention of a U-Net has, and what its middle is."""

    def settled(levels: Sequence[Sequence[int]]) -> list[int | list[int]]:
        return [max(level[0], 1) if len(set(level)) == 1 else list(level) for level in levels]

    config: dict[str, Any] = {"transformer_layers_per_block": settled(down)}
    if settled(up) != settled(down)[::-1]:
        config["reverse_transformer_layers_per_block"] = settled(up)
    if "middle_block.0.in_layers.2.weight" not in shapes:
        config["mid_block_type"] = None
    elif not (depth := _depth(shapes, "middle_block.1")):
        config["mid_block_type"] = "UNetMidBlock2D"
    elif not any(down[-1]):
        config["transformer_layers_per_block"][-1] = depth  # which diffusers takes from there
    elif depth != down[-1][-1]:
        raise KeyError("a middle block as deep as the last level's")
    return config


def _depth(shapes: Shapes, attention: str) -> int:
    """The number of transformer blocks in an attention; 0 where there is none."""
    if f"{attention}.norm.weight" not in shapes:
        return 0
    return _count(shapes, rf"{re.escape(attention)}\.transformer_blocks\.(\d+)\.") + 1


def _first(shapes: Shapes, ending: str) -> tuple[int, ...]:
    """The shape of the first tensor whose name ends so."""
    shape = next((shape for name, shape in shapes.items() if name.endswith(ending)), None)
    if shape is None:
        raise KeyError(f"...{ending}")
    return shape


def vae_sizes(shapes: Shapes) -> dict[str, Any]:
    """The part of a diffusers VAE configuration that shapes tell, under the original's or diffusers' names."""
    original = "encoder.mid.block_1.conv1.weight" in shapes
    block = r"encoder\.down\.{}\.block\.(\d+)\." if original else r"encoder\.down_blocks\.{}\.resnets\.(\d+)\."
    first = "encoder.down.{}.block.0.conv1.weight" if original else "encoder.down_blocks.{}.resnets.0.conv1.weight"
    levels = _count(shapes, block.split(r"\.{}")[0] + r"\.(\d+)\.") + 1
    widths = [shapes[first.format(level)][0] for level in range(levels)]
    return {
        "block_out_channels": widths,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "layers_per_block": _count(shapes, block.format(0)) + 1,
        "latent_channels": shapes["decoder.conv_in.weight"][1],
        "norm_num_groups": math.gcd(32, *widths),
    }


def text_encoder_sizes(shapes: Shapes, *, openclip: bool) -> dict[str, int]:
    """The part of a CLIP text configuration that shapes tell, under OpenCLIP's or transformers' names."""
    if openclip:
        layer, width = r"transformer\.resblocks\.(\d+)\.", shapes["positional_embedding"][1]
        inner = shapes["transformer.resblocks.0.mlp.c_fc.weight"][0]
        vocabulary = shapes["token_embedding.weight"][0]
    else:
        layer, width = r"encoder\.layers\.(\d+)\.", shapes["embeddings.position_embedding.weight"][1]
        inner = shapes["encoder.layers.0.mlp.fc1.weight"][0]
        vocabulary = shapes["embeddings.token_embedding.weight"][0]
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": _count(shapes, layer) + 1,
    }


def projection_width(shapes: Shapes) -> int:
    """The width of the pooled vector that a text encoder's projection gives."""
    if TEXT_PROJECTION in shapes:
        return shapes[TEXT_PROJECTION][0]
    return shapes[OPENCLIP_PROJECTION][1]


def _count(shapes: Shapes, pattern: str) -> int:
    """The highest number that the pattern's group takes among the names (0 when none matches)."""
    return max((int(m[1]) for m in map(re.compile(pattern).match, shapes) if m), default=0)
