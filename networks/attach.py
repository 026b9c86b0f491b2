"""The networks of a run on its models: made by their modules, merged or attached, and their multipliers switched."""

import importlib
import inspect
import logging
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Protocol

import torch
from torch import nn

from library.errors import InputError
from library.models import Models
from networks.files import OWN_MODULE, NetworkPlan, NetworkSpec

logger = logging.getLogger("library.networks")

# LyCORIS 4.1's networks are merged at full strength, whatever their multiplier
_MERGED_AT_FULL_STRENGTH = "lycoris."


class Network(Protocol):
    """What the program asks of a network; `networks.lora.LoraNetwork` says more. The rest is asked for where needed."""

    def apply_to(self, text_encoder: nn.Module, unet: nn.Module) -> None:
        """Attach."""

    def load_state_dict(self, state: Mapping[str, torch.Tensor], strict: bool) -> object:
        """Take the weights."""

    def set_multiplier(self, multiplier: float) -> None:
        """Set how strongly it acts."""


class HuggingFaceNames(nn.Module):
    """A text encoder under a `text_model` level, which names in files have and transformers has given up since 5.6.

    Other people's modules match keys against such names.
    """

    def __init__(self, text_encoder: nn.Module) -> None:
        super().__init__()
        self.text_model = text_encoder


class Networks:
    """The networks of a run.

    Args:
        plan: which, and how they act.
        states: the weights of each, from `files.read_state`.
        models: what they are attached to.

    Raises:
        InputError: when a module cannot do what is asked of it, or none of its file's keys fit.
    """

    def __init__(self, plan: NetworkPlan, states: Sequence[Mapping[str, torch.Tensor]], models: Models) -> None:
        self._pre_calculated = plan.pre_calculated
        self._attached: list[Network] = []
        for place, (spec, state) in enumerate(zip(plan.specs, states)):
            self._add(spec, dict(state), models, merge=place < plan.merged)
        self._multipliers: tuple[float, ...] | None = None
        self.use(plan.multipliers)

    @torch.no_grad()
    def use(self, multipliers: tuple[float, ...]) -> None:
        """Let the networks that are not merged act with these multipliers."""
        if multipliers == self._multipliers:
            return
        if self._pre_calculated:
            for network in self._attached:
                network.restore_weights()
        for network, multiplier in zip(self._attached, multipliers):
            network.set_multiplier(multiplier)
        if self._pre_calculated:
            for network in self._attached:
                network.pre_calculation()
        self._multipliers = multipliers

    @torch.no_grad()
    def _add(self, spec: NetworkSpec, state: dict[str, torch.Tensor], models: Models, *, merge: bool) -> None:
        subject = f"--network_weights {spec.weights.path}"
        own = spec.module == OWN_MODULE
        text_encoder = models.text_encoder if own else HuggingFaceNames(models.text_encoder)
        create = getattr(_import(spec.module), "create_network_from_weights", None)
        if create is None:
            problem = "has no create_network_from_weights, as a network's module has; give one that has"
            raise InputError(f"--network_module {spec.module}", problem)
        arguments = {} if own else spec.arguments
        path = str(spec.weights.path)
        models_for_it = (models.vae, text_encoder, models.unet)
        try:
            network, state = create(
                spec.multiplier, path, *models_for_it, weights_sd=state, for_inference=True, **arguments
            )
        except InputError as problem:
            raise InputError(subject, str(problem)) from None
        if merge:
            _merge(network, spec, state, text_encoder, models.unet)
            return
        if self._pre_calculated and not hasattr(network, "pre_calculation"):
            raise InputError(f"--network_pre_calc with {spec.module}", "the module cannot do that; leave one out")
        _attach(network, spec, state, text_encoder, models.unet)
        if self._pre_calculated:
            network.backup_weights()
        self._attached.append(network)


def _import(module: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except Exception as problem:  # whatever the module raises
        reason = f"{type(problem).__name__}: {problem}".splitlines()[0]
        raise InputError(f"--network_module {module}", f"cannot be imported ({reason}); repair or replace it") from None


def _merge(
    network: Network, spec: NetworkSpec, state: Mapping[str, torch.Tensor], text_encoder: nn.Module, unet: nn.Module
) -> None:
    """Add a network to the weights for good."""
    option = f"--network_merge with {spec.module}"
    if not hasattr(network, "merge_to") or not getattr(network, "is_mergeable", lambda: True)():
        raise InputError(option, "the module cannot merge this network; leave out --network_merge")
    if spec.module.startswith(_MERGED_AT_FULL_STRENGTH) and spec.multiplier != 1:
        raise InputError(option, f"it merges with multiplier 1 only; use 1, or {OWN_MODULE}, which reads its files")
    network.merge_to(text_encoder, unet, state, unet.dtype, unet.device)


def _attach(
    network: Network, spec: NetworkSpec, state: Mapping[str, torch.Tensor], text_encoder: nn.Module, unet: nn.Module
) -> None:
    """Attach a network and fill in its weights; refuses one with no key that fits."""
    # sd-scripts and LyCORIS let a trainer choose the parts to attach
    choices = {"apply_text_encoder", "apply_unet"} & set(inspect.signature(network.apply_to).parameters)
    network.apply_to(text_encoder, unet, **dict.fromkeys(choices, True))
    loaded = network.load_state_dict(state, False)
    if isinstance(network, nn.Module):
        network.requires_grad_(False).eval().to(unet.device)
    if spec.module == OWN_MODULE:
        return  # its keys were told before the models were loaded
    subject, unmatched = f"--network_weights {spec.weights.path}", loaded.unexpected_keys
    fits = f"{len(state) - len(unmatched)} of {len(state)} keys fit in {spec.module}"
    if len(unmatched) == len(state):
        raise InputError(subject, f"{fits}; use the module that wrote the file")
    if unmatched:
        logger.warning("%s: %s; left aside: %r and %d others", subject, fits, unmatched[0], len(unmatched) - 1)
