"""Running a VAE's residual blocks slice by slice: the same numbers with less memory.

A block needs its whole input only for the statistics of its group normalisations. With these known, normalisation,
activation and the 3×3 convolution run on a few rows at a time, so that only a block's input and output stand in memory
whole.
"""

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from diffusers.models.resnet import ResnetBlock2D


class SlicedResnetBlock(torch.nn.Module):
    """A VAE's `ResnetBlock2D`, computed in horizontal slices."""

    def __init__(self, block: ResnetBlock2D, slices: int) -> None:
        super().__init__()
        self.block = block
        self.slices = slices

    def forward(self, x: torch.Tensor, temb: None = None) -> torch.Tensor:
        """(B, C, H, W) → (B, C', H, W); a VAE's blocks have no time embedding."""
        block = self.block
        hidden = _normalise_and_convolve(x, block.norm1, block.conv1, self.slices)
        hidden = _normalise_and_convolve(hidden, block.norm2, block.conv2, self.slices)
        hidden += x if block.conv_shortcut is None else block.conv_shortcut(x)
        return hidden


def _normalise_and_convolve(
    x: torch.Tensor, norm: torch.nn.GroupNorm, conv: torch.nn.Conv2d, slices: int
) -> torch.Tensor:
    """conv(silu(norm(x))) for a 3×3 convolution with a border of 1, a band of rows at a time."""
    scale, shift = _group_norm_as_affine(x, norm)
    batch, _, height, width = x.shape
    output = x.new_empty((batch, conv.out_channels, height, width))
    rows = -(-height // slices)
    for top in range(0, height, rows):
        bottom = min(top + rows, height)
        first, last = max(top - 1, 0), min(bottom + 1, height)  # one row more on either side where there is one
        band = F.silu(x[:, :, first:last].float() * scale + shift).to(x.dtype)
        band = F.pad(band, (1, 1, int(first == top), int(last == bottom)))
        output[:, :, top:bottom] = F.conv2d(band, conv.weight, conv.bias)
    return output


def _group_norm_as_affine(x: torch.Tensor, norm: torch.nn.GroupNorm) -> tuple[torch.Tensor, torch.Tensor]:
    """Group normalisation of `x` as a scale and a shift for each picture and channel, (B, C, 1, 1) float32."""
    batch, channels = x.shape[:2]
    groups = x.reshape(batch, norm.num_groups, -1)
    # one picture's group at a time, so that the float32 copy stays small
    statistics = [torch.var_mean(group.float(), correction=0) for picture in groups for group in picture]
    variance, mean = (torch.stack(part).view(batch, norm.num_groups, 1) for part in zip(*statistics))
    scale = norm.weight.float().view(1, norm.num_groups, -1) * torch.rsqrt(variance + norm.eps)
    shift = norm.bias.float().view(1, norm.num_groups, -1) - mean * scale
    return scale.reshape(batch, channels, 1, 1), shift.reshape(batch, channels, 1, 1)


def slice_resnets(vae: AutoencoderKL, slices: int) -> None:
    """Replace every residual block of a VAE by one that runs in `slices` slices."""
    for module in list(vae.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, ResnetBlock2D):
                setattr(module, name, SlicedResnetBlock(child, slices))
