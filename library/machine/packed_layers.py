"""Layers with their weights in the order that oneDNN computes in.

PyTorch brings a layer's weight into that order at every call; here it is done once, at the first one, and only the
reordered weight is kept. The results are the same. torch.compile does the same to frozen models.
"""

import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, TypeVar

import torch
from torch import nn

from library.machine import malloc
from library.machine.at_once import pieces_at_once

Made = TypeVar("Made")

packing = threading.Lock()  # held by who changes what layers compute with

_ON_PIXELS = ((1, 1), (0, 0), (1, 1), (1, 1), 1)  # kernel, padding, stride, dilation, groups


@dataclass(frozen=True)
class Parts:
    """In how many parts a linear layer's weight is packed, and which way it is cut."""

    number: int
    of_inputs: bool = False  # else of the outputs


WHOLE = Parts(1)


def can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this build of PyTorch can reorder weights and compute with them on this machine."""
    # the operators have no public names; where they are missing, layers stay as they are
    names = ("_reorder_linear_weight", "_linear_pointwise", "_reorder_convolution_weight", "_convolution_pointwise")
    known = all(hasattr(torch.ops.mkldnn, name) for name in names)
    known = known and all(hasattr(getattr(torch.ops.mkldnn, name), "binary") for name in names[1::2])
    if device.type != "cpu" or not torch.backends.mkldnn.is_available() or not known:
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def pack_layers(
    model: nn.Module, keep: Collection[nn.Module] = (), parts: Mapping[nn.Module, Parts] = MappingProxyType({})
) -> None:
    """Let a model's linear and convolution layers reorder their weights when they are first called.

    Their `weight` then has its shape, type and device still, but no values. Gradients cannot be taken any more.

    Args:
        model: for inference, finished but for what forward hooks do.
        keep: layers whose weights may be exchanged for others; they keep these beside what they compute with.
        parts: of linear layers that are asked for `PackedForward.gated` or `PackedForward.summed`.
    """
    for layer in model.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d) and "forward" not in vars(layer):
            vars(layer)["forward"] = PackedForward(layer, keep=layer in keep, parts=parts.get(layer, WHOLE))


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
        parts: that its weight is packed in.
    """

    def __init__(self, layer: nn.Linear | nn.Conv2d, *, keep: bool, parts: Parts = WHOLE) -> None:
        self._layer = layer
        self._keep = keep
        self.parts = parts
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

    def gated(self, x: torch.Tensor) -> Iterator[torch.Tensor]:
        """(…, channels) → the first half of the outputs times GELU of the second (Shazeer, GLU Variants), in parts."""
        packed = self._weights_and_biases(x)
        half = len(packed) // 2
        for (value, value_bias), (gate, gate_bias) in zip(packed[:half], packed[half:]):
            gates = torch.ops.mkldnn._linear_pointwise(x, gate, gate_bias, "gelu", [], "none")
            yield torch.ops.mkldnn._linear_pointwise.binary(x, gates, value, value_bias, "mul")

    def summed(self, inputs: Iterable[torch.Tensor], added: torch.Tensor | None = None) -> torch.Tensor:
        """What a layer in parts of its inputs gives for these, (…, channels of a part) each, plus `added`."""
        total = added
        for index, x in enumerate(inputs):
            weight, bias = self._weights_and_biases(x)[index]
            if total is None:
                total = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
            else:
                total = torch.ops.mkldnn._linear_pointwise.binary(x, total, weight, bias, "add")
        assert total is not None  # there is a part
        return total

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
        if self.parts != WHOLE:
            return self._linear(x) + added
        ((weight, bias),) = self._weights_and_biases(x)
        return torch.ops.mkldnn._linear_pointwise.binary(x, added, weight, bias, "add")

    def _linear(self, x: torch.Tensor) -> torch.Tensor:
        if self.parts.of_inputs:
            return self.summed(x.chunk(self.parts.number, -1))
        outputs = [
            torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
            for weight, bias in self._weights_and_biases(x)
        ]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)

    def _weights_and_biases(self, x: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
        """Those of each part, weights in the order that is best for inputs like the first."""
        layer = self._layer
        if layer.weight is not self._source:
            with packing:
                if layer.weight is not self._source:  # nor has another thread packed it meanwhile
                    self._pack(x.shape)
        first_only = [layer.bias] + [None] * (self.parts.number - 1)
        whole = layer.bias is None or self.parts.of_inputs
        return list(zip(self._packed, first_only if whole else layer.bias.chunk(self.parts.number)))

    def _pack(self, input_shape: torch.Size) -> None:
        layer, weight = self._layer, self._layer.weight
        parts = weight.chunk(self.parts.number, 1 if self.parts.of_inputs else 0)
        if self._window is None or self._on_pixels:
            # linear layers are fastest in the order for the rows of all pieces, on the cores of one of them, too
            input_shape = torch.Size((pieces_at_once(), *input_shape))
        self._packed = to_stay(lambda: [self._reordered(part, input_shape) for part in parts])
        # in this order, in which whatever ends it leaves a weight that can be packed, or one that is
        if self._keep:
            self._source = weight
        else:
            self._source = nn.Parameter(weight.new_empty(1).expand(weight.shape), requires_grad=False)
            layer.weight = self._source

    def _reordered(self, weight: torch.Tensor, input_shape: torch.Size) -> torch.Tensor:
        """The weight in the order that is best for inputs of this shape."""
        if self._window is None or self._on_pixels:
            # in float32 the order for a single row gives other sums than all others: what is first would show
            rows = max(2, input_shape.numel() // weight.shape[1])
            return torch.ops.mkldnn._reorder_linear_weight(weight.flatten(1).contiguous(), rows)
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
