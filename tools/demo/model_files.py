"""Read the demo's model for further training and write companions in the layouts found in the wild."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from library.checkpoint_layout import UNET_RESNET


def load_frozen(folder: Path) -> tuple[CLIPTokenizer, CLIPTextModel, AutoencoderKL, UNet2DConditionModel]:
    """The model's parts in float32 without gradients."""
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    parts = (
        CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=torch.float32),
        AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=torch.float32),
        UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=torch.float32),
    )
    for part in parts:
        part.requires_grad_(False).to(memory_format=torch.channels_last)
    return tokenizer, *parts


def kohya_name(prefix: str, path: str) -> str:
    """Module path → kohya's name; text encoders keep the level `text_model` there."""
    if prefix == "lora_te" and not path.startswith("text_model."):
        path = f"text_model.{path}"
    return f"{prefix}_{path.replace('.', '_')}"


def resnet_key(rest: str) -> str:
    name, _, parameter = rest.partition(".")
    return f"{UNET_RESNET[name]}.{parameter}"


def cldm_key(key: str) -> str:
    """A Diffusers ControlNet's key → its key in the original (cldm) layout, for two layers a block."""
    fixed = {
        "conv_in": "input_blocks.0.0",
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "controlnet_mid_block": "middle_block_out.0",
        "controlnet_cond_embedding.conv_in": "input_hint_block.0",
        "controlnet_cond_embedding.conv_out": "input_hint_block.14",
    }
    stem, _, parameter = key.rpartition(".")
    if stem in fixed:
        return f"{fixed[stem]}.{parameter}"
    if match := re.fullmatch(r"controlnet_cond_embedding\.blocks\.(\d+)", stem):
        return f"input_hint_block.{2 * int(match[1]) + 2}.{parameter}"
    if match := re.fullmatch(r"controlnet_down_blocks\.(\d+)", stem):
        return f"zero_convs.{match[1]}.0.{parameter}"
    if match := re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d)\.(.+)", key):
        if match[1] == "attentions":
            return f"middle_block.1.{match[3]}"
        return f"middle_block.{2 * int(match[2])}.{resnet_key(match[3])}"
    match = re.fullmatch(r"down_blocks\.(\d)\.(resnets|attentions|downsamplers)\.(\d)\.(.+)", key)
    first = 3 * int(match[1]) + 1
    if match[2] == "downsamplers":
        return f"input_blocks.{first + 2}.0.op.{parameter}"
    block = f"input_blocks.{first + int(match[3])}"
    return f"{block}.1.{match[4]}" if match[2] == "attentions" else f"{block}.0.{resnet_key(match[4])}"
