"""ControlNet files: found, told apart and checked from their headers.

A ControlNet (Zhang et al. 2023, https://arxiv.org/abs/2302.05543) is a copy of the U-Net's encoder that reads a guide
picture besides, and whose outputs are added to the U-Net's skip connections.
"""

from collections.abc import Mapping
from typing import Any

from library.errors import InputError
from library.files import checkpoint_layout as layout
from library.files.families import ANY_FAMILY, name_of_width
from library.files.model_files import Component, folder_component, name_kind, resolve
from library.files.weight_files import WeightFile, open_weights
from library.files.weight_types import check_types, in_modules

DIFFERENCE = "difference"  # a tensor of this name says that the U-Net's weights were subtracted
_HINT_BLOCKS = 6  # convolutions between the hint block's first and last one, in every published ControlNet
_HINT_CHANNELS = 3
# What a ControlNet takes over from the configuration of the U-Net that it belongs to
_SHARED_CONFIG = (
    "in_channels",
    "block_out_channels",
    "down_block_types",
    "layers_per_block",
    "cross_attention_dim",
    "attention_head_dim",
    "num_attention_heads",
    "norm_num_groups",
    "use_linear_projection",
    "upcast_attention",
)


def find_control_net(given: str, unet_config: Mapping[str, Any]) -> tuple[Component, bool]:
    """Find and check a ControlNet, and tell whether it is a difference to the U-Net.

    Args:
        given: a file in the original or in diffusers' layout, a Diffusers folder, a glob, or a Hugging Face id.
        unet_config: of the model that it is to steer.

    Raises:
        InputError: when it is not there, is something else, or does not fit the model.
    """
    subject = f"--control_net_models {given}"
    path, _ = resolve(given, "--control_net_models")
    component = folder_component(path, "diffusion_pytorch_model") if path.is_dir() else None
    weights = component.weights if component else open_weights(path)
    if not _is_control_net(weights):
        kind = name_kind(weights) or "no ControlNet"
        raise InputError(subject, f"is {kind}; give a ControlNet for {ANY_FAMILY}")
    _check_shapes(weights, unet_config, subject)
    modules = layout.control_net_modules(unet_config, _HINT_BLOCKS)
    check_types(weights, in_modules(modules, layout.CONTROL_PREFIX, weights))
    if component is None:
        shared = {name: unet_config[name] for name in _SHARED_CONFIG if name in unet_config}
        component = Component(shared, weights)
    elif component.config.get("controlnet_conditioning_channel_order", "rgb") != "rgb":
        raise InputError(subject, "reads its guide as BGR, which this program does not; use another ControlNet")
    return component, DIFFERENCE in weights.shapes


def _is_control_net(weights: WeightFile) -> bool:
    kind = name_kind(weights)
    # the first published files hold the whole Stable Diffusion model as well
    return kind == "a ControlNet" or any(key.startswith(layout.CONTROL_PREFIX) for key in weights.shapes)


def _check_shapes(weights: WeightFile, unet_config: Mapping[str, Any], subject: str) -> None:
    """Compare the sizes that tell the families apart, and those of the hint block, with the model's."""
    modules = layout.control_net_modules(unet_config, _HINT_BLOCKS)

    def shape(name: str) -> tuple[int, ...]:
        candidates = control_net_names(name, modules)
        found = next((weights.shapes[candidate] for candidate in candidates if candidate in weights.shapes), None)
        if not found:
            raise InputError(subject, f"is no whole ControlNet: it lacks {name!r}; download it again")
        return found

    width = shape("mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight")[-1]
    if width != unet_config["cross_attention_dim"]:
        raise InputError(
            subject,
            f"is made for {name_of_width(width) or 'another model'} (texts {width} wide), the model's are "
            f"{unet_config['cross_attention_dim']} wide; use a ControlNet of the model's family",
        )
    for level, wanted in enumerate(unet_config["block_out_channels"]):
        if (width := shape(f"down_blocks.{level}.resnets.0.conv1.weight")[0]) != wanted:
            problem = f"its level {level} is {width} wide, the model's {wanted}; use a ControlNet made for this model"
            raise InputError(subject, problem)
    if (channels := shape("controlnet_cond_embedding.conv_in.weight")[1]) != _HINT_CHANNELS:
        raise InputError(subject, f"wants guides of {channels} channels; this program has pictures of {_HINT_CHANNELS}")


def control_net_names(target: str, modules: Mapping[str, str]) -> list[str]:
    """The names that a ControlNet's parameter may have in a file; `modules`: see `layout.control_net_modules`."""
    original = layout.original_name(target, modules)
    return [target, layout.CONTROL_PREFIX + original, original] if original else [target]
