"""Which layer each key of a network file is for, in every way of naming that is found in the wild.

A key is a module's name and a part. Names are matched against those of the model's own layers, flattened with `_` for
`.`: kohya's `lora_unet_…` and `lora_te_…`, also with the original checkpoints' U-Net names, and the paths of Diffusers
and PEFT.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from library.files import checkpoint_layout as layout
from library.files.families import TextEncoderKind
from library.files.model_files import ModelFiles
from library.files.unet_layers import original_paths, unet_layers
from networks.kinds import KINDS, Kind, Shape, Shapes

UNET = "unet"
Target = tuple[str, str]  # UNET or a text encoder's part, and the module's path in it


# Parts that are modules of their own, which have a weight
_MODULES = ("lora_down", "lora_up", "lora_mid", "a1", "a2", "b1", "b2", "bm")
_PEFT_PARTS = ("hada_", "lokr_", "boft_", "oft_r", "oft_s")
_ADAPTER = r"(?:\.[^.]+)?"  # PEFT may put the adapter's name in between
# How a key ends, as a pattern → the part it holds
_ENDINGS = {
    **{rf"\.{name}\.weight": name for name in _MODULES},
    **{
        rf"\.{name}{_ADAPTER if name.startswith(_PEFT_PARTS) else ''}": name
        for kind in KINDS
        for name in (*frozenset().union(*kind.needed), *kind.optional)
        if name not in _MODULES
    },
    # Diffusers
    **{
        rf"{mark}\.{name}": part
        for mark in (r"\.lora", "_lora", r"\.lora_linear_layer")
        for name, part in ((r"down\.weight", "lora_down"), (r"up\.weight", "lora_up"), ("alpha", "alpha"))
    },
    # PEFT
    rf"\.lora_A{_ADAPTER}\.weight": "lora_down",
    rf"\.lora_B{_ADAPTER}\.weight": "lora_up",
    rf"\.lora_B{_ADAPTER}\.bias": "up_bias",
    rf"\.lora_magnitude_vector{_ADAPTER}(?:\.weight)?": "magnitude",
    rf"\.oft_R{_ADAPTER}\.weight": "oft_R",
}
_ENDING = re.compile("|".join(rf"(?P<p{place}>{pattern})$" for place, pattern in enumerate(_ENDINGS)))
_PARTS = list(_ENDINGS.values())
# Of the U-Net's layers; without one a key may name any component's
_UNET_PREFIXES = ("lora_unet_", "oft_unet_", "unet_", "diffusion_model_", "model_diffusion_model_")
# What stands before a module's name, or before its prefix, and says nothing
_WRAPPERS = ("base_model.model.", "lycoris_")
# Keys that are no part of a change: OneTrainer's notes, and embeddings, which `files.textual_inversion` reads
_ASIDE = re.compile(r"\._aux\.|^bundle_emb\.")
# What Diffusers' first files call the projections of text encoders' attention
_OLD_PROJECTIONS = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out_0"}


def is_aside(key: str) -> bool:
    """Whether a key is none of a network's own."""
    return _ASIDE.search(key) is not None


@lru_cache(1 << 14)  # each key of a file is asked for several times, and those of files are much the same
def split_key(key: str) -> tuple[str, str] | None:
    """A key's flat module name and part, `lora_unet_mid_block_…` and `lora_down`; None when it has no known part."""
    match = _ENDING.search(key)
    if match is None or match.lastgroup is None or not match.start():
        return None
    module = key[: match.start()].replace(".processor.", ".")
    for wrapper in _WRAPPERS:
        module = module.replace(wrapper, "")
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
                for name in _text_names(path.removeprefix("text_model.")):
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


def _text_names(path: str) -> Iterator[str]:
    """The flat names of a text encoder's layer: its own, that of Diffusers' first files, and OpenCLIP's."""
    yield path.replace(".", "_")
    last = path.rpartition(".")[2]
    if last in _OLD_PROJECTIONS:
        yield f"{path.removesuffix(last)}{_OLD_PROJECTIONS[last]}".replace(".", "_")
    try:
        name, third = layout.openclip_name(f"{path}.weight")
    except KeyError:  # the projection
        return
    if third is None:
        yield name.removesuffix(".weight").replace(".", "_")


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

    A file that names a layer in several ways means Diffusers' one, as diffusers reads it.

    Args:
        shapes: the file's tensors.
        names: the model's layers.
        weights: the shapes of their weights; parts that do not fit them are unmatched.
    """
    modules, unmatched = sort_keys(shapes)
    candidates = [(names.find(module), keys) for module, keys in modules.items()]
    layers: dict[Target, LayerKeys] = {}
    for named, keys in sorted(candidates, key=lambda candidate: candidate[0].original):
        its_shapes = {part: shapes[key] for part, key in keys.items()}
        open_targets = [target for target in named.targets if target not in layers]
        pairs = ((kind, target) for target in open_targets for kind in KINDS if kind.takes(its_shapes, weights[target]))
        kind, target = next(pairs, (None, None))
        if kind and target:
            layers[target] = LayerKeys(kind, keys)
        else:
            unmatched += keys.values()
    return KeyMatch(layers, tuple(unmatched))


def sort_keys(shapes: Iterable[str]) -> tuple[dict[str, dict[str, str]], list[str]]:
    """A file's keys by flat module name and part, and those that are of no known part or say one again."""
    modules: dict[str, dict[str, str]] = {}
    others = []
    for key in shapes:
        if is_aside(key):
            continue
        module, part = split_key(key) or ("", "")
        if not part or part in modules.get(module, ()):
            others.append(key)
        else:
            modules.setdefault(module, {})[part] = key
    return modules, others


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
    yield "embeddings.token_embedding", (config["vocab_size"], width)
    yield "embeddings.position_embedding", (config.get("max_position_embeddings", 77), width)
    yield "final_layer_norm", (width,)
    for layer in range(config["num_hidden_layers"]):
        path = f"encoder.layers.{layer}"
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            yield f"{path}.self_attn.{name}", (width, width)
        yield f"{path}.mlp.fc1", (inner, width)
        yield f"{path}.mlp.fc2", (width, inner)
        yield f"{path}.layer_norm1", (width,)
        yield f"{path}.layer_norm2", (width,)
