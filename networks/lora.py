"""LoRA and its relatives for this program: `--network_module networks.lora`.

A network module is any one with `create_network_from_weights`; a network answers to the methods of `LoraNetwork`. Which
relative a file holds is told from its keys, layer by layer (`networks.kinds`).
"""

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import UNet2DConditionModel
from torch import nn

from library.errors import InputError
from library.files.families import encoder_kinds
from library.files.unet_layers import unet_blocks
from networks.files import open_network
from networks.keys import UNET, LayerNames, Target, match_keys
from networks.layers import Layer, LayerChange, abandon_changes, adapter_of, folded_values, remove_change
from networks.states import State, read_state
from networks.strengths import Strength

TextEncoders = nn.Module | Sequence[nn.Module]  # a model's one, or all of them in its family's order


def create_network_from_weights(
    multiplier: float | Strength,
    file: str,
    vae: nn.Module | None,
    text_encoder: TextEncoders,
    unet: UNet2DConditionModel,
    weights_sd: State | None = None,
    for_inference: bool = False,
    **arguments: str,
) -> tuple["LoraNetwork", State]:
    """Make a network of a file's weights.

    Args:
        multiplier: how strongly it acts.
        file: where the weights are; not read when they are given.
        vae: not changed by any relative of LoRA; part of the contract.
        text_encoder: whose layers the keys are matched against; a family's several are given as a list.
        unet: likewise.
        weights_sd: the weights.
        for_inference: part of the contract; this network does nothing else.
        arguments: from `--network_args`; there are none.

    Returns:
        The network, not yet attached, and its weights.

    Raises:
        InputError: when no key fits a layer.
    """
    if arguments:
        raise InputError("--network_args", f"networks.lora takes none; leave out {', '.join(arguments)}")
    if weights_sd is None:
        weights_sd = read_state(open_network(Path(file)))
    network = LoraNetwork(text_encoder, unet, multiplier)
    network.load_state_dict(weights_sd, strict=False)
    return network, weights_sd


class LoraNetwork:
    """One network, its layers and its strength; where a multiplier is asked for, a number is one for all layers.

    By default low-rank changes work as two small products beside each layer, and other relatives are folded into the
    weights whenever the multiplier changes. After `backup_weights` everything is folded, when `pre_calculation` says
    so. Attaching and `detach` leave the model bit for bit as it was, in whatever order networks come and go.
    """

    def __init__(self, text_encoder: TextEncoders, unet: UNet2DConditionModel, multiplier: float | Strength) -> None:
        self.strength = _strength(multiplier)
        encoders = [text_encoder] if isinstance(text_encoder, nn.Module) else list(text_encoder)
        kinds = encoder_kinds(len(encoders))
        components = {UNET: unet} | {kind.part: encoder for kind, encoder in zip(kinds, encoders)}
        self._layers: dict[Target, Layer] = {
            (component, path): layer
            for component, model in components.items()
            for path, layer in model.named_modules()
            if isinstance(layer, Layer)
        }
        self._unet_config = unet.config
        self._names = LayerNames(self._layers, unet.config, kinds)
        self._changes: dict[Target, LayerChange] = {}
        self._attached = False
        self._pre_calculated = False

    def load_state_dict(self, state: State, strict: bool = True) -> "LoadedKeys":
        """Take the weights from a file's tensors.

        Raises:
            InputError: when no key fits a layer, or, with `strict`, when any does not.
        """
        shapes = {key: tuple(tensor.shape) for key, tensor in state.items()}
        match = match_keys(shapes, self._names, {t: tuple(layer.weight.shape) for t, layer in self._layers.items()})
        if not match.layers or (strict and match.unmatched):
            problem = f"{match.matched} of {len(state)} keys fit the model; use a network that is made for it"
            raise InputError("the network's weights", problem)
        attached = self._attached
        if attached:
            self.detach()
        self._changes = {
            target: LayerChange(
                *(found.kind, {part: state[key] for part, key in found.keys.items()}, self._factor(target)),
                rows=self._layers[target].weight.shape[0],
            )
            for target, found in match.layers.items()
        }
        if attached:
            self._attach()
        return LoadedKeys([], list(match.unmatched))

    def apply_to(self, text_encoder: TextEncoders, unet: nn.Module) -> None:
        """Attach the network to the models that it was made for.

        Raises:
            RuntimeError: when it is attached already.
        """
        if self._attached:
            raise RuntimeError("the network is attached already")
        self._attach()

    def detach(self) -> None:
        """Leave the models as if the network had never been there."""
        for layer, change in self.layer_changes():
            remove_change(layer, change)
        self._attached = False

    @torch.no_grad()
    def set_multiplier(self, multiplier: float | Strength) -> None:
        """Set how strongly the network acts; after `backup_weights`, from the next `pre_calculation` on."""
        self.strength = _strength(multiplier)
        for target, change in self._changes.items():
            factor = self._factor(target)
            if factor != change.multiplier:
                change.multiplier = factor
                if self._attached:
                    adapter_of(self._layers[target]).update()
        if not self._pre_calculated:
            self.pre_calculation()

    def is_mergeable(self) -> bool:
        """Whether `merge_to` works; it does for every relative."""
        return True

    @torch.no_grad()
    def merge_to(
        self,
        text_encoder: TextEncoders,
        unet: nn.Module,
        weights_sd: State | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> None:
        """Add the network to the models' weights for good, worked out in float32.

        Args:
            text_encoder: the model that the network was made for, as `unet`.
            unet: likewise.
            weights_sd: weights in place of the network's own.
            dtype: the weights keep their type and device; part of the contract, as `device`.
            device: see `dtype`.
        """
        if weights_sd is not None:
            self.load_state_dict(weights_sd, strict=False)
        merge_together([self])

    def backup_weights(self) -> None:
        """From now on the whole network goes into the weights, when `pre_calculation` says so."""
        if self._pre_calculated:
            return
        attached = self._attached
        if attached:
            self.detach()
        self._pre_calculated = True
        if attached:
            self._attach()

    def leave_text_encoders(self) -> None:
        """Change the U-Net alone from now on: the text encoders' weights go, and nothing is worked out from them."""
        for target in [target for target in self._changes if target[0] != UNET]:
            del self._changes[target]
            abandon_changes(self._layers[target])
        self._layers = {target: layer for target, layer in self._layers.items() if target[0] == UNET}

    def restore_weights(self) -> None:
        """Put the original weights back until the next `pre_calculation`."""
        for layer, _ in self.layer_changes():
            adapter_of(layer).restore()

    @torch.no_grad()
    def pre_calculation(self) -> None:
        """Work out the weights with the current multipliers of all networks, from the original weights."""
        if self._attached:
            for layer, _ in self.layer_changes():
                adapter_of(layer).fold()

    def keep_shapes(self) -> None:
        """Let the U-Net's layers keep what is compiled with them, see `layers.LowRankStack.keep_shapes`."""
        for component, path in self._changes if self._attached else ():
            if component == UNET:
                adapter_of(self._layers[component, path]).keep_shapes()

    @property
    def changes(self) -> Mapping[Target, LayerChange]:
        """What it changes, by the model's part and the layer's path in it."""
        return self._changes

    def layer_changes(self) -> list[tuple[Layer, LayerChange]]:
        """What it changes, layer by layer."""
        return [(self._layers[target], change) for target, change in self._changes.items()]

    @cached_property
    def _blocks(self) -> dict[str, str]:
        """The blocks of the U-Net's layers, by their paths."""
        return unet_blocks((path for component, path in self._layers if component == UNET), self._unet_config)

    def _factor(self, target: Target) -> float:
        """How strongly the network acts on one layer."""
        component, path = target
        if component != UNET:
            return self.strength.in_text
        return self.strength.in_unet(self._blocks.get(path)) if self.strength.blocks else self.strength.unet

    @torch.no_grad()
    def _attach(self) -> None:
        for layer, change in self.layer_changes():
            adapter_of(layer).add(change, folded=self._pre_calculated or not change.is_pair(layer))
        self._attached = True
        if not self._pre_calculated:
            self.pre_calculation()


def _strength(multiplier: float | Strength) -> Strength:
    return multiplier if isinstance(multiplier, Strength) else Strength.of(multiplier)


@torch.no_grad()
def merge_together(networks: Sequence[LoraNetwork]) -> None:
    """Add networks to their models' weights for good, all worked out from the weights as they are, in float32."""
    changes: dict[Layer, list[LayerChange]] = {}
    for network in networks:
        for layer, change in network.layer_changes():
            changes.setdefault(layer, []).append(change)
    for layer, its_changes in changes.items():
        for name, value in folded_values(layer, [change for change in its_changes if change.acts]).items():
            original = getattr(layer, name)
            if original is None:
                setattr(layer, name, nn.Parameter(value.to(layer.weight.dtype), requires_grad=False))
            else:
                original.copy_(value)


class LoadedKeys(NamedTuple):
    """What `load_state_dict` made of a file's keys."""

    missing_keys: list[str]  # a network has no weights but those of its file, so that none is ever missing
    unexpected_keys: list[str]
