"""What PEFT keeps beside its tensors: the configuration of a network, from which their strength follows.

Source: the formulas and the matching of patterns are those of https://github.com/huggingface/peft.
"""

import json
import math
import re
from collections.abc import Mapping
from typing import Any

from library.errors import InputError
from library.files.families import TEXT_PARTS
from library.files.weight_files import WeightFile

_ADAPTER = r"(?:\.[^.]+)?"
# The parts of which one marks each changed module
_MARK = re.compile(rf"\.(?:(?:lora_A|oft_R){_ADAPTER}\.weight|(?:hada_w1_a|lokr_w1|lokr_w1_a){_ADAPTER})$")


def stated_parts(weights: WeightFile) -> dict[str, float]:
    """What a network's configuration says of its modules, under the keys that it would have in the file.

    It is alpha, for two full factors of a LoKr the scale that PEFT gives them, for OFT the terms of its series and a
    bound. With `use_rslora` a LoRA's scale is alpha / √rank (https://arxiv.org/abs/2312.03732), alpha·√rank / rank.

    Raises:
        InputError: for a configuration that cannot be read.
    """
    config = _configuration(weights)
    stated: dict[str, float] = {}
    for key, shape in weights.shapes.items() if config else ():
        mark = _MARK.search(key)
        if mark is None:
            continue
        module = key[: mark.start()]
        settings, path = _settings(config, module)
        try:
            parts = _stated(settings, path, mark[0], shape)
        except re.error as problem:
            raise InputError(str(weights.path), f"its adapter configuration has a wrong pattern ({problem})") from None
        stated |= {f"{module}.{part}": value for part, value in parts if f"{module}.{part}" not in weights.shapes}
    return stated


def _stated(settings: Mapping[str, Any], path: str, mark: str, shape: tuple[int, ...]) -> list[tuple[str, float]]:
    """The parts that the settings say of one module, which has a marking part of this shape."""
    if mark.startswith(".oft_R"):
        terms = settings.get("num_cayley_neumann_terms", 5) if settings.get("use_cayley_neumann") else 0
        bound = settings.get("eps") if settings.get("coft") else None
        bounds = [("oft_bound", bound / math.sqrt(shape[0]))] if isinstance(bound, int | float) and shape else []
        return [("oft_terms", float(terms)), *bounds]
    is_lora = mark.startswith(".lora_A")
    alpha = _for_module(settings, "alpha_pattern", path, settings.get("lora_alpha" if is_lora else "alpha"))
    if not isinstance(alpha, int | float) or not shape:
        return []
    if is_lora:
        return [("alpha", alpha * (math.sqrt(shape[0]) if settings.get("use_rslora") else 1))]
    parts = [("alpha", float(alpha))]
    rank = _for_module(settings, "rank_pattern", path, settings.get("r"))
    if mark.startswith(".lokr") and isinstance(rank, int) and rank:
        parts.append(("full_scale", alpha / rank))
    return parts


def _for_module(settings: Mapping[str, Any], patterns: str, path: str, otherwise: object) -> object:
    """What the first regular expression that fits the end of a module's path says, else what holds for all."""
    found = settings.get(patterns) or {}
    return next((value for name, value in found.items() if re.match(rf"(.*\.)?({name})$", path)), otherwise)


def _settings(config: Mapping[str, Any], module: str) -> tuple[Mapping[str, Any], str]:
    """The settings that hold for a module, and its path in its model: Diffusers prefixes both with the component."""
    path = module.removeprefix("base_model.model.")
    for part in ("unet", *TEXT_PARTS):
        if path.startswith(f"{part}."):
            own = {name.removeprefix(f"{part}."): v for name, v in config.items() if name.startswith(f"{part}.")}
            return own or config, path.removeprefix(f"{part}.").removeprefix("base_model.model.")
    return config, path


def _configuration(weights: WeightFile) -> dict[str, Any]:
    """PEFT's configuration of a file: in its metadata, as Diffusers writes it, or in a file beside it."""
    beside = weights.path.parent / "adapter_config.json"
    text = weights.metadata.get("lora_adapter_metadata")
    try:
        if text is None and weights.path.stem == "adapter_model" and beside.is_file():
            text = beside.read_text(encoding="utf-8")
        config = json.loads(text or "{}")
        return config if isinstance(config, dict) else {}
    except (OSError, ValueError) as problem:
        raise InputError(str(weights.path), f"its adapter configuration cannot be read ({problem})") from None
