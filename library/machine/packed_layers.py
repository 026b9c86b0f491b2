"""Layers with their weights in the order that oneDNN computes in.

PyTorch brings a layer's weight into that order at every call; here it is done once, at the first one, and only the
reordered weight is kept. The results are the same. torch.compile does the same to frozen models.
"""

from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import nn

from library.machine import malloc

Made = TypeVar("Made")

_ON_PIXELS = ((1, 1), (0, 0), (1, 1), (1, 1), 1)  # kernel, padding, stride, dilation, groups


def can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this build of PyTorch can reorder weights and compute with them on this machine."""
    # the operators have no public names; where they are missing, layers stay as they are
    names = ("_reorder_linear_weight", "_linear_pointwise", "_reorder_convolution_weight", "_convolution_pointwise")
    known = all(hasattr(torch.ops.mkldnn, name) for name in names)
    known = known and all(hasattr(getattr(torch.ops.mkldnn, name), "binary") for name in names[1::2])
    if device.type != "cpu" or not torch.backends.mkldnn.is_available() or not known:
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def pack_layers(model: nn.Module, keep: Collection[nn.Module] = (), halve: Collection[nn.Module] = ()) -> None:
    """Let a model's linear and convolution layers reorder their weights when they are first called.

    Their `weight` then has its shape, type and device still, but no values. Gradients cannot be taken any more.

    Args:
        model: for inference, finished but for what forward hooks do.
        keep: layers whose weights may be exchanged for others; they keep these beside what they compute with.
        halve: linear layers that are asked for `PackedForward.gated`.
    """
    for layer in model.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d) and "forward" not in vars(layer):
            vars(layer)["forward"] = PackedForward(layer, keep=layer in keep, halved=layer in halve)


def others_act_at(layer: Any) -> bool:
    """Whether others act at a layer, beside it or in its place; their networks may put hooks there at any time."""
    forward = vars(layer).get("forward")
    known = forward is None or isinstance(forward, PackedForward) or forward == type(layer).forward.__get__(layer)
    return bool(not known or layer._forward_hooks or layer._forward_pre_hooks)


def let_go(model: nn.Module) -> None:
    """Free the memory of a model that is not called any more; whoever else holds it holds no weights by it."""
    for layer in model.modules():
        vars(layer).pop("forward", None)  # which holds the reordered weights
    model.to("meta")


def plus(layer: nn.Module, x: torch.Tensor, added: torch.Tensor) -> torch.Tensor:
    """A layer's outputs plus features of the same shape, which oneDNN adds as it writes them where it can."""
    forward = vars(layer).get("forward")
    if isinstance(forward, PackedForward) and not others_act_at(layer):
        return forward.plus(x, added)
    return layer(x) + added


class PackedForward:
    """What a layer does in place of its `forward`: the same with oneDNN's operators.

    Args:
        layer: whose place it takes.
        keep: see `pack_layers`.
        halved: whether the halves of a linear layer's outputs are computed one by one.
    """

    def __init__(self, layer: nn.Linear | nn.Conv2d, *, keep: bool, halved: bool = False) -> None:
        self._layer = layer
        self._keep = keep
        self.halved = halved
        self._window = _window(layer) if isinstance(layer, nn.Conv2d) else None
        # A 1×1 convolution is a linear layer of the channels, which in this memory layout come last. In float32 the
        # order of its weight would hold for inputs of one size; with others it takes up to thirty times as long
        self._on_pixels = isinstance(layer, nn.Conv2d) and (layer.kernel_size, *_window(layer)) == _ON_PIXELS
        self._source: torch.Tensor | None = None  # the weight that `_packed` was made of, or what stands in for it
        self._packed: list[torch.Tensor] = []  # its parts

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """(…, channels) or (B, channels, h, w), as the layer takes it"""
        if self._window is None:
            return self._linear(x)
        if self._on_pixels:
            return self._linear(x.movedim(1, -1)).movedim(-1, 1)
        ((weight, bias),) = self._weights_and_biases(x)
        return torch.ops.mkldnn._convolution_pointwise(x, weight, bias, *self._window, "none", [], "")

    def gated(self, x: torch.Tensor) -> torch.Tensor:
        """(…, channels) → the first half of the outputs times GELU of the second half (Shazeer, GLU Variants)."""
        (value, value_bias), (gate, gate_bias) = self._weights_and_biases(x)
        gates = torch.ops.mkldnn._linear_pointwise(x, gate, gate_bias, "gelu", [], "none")
        return torch.ops.mkldnn._linear_pointwise.binary(x, gates, value, value_bias, "mul")

    def plus(self, x: torch.Tensor, added: torch.Tensor) -> torch.Tensor:
        """What it gives for `x`, plus more of the same shape."""
        if self._on_pixels:
            return self._linear_plus(x.movedim(1, -1), added.movedim(1, -1)).movedim(-1, 1)
        if self._window is None:
            return self._linear_plus(x, added)
        ((weight, bias),) = self._weights_and_biases(x)
        add = torch.ops.mkldnn._convolution_pointwise.binary
        return add(x, added, weight, bias, *self._window, "add", None, None, [], None)

    def _linear_plus(self, x: torch.Tensor, added: torch.Tensor) -> torch.Tensor:
        ((weight, bias),) = self._weights_and_biases(x)
        return torch.ops.mkldnn._linear_pointwise.binary(x, added, weight, bias, "add")

    def _linear(self, x: torch.Tensor) -> torch.Tensor:
        outputs = [
            torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
            for weight, bias in self._weights_and_biases(x)
        ]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)

    def _weights_and_biases(self, x: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
        """Those of each part, weights in the order that is best for inputs like the first."""
        layer = self._layer
        if layer.weight is not self._source:
            self._pack(x.shape)
        parts = len(self._packed)
        biases = [None] * parts if layer.bias is None else layer.bias.chunk(parts)
        return list(zip(self._packed, biases))

    def _pack(self, input_shape: torch.Size) -> None:
        layer, weight = self._layer, self._layer.weight
        parts = weight.chunk(2 if self.halved else 1)
        self._packed = to_stay(lambda: [self._reordered(part, input_shape) for part in parts])
        if not self._keep:
            layer.weight = nn.Parameter(weight.new_empty(1).expand(weight.shape), requires_grad=False)
        self._source = layer.weight

    def _reordered(self, weight: torch.Tensor, input_shape: torch.Size) -> torch.Tensor:
        """The weight in the order that is best for inputs of this shape."""
        if self._window is None or self._on_pixels:
            rows = input_shape.numel() // weight.shape[1]
            return torch.ops.mkldnn._reorder_linear_weight(weight.flatten(1), rows)
        return torch.ops.mkldnn._reorder_convolution_weight(weight, *self._window, input_shape)


def to_stay(make: Callable[[], Made]) -> Made:
    """Make tensors that stay while features come and go, away from these: the holes that they leave are theirs again.

    The C library looks for room for another thread elsewhere, where large blocks come from the system.
    """
    threads = torch.get_num_threads()  # on which the order depends

    def work() -> Made:
        torch.set_num_threads(threads)
        with torch.inference_mode(), malloc.blocks_from_system():
            return make()

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result()


def _window(layer: nn.Conv2d) -> tuple:
    return layer.padding, layer.stride, layer.dilation, layer.groups
