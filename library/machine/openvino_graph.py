"""Layers and blocks written out as OpenVINO's operations, and the VAE's decoder of these.

They are written from the loaded modules, whose weights are not copied.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from library.machine.enlarging import enlarging_kernel
from library.machine.openvino_itself import Node, openvino, ops

Module = Any  # one of diffusers'; type checkers take parts of modules for tensors

# A layer's weight, and its bias if it has one, with what networks do to them
ValuesOf = Callable[[Module], tuple[torch.Tensor, torch.Tensor | None]]

ANY = -1  # a size that is not known when a graph is compiled
TYPES = {torch.float32: openvino.Type.f32, torch.bfloat16: openvino.Type.bf16}


@dataclass
class Graph:
    """Operations on tensors of one type, written from modules.

    Args:
        dtype: of all tensors.
        values_of: tells layers' weights.
    """

    dtype: torch.dtype
    values_of: ValuesOf
    inputs: list[Any] = field(default_factory=list)
    memory: list[torch.Tensor] = field(default_factory=list)  # that the constants lie in

    @property
    def type(self) -> openvino.Type:
        """OpenVINO's name of the type."""
        return TYPES[self.dtype]

    def model(self, output: Node) -> openvino.Model:
        """The graph with its one output, in float32."""
        results: list[Any] = [ops.result(ops.convert(output, "f32"))]
        return openvino.Model(results, self.inputs, "graph")  # ty: ignore[no-matching-overload]  # its stubs want `Op`

    def input(self, name: str, shape: Sequence[int], type: openvino.Type | None = None) -> Node:
        """An input of the graph; inputs keep their order."""
        node = ops.parameter(openvino.PartialShape(list(shape)), type or self.type, name)
        self.inputs.append(node)
        return node

    def constant(self, value: torch.Tensor) -> Node:
        """A tensor, in its own memory."""
        value = value.detach().to(self.dtype).contiguous()
        self.memory.append(value)
        return ops.constant(shared_tensor(value), shared_memory=True)

    def silu(self, x: Node) -> Node:
        """x · sigmoid(x)"""
        return ops.swish(x, openvino.op.Constant(self.type, openvino.Shape([]), [1.0]))

    def linear(self, layer: Module, x: Node, rows: slice = slice(None)) -> Node:
        """(B, T, in) or (B, in) → likewise; of the layer's outputs some, or all."""
        weight, bias = self.values_of(layer)
        y = ops.matmul(x, self.constant(weight[rows]), False, True)
        return y if bias is None else ops.add(y, self.constant(bias[rows]))

    def conv(self, layer: Module, x: Node) -> Node:
        """(B, C, h, w) → likewise"""
        weight, bias = self.values_of(layer)
        padding = list(layer.padding)
        y = ops.convolution(x, self.constant(weight), list(layer.stride), padding, padding, list(layer.dilation))
        return self._with_bias(y, bias)

    def conv_of_enlarged(self, layer: Module, x: Node) -> Node:
        """A 3 × 3 convolution of (B, C, h, w) with each pixel repeated 2 × 2 times → (B, C', 2h, 2w)"""
        weight, bias = self.values_of(layer)
        kernel, one, two = self.constant(enlarging_kernel(weight)), [1, 1], [2, 2]
        y = ops.convolution_backprop_data(x, kernel, two, None, one, one, one, "explicit", [0, 0])
        return self._with_bias(y, bias)

    def _with_bias(self, y: Node, bias: torch.Tensor | None) -> Node:
        return y if bias is None else ops.add(y, self.constant(bias.view(1, -1, 1, 1)))

    def group_norm(self, layer: Module, x: Node) -> Node:
        """(B, C, …) → likewise"""
        weight, bias = self.values_of(layer)
        assert bias is not None
        return ops.group_normalization(x, self.constant(weight), self.constant(bias), layer.num_groups, layer.eps)

    def layer_norm(self, layer: Module, x: Node) -> Node:
        """(B, T, C) → likewise"""
        weight, bias = self.values_of(layer)
        assert bias is not None
        y = ops.mvn(x, numbers(2), True, layer.eps, "INSIDE_SQRT")
        return ops.add(ops.multiply(y, self.constant(weight)), self.constant(bias))

    def resnet(self, block: Module, x: Node, embedding: Node | None) -> Node:
        """(B, C, h, w), and what the block is told of the time, (B, E) → (B, C', h, w)"""
        h = self.conv(block.conv1, self.silu(self.group_norm(block.norm1, x)))
        if embedding is not None:
            h = ops.add(h, ops.unsqueeze(self.linear(block.time_emb_proj, embedding), numbers(2, 3)))
        h = self.conv(block.conv2, self.silu(self.group_norm(block.norm2, h)))
        return ops.add(h, x if block.conv_shortcut is None else self.conv(block.conv_shortcut, x))

    def upsample(self, block: Module, x: Node, size: Node | None = None) -> Node:
        """Twice the size, or with the height and width of `size` (B, C, h, w); convolved."""
        if size is None:
            return self.conv_of_enlarged(block.conv, x)
        shape = ops.gather(ops.shape_of(size), numbers(2, 3), number(0))
        axes, how = numbers(2, 3), {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
        return self.conv(block.conv, ops.interpolate(x, shape, "nearest", "sizes", axes=axes, **how))

    def attention(self, layer: Module, query: Node, key: Node, value: Node) -> Node:
        """(B, heads, T, size), (B, heads, S, size), (B, heads, S, size) → what the layer makes of them, (B, T, C)"""
        attended = ops.transpose(ops.scaled_dot_product_attention(query, key, value), numbers(0, 2, 1, 3))
        return self.linear(layer.to_out[0], ops.reshape(attended, numbers(0, 0, -1), True))

    def self_attention(self, layer: Module, x: Node) -> Node:
        """(B, T, C) → likewise"""
        return self.attention(layer, *(self.heads(layer, part, x) for part in (layer.to_q, layer.to_k, layer.to_v)))

    def heads(self, layer: Module, part: Module, x: Node) -> Node:
        """(B, T, C) → (B, heads, T, size)"""
        return self.transposed_heads(ops.reshape(self.linear(part, x), numbers(0, 0, layer.heads, -1), True))

    def transposed_heads(self, x: Node) -> Node:
        """(B, T, heads, size) → (B, heads, T, size)"""
        return ops.transpose(x, numbers(0, 2, 1, 3))

    def tokens(self, x: Node) -> Node:
        """(B, C, h, w) → (B, h * w, C)"""
        pixels = ops.transpose(x, numbers(0, 2, 3, 1))
        return ops.reshape(pixels, numbers(0, -1, x.get_output_partial_shape(0)[1].get_length()), True)

    def pixels(self, x: Node, like: Node) -> Node:
        """(B, h * w, C) → (B, C, h, w), with the height and width of another node"""
        size = ops.gather(ops.shape_of(like), numbers(0, 2, 3), number(0))
        channels = numbers(x.get_output_partial_shape(0)[2].get_length())
        return ops.transpose(ops.reshape(x, ops.concat([size, channels], 0), False), numbers(0, 3, 1, 2))


def decoder_model(decoder: Module, graph: Graph, shape: Sequence[int]) -> openvino.Model:
    """The VAE's decoder: latents (B, C, h, w) → pixels (B, 3, 8h, 8w) float32.

    Args:
        decoder: diffusers', without what comes before it.
        graph: to write into.
        shape: of the latents, some of which may be `ANY`.
    """
    x = graph.conv(decoder.conv_in, graph.input("latents", shape))
    resnets = decoder.mid_block.resnets
    x = graph.resnet(resnets[0], x, None)
    for attention, resnet in zip(decoder.mid_block.attentions, resnets[1:]):
        if attention is not None:
            attended = graph.self_attention(attention, graph.tokens(graph.group_norm(attention.group_norm, x)))
            x = ops.add(graph.pixels(attended, x), x)
        x = graph.resnet(resnet, x, None)
    for block in decoder.up_blocks:
        for resnet in block.resnets:
            x = graph.resnet(resnet, x, None)
        for upsampler in block.upsamplers or ():
            x = graph.upsample(upsampler, x)
    return graph.model(graph.conv(decoder.conv_out, graph.silu(graph.group_norm(decoder.conv_norm_out, x))))


def shared_tensor(value: torch.Tensor) -> openvino.Tensor:
    """A contiguous tensor as OpenVINO's, in the same memory, which has to outlive it."""
    if value.dtype == torch.bfloat16:  # NumPy has no such type
        return openvino.Tensor(value.view(torch.int16).numpy(), list(value.shape), openvino.Type.bf16)
    return openvino.Tensor(value.numpy(), shared_memory=True)


def numbers(*values: int) -> Node:
    """Some whole numbers."""
    return ops.constant(np.array(values, np.int64))


def number(value: int) -> Node:
    """One, without an axis."""
    return ops.constant(np.array(value, np.int64))
