"""Enlarging by 2 with the 3 × 3 convolution after it as one transposed convolution, on a CPU.

Each pixel stands four times under such a convolution, so that many of its products have the same pixel. With their
weights added up first there are 16 products for four pixels in place of 36, and the enlarged features are never made.
The sums are the same, but for rounding.
"""

from functools import partial
from itertools import product

import torch
from diffusers.models.resnet import Upsample2D
from torch import nn

from library.machine.packed_layers import others_act_at, packing, to_stay

_WINDOW = ((1, 1), (0, 0), (2, 2), (1, 1), 1)  # padding, output padding, stride, dilation, groups


def enlarging_kernel(weight: torch.Tensor) -> torch.Tensor:
    """What enlarges and convolves at once.

    Args:
        weight: of the convolution, (O, I, 3, 3).

    Returns:
        That of the transposed convolution, of stride 2 and padding 1, (I, O, 4, 4).
    """
    taps = weight.detach().permute(0, 2, 3, 1).float().flip(1, 2)
    kernel = taps.new_zeros(len(weight), 4, 4, weight.shape[1])
    for y, x in product((0, 1), repeat=2):  # where each pixel stands
        kernel[:, y : y + 3, x : x + 3] += taps
    return kernel.to(weight.dtype).permute(3, 0, 1, 2)


def enlarge_at_once(model: nn.Module) -> set[nn.Module]:
    """Let a model's blocks that enlarge do it together with their convolution.

    Args:
        model: finished but for what forward hooks do, on the CPU; see `packed_layers.can_pack`. Gradients cannot be
            taken any more.

    Returns:
        These convolutions. Their weights have to stay, as sizes that are not doubled need them.
    """
    convolutions = set()
    for block in model.modules():
        if isinstance(block, Upsample2D):
            conv = getattr(block, "conv", None)  # some only enlarge
            if isinstance(conv, nn.Conv2d) and "forward" not in vars(conv):
                vars(block)["forward"] = EnlargingForward(block, conv)
                convolutions.add(conv)
    return convolutions


class EnlargingForward:
    """What a block does in place of its `forward`: the same, faster, where the size is doubled."""

    def __init__(self, block: Upsample2D, conv: nn.Conv2d) -> None:
        self._block, self._conv = block, conv
        self._source: torch.Tensor | None = None  # the weight that `_packed` was made of
        self._packed: torch.Tensor | None = None

    def __call__(self, x: torch.Tensor, output_size: tuple[int, int] | None = None) -> torch.Tensor:
        """(B, C, h, w) → (B, C', 2h, 2w), or of another height and width"""
        conv, doubled = self._conv, (2 * x.shape[-2], 2 * x.shape[-1])
        if tuple(output_size or doubled) != doubled or others_act_at(conv):
            return type(self._block).forward(self._block, x, output_size)
        with packing:
            if self._packed is None or conv.weight is not self._source or x.dtype != self._packed.dtype:
                self._packed, self._source = to_stay(partial(self._kernel, x)), conv.weight
        return torch.ops.mkldnn._convolution_transpose_pointwise(x, self._packed, conv.bias, *_WINDOW, "none", [], "")

    def _kernel(self, x: torch.Tensor) -> torch.Tensor:
        """In the order that is best for inputs like `x`."""
        kernel = enlarging_kernel(self._conv.weight)
        return torch.ops.mkldnn._reorder_convolution_transpose_weight(kernel, *_WINDOW, x.shape)
