"""Which family a network file is made for, told by its names, its shapes and, where these fit several, its metadata."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from library.files import checkpoint_layout as layout
from library.files.families import FAMILIES, FOREIGN_FAMILIES, Family, name_of_width
from library.files.model_files import ModelFiles
from networks.keys import UNET, LayerNames, Target, layer_shapes, sort_keys
from networks.kinds import KINDS, Shape, Shapes

# What reads the text in the U-Net, and what reads the features in text encoders
_READ_TEXT = ("attn2_to_k", "attn2_to_v")
_READ_FEATURES = tuple(f"self_attn_{name}" for name in ("q_proj", "k_proj", "v_proj", "to_q", "to_k", "to_v"))
_READ_FEATURES += ("mlp_fc1", "mlp_c_fc")
# How sd-scripts and LyCORIS name the layers of a text encoder that is the only one
_ONLY_ENCODER = ("lora_te_", "oft_te_")
_CONVOLUTION = re.compile(
    r"(?:resnets_\d+_(?:conv1|conv2|conv_shortcut|time_emb_proj)|samplers_0_conv)$"
    r"|_(?:in_layers_2|out_layers_3|skip_connection|emb_layers_1|op|conv)$"
)


class _Widths(NamedTuple):
    """How wide a model's texts are: what its U-Net attends to, and each text encoder by itself."""

    joined: int
    encoders: tuple[int, ...]


def made_for(shapes: Shapes, metadata: Mapping[str, str], model: ModelFiles) -> str | None:
    """What a network file is made for where that is another family than the model's; None where nothing says so.

    Args:
        shapes: the file's tensors.
        metadata: the file's.
        model: what it is given for.
    """
    modules = {name: {part: shapes[key] for part, key in keys.items()} for name, keys in sort_keys(shapes)[0].items()}
    flat = "\n".join(shapes).replace(".", "_")
    for foreign in FOREIGN_FAMILIES:
        if any(mark in flat for mark in foreign.network_marks):
            return foreign.name
    encoders = tuple(text.config["hidden_size"] for text in model.texts)
    widths = _Widths(sum(encoders), encoders)
    marked = [each for each in FAMILIES if any(mark in flat for mark in each.network_marks)]
    if (width := _width(modules, _READ_TEXT)) is not None:
        if width == widths.joined:
            return None
        return name_of_width(width) or _names(marked, model.family) or f"a model whose text is {width} wide"
    if marked and model.family not in marked:
        return _names(marked, model.family)
    others = [each for each in FAMILIES if each is not model.family]
    if marked:
        return _by_encoder(modules, widths, certain=True)
    return (
        _by_encoder(modules, widths, certain=False)
        or _names(_by_convolutions(modules, model, others), model.family)
        or _names(_by_metadata(metadata, model.family), model.family)
    )


def _names(families: Sequence[Family], own: Family) -> str | None:
    """Families for people; None without any but the model's own."""
    return " or ".join(each.name for each in families if each is not own) or None


def _width(modules: Mapping[str, Shapes], endings: tuple[str, ...]) -> int | None:
    """The width of what modules of these names take, by the first that tells it; None where none does."""
    return next((width for _, width in _widths(modules, endings)), None)


def _widths(modules: Mapping[str, Shapes], endings: tuple[str, ...]) -> Iterator[tuple[str, int]]:
    """The modules of these names, and the widths of what they take, as far as their parts tell."""
    for name, parts in modules.items():
        kind = next((kind for kind in KINDS if kind.size and kind.has(parts)), None)
        if name.endswith(endings) and kind and kind.size:
            try:
                yield name, kind.size(parts)[1]
            except IndexError:  # a part of too few axes
                continue
        elif name.endswith(endings) and len(parts.get("diff", ())) > 1:
            yield name, parts["diff"][1]


def _by_encoder(modules: Mapping[str, Shapes], widths: _Widths, *, certain: bool) -> str | None:
    """Told by the text encoders' layers: their width, and, unless the file is `certain` to be of the model's family by
    other names, a name that only models of one text encoder need.
    """
    for name, width in _widths(modules, _READ_FEATURES):
        single = name.startswith(_ONLY_ENCODER) and not certain
        own = width in widths.encoders and not (single and width == widths.encoders[0] and len(widths.encoders) > 1)
        if own:
            continue
        named = [each for each in FAMILIES if not single or len(each.encoders) == 1]
        having = [f for f in named if width in [f.config(kind.part)["hidden_size"] for kind in f.encoders]]
        unnamed = named if width in widths.encoders else []  # a small model's
        return " or ".join(each.name for each in having or unnamed) or f"a model whose text encoder is {width} wide"
    return None


def _by_convolutions(modules: Mapping[str, Shapes], model: ModelFiles, others: Sequence[Family]) -> list[Family]:
    """The families whose U-Net all convolutions fit, where some do not fit the model's."""
    own = {target: shape for target, shape in layer_shapes(model).items() if target[0] == UNET}
    if _all_fit(modules, own, model.unet.config):
        return []
    widths = model.unet.config["block_out_channels"]
    fitting = []
    for family in others:
        config = family.config("unet")
        levels = len(config["block_out_channels"])
        alike = [*widths[:levels], *[widths[-1]] * (levels - len(widths))]
        for sizes in (config, config | {"block_out_channels": alike}):
            if family not in fitting and _all_fit(modules, _convolutions(sizes), sizes):
                fitting.append(family)
    return fitting


def _all_fit(modules: Mapping[str, Shapes], layers: Mapping[Target, Shape], config: Mapping) -> bool:
    """Whether all changes of convolutions fit a U-Net."""
    names = LayerNames(layers, config, ())
    for name, parts in modules.items():
        if _CONVOLUTION.search(name):
            targets = names.find(name).targets
            if not any(kind.takes(parts, layers[target]) for target in targets for kind in KINDS):
                return False
    return True


def _convolutions(config: Mapping) -> dict[Target, Shape]:
    """The shapes of a U-Net's convolutions, and of what takes the time, by its configuration."""
    return {(UNET, path): shape for path, shape in layout.unet_convolutions(config).items()}


def _by_metadata(metadata: Mapping[str, str], own: Family) -> list[Family]:
    """The family that a file's metadata name."""
    architecture = metadata.get("modelspec.architecture", "")
    base = metadata.get("ss_base_model_version", "")
    named = [f for f in FAMILIES if architecture.startswith(f.architecture) or base.startswith(f.network_base)]
    return [] if own in named else named
