"""ControlNet files: found, told apart and checked from their headers.

A ControlNet (Zhang et al. 2023, https://arxiv.org/abs/2302.05543) is a copy of the U-Net's encoder that reads a guide
picture besides, and whose outputs are added to the U-Net's skip connections.
"""

import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from library.errors import InputError
from library.files import checkpoint_layout as layout
from library.files.families import ANY_FAMILY, SDXL, name_of_width
from library.files.model_files import Component, folder_component, name_kind, resolve
from library.files.model_inputs import PLAIN
from library.files.weight_files import WEIGHT_STEMS, Shape, WeightFile, open_weights
from library.files.weight_types import check_types, in_modules

DIFFERENCE = "difference"  # a tensor of this name says that the U-Net's weights were subtracted
_HINT_BLOCKS = 6  # convolutions between the hint block's first and last one, in every published ControlNet
_HINT_CHANNELS = 3
# What a ControlNet takes over from the configuration of the U-Net that it belongs to
_SHARED_CONFIG = (
    *("block_out_channels", "layers_per_block", "cross_attention_dim", "attention_head_dim", "num_attention_heads"),
    *("norm_num_groups", "use_linear_projection", "upcast_attention"),
    *("addition_embed_type", "addition_time_embed_dim", "projection_class_embeddings_input_dim"),
)
# Kinds of guides that a ControlNet Union is told by their numbers
# (https://github.com/xinsir6/ControlNetPlus); the last two are ProMax's
CONTROL_TYPES = {
    **{"openpose": 0, "depth": 1},
    **dict.fromkeys(("hed", "pidi", "scribble", "ted", "softedge"), 2),
    **dict.fromkeys(("canny", "lineart", "anime_lineart", "mlsd"), 3),
    **{"normal": 4, "segment": 5, "tile": 6, "repaint": 7},
}
_OUTPUT = re.compile(r"(?:controlnet_down_blocks|(?:control_model\.)?zero_convs)\.(\d+)\.(?:0\.)?weight")
_UNION_MARK = "task_embedding"  # a row for each kind of guide


@dataclass(frozen=True)
class ControlNetFile(Component):
    """A ControlNet that was checked.

    Args:
        name: of its file, folder or Hugging Face id, for people and metadata.
        is_difference: its weights are a difference to the U-Net's.
        control_types: how many kinds of guides it is told apart, as a ControlNet Union is; 0 for a single kind.
    """

    name: str
    is_difference: bool = False
    control_types: int = 0


def find_control_net(given: str, unet_config: Mapping[str, Any]) -> ControlNetFile:
    """Find and check a ControlNet.

    Args:
        given: a file in the original or in diffusers' layout, a Diffusers folder, a glob, or a Hugging Face id.
        unet_config: of the model that it is to steer.

    Raises:
        InputError: when it is not there, is something else, or does not fit the model.
    """
    subject = f"--control_net_models {given}"
    path, name = resolve(given, "--control_net_models")
    folder = folder_component(path, *WEIGHT_STEMS) if path.is_dir() else None
    weights = folder.weights if folder else open_weights(path)
    if not _is_control_net(weights):
        kind = name_kind(weights) or "no ControlNet"
        lllite = "; give it with --control_net_lllite_models" if "LLLite" in kind else ""
        raise InputError(subject, f"is {kind}{lllite or f'; give a ControlNet for {ANY_FAMILY}'}")
    modules = layout.control_net_modules(unet_config, _HINT_BLOCKS)
    names = _Names(weights.shapes, modules)
    _check_shapes(names, unet_config, subject)
    check_types(weights, in_modules(modules, layout.CONTROL_PREFIX, weights))
    if folder and folder.config.get("controlnet_conditioning_channel_order", "rgb") != "rgb":
        raise InputError(subject, "reads its guide as BGR, which this program does not; use another ControlNet")
    shared = {name: unet_config[name] for name in _SHARED_CONFIG if name in unet_config}
    config = folder.config if folder else shared | names.encoder_config(unet_config)
    types = weights.shapes.get(_UNION_MARK, (0, 0))
    if len(types) != 2 or (types[0] and names.shape("transformer_layes.0.ln_1.weight") is None):
        raise InputError(subject, "is no whole ControlNet Union: what joins its guides is missing; download it again")
    if types[0]:
        config = {name: value for name, value in config.items() if name != "mid_block_type"} | names.union_config()
    return ControlNetFile(config, weights, name, DIFFERENCE in weights.shapes, types[0])


def _is_control_net(weights: WeightFile) -> bool:
    kind = name_kind(weights)
    # the first published files hold the whole Stable Diffusion model as well
    return kind == "a ControlNet" or any(key.startswith(layout.CONTROL_PREFIX) for key in weights.shapes)


class _Names:
    """The tensors of a ControlNet's file, found in either layout."""

    def __init__(self, shapes: Mapping[str, Shape], modules: Mapping[str, str]) -> None:
        self._shapes, self._modules = shapes, modules

    def shape(self, name: str) -> Shape | None:
        """A tensor's shape, by diffusers' name of it; None where there is none."""
        names = control_net_names(name, self._modules)
        return next((self._shapes[candidate] for candidate in names if candidate in self._shapes), None)

    @property
    def outputs(self) -> int:
        """How many of the encoder's features it adds to, beside the middle block's."""
        return max((int(match[1]) + 1 for match in map(_OUTPUT.fullmatch, self._shapes) if match), default=0)

    def depth(self, attention: str) -> int | None:
        """How many transformer blocks an attention has; None where there is no attention."""
        if self.shape(f"{attention}.norm.weight") is None:
            return None
        blocks = (f"{attention}.transformer_blocks.{block}.norm1.weight" for block in itertools.count())
        return sum(1 for _ in itertools.takewhile(self.shape, blocks))

    def text_width(self, levels: int) -> int | None:
        """How wide the text is that its attentions read; None where it has none, as small ones for XL."""
        places = ("mid_block", *(f"down_blocks.{level}" for level in range(levels)))
        ending = "attentions.0.transformer_blocks.0.attn2.to_k.weight"
        return next((shape[-1] for place in places if (shape := self.shape(f"{place}.{ending}"))), None)

    def encoder_config(self, unet_config: Mapping[str, Any]) -> dict[str, Any]:
        """How many channels it reads, and what attentions it has: as many as the U-Net's encoder, or fewer."""
        count = len(unet_config["block_out_channels"])
        depths = [self.depth(f"down_blocks.{level}.attentions.0") for level in range(count)]
        middle = self.depth("mid_block.attentions.0")
        levels = [1 if depth is None else depth for depth in depths]
        if middle is not None and depths[-1] is None:
            levels[-1] = middle
        return {
            "in_channels": (self.shape("conv_in.weight") or (0, PLAIN.channels))[1],
            "down_block_types": ["DownBlock2D" if depth is None else "CrossAttnDownBlock2D" for depth in depths],
            "mid_block_type": "UNetMidBlock2D" if middle is None else "UNetMidBlock2DCrossAttn",
            "transformer_layers_per_block": levels,
        }

    def union_config(self) -> dict[str, Any]:
        """The sizes of what a ControlNet Union joins its guides with."""
        types, width = self._shapes[_UNION_MARK]
        hint = [self.shape("controlnet_cond_embedding.conv_in.weight")]
        hint += [self.shape(f"controlnet_cond_embedding.blocks.{place}.weight") for place in range(1, _HINT_BLOCKS, 2)]
        layers = (f"transformer_layes.{layer}.ln_1.weight" for layer in itertools.count())
        return {
            "num_control_type": types,
            "num_trans_channel": width,
            "num_proj_channel": width,
            "num_trans_layer": sum(1 for _ in itertools.takewhile(self.shape, layers)),
            "conditioning_embedding_out_channels": [shape[0] for shape in hint if shape],
        }


def _check_shapes(names: _Names, unet_config: Mapping[str, Any], subject: str) -> None:
    """Compare the sizes that tell the families apart, and those of the hint block, with the model's."""

    def shape(name: str) -> Shape:
        if not (found := names.shape(name)):
            raise InputError(subject, f"is no whole ControlNet: it lacks {name!r}; download it again")
        return found

    widths = unet_config["block_out_channels"]
    width = names.text_width(len(widths))
    if width not in (None, unet_config["cross_attention_dim"]):
        raise InputError(
            subject,
            f"is made for {name_of_width(width) or 'another model'} (texts {width} wide), the model's are "
            f"{unet_config['cross_attention_dim']} wide; use a ControlNet of the model's family",
        )
    told = names.shape("add_embedding.linear_1.weight")
    if (told is None) == bool(unet_config.get("addition_embed_type")):
        problem = "is not" if told is None else "is"
        raise InputError(subject, f"{problem} for {SDXL.name}; use a ControlNet of the model's family")
    places = len(widths) * (unet_config["layers_per_block"] + 1)
    if (found := names.outputs) != places:
        problem = f"adds to {found} places of a U-Net's encoder, the model's has {places}"
        raise InputError(subject, f"{problem}; use a ControlNet made for this model")
    for level, wanted in enumerate(widths):
        if (width := shape(f"down_blocks.{level}.resnets.0.conv1.weight")[0]) != wanted:
            problem = f"its level {level} is {width} wide, the model's {wanted}; use a ControlNet made for this model"
            raise InputError(subject, problem)
    # of a model with more inputs it sees the latents, or as much as the U-Net does
    if (channels := shape("conv_in.weight")[1]) not in (PLAIN.channels, unet_config.get("in_channels")):
        raise InputError(subject, f"reads {channels} channels, which the model does not have; use another ControlNet")
    if (channels := shape("controlnet_cond_embedding.conv_in.weight")[1]) != _HINT_CHANNELS:
        raise InputError(subject, f"wants guides of {channels} channels; this program has pictures of {_HINT_CHANNELS}")


def control_net_names(target: str, modules: Mapping[str, str]) -> list[str]:
    """The names that a ControlNet's parameter may have in a file; `modules`: see `layout.control_net_modules`."""
    original = layout.original_name(target, modules)
    return [target, layout.CONTROL_PREFIX + original, original] if original else [target]
