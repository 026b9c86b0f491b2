"""Which layer each key of a network file is for, in every way of naming that is found in the wild.

A key is a module's name and a part. Names are matched against those of the model's own layers, flattened with `_` for
`.`: kohya's `lora_unet_…` and `lora_te_…`, also with the original checkpoints' U-Net names, and the paths of Diffusers
and PEFT.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from library.files import checkpoint_layout as layout
from library.files.families import TextEncoderKind
from library.files.model_files import Component, ModelFiles
from networks.kinds import KINDS, Kind, Shape, Shapes

UNET = "unet"
Target = tuple[str, str]  # UNET or a text encoder's part, and the module's path in it

# How a key ends → the part it holds
_ENDINGS = {
    **{f".{name}.weight": name for name in ("lora_down", "lora_up", "lora_mid")},
    **{
        f".{name}": name
        for kind in KINDS
        for name in (*frozenset().union(*kind.needed), *kind.optional)
        if not name.startswith("lora_")
    },
    # Diffusers
    ".lora.down.weight": "lora_down",
    ".lora.up.weight": "lora_up",
    "_lora.down.weight": "lora_down",
    "_lora.up.weight": "lora_up",
    ".lora_linear_layer.down.weight": "lora_down",
    ".lora_linear_layer.up.weight": "lora_up",
    # PEFT
    ".lora_A.weight": "lora_down",
    ".lora_B.weight": "lora_up",
    ".lora_A.default.weight": "lora_down",
    ".lora_B.default.weight": "lora_up",
    ".lora_magnitude_vector": "dora_scale",
    ".lora_magnitude_vector.weight": "dora_scale",
    ".lora_magnitude_vector.default.weight": "dora_scale",
}
_ENDING = re.compile(f"(?P<module>.+?)(?P<ending>{'|'.join(sorted(map(re.escape, _ENDINGS), key=len, reverse=True))})")
_UNET_PREFIXES = ("lora_unet_", "oft_unet_", "unet_")


def split_key(key: str) -> tuple[str, str] | None:
    """A key's flat module name and part, `lora_unet_mid_block_…` and `lora_down`; None when it has no known part."""
    match = _ENDING.fullmatch(key)
    if match is None:
        return None
    module = match["module"].removeprefix("base_model.model.").replace(".processor.", ".")
    if match["ending"].startswith("_lora.") and module.endswith(".to_out"):
        module += ".0"  # older Diffusers files leave the list out that to_out is
    return module.replace(".", "_"), _ENDINGS[match["ending"]]


class LayerNames:
    """Finds layers by the flat names of files.

    Args:
        targets: the model's layers; text encoders' paths with or without the `text_model.` that files have and
            transformers has given up.
        unet_config: tells the original's names of the U-Net's modules.
        encoders: the kinds of the text encoders.
    """

    def __init__(self, targets: Iterable[Target], unet_config: Mapping, encoders: Sequence[TextEncoderKind]) -> None:
        prefixes = {prefix: kind.part for kind in encoders for prefix in kind.lora_prefixes}
        prefixes |= dict.fromkeys(_UNET_PREFIXES, UNET)
        self._prefixes = dict(sorted(prefixes.items(), key=lambda item: -len(item[0])))  # one may begin another
        self._flat: dict[str, dict[str, str]] = {UNET: {}, **{kind.part: {} for kind in encoders}}
        originals = layout.unet_modules(unet_config)
        for component, path in targets:
            flat = path.removeprefix("text_model.").replace(".", "_") if component != UNET else path.replace(".", "_")
            self._flat[component][flat] = path
            if component != UNET:
                self._flat[component][f"text_model_{flat}"] = path
            elif original := layout.original_name(path, originals):
                self._flat[UNET][original.replace(".", "_")] = path

    def find(self, flat_name: str) -> Target | None:
        """The layer of a flat module name; one without a prefix may be in any component."""
        prefix = next((prefix for prefix in self._prefixes if flat_name.startswith(prefix)), "")
        components = (self._prefixes[prefix],) if prefix else tuple(self._flat)
        name = flat_name.removeprefix(prefix)
        return next(((part, self._flat[part][name]) for part in components if name in self._flat[part]), None)


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
    found: dict[Target, dict[str, str]] = {}
    unmatched = []
    for key in shapes:
        module, part = split_key(key) or ("", "")
        target = names.find(module)
        if target is None or part in found.get(target, {}):
            unmatched.append(key)
        else:
            found.setdefault(target, {})[part] = key
    layers = {}
    for target, keys in found.items():
        kind = next((kind for kind in KINDS if kind.has(keys)), None)
        if kind and kind.fits({part: shapes[key] for part, key in keys.items()}, weights[target]):
            layers[target] = LayerKeys(kind, keys)
        else:
            unmatched += keys.values()
    return KeyMatch(layers, tuple(unmatched))


def text_width(shapes: Shapes) -> int | None:
    """The width of the text that a network file is for, from its parts for cross-attention or the text encoder."""
    marks = ("attn2_to_k", "attn2_to_v", "self_attn_q_proj", "self_attn_k_proj", "self_attn_v_proj")
    for key, shape in shapes.items():
        module, part = split_key(key) or ("", "")
        if module.endswith(marks) and len(shape) > 1:
            if part == "lora_down":
                return math.prod(shape[1:])
            if part in ("hada_w1_b", "diff"):
                return shape[1]
    return None


# ---------------------------------------------------------------------------------------------------------------------
# A model's layers, from its files


def layer_shapes(model: ModelFiles) -> dict[Target, Shape]:
    """The layers of a model that is not loaded yet, and the shapes of their weights."""
    shapes = {(UNET, path): shape for path, shape in _unet_shapes(model.unet)}
    for text in model.texts:
        shapes |= {(text.kind.part, path): shape for path, shape in _text_shapes(text.config)}
    return shapes


def _unet_shapes(unet: Component) -> Iterator[tuple[str, Shape]]:
    diffusers_names = {original: path for path, original in layout.unet_modules(unet.config).items()}
    for key, shape in unet.weights.shapes.items():
        if not key.endswith(".weight"):
            continue
        name = key.removesuffix(".weight")
        if name.startswith(layout.UNET_PREFIX):
            name = layout.original_name(name.removeprefix(layout.UNET_PREFIX), diffusers_names)
        if name is not None:
            yield name, shape


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
