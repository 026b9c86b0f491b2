"""The networks of a run on its models: made by their modules, merged or attached, and their multipliers switched."""

import importlib
import inspect
import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Protocol, runtime_checkable

import torch
from diffusers import UNet2DConditionModel
from torch import nn

from library.console import others_at_work
from library.draw.regions import Regions
from library.errors import InputError
from library.models.models import Models, TextEncoder
from networks.files import OWN_MODULE, NetworkPlan, NetworkSpec
from networks.keys import UNET, LayerNames, Named
from networks.layers import Layer, LayerChange, adapter_of, is_rewritten
from networks.lora import LoraNetwork, TextEncoders, merge_together
from networks.regional import make_gate
from networks.states import State
from networks.strengths import OFF, Strength

logger = logging.getLogger(__name__)

_KOHYA_UNET = "lora_unet_"  # how sd-scripts and LyCORIS begin the names of the U-Net's layers
# LyCORIS 4.1 leaves the multiplier out when it merges, and counts the scale of LoHa twice
_NOT_MERGED = "lycoris."
# Before it makes the network of a file, LyCORIS makes one of the layers that its preset names, and 4.1's names some
# layers of Stable Diffusion twice, which fails. This preset names none.
_LYCORIS_PRESET = {
    **{"unet_target_module": [], "unet_target_name": []},
    **{"text_encoder_target_module": [], "text_encoder_target_name": []},
}


class Network(Protocol):
    """What the program asks of a network; `networks.lora.LoraNetwork` says more. The rest is asked for where needed."""

    def apply_to(self, text_encoder: TextEncoders, unet: UNet2DConditionModel) -> None:
        """Attach."""

    def state_dict(self) -> State:
        """The weights; asked of networks of other modules alone."""

    def load_state_dict(self, state: State, strict: bool) -> object:
        """Take the weights."""

    def set_multiplier(self, multiplier: float) -> None:
        """Set how strongly it acts."""


@runtime_checkable
class FoldingNetwork(Protocol):
    """What `--network_pre_calc` asks of a network besides."""

    def backup_weights(self) -> None:
        """Keep the original weights."""

    def restore_weights(self) -> None:
        """Put the original weights back."""

    def pre_calculation(self) -> None:
        """Put the weights with the network in their place."""


class HuggingFaceNames(nn.Module):
    """A text encoder under a `text_model` level, which names in files have and transformers has given up since 5.6.

    Other people's modules match keys against such names.
    """

    def __init__(self, text_encoder: nn.Module) -> None:
        super().__init__()
        self.text_model = text_encoder


@torch.no_grad()
def merge_networks(plan: NetworkPlan, states: Sequence[State], models: Models) -> None:
    """Add the first networks of a run, as many as the plan merges, to the models' weights for good.

    Other modules' go in one by one, as they come. Then those of our own go in together, each worked out from the
    weights as they are by then, not from what the one before it made of them.

    Args:
        plan: which.
        states: the weights of each, from `states.read_state`.
        models: whose weights change.

    Raises:
        InputError: when a module cannot do what is asked of it.
    """
    own: list[LoraNetwork] = []
    for spec, state in zip(plan.specs[: plan.merged], states):
        with others_at_work():
            text_encoder = _text_encoders(models.texts, own=spec.module == OWN_MODULE)
            network, state = _create(spec, state, models.vae, text_encoder, models.unet)
            if isinstance(network, LoraNetwork):
                own.append(network)
            else:
                _merge(network, spec, state, text_encoder, models.unet)
    merge_together(own)


class Networks:
    """The networks of a run that are not merged.

    Args:
        plan: which, and how they act.
        states: the weights of each, from `states.read_state`, merged ones' among them.
        models: what they are attached to.

    Raises:
        InputError: when a module cannot do what is asked of it, or none of its file's keys fit.
    """

    def __init__(self, plan: NetworkPlan, states: Sequence[State], models: Models) -> None:
        self._pre_calculated = plan.pre_calculated
        # only this program's own network is known to put other weights in place and not to write into them
        self.write_into_weights = plan.pre_calculated and any(spec.module != OWN_MODULE for spec in plan.specs)
        self._unet = models.unet
        self._attached: list[Network] = []
        self._folding: list[FoldingNetwork] = []  # those of them that are pre-calculated
        for spec, state in zip(plan.specs[plan.merged :], states[plan.merged :]):
            with others_at_work():
                self._add(spec, state, models)
        self._strengths: tuple[Strength | None, ...] = (None,) * len(self._attached)
        self.version = 0  # another number where the models do otherwise than before
        self.use(plan.multipliers)

    @property
    def are_own(self) -> bool:
        """Whether all are this program's own."""
        return all(isinstance(network, LoraNetwork) for network in self._attached)

    @torch.no_grad()
    def use(self, strengths: tuple[Strength, ...]) -> None:
        """Let the networks that are not merged act with these strengths, and those beyond them not at all."""
        strengths += (OFF,) * (len(self._attached) - len(strengths))
        if strengths == self._strengths:
            return
        for folding in self._folding:
            folding.restore_weights()
        for network, strength, before in zip(self._attached, strengths, self._strengths):
            if strength != before:
                if isinstance(network, LoraNetwork):
                    network.set_multiplier(strength)
                else:
                    network.set_multiplier(strength.unet)  # planning lets no strength come to it that says more
        for folding in self._folding:
            folding.pre_calculation()
        self._strengths = strengths
        self.version += 1

    def leave_text_encoders(self) -> None:
        """Change the U-Net alone from now on, before the text encoders' weights go."""
        for network in self._attached:
            if isinstance(network, LoraNetwork):
                network.leave_text_encoders()

    def _note_change(self) -> None:
        self.version += 1

    def keep_shapes(self) -> None:
        """Let the U-Net's layers do what is compiled with their networks, whichever of these act later on."""
        for network in self._attached:
            if isinstance(network, LoraNetwork):
                network.keep_shapes()

    def rewritten_layers(self) -> set[nn.Module]:
        """The U-Net's layers whose weights are exchanged for others during the run."""
        return {layer for layer in self._unet.modules() if is_rewritten(layer)}

    @contextmanager
    def acting_in(self, regions: Regions) -> Iterator[None]:
        """Let network i act for part i alone, for the length of the block, where regions are for networks.

        Networks beyond the last that is for a part, those of tags, act everywhere.
        """
        if not regions.networks:
            yield
            return
        layers: dict[str, dict[LayerChange, int]] = {}
        for number, network in enumerate(self._attached):
            # planning lets no other module's network come to regions
            for (component, path), change in network.changes.items() if isinstance(network, LoraNetwork) else ():
                if component == UNET:
                    layers.setdefault(path, {})[change] = number
        with ExitStack() as stack:
            if self.rewritten_layers():
                stack.callback(self._note_change)  # afterwards their weights are in other memory than before
            for path, changes in layers.items():
                layer = self._unet.get_submodule(path)
                assert isinstance(layer, Layer)  # networks change no others
                if (gate := make_gate(path, regions)) is not None:
                    stack.enter_context(adapter_of(layer).gated(gate, changes))
            yield

    @torch.no_grad()
    def _add(self, spec: NetworkSpec, state: State, models: Models) -> None:
        own = spec.module == OWN_MODULE
        text_encoder = _text_encoders(models.texts, own=own)
        network, state = _create(spec, state, models.vae, text_encoder, models.unet)
        folding = network if isinstance(network, FoldingNetwork) and self._pre_calculated else None
        if self._pre_calculated and folding is None:
            raise InputError(f"--network_pre_calc with {spec.module}", "the module cannot do that; leave one out")
        _attach(network, spec, state, text_encoder, models.unet)
        if folding is not None:
            folding.backup_weights()
            self._folding.append(folding)
        self._attached.append(network)


def _text_encoders(texts: Sequence[TextEncoder], *, own: bool) -> TextEncoders:
    """The text encoders as networks' modules expect them: one by itself, several as a list."""
    models = [text.model if own or text.kind.pooled else HuggingFaceNames(text.model) for text in texts]
    return models[0] if len(models) == 1 else models


def _create(
    spec: NetworkSpec, state: State, vae: nn.Module, text_encoder: TextEncoders, unet: UNet2DConditionModel
) -> tuple[Network, State]:
    """Let a network's module make it of its weights."""
    try:
        module = importlib.import_module(spec.module)
    except Exception as problem:  # whatever the module raises
        reason = _in_one_line(problem)
        raise InputError(f"--network_module {spec.module}", f"cannot be imported ({reason}); repair it") from None
    if not hasattr(module, "create_network_from_weights"):
        problem = "has no create_network_from_weights, as a network's module has; give one that has"
        raise InputError(f"--network_module {spec.module}", problem)
    if hasattr(module, "LycorisNetworkKohya"):
        module.LycorisNetworkKohya.apply_preset(_LYCORIS_PRESET)
        logging.getLogger("LyCORIS").setLevel(logging.WARNING)  # below that it tells trainers what they chose
    own = spec.module == OWN_MODULE
    arguments = {} if own else spec.arguments
    state = state if own else _diffusers_paths(state, unet)
    file = str(spec.weights.path)
    multiplier = spec.multiplier if own else spec.multiplier.unet
    with _others_at_fault(spec):
        return module.create_network_from_weights(
            multiplier, file, vae, text_encoder, unet, weights_sd=state, for_inference=True, **arguments
        )


@contextmanager
def _others_at_fault(spec: NetworkSpec) -> Iterator[None]:
    """A block of a network's module, whose faults are not this program's."""
    try:
        yield
    except Exception as problem:  # whatever the module raises
        subject = f"--network_weights {spec.weights.path}"
        raise InputError(subject, f"{spec.module} cannot use it ({_in_one_line(problem)}); see {OWN_MODULE}") from None


def _diffusers_paths(state: State, unet: UNet2DConditionModel) -> State:
    """A state with the U-Net's layers named after Diffusers' paths, as others' modules look for them in this U-Net.

    What names a layer in the original's way besides is left out, as `networks.lora` does.
    """
    layers = [(UNET, path) for path, layer in unet.named_modules() if isinstance(layer, Layer)]
    names = LayerNames(layers, unet.config, ())
    renamed: dict[str, torch.Tensor] = {}
    for key, tensor in state.items():
        module, _, part = key.partition(".")
        named = names.find(module) if module.startswith(_KOHYA_UNET) else Named(())
        if named.original:
            key = f"{_KOHYA_UNET}{named.targets[0][1].replace('.', '_')}.{part}"
        if not (named.original and key in state):
            renamed[key] = tensor
    return renamed


def _in_one_line(problem: Exception) -> str:
    return f"{type(problem).__name__}: {problem}".splitlines()[0]


def _merge(
    network: Network, spec: NetworkSpec, state: State, text_encoder: TextEncoders, unet: UNet2DConditionModel
) -> None:
    """Add a network to the weights for good."""
    option = f"--network_merge with {spec.module}"
    merge_to = getattr(network, "merge_to", None)
    if merge_to is None or not getattr(network, "is_mergeable", lambda: True)():
        raise InputError(option, "the module cannot merge this network; leave out --network_merge")
    if spec.module.startswith(_NOT_MERGED):
        raise InputError(option, f"LyCORIS merges in another strength; use {OWN_MODULE}, which reads its files")
    merge_to(text_encoder, unet, state, unet.dtype, unet.device)


def _attach(
    network: Network, spec: NetworkSpec, state: State, text_encoder: TextEncoders, unet: UNet2DConditionModel
) -> None:
    """Attach a network and fill in its weights; refuses one with no key that fits."""
    if spec.module == OWN_MODULE:
        network.apply_to(text_encoder, unet)
        return  # its weights are in it, and its keys were told before the models were loaded
    with _others_at_fault(spec):
        # sd-scripts and LyCORIS let a trainer choose the parts to attach
        choices = {"apply_text_encoder", "apply_unet"} & set(inspect.signature(network.apply_to).parameters)
        network.apply_to(text_encoder, unet, **dict.fromkeys(choices, True))
        held = network.state_dict()
        if not _is_filled(held, state):
            network.load_state_dict(state, False)
    if isinstance(network, nn.Module):
        network.requires_grad_(False).eval()
        network.to(unet.device)
    subject, unmatched = f"--network_weights {spec.weights.path}", [key for key in state if key not in held]
    fits = f"{len(state) - len(unmatched)} of {len(state)} keys fit in {spec.module}"
    if len(unmatched) == len(state):
        raise InputError(subject, f"{fits}; use the module that wrote the file")
    if unmatched:
        logger.warning("%s: %s; left aside: %r and %d others", subject, fits, unmatched[0], len(unmatched) - 1)


def _is_filled(held: State, state: State) -> bool:
    """Whether a network came with its weights; LyCORIS counts full differences twice when they are loaded again."""
    shared = held.keys() & state.keys()
    return all(
        held[key].shape == state[key].shape
        # full differences come back as the weight less the original one
        and torch.allclose(held[key].float().cpu(), state[key].float(), rtol=1e-3, atol=1e-5)
        for key in shared
    )
