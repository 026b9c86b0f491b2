"""What networks do to one layer: low-rank pairs beside it, and changes folded into its weights.

All pairs of a layer are stacked into one: the downs behind each other, the ups with their multipliers side by side, so
that any number of networks costs two small matrix products. Everything is worked out in float32 and cast once.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.hooks import RemovableHandle

from networks.kinds import LORA, Kind, bias_changes, is_plain, low_rank_pair, weight_change

Layer = nn.Linear | nn.Conv2d | nn.Embedding | nn.LayerNorm | nn.GroupNorm  # what has a weight in these models


class LayerChange:
    """One network's change of one layer: its parts as they are in the file, and the multiplier.

    Args:
        kind: which relative of LoRA it is.
        parts: see `networks.kinds`.
        multiplier: how strongly it acts.
        rows: of the weight that it is for, where these are not all: a token table grows by embeddings' vectors.
    """

    def __init__(self, kind: Kind, parts: dict[str, torch.Tensor], multiplier: float, rows: int | None = None) -> None:
        self.kind = kind
        self.parts = parts
        self.multiplier = multiplier
        self.rows = rows

    def wide_parts(self, device: torch.device) -> dict[str, torch.Tensor]:
        """The parts in float32 on a device."""
        return {name: part.to(device, torch.float32) for name, part in self.parts.items()}

    def is_pair(self, layer: Layer) -> bool:
        """Whether this can run beside the layer as two small products."""
        return self.kind is LORA and is_plain(self.parts) and isinstance(layer, nn.Linear | nn.Conv2d)


def folded_values(layer: Layer, changes: list[LayerChange]) -> dict[str, torch.Tensor]:
    """The layer's weight and bias with all of these changes, each worked out from the weight as it is, in float32."""
    weight = layer.weight.float()
    values = {"weight": weight.clone()}
    for change in changes:
        parts = change.wide_parts(weight.device)
        own = weight[: change.rows]
        values["weight"][: change.rows] += change.multiplier * weight_change(change.kind, parts, own)
        for addition in bias_changes(parts):
            original = getattr(layer, "bias", None)
            bias = values.get("bias", torch.zeros(()) if original is None else original.float())
            values["bias"] = bias + change.multiplier * addition
    return values


# Takes networks' effect on a layer, (rows, channels, h, w) or (rows, places, channels), and for each network in turn
# its number and how many channels it has; gives the effect where it is wanted.
Gate = Callable[[torch.Tensor, list[tuple[int, int]]], torch.Tensor]


class LowRankStack:
    """The low-rank pairs of all networks on one layer, as one pair.

    For an input x and the layer's output y: h = `reduce`(x) has one channel for each rank of each network, in the
    order of the changes; y += up(h).
    """

    def __init__(self, layer: Layer, changes: list[LayerChange]) -> None:
        self._changes = changes
        device, dtype = layer.weight.device, layer.weight.dtype
        downs, self._ups = zip(*(low_rank_pair(change.wide_parts(device)) for change in changes))
        window = layer.weight.shape[1:]
        self._down = torch.cat([down.reshape(-1, *window) for down in downs]).to(dtype)
        self._up = torch.empty(layer.weight.shape[0], self._down.shape[0], device=device, dtype=dtype)
        self._gate: Gate | None = None
        self._networks: list[tuple[int, int]] = []  # see `Gate`
        self.update()

    def gate(self, gate: Gate | None, networks: Mapping[LayerChange, int]) -> None:
        """Let the networks, numbered by their changes, act where the gate says; None ends that."""
        self._gate = gate
        self._networks = [(networks[c], up.shape[1]) for c, up in zip(self._changes, self._ups)] if gate else []

    def update(self) -> None:
        """Put the changes' multipliers into the ups."""
        ups = [change.multiplier * up for change, up in zip(self._changes, self._ups)]
        self._up.copy_(torch.cat(ups, dim=1))

    def __call__(self, layer: nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
        """Forward hook: add the pairs' effect to the layer's output, in place."""
        (x,) = inputs
        if isinstance(layer, nn.Conv2d):
            reduced = F.conv2d(x, self._down, None, layer.stride, layer.padding, layer.dilation)  # (B, ranks, h, w)
            return output.add_(F.conv2d(self._gated(reduced), self._up[:, :, None, None]))
        reduced = self._gated(F.linear(x, self._down))  # (..., ranks)
        flat = output.view(-1, output.shape[-1])
        flat.addmm_(reduced.reshape(-1, reduced.shape[-1]), self._up.T)
        return output

    def _gated(self, reduced: torch.Tensor) -> torch.Tensor:
        return reduced if self._gate is None else self._gate(reduced, self._networks)


class GatedVersions:
    """The changes of a layer that do not run beside it, made to: each as a version of the layer's parameters.

    It is a forward hook, and takes two evaluations of the layer and more, which only gating is worth.
    """

    def __init__(self, layer: Layer, networks: Mapping[LayerChange, int], gate: Gate) -> None:
        self._gate = gate
        self._versions = [
            (number, {name: nn.Parameter(v.to(layer.weight), False) for name, v in folded_values(layer, [c]).items()})
            for c, number in networks.items()
        ]

    def __call__(self, layer: nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
        """Forward hook: add each version's difference to the layer's output, where its gate lets it."""
        plain = layer.forward(*inputs)
        for number, parameters in self._versions:
            originals = {name: getattr(layer, name) for name in parameters}
            try:
                for name, parameter in parameters.items():
                    setattr(layer, name, parameter)
                difference = layer.forward(*inputs) - plain
            finally:
                for name, original in originals.items():
                    setattr(layer, name, original)
            output = output + self._gate(difference, [(number, plain.shape[1 if plain.dim() == 4 else -1])])
        return output


class LayerAdapter:
    """Everything that networks do to one layer. It comes with the first change and goes with the last."""

    def __init__(self, layer: Layer) -> None:
        self._layer = layer
        self._pairs: list[LayerChange] = []
        self._stack: LowRankStack | None = None
        self._hook: RemovableHandle | None = None
        self._folds: list[LayerChange] = []
        self._originals: dict[str, nn.Parameter | None] = {}  # what folded parameters stand in for
        self._stale = False  # the folded parameters are not those of the multipliers

    def add(self, change: LayerChange, *, folded: bool) -> None:
        """Add a change: as a low-rank pair that works at once, or to what `fold` puts into the weights."""
        if folded:
            self._folds.append(change)
            self._stale = True
        else:
            self._set_pairs([*self._pairs, change])

    def remove(self, change: LayerChange) -> None:
        """Take a change away; weights that no change is left in are the original ones again."""
        if change in self._pairs:
            self._set_pairs([other for other in self._pairs if other is not change])
        else:
            self._folds.remove(change)
            self.restore()
            self.fold()

    @property
    def empty(self) -> bool:
        """Whether no change is left."""
        return not self._pairs and not self._folds

    @property
    def rewrites(self) -> bool:
        """Whether the layer's weights are exchanged for others."""
        return bool(self._folds)

    def update(self) -> None:
        """Take up new multipliers; in the weights they show after the next `fold`."""
        if self._stack is not None:
            self._stack.update()
        self._stale = bool(self._folds)

    def fold(self) -> None:
        """Put the folded changes with their multipliers into the weights, worked out from the original ones."""
        if not (self._stale and self._folds):
            return
        self.restore()
        dtype = self._layer.weight.dtype
        for name, value in folded_values(self._layer, self._folds).items():
            self._originals[name] = getattr(self._layer, name)
            setattr(self._layer, name, nn.Parameter(value.to(dtype), requires_grad=False))
        self._stale = False

    def restore(self) -> None:
        """Put the original weights back."""
        for name, original in self._originals.items():
            current = getattr(self._layer, name)
            if original is not None and len(current) > len(original):  # a token table that has grown meanwhile
                grown = torch.cat([original, current[len(original) :]])
                original = nn.Parameter(grown, requires_grad=False)
            setattr(self._layer, name, original)
        self._originals.clear()
        self._stale = True

    @contextmanager
    def gated(self, gate: Gate, networks: Mapping[LayerChange, int]) -> Iterator[None]:
        """Let each network's change act where the gate says, for the length of the block.

        Args:
            gate: see `Gate`.
            networks: the number of each change's network.
        """
        with ExitStack() as stack:
            if self._stack is not None:
                self._stack.gate(gate, networks)
                stack.callback(self._stack.gate, None, {})
            if self._folds:
                self.restore()
                stack.callback(self.fold)
                versions = GatedVersions(self._layer, {change: networks[change] for change in self._folds}, gate)
                stack.callback(self._layer.register_forward_hook(versions).remove)
            yield

    def _set_pairs(self, pairs: list[LayerChange]) -> None:
        if self._hook is not None:
            self._hook.remove()
        self._pairs = pairs
        self._stack = stack = LowRankStack(self._layer, pairs) if pairs else None
        self._hook = self._layer.register_forward_hook(stack) if stack else None


_ATTRIBUTE = "network_adapter"  # where a layer keeps its adapter, so that both go together


def adapter_of(layer: Layer) -> LayerAdapter:
    """The layer's adapter, a new one if it has none."""
    if not hasattr(layer, _ATTRIBUTE):
        setattr(layer, _ATTRIBUTE, LayerAdapter(layer))
    return getattr(layer, _ATTRIBUTE)


def is_rewritten(module: nn.Module) -> bool:
    """Whether it is a layer whose weights networks exchange."""
    adapter = getattr(module, _ATTRIBUTE, None)
    return adapter is not None and adapter.rewrites


def remove_change(layer: Layer, change: LayerChange) -> None:
    """Take a change off a layer, and the adapter with the last one."""
    adapter = adapter_of(layer)
    adapter.remove(change)
    if adapter.empty:
        delattr(layer, _ATTRIBUTE)
