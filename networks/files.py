"""Network files: found, opened and checked against the model's headers before anything is loaded."""

import importlib.util
import json
import logging
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from library.console import others_at_work, say
from library.errors import InputError
from library.files import checkpoint_layout as layout
from library.files.families import FAMILIES
from library.files.model_files import ModelFiles, name_kind
from library.files.safetensors_file import ADVICE, FLOATING
from library.files.unet_layers import blocks_a_side
from library.files.weight_files import WeightFile, choose_weights, open_weights
from library.settings.options import Options
from library.texts import readable
from networks.keys import KeyMatch, LayerNames, Target, is_aside, layer_shapes, match_keys, sort_keys
from networks.kinds import KINDS, Shape
from networks.origins import made_for
from networks.strengths import Strength, block_names, blocks_problem

logger = logging.getLogger(__name__)

OWN_MODULE = "networks.lora"


@dataclass(frozen=True)
class NetworkSpec:
    """One network of a run: the module that understands it, its file, and what the user set for it."""

    module: str
    weights: WeightFile
    multiplier: Strength
    arguments: Mapping[str, str]

    @property
    def name(self) -> str:
        """The file's name for people and metadata."""
        path = self.weights.path
        return readable((path.parent if path.stem in FOLDER_STEMS else path).stem)


@dataclass(frozen=True)
class NetworkPlan:
    """The networks of a run and how they act: those that options name, and after them those of prompts' tags."""

    specs: tuple[NetworkSpec, ...] = ()
    merged: int = 0  # so many of the first are added to the weights for good
    pre_calculated: bool = False  # the others go into the weights whenever multipliers change
    tagged: int = 0  # so many of the last are tags'; these act in the pictures alone whose prompts name them

    @property
    def multipliers(self) -> tuple[Strength, ...]:
        """Those of the networks that options name and are not merged, where a prompt line sets no others."""
        return tuple(spec.multiplier for spec in self.specs[self.merged : len(self.specs) - self.tagged])

    def in_picture(self, strengths: Sequence[Strength]) -> Iterator[tuple[NetworkSpec, Strength, bool]]:
        """Each network of a picture, its strength, and whether it is merged; tags' only where they act.

        Args:
            strengths: of those that are not merged, from `Job.all_strengths`.
        """
        merged = [spec.multiplier for spec in self.specs[: self.merged]]
        first_tagged = len(self.specs) - self.tagged
        for place, (spec, strength) in enumerate(zip(self.specs, [*merged, *strengths])):
            if place < first_tagged or strength.acts:
                yield spec, strength, place < self.merged

    def describe(self, strengths: Sequence[Strength]) -> str:
        """The networks of a picture with their strengths, see `in_picture`: `style: 0.8, detail: 0.3/1`."""
        texts = (
            f"{spec.name}: {strength if strength.number is None else f'{strength.number:g}'}"
            for spec, strength, _ in self.in_picture(strengths)
        )
        return ", ".join(texts)


# ---------------------------------------------------------------------------------------------------------------------
# Files

FOLDER_STEMS = ("adapter_model", "pytorch_lora_weights")  # how PEFT and Diffusers name the file in its folder


def open_network(path: Path) -> WeightFile:
    """Open a network file, or the one in a folder that PEFT or Diffusers wrote."""
    path = path.expanduser()
    if path.is_dir():
        name = choose_weights([entry.name for entry in path.iterdir()], FOLDER_STEMS)
        if name is None:
            problem = f"is a folder without {' or '.join(FOLDER_STEMS)}.safetensors; give the network's file"
            raise InputError(str(path), problem)
        path /= name
    return open_weights(path)


# ---------------------------------------------------------------------------------------------------------------------
# Options to specifications


def plan_networks(options: Options, model: ModelFiles) -> NetworkPlan:
    """Check the networks that the options name, and decide which of them are merged.

    Raises:
        InputError: for options that do not go together.
    """
    weights = options.network_weights or []
    modules = options.network_module or [OWN_MODULE] * len(weights)
    if not modules:
        return NetworkPlan(pre_calculated=options.network_pre_calc)
    merged = len(modules) if options.network_merge else 0
    if (first := options.network_merge_n_models) is not None:
        if first > len(modules):
            subject = f"--network_merge_n_models {first}"
            raise InputError(subject, f"there are {len(modules)} networks; give at most that number")
        merged = first
    if merged and options.network_pre_calc:
        raise InputError("--network_pre_calc", "is for networks that are not merged; leave out one of the two")
    specs = find_networks(modules, weights, options.network_mul or [], options.network_args or [], model)
    for place, spec in enumerate(specs):
        check_strength(spec, spec.multiplier, model, f"--network_mul {spec.multiplier}")
        if place < merged and spec.multiplier.has_range:
            problem = "a range of steps is for networks that are not merged; leave it out, or merge fewer networks"
            raise InputError(f"--network_mul {spec.multiplier}", problem)
    for spec in specs if options.network_show_meta else ():
        for line in describe_metadata(spec):
            say(line)
    return NetworkPlan(specs, merged, options.network_pre_calc)


def find_networks(
    modules: Sequence[str],
    weights: Sequence[str],
    multipliers: Sequence[Strength],
    arguments: Sequence[str],
    model: ModelFiles,
) -> tuple[NetworkSpec, ...]:
    """Pair up what `--network_module` and its companions say, and check each file against the model.

    Raises:
        InputError: for numbers that do not fit, a module that is not there, a file that is no network of this family.
    """
    if len(weights) != len(modules):
        subject = f"--network_weights: {len(weights)} for {len(modules)} --network_module"
        advice = f"give as many, or leave --network_module out, which is then {OWN_MODULE}"
        raise InputError(subject, f"each module needs one weight file; {advice}")
    for name, values in (("--network_mul", multipliers), ("--network_args", arguments)):
        if len(values) > len(modules):
            networks = f"{len(modules)} network{'s' if len(modules) > 1 else ''}"
            swept = ",".join(f'"{value}"' if "," in str(value) else str(value) for value in values)
            advice = f"; to compare strengths, give --sweep network_mul={swept}, or a line for each (--am {values[0]})"
            advice = advice if name == "--network_mul" else ""
            raise InputError(name, f"has {len(values)} values for {networks}; give at most as many{advice}")
    for module in modules:
        _check_module(module)
    specs = []
    check = FileCheck(model)
    for place, (module, path) in enumerate(zip(modules, weights)):
        multiplier = multipliers[place] if place < len(multipliers) else Strength()
        parsed = _parse_arguments(arguments[place]) if place < len(arguments) else {}
        if parsed and module == OWN_MODULE:
            logger.warning("--network_args: %s takes none, %s does nothing", module, ", ".join(parsed))
        spec = NetworkSpec(module, open_network(Path(path)), multiplier, parsed)
        check(spec, f"--network_weights {spec.weights.path}")
        specs.append(spec)
    return tuple(specs)


def check_strength(spec: NetworkSpec, strength: Strength, model: ModelFiles, subject: str, where: str = "") -> None:
    """Refuse a strength that a network's module or the model's blocks do not know.

    Raises:
        InputError: for `subject`, where it is said.
    """
    if spec.module != OWN_MODULE and (strength.te != strength.unet or strength.blocks):
        problem = f"{spec.module} takes one number for all layers; give one, or use {OWN_MODULE}"
        raise InputError(subject, problem, where)
    if strength.blocks:
        has, published = (blocks_a_side(config) for config in (model.unet.config, model.family.config("unet")))
        if problem := blocks_problem(strength.blocks, block_names(has), 2 * published + 2):
            raise InputError(subject, problem, where)


def _check_module(module: str) -> None:
    """Refuse a module that cannot be imported; its own file is not run yet."""
    try:
        with others_at_work():
            found = importlib.util.find_spec(module)
    except Exception as problem:  # whatever the packages that it is in raise
        found, reason = None, f"{type(problem).__name__}: {problem}".splitlines()[0]
    else:
        reason = "there is none of that name"
    if found is None:
        hint = f"{OWN_MODULE} reads LoRA and its relatives"
        if module.startswith("lycoris"):
            hint = "pip install -r requirements-lycoris.txt"
        raise InputError(f"--network_module {module}", f"cannot be imported ({reason}); {hint}")


def _parse_arguments(text: str) -> dict[str, str]:
    """`key=value;key=value`; a value may hold `=`."""
    arguments = {}
    for pair in text.split(";"):
        key, equals, value = pair.partition("=")
        if not equals or not key.strip():
            raise InputError(f"--network_args {text}", f"{pair!r} is not key=value; write key=value;key=value")
        arguments[key.strip()] = value.strip()
    return arguments


class FileCheck:
    """Checks network files against a model."""

    def __init__(self, model: ModelFiles) -> None:
        self._model = model

    @cached_property
    def _layers(self) -> Mapping[Target, Shape]:
        return layer_shapes(self._model)

    @cached_property
    def _names(self) -> LayerNames:
        return LayerNames(self._layers, self._model.unet.config, self._model.family.encoders)

    def __call__(self, spec: NetworkSpec, subject: str, where: str = "") -> None:
        """Refuse a file of another family or with no key that fits; warn of keys that do not.

        Raises:
            InputError: for `subject`, where it is named.
        """
        model, shapes = self._model, spec.weights.shapes
        match = match_keys(shapes, self._names, self._layers)
        fits = f"{match.matched} of {match.matched + len(match.unmatched)} keys fit"
        if (other := made_for(shapes, spec.weights.metadata, model)) is not None:
            problem = f"{fits}; it is made for {other}, the model is {model.family.name}; use one made for it"
            raise InputError(subject, problem, where)
        _check_types(spec.weights, match)
        if spec.module != OWN_MODULE:
            return  # what its keys mean is the module's to say
        if not match.layers:
            raise InputError(subject, f"{fits}; it is {_what_it_is(spec.weights, model)}", where)
        if match.unmatched:
            left = f"{match.unmatched[0]!r} and {len(match.unmatched) - 1} others"
            logger.warning("%s: %s; left aside: %s", subject, fits, left)


def _check_types(weights: WeightFile, match: KeyMatch) -> None:
    """Refuse a file of which a tensor that has a layer is of another type than weights are; single numbers may be."""
    for key in (key for layer in match.layers.values() for key in layer.keys.values()):
        kind = weights.types[key]
        if kind not in FLOATING and math.prod(weights.shapes[key]) > 1:
            raise InputError(str(weights.path), f"{key!r} is of type {kind}, in which no weights are read; {ADVICE}")


# Kinds of networks that cannot be read, told by their keys
_UNKNOWN_KINDS = {
    r"\.ia3_l\b": "an IA³ of PEFT",
    r"\.glora_[A-E]\.": "a GLoRA of PEFT",
    r"\.lora_E\b": "an AdaLoRA",
    r"\.lora_embedding_[AB]\b": "a LoRA of embeddings alone",
    r"vera_lambda_[bd]": "a VeRA",
    r"randlora_(?:lambda|gamma)": "a RandLoRA",
    r"vblora_(?:logits|vector_bank)": "a VB-LoRA",
    r"\.hra_u\b": "an HRA",
    r"fourierft_spectrum": "a FourierFT",
    r"\.oft_r(?:\.|$)": "an OFT of the first versions of PEFT",
    r"\.(?:bone|miss)_": "a MiSS",
    r"\.shira_weight\b": "a SHiRA",
    r"\.road_(?:theta|alpha)\b": "a RoAd",
    r"\.c3a_kernel\b": "a C3A",
    r"waveft_spectrum": "a WaveFT",
}
# What is no network, by the names of `name_kind` → the option that it belongs to
_BELONGS_TO = {
    "a ControlNet": "--control_net_models",
    "a ControlNet-LLLite": "--control_net_lllite_models",
    "a textual inversion embedding": "--textual_inversion_embeddings",
}


def _is_embedding(keys: Sequence[str], shapes: Mapping[str, Shape], model: ModelFiles) -> bool:
    """Whether all that a file has is a word's vectors, for each of one or two text encoders."""
    widths = {text.config["hidden_size"] for text in model.texts}
    widths |= {family.config(kind.part)["hidden_size"] for family in FAMILIES for kind in family.encoders}
    return len(keys) <= 2 and all(0 < len(shapes[key]) < 3 and shapes[key][-1] in widths for key in keys)


def _what_it_is(weights: WeightFile, model: ModelFiles) -> str:
    """What a file of which no key fits is, and what to do with it."""
    keys = [key for key in weights.shapes if not is_aside(key)]
    if not keys:
        return "a file of embeddings alone; use one that has a network too"
    parts = sort_keys(keys)[0].values()
    if (known := next((kind for each in parts for kind in KINDS if kind.has(each)), None)) is not None:
        return f"a network ({known.name}) for other layers than this model's; use one made for it"
    for pattern, unknown in _UNKNOWN_KINDS.items():
        if any(re.search(pattern, key) for key in keys):
            return f"{unknown}, which {OWN_MODULE} cannot read; use a network of another kind"
    kind = name_kind(weights)
    if kind is None and _is_embedding(keys, weights.shapes, model):
        kind = "a textual inversion embedding"
    if kind in _BELONGS_TO:
        return f"{kind}, not a network; give it with {_BELONGS_TO[kind]}"
    prefixes = {layout.UNET_PREFIX: ("a checkpoint", "--ckpt"), layout.VAE_PREFIX: ("a VAE", "--vae")}
    prefixes |= {"encoder.conv_in": ("a VAE", "--vae"), "down_blocks.": ("a U-Net", "--ckpt in its model's folder")}
    for prefix, (what, option) in prefixes.items():
        if any(key.startswith(prefix) for key in keys):
            return f"{what}, not a network; give it with {option}"
    return f"{kind or 'no network for Stable Diffusion'}, which {OWN_MODULE} cannot read; use another file"


# ---------------------------------------------------------------------------------------------------------------------
# Metadata


def describe_metadata(spec: NetworkSpec) -> list[str]:
    """A file's metadata in readable lines; JSON within it is unfolded."""
    lines = [f"metadata of {spec.weights.path}:"]
    for name, text in sorted(spec.weights.metadata.items()):
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            value = text
        if isinstance(value, dict | list):
            lines += [f"  {name}:", *(f"    {line}" for line in json.dumps(value, indent=2).splitlines())]
        else:
            lines.append(f"  {name}: {text}")
    return lines if len(lines) > 1 else [f"metadata of {spec.weights.path}: none"]
