"""Whether the tensors that a model needs are of types that weights are stored in, told before anything is loaded.

Others, whole numbers for instance, are what quantising programs write, which mean something else by them. Files may
hold any besides, as long as nothing asks for them.
"""

import math
import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from library.errors import InputError
from library.files import checkpoint_layout as layout
from library.files.model_files import ModelFiles
from library.files.safetensors_file import ADVICE, FLOATING
from library.files.weight_files import WeightFile, scale_of

_SCALED = frozenset(name for name in FLOATING if name.startswith("F8"))  # the types that may have scales beside them
_PARAMETER = re.compile(r"(?:.*[._])?(?:weight|bias|embedding|text_projection)")
_TEXT_MODULES = re.compile(
    r"(?:text_model\.)?(?:embeddings|encoder\.layers\.\d+|final_layer_norm"  # transformers' names, then OpenCLIP's
    r"|token_embedding|positional_embedding|ln_final|text_projection|transformer\.resblocks\.\d+)(?:\..*)?"
)


def check_types(weights: WeightFile, is_needed: Callable[[str], bool]) -> None:
    """Refuse a file of which a tensor that is needed is of another type than weights are, or scaled block by block.

    Raises:
        InputError: naming the tensor and its type.
    """
    for name, kind in weights.types.items():
        if kind not in FLOATING and _PARAMETER.fullmatch(name) and is_needed(name):
            raise InputError(str(weights.path), f"{name!r} is of type {kind}, in which no weights are read; {ADVICE}")
        scale = scale_of(name, weights)
        if scale is not None and math.prod(weights.shapes[scale]) != 1 and is_needed(name):
            problem = f"{scale!r} scales blocks of a weight, which this program does not; {ADVICE}"
            raise InputError(str(weights.path), problem)


def in_modules(modules: Mapping[str, str], prefix: str, weights: WeightFile) -> Callable[[str], bool]:
    """Tells the tensors of modules, which stand in the file under either name, the second with the prefix or without.

    Args:
        modules: diffusers' names → the original's.
        prefix: what the original's names begin with in whole checkpoints, which hold other models besides.
        weights: the file.
    """
    known = {name: name for pair in modules.items() for name in pair}
    return lambda name: layout.original_name(_own_name(name, prefix, weights), known) is not None


def _own_name(name: str, prefix: str, weights: WeightFile) -> str:
    """A tensor's name without the prefix; empty when it belongs to another model of the file."""
    if name.startswith(prefix):
        return name.removeprefix(prefix)
    return "" if any(other.startswith(prefix) for other in weights.shapes) else name


def _is_of_text_encoder(prefix: str, weights: WeightFile, name: str) -> bool:
    return _TEXT_MODULES.fullmatch(_own_name(name, prefix, weights)) is not None


def _vae_modules(config: Mapping[str, Any]) -> dict[str, str]:
    """The VAE's modules; its attention as a whole, whose parts have had several names."""
    attention = {f"{half}.mid_block.attentions.0": f"{half}.mid.attn_1" for half in ("encoder", "decoder")}
    return layout.vae_modules(config) | attention


def check_model(model: ModelFiles) -> None:
    """Refuse a model one of whose tensors is of a type in which no weights are read.

    Raises:
        InputError: naming the file, the tensor and its type.
    """
    for part, name_modules, prefix in (
        (model.unet, layout.unet_modules, layout.UNET_PREFIX),
        (model.vae, _vae_modules, layout.VAE_PREFIX),
    ):
        if (FLOATING - _SCALED).issuperset(part.weights.types.values()):
            continue
        try:
            modules = name_modules(part.config)
        except (KeyError, IndexError, TypeError):  # a damaged configuration: the model that is built of it says so
            continue
        check_types(part.weights, in_modules(modules, prefix, part.weights))
    for text in model.texts:
        check_types(text.weights, partial(_is_of_text_encoder, text.names.prefix if text.names else "", text.weights))
