"""The U-Net written out as a graph of OpenVINO's operations.

Two things are done otherwise than PyTorch does them, with the same results: cross-attention is given the keys and
values of the text, which do not change from step to step; and what is the same in all branches of guidance, up to the
first cross-attention, is computed once.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import nn

from library.machine.openvino_graph import ANY, Graph, Module, number
from library.machine.openvino_itself import Node, openvino, ops


@dataclass(frozen=True)
class UnetShape:
    """The sizes of a U-Net's inputs; each may be `ANY`.

    Args:
        own_rows: rows that differ before the first cross-attention.
        rows: all rows, those of one branch after those of another.
        height: in latent cells.
        width: likewise.
        tokens: of the text.
        halves_evenly: height and width can be halved at every level without a rest.
    """

    own_rows: int
    rows: int
    height: int
    width: int
    tokens: int
    halves_evenly: bool

    @property
    def any_size(self) -> "UnetShape":
        """What holds this shape and all others that are halved alike; where that is unevenly, all others."""
        return UnetShape(*[ANY] * 5, self.halves_evenly)


def shares_beginning(unet: Module) -> bool:
    """Whether branches begin alike: where they are told nothing but the text."""
    return unet.config.addition_embed_type is None


def cross_attentions(model: nn.Module) -> list[Module]:
    """A model's cross-attention layers, in the order in which the graph asks for their keys and values."""
    return [layer for path, layer in model.named_modules() if path.endswith(".attn2")]


@dataclass
class UnetGraph:
    """A U-Net as a graph.

    Its inputs, in this order: the sample; the time's embedding; where branches begin alike, which of these rows each
    row goes on from; each cross-attention's keys and values, (B, S, heads, size); where ControlNets steer, what they
    add to each skip connection and to the middle.

    Args:
        unet: the model.
        graph: to write into.
        shape: of the inputs.
        steered: whether there are ControlNets.
    """

    unet: Module
    graph: Graph
    shape: UnetShape
    steered: bool
    _skips: list[Node] = field(default_factory=list)

    def model(self) -> openvino.Model:
        """Write it."""
        unet, graph, shape = self.unet, self.graph, self.shape
        size = [shape.height, shape.width]
        sample = graph.input("sample", [shape.own_rows, unet.config.in_channels, *size])
        self._time = graph.silu(graph.input("time", [shape.own_rows, unet.time_embedding.linear_2.out_features]))
        self._rows = graph.input("rows", [shape.rows], openvino.Type.i32) if shares_beginning(unet) else None
        self._kept = {layer: self._text_input(number, layer) for number, layer in enumerate(cross_attentions(unet))}
        x = graph.conv(unet.conv_in, sample)
        self._skips.append(x)
        for block in unet.down_blocks:
            x = self._block(block, x)
        if self.steered:
            self._skips = [self._plus_input(f"skip {n}", skip) for n, skip in enumerate(self._skips)]
        if unet.mid_block is not None:
            x = self._middle(unet.mid_block, x)
        if self.steered:
            x = self._plus_input("middle", x)
        for block in unet.up_blocks:
            x = self._block(block, x, joins=True)
        return graph.model(graph.conv(unet.conv_out, graph.silu(graph.group_norm(unet.conv_norm_out, x))))

    def _text_input(self, number: int, layer: Module) -> tuple[Node, Node]:
        sizes = [self.shape.rows, self.shape.tokens, layer.heads, layer.to_q.out_features // layer.heads]
        key, value = (self.graph.input(f"{name} {number}", sizes) for name in ("key", "value"))
        return self.graph.transposed_heads(key), self.graph.transposed_heads(value)

    def _plus_input(self, name: str, x: Node) -> Node:
        """With what is added; a number in its place, of shape (1, 1, 1, 1), counts for all."""
        return ops.add(x, self.graph.input(name, [ANY] * 4))

    def _block(self, block: Module, x: Node, *, joins: bool = False) -> Node:
        """A block that shrinks at its end and leaves its features for skip connections, or joins these and enlarges."""
        attentions: Sequence[Module | None] = getattr(block, "attentions", None) or [None] * len(block.resnets)
        for resnet, attention in zip(block.resnets, attentions):
            if joins:
                x = ops.concat([x, self._skips.pop()], 1)
            x = self.graph.resnet(resnet, x, self._time)
            if attention is not None:
                x = self._transformer(attention, x)
            if not joins:
                self._skips.append(x)
        for sampler in getattr(block, "downsamplers", None) or ():
            x = self.graph.conv(sampler.conv, x)
            self._skips.append(x)
        for sampler in getattr(block, "upsamplers", None) or ():
            x = self.graph.upsample(sampler, x, None if self.shape.halves_evenly else self._skips[-1])
        return x

    def _middle(self, block: Module, x: Node) -> Node:
        x = self.graph.resnet(block.resnets[0], x, self._time)
        for attention, resnet in zip(block.attentions, block.resnets[1:]):
            if attention is not None:
                x = self._transformer(attention, x)
            x = self.graph.resnet(resnet, x, self._time)
        return x

    def _transformer(self, model: Module, x: Node) -> Node:
        """(B, C, h, w) → likewise, for all rows"""
        graph = self.graph
        before, x = x, graph.group_norm(model.norm, x)
        if model.use_linear_projection:
            tokens = graph.linear(model.proj_in, graph.tokens(x))
        else:
            tokens = graph.tokens(graph.conv(model.proj_in, x))
        waiting = self._rows
        for block in model.transformer_blocks:
            tokens = self._transformer_block(block, tokens)
        if waiting is not None and self._rows is None:
            before = _of_rows(before, waiting)
        if model.use_linear_projection:
            x = graph.pixels(graph.linear(model.proj_out, tokens), before)
        else:
            x = graph.conv(model.proj_out, graph.pixels(tokens, before))
        return ops.add(x, before)

    def _transformer_block(self, block: Module, x: Node) -> Node:
        """(B, T, C) → likewise, for all rows"""
        graph, (attention, cross) = self.graph, (block.attn1, block.attn2)
        x = ops.add(graph.self_attention(attention, graph.layer_norm(block.norm1, x)), x)
        query = graph.heads(cross, cross.to_q, graph.layer_norm(block.norm2, x))
        if self._rows is not None:  # from here on branches differ
            query, x, self._time = (_of_rows(each, self._rows) for each in (query, x, self._time))
            self._skips = [_of_rows(skip, self._rows) for skip in self._skips]
            self._rows = None
        x = ops.add(graph.attention(cross, query, *self._kept[cross]), x)
        normed, inner = graph.layer_norm(block.norm3, x), block.ff.net[0].proj
        half = inner.out_features // 2
        value, gate = (graph.linear(inner, normed, rows) for rows in (slice(half), slice(half, None)))
        return ops.add(graph.linear(block.ff.net[2], ops.multiply(value, ops.gelu(gate, "erf"))), x)


def _of_rows(x: Node, rows: Node) -> Node:
    return ops.gather(x, rows, number(0))
