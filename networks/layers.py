"""What networks do to one layer: low-rank pairs beside it, and changes folded into its weights.

All pairs of a layer that act are stacked into one: the downs behind each other, the ups with their multipliers side by
side, so that any number of networks costs two small matrix products. Everything is worked out in float32 and cast once.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

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
        return {name: part.to(device, torch.float32, non_blocking=True) for name, part in self.parts.items()}

    @property
    def acts(self) -> bool:
        """Whether there is anything of it at the multiplier that it has."""
        return self.multiplier != 0

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
    """The low-rank pairs of the networks on one layer that act, as one pair.

    For an input x and the layer's output y: h = `reduce`(x) has one channel for each rank of each acting network, in
    the order of the changes; y += up(h). Networks of multiplier 0 are not in it: it is what it would be without them.

    Args:
        layer: what they change.
    """

    def __init__(self, layer: Layer) -> None:
        self._changes: list[LayerChange] = []
        self._pairs: dict[LayerChange, tuple[torch.Tensor, torch.Tensor]] = {}  # of those that act
        self._window = layer.weight.shape[1:]
        self._down = layer.weight.detach().new_zeros(0, *self._window)
        self._up = layer.weight.detach().new_zeros(layer.weight.shape[0], 0)
        self._reserved: int | None = None  # ranks that there is room for, where shapes are kept
        self._gate: Gate | None = None
        self._numbers: Mapping[LayerChange, int] = {}
        self._networks: list[tuple[int, int]] = []  # see `Gate`

    @property
    def changes(self) -> Sequence[LayerChange]:
        """All pairs, also those that do not act."""
        return self._changes

    @property
    def works(self) -> bool:
        """Whether there is anything to do: some pair acts, or shapes are kept."""
        return bool(self._pairs) or (bool(self._changes) and self._reserved is not None)

    def set_changes(self, changes: list[LayerChange]) -> None:
        """Stack these pairs."""
        self._changes = changes
        self.update()

    def keep_shapes(self) -> None:
        """From now on leave room for the widest pair, filled up with zeros, and more only where more is needed.

        Code that is compiled with the shapes stays right, and is seldom compiled anew.
        """
        self._reserved = max((len(change.parts["lora_down"]) for change in self._changes), default=0)
        self.update()

    def gate(self, gate: Gate | None, numbers: Mapping[LayerChange, int]) -> None:
        """Let the networks, numbered by their changes, act where the gate says; None ends that."""
        self._gate, self._numbers = gate, numbers
        self._note_networks()

    def update(self) -> None:
        """Take up the changes' multipliers."""
        self._pairs = {c: self._pairs.get(c) or self._pair(c) for c in self._changes if c.acts}
        downs = [down for down, _ in self._pairs.values()]
        ups = [change.multiplier * up for change, (_, up) in self._pairs.items()]
        if self._reserved is not None:
            self._fill(downs, ups)
        elif downs:
            self._down = torch.cat(downs)
            self._up = torch.cat(ups, dim=1).to(self._down.dtype)
        else:
            self._down, self._up = self._down.new_zeros(0, *self._window), self._up.new_zeros(len(self._up), 0)
        self._note_networks()

    def __call__(self, layer: nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
        """Forward hook: add the pairs' effect to the layer's output, in place."""
        if not self._down.shape[0]:
            return output
        (x,) = inputs
        if isinstance(layer, nn.Conv2d):
            reduced = F.conv2d(x, self._down, None, layer.stride, layer.padding, layer.dilation)  # (B, ranks, h, w)
            return output.add_(F.conv2d(self._gated(reduced), self._up[:, :, None, None]))
        reduced = self._gated(F.linear(x, self._down))  # (..., ranks)
        flat = output.view(-1, output.shape[-1])
        flat.addmm_(reduced.reshape(-1, reduced.shape[-1]), self._up.T)
        return output

    def _pair(self, change: LayerChange) -> tuple[torch.Tensor, torch.Tensor]:
        """Down as the layer's weights are, and up in float32."""
        down, up = low_rank_pair(change.wide_parts(self._down.device))
        return down.reshape(-1, *self._window).to(self._down.dtype), up

    def _fill(self, downs: list[torch.Tensor], ups: list[torch.Tensor]) -> None:
        """Put the pairs into the tensors that compiled code knows."""
        ranks = sum(map(len, downs))
        room = max(ranks, self._reserved or 0)
        if room != len(self._down):
            self._reserved = room
            self._down = self._down.new_zeros(room, *self._window)
            self._up = self._up.new_zeros(len(self._up), room)
        self._down.zero_()  # no leftover may overflow, which 0 times it would not undo
        self._up.zero_()
        if downs:
            self._down[:ranks].copy_(torch.cat(downs))
            self._up[:, :ranks].copy_(torch.cat(ups, dim=1))

    def _note_networks(self) -> None:
        """Note which channels are which network's; those that are left over go with any."""
        self._networks = []
        if self._gate is not None:
            self._networks = [(self._numbers[c], up.shape[1]) for c, (_, up) in self._pairs.items()]
            if left := len(self._down) - sum(count for _, count in self._networks):
                self._networks.append((0, left))

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
        self._stack = LowRankStack(layer)
        self._stack_hook: RemovableHandle | None = None
        self._folds: list[LayerChange] = []
        self._originals: dict[str, nn.Parameter | None] = {}  # what folded parameters stand in for
        self._stale = False  # the folded parameters are not those of the multipliers
        self._gating: tuple[Gate, Mapping[LayerChange, int]] | None = None
        self._gated_hook: RemovableHandle | None = None

    def add(self, change: LayerChange, *, folded: bool) -> None:
        """Add a change: as a low-rank pair that works at once, or to what `fold` puts into the weights."""
        if folded:
            self._folds.append(change)
            self._stale = True
        else:
            self._set_pairs([*self._stack.changes, change])

    def remove(self, change: LayerChange) -> None:
        """Take a change away; weights that no change is left in are the original ones again."""
        if change in self._stack.changes:
            self._set_pairs([other for other in self._stack.changes if other is not change])
        else:
            self._folds.remove(change)
            self.restore()
            self.fold()

    def values(self) -> dict[str, torch.Tensor]:
        """The layer's weight and bias with all that acts on them, where pairs do beside what is folded; in its type."""
        acting = [change for change in self._stack.changes if change.acts]
        return {name: value.to(self._layer.weight) for name, value in folded_values(self._layer, acting).items()}

    def abandon(self) -> None:
        """Take all changes away, from a layer that is not computed with any more; its original weights are back."""
        self._folds.clear()
        self._set_pairs([])
        self.restore()

    @property
    def empty(self) -> bool:
        """Whether no change is left."""
        return not self._stack.changes and not self._folds

    @property
    def rewrites(self) -> bool:
        """Whether the layer's weights are exchanged for others."""
        return bool(self._folds)

    def keep_shapes(self) -> None:
        """See `LowRankStack.keep_shapes`."""
        self._stack.keep_shapes()
        self._hook_stack()

    def update(self) -> None:
        """Take up new multipliers; in the weights they show after the next `fold`."""
        self._stack.update()
        self._hook_stack()
        self._stale = bool(self._folds)

    def fold(self) -> None:
        """Put the folded changes that act, with their multipliers, into the weights, worked out from the original ones.

        While they are gated they go into versions of the weights instead.
        """
        if not (self._stale and self._folds):
            return
        self.restore()
        acting = [change for change in self._folds if change.acts]
        if self._gating is not None:
            gate, numbers = self._gating
            versions = GatedVersions(self._layer, {change: numbers[change] for change in acting}, gate)
            self._gated_hook = self._layer.register_forward_hook(versions) if acting else None
        elif acting:
            dtype = self._layer.weight.dtype
            for name, value in folded_values(self._layer, acting).items():
                self._originals[name] = getattr(self._layer, name)
                setattr(self._layer, name, nn.Parameter(value.to(dtype), requires_grad=False))
        self._stale = False

    def restore(self) -> None:
        """Put the original weights back."""
        if self._gated_hook is not None:
            self._gated_hook.remove()
            self._gated_hook = None
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
        try:
            self._set_gating((gate, networks))
            yield
        finally:
            self._set_gating(None)

    def _set_gating(self, gating: tuple[Gate, Mapping[LayerChange, int]] | None) -> None:
        self._gating = gating
        self._stack.gate(*(gating or (None, {})))
        self._stale = bool(self._folds)
        self.fold()

    def _set_pairs(self, pairs: list[LayerChange]) -> None:
        self._stack.set_changes(pairs)
        self._hook_stack()

    def _hook_stack(self) -> None:
        """Let the stack work where it has something to do, and nothing be called where it has not."""
        if self._stack.works == (self._stack_hook is not None):
            return
        if self._stack_hook is not None:
            self._stack_hook.remove()
        self._stack_hook = self._layer.register_forward_hook(self._stack) if self._stack.works else None


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


def values_of(layer: nn.Module) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A layer's weight, and its bias if it has one, with whatever networks do to them just now."""
    adapter = getattr(layer, _ATTRIBUTE, None)
    changed = adapter.values() if adapter is not None else {}
    return changed.get("weight", layer.weight), changed.get("bias", layer.bias)


def abandon_changes(layer: Layer) -> None:
    """Take all changes off a layer that is not computed with any more, and the adapter."""
    adapter = getattr(layer, _ATTRIBUTE, None)
    if adapter is not None:
        adapter.abandon()
        delattr(layer, _ATTRIBUTE)


def remove_change(layer: Layer, change: LayerChange) -> None:
    """Take a change off a layer, and the adapter with the last one."""
    adapter = adapter_of(layer)
    adapter.remove(change)
    if adapter.empty:
        delattr(layer, _ATTRIBUTE)
