"""Read the demo's model for further training and write companions in the layouts found in the wild."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from library.files.checkpoint_layout import control_net_modules


def load_frozen(folder: Path) -> tuple[CLIPTokenizer, CLIPTextModel, AutoencoderKL, UNet2DConditionModel]:
    """The model's parts in float32 without gradients."""
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    parts = (
        CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=torch.float32),
        AutoencoderKL.from_pretrained(folder / "vae", dtype=torch.float32),
        UNet2DConditionModel.from_pretrained(folder / "unet", dtype=torch.float32),
    )
    for part in parts:
        part.requires_grad_(False).to(memory_format=torch.channels_last)
    return tokenizer, *parts


def kohya_name(prefix: str, path: str) -> str:
    """Module path → kohya's name; text encoders keep the level `text_model` there."""
    if prefix == "lora_te" and not path.startswith("text_model."):
        path = f"text_model.{path}"
    return f"{prefix}_{path.replace('.', '_')}"


def cldm_key(key: str, unet_config: Mapping, hint_blocks: int = 6) -> str:
    """A Diffusers ControlNet's key → its key in the original (cldm) layout."""
    modules = control_net_modules(unet_config, hint_blocks)
    path = key
    while path not in modules:  # attention blocks and residual convolutions map as a whole
        path = path.rpartition(".")[0]
    return f"control_model.{modules[path]}{key[len(path) :]}"
