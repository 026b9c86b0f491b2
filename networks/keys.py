"""Which layer each key of a network file is for, in every way of naming that is found in the wild.

A key is a module's name and a part. Names are matched against those of the model's own layers, flattened with `_` for
`.`: kohya's `lora_unet_…` and `lora_te_…`, also with the original checkpoints' U-Net names, and the paths of Diffusers
and PEFT.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from library.files.families import FAMILIES, FOREIGN_FAMILIES, Family, TextEncoderKind, name_of_width
from library.files.model_files import ModelFiles
from library.files.unet_layers import original_paths, unet_layers
from networks.kinds import KINDS, Kind, Shape, Shapes

UNET = "unet"
Target = tuple[str, str]  # UNET or a text encoder's part, and the module's path in it


class Widths(NamedTuple):
    """How wide a model's texts are: what its U-Net attends to, and each text encoder by itself."""

    joined: int
    encoders: tuple[int, ...]


# How a key ends, as a pattern → the part it holds; PEFT puts the adapter's name in between
_ENDINGS = {
    **{rf"\.{name}\.weight": name for name in ("lora_down", "lora_up", "lora_mid")},
    **{
        rf"\.{name}": name
        for kind in KINDS
        for name in (*frozenset().union(*kind.needed), *kind.optional)
        if not name.startswith("lora_")
    },
    # Diffusers
    r"\.lora\.down\.weight": "lora_down",
    r"\.lora\.up\.weight": "lora_up",
    r"_lora\.down\.weight": "lora_down",
    r"_lora\.up\.weight": "lora_up",
    r"\.lora_linear_layer\.down\.weight": "lora_down",
    r"\.lora_linear_layer\.up\.weight": "lora_up",
    # PEFT
    r"\.lora_A(?:\.[^.]+)?\.weight": "lora_down",
    r"\.lora_B(?:\.[^.]+)?\.weight": "lora_up",
    r"\.lora_magnitude_vector(?:\.[^.]+)?(?:\.weight)?": "dora_scale",
    r"\.magnitude": "dora_scale",
}
_ENDING = re.compile("|".join(rf"(?P<p{place}>{pattern})$" for place, pattern in enumerate(_ENDINGS)))
_PARTS = list(_ENDINGS.values())
# Of the U-Net's layers; without one a key may name any component's
_UNET_PREFIXES = ("lora_unet_", "oft_unet_", "lycoris_", "unet_", "diffusion_model_", "model_diffusion_model_")
# What Diffusers' first files call the projections of text encoders' attention
_OLD_PROJECTIONS = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out_0"}


def split_key(key: str) -> tuple[str, str] | None:
    """A key's flat module name and part, `lora_unet_mid_block_…` and `lora_down`; None when it has no known part."""
    match = _ENDING.search(key)
    if match is None or match.lastgroup is None or not match.start():
        return None
    module = key[: match.start()].removeprefix("base_model.model.").replace(".processor.", ".")
    if match[0].startswith("_lora.") and module.endswith(".to_out"):
        module += ".0"  # older Diffusers files leave the list out that to_out is
    return module.replace(".", "_"), _PARTS[int(match.lastgroup[1:])]


@dataclass(frozen=True)
class Named:
    """The layers that a flat module name may mean, of which the first that fits counts; `original`: in its naming."""

    targets: tuple[Target, ...]
    original: bool = False


class LayerNames:
    """Finds layers by the flat names of files.

    Args:
        targets: the model's layers; text encoders' paths with or without the `text_model.` that files have and
            transformers has given up.
        unet_config: tells the original's names of the U-Net's modules.
        encoders: the kinds of the text encoders.
    """

    def __init__(self, targets: Iterable[Target], unet_config: Mapping, encoders: Sequence[TextEncoderKind]) -> None:
        prefixes: dict[str, tuple[str, ...]] = dict.fromkeys(_UNET_PREFIXES, (UNET,))
        for kind in encoders:
            for prefix in kind.lora_prefixes:
                prefixes[prefix] = (*prefixes.get(prefix, ()), kind.part)
        self._prefixes = dict(sorted(prefixes.items(), key=lambda item: -len(item[0])))  # one may begin another
        self._flat: dict[str, dict[str, str]] = {UNET: {}, **{kind.part: {} for kind in encoders}}
        for component, path in targets:
            if component == UNET:
                self._flat[UNET][path.replace(".", "_")] = path
            else:
                flat = path.removeprefix("text_model.").replace(".", "_")
                old = re.sub("[a-z]+_proj$", lambda last: _OLD_PROJECTIONS.get(last[0], last[0]), flat)
                for name in (flat, old):
                    self._flat[component] |= {name: path, f"text_model_{name}": path}
        self._originals = original_paths(self._flat[UNET].values(), unet_config)

    def find(self, flat_name: str) -> Named:
        """What a flat module name may mean; one without a prefix may be in any component."""
        prefix = next((prefix for prefix in self._prefixes if flat_name.startswith(prefix)), "")
        components = self._prefixes[prefix] if prefix else tuple(self._flat)
        name = flat_name.removeprefix(prefix)
        targets = tuple((part, self._flat[part][name]) for part in components if name in self._flat[part])
        if not targets and UNET in components and name in self._originals:
            return Named(((UNET, self._originals[name]),), original=True)
        return Named(targets)


@dataclass
class LayerKeys:
    """One layer's part of a network file: what it is, and the key of each part."""

    kind: Kind
    keys: dict[str, str] = field(default_factory=dict)  # part → key


@dataclass(frozen=True)
class KeyMatch:
    """A network file's keys against a model's layers."""

    layers: dict[Target, LayerKeys]
    unmatched: tuple[str, ...]

    @property
    def matched(self) -> int:
        """How many keys have a layer."""
        return sum(len(layer.keys) for layer in self.layers.values())


def match_keys(shapes: Shapes, names: LayerNames, weights: Mapping[Target, Shape]) -> KeyMatch:
    """Find the layer of each key of a file.

    Args:
        shapes: the file's tensors.
        names: the model's layers.
        weights: the shapes of their weights; parts that do not fit them are unmatched.
    """
    found: dict[tuple[Target, ...], dict[str, tuple[str, Named]]] = {}
    unmatched = []
    for key in shapes:
        module, part = split_key(key) or ("", "")
        named = names.find(module)
        parts = found.setdefault(named.targets, {}) if named.targets else {}
        if not named.targets or (part in parts and (named.original or not parts[part][1].original)):
            unmatched.append(key)
            continue
        if part in parts:  # a file that names a layer in both ways means Diffusers' one
            unmatched.append(parts[part][0])
        parts[part] = key, named
    layers = {}
    for targets, parts in found.items():
        keys = {part: key for part, (key, _) in parts.items()}
        kind = next((kind for kind in KINDS if kind.has(keys)), None)
        its_shapes = {part: shapes[key] for part, key in keys.items()}
        target = next((t for t in targets if kind and t not in layers and kind.fits(its_shapes, weights[t])), None)
        if kind and target:
            layers[target] = LayerKeys(kind, keys)
        else:
            unmatched += keys.values()
    return KeyMatch(layers, tuple(unmatched))


def made_for(shapes: Shapes, family: Family, widths: Widths) -> str | None:
    """What a network file is made for where that is another family than the model's; None where nothing says so.

    Args:
        shapes: the file's tensors.
        family: of the model.
        widths: of the model's texts.
    """
    flat = [key.replace(".", "_") for key in shapes]
    for foreign in FOREIGN_FAMILIES:
        if any(mark in key for key in flat for mark in foreign.network_marks):
            return foreign.name
    if (width := _input_width(shapes, ("attn2_to_k", "attn2_to_v"))) is not None:
        return None if width == widths.joined else name_of_width(width) or f"a model whose text is {width} wide"
    marked = [each for each in FAMILIES if any(mark in key for key in flat for mark in each.network_marks)]
    if marked and family not in marked:
        return " or ".join(each.name for each in marked)
    width = _input_width(shapes, ("self_attn_q_proj", "self_attn_k_proj", "self_attn_v_proj"))
    if width is None or width in widths.encoders:
        return None
    return name_of_width(width) or f"a model whose text encoder is {width} wide"


def _input_width(shapes: Shapes, modules: tuple[str, ...]) -> int | None:
    """The width of what modules of these names take, by the first of them in a network file; None without one."""
    for key, shape in shapes.items():
        module, part = split_key(key) or ("", "")
        if module.endswith(modules) and len(shape) > 1:
            if part == "lora_down":
                return math.prod(shape[1:])
            if part in ("hada_w1_b", "diff"):
                return shape[1]
    return None


# ---------------------------------------------------------------------------------------------------------------------
# A model's layers, from its files


def layer_shapes(model: ModelFiles) -> dict[Target, Shape]:
    """The layers of a model that is not loaded yet, and the shapes of their weights."""
    shapes = {(UNET, path): shape for path, shape in unet_layers(model.unet)}
    for text in model.texts:
        shapes |= {(text.kind.part, path): shape for path, shape in _text_shapes(text.config)}
        if text.kind.pooled:
            width = text.config["hidden_size"]
            shapes[text.kind.part, "text_projection"] = (text.config.get("projection_dim", width), width)
    return shapes


def _text_shapes(config: Mapping) -> Iterator[tuple[str, Shape]]:
    width, inner = config["hidden_size"], config["intermediate_size"]
    yield "final_layer_norm", (width,)
    for layer in range(config["num_hidden_layers"]):
        path = f"encoder.layers.{layer}"
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            yield f"{path}.self_attn.{name}", (width, width)
        yield f"{path}.mlp.fc1", (inner, width)
        yield f"{path}.mlp.fc2", (width, inner)
        yield f"{path}.layer_norm1", (width,)
        yield f"{path}.layer_norm2", (width,)
