"""An upscaler for Highres. fix: enlarges the picture by LANCZOS and refines its latent with a small residual network.

Loads the published `upscaler-v1-e100-220.safetensors` of sd-scripts (and smaller networks of that layout).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from PIL.Image import Image, Resampling
from torch import nn

from library.errors import InputError
from library.files.weight_files import WeightFile, open_weights

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

_BLOCKS_IN_GROUP = 4


def _conv3(inputs: int, outputs: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)


class _ResidualBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = _conv3(width, width), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = _conv3(width, width), nn.BatchNorm2d(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + x)


class LatentUpscaler(nn.Module):
    """Refines latents that were encoded from an enlarged picture, before they are scaled.

    Args:
        width: channels of the residual blocks.
        narrow_width: channels behind them.
        blocks: residual blocks; groups of four have a skip connection each.
        channels: of the latents.
    """

    def __init__(self, width: int = 128, narrow_width: int = 64, blocks: int = 20, channels: int = 4) -> None:
        super().__init__()
        self.conv1, self.bn1 = _conv3(channels, width), nn.BatchNorm2d(width)
        self._names = [f"resblock{number}" for number in range(1, blocks + 1)]
        for name in self._names:
            self.add_module(name, _ResidualBlock(width))
        self.conv2, self.bn2 = _conv3(width, narrow_width), nn.BatchNorm2d(narrow_width)
        self.conv3, self.bn3 = _conv3(narrow_width, narrow_width), nn.BatchNorm2d(narrow_width)
        self.conv_final = nn.Conv2d(narrow_width, channels, 1)

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        """(B, channels, h, w) → the same shape"""
        x = F.relu(self.bn1(self.conv1(latents)))
        for first in range(0, len(self._names), _BLOCKS_IN_GROUP):
            group_input = x
            for name in self._names[first : first + _BLOCKS_IN_GROUP]:
                x = self.get_submodule(name)(x)
            x = x + group_input
        x = F.relu(self.bn2(self.conv2(x)))
        return self.conv_final(self.bn3(self.conv3(x))) + latents

    def upscale(
        self,
        vae: AutoencoderKL,
        lowreso_images: Sequence[Image],
        lowreso_latents: torch.Tensor | None,
        dtype: torch.dtype,
        width: int,
        height: int,
        batch_size: int = 1,
        vae_batch_size: int = 1,
    ) -> torch.Tensor:
        """Enlarge pictures to latents; this call is the contract of an upscaler module.

        Args:
            vae: encodes the enlarged pictures.
            lowreso_images: the pictures.
            lowreso_latents: their latents, which this upscaler does not need.
            dtype: the type the VAE and this network run in.
            width: of the result in pixels.
            height: likewise.
            batch_size: latents refined at a time.
            vae_batch_size: pictures encoded at a time.

        Returns:
            Scaled latents (B, channels, height / 8, width / 8).
        """
        large = [np.asarray(image.resize((width, height), Resampling.LANCZOS)) for image in lowreso_images]
        pixels = torch.from_numpy(np.stack(large)).permute(0, 3, 1, 2).float() / 127.5 - 1  # (B, 3, H, W)
        encoded = [vae.encode(part.to(vae.device, dtype)).latent_dist.mean for part in pixels.split(vae_batch_size)]
        refined = [self(part) for part in torch.cat(encoded).split(batch_size)]
        return torch.cat(refined).float() * vae.config.scaling_factor


def create_upscaler(weights: str) -> LatentUpscaler:
    """Make the upscaler.

    Args:
        weights: its weights file.

    Raises:
        InputError: when the file is none of this layout.
    """
    file = open_weights(Path(weights).expanduser())
    blocks = [int(match[1]) for match in map(re.compile(r"resblock(\d+)\.").match, file.shapes) if match]
    try:
        width, channels = file.shapes["conv1.weight"][:2]
        with torch.device("meta"):
            upscaler = LatentUpscaler(width, file.shapes["conv2.weight"][0], max(blocks), channels)
    except (KeyError, ValueError, IndexError):
        raise InputError(weights, "is no latent upscaler; give upscaler-v1-e100-220.safetensors") from None
    upscaler.load_state_dict(_state(upscaler, file, weights), assign=True)
    return upscaler.eval().requires_grad_(False)


def _state(upscaler: LatentUpscaler, file: WeightFile, weights: str) -> dict[str, torch.Tensor]:
    """The tensors of the network, each a copy in float32."""
    state = {}
    for name, expected in upscaler.state_dict().items():
        if name.endswith("num_batches_tracked"):  # plays no part in inference
            state[name] = torch.tensor(0)
        elif file.shapes.get(name) != tuple(expected.shape):
            problem = f"{name!r} has the shape {file.shapes.get(name)}, needed is {tuple(expected.shape)}; get it again"
            raise InputError(weights, problem)
        else:
            state[name] = file.tensor(name).to(torch.float32, copy=True)
    file.close()
    return state
