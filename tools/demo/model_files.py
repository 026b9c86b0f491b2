"""Read the demo's model for further training and write companions in the layouts found in the wild."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from library.checkpoint_layout import unet_modules


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


def cldm_key(key: str, unet_config: Mapping) -> str:
    """A Diffusers ControlNet's key → its key in the original (cldm) layout."""
    modules = unet_modules(unet_config) | {"controlnet_mid_block": "middle_block_out.0"}
    path, _, kind = key.rpartition(".")
    if path in modules:
        return f"control_model.{modules[path]}.{kind}"
    if match := re.fullmatch(r"controlnet_down_blocks\.(\d+)", path):
        return f"control_model.zero_convs.{match[1]}.0.{kind}"
    if match := re.fullmatch(r"controlnet_cond_embedding\.(?:conv_(in|out)|blocks\.(\d+))", path):
        # every second module of the original's hint block is an activation
        place = {"in": 0, "out": 14}[match[1]] if match[1] else 2 * int(match[2]) + 2
        return f"control_model.input_hint_block.{place}.{kind}"
    block = re.match(r"(down_blocks\.\d+|mid_block)\.attentions\.\d+", key)[0]
    return f"control_model.{modules[block]}{key[len(block) :]}"
