"""ControlNet-LLLite files: found and checked from their headers.

A ControlNet-LLLite (Kohya) is a set of small networks, one for each of some linear layers of an SDXL U-Net, that change
what these take by what a guide picture holds there.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from library.errors import InputError
from library.files.families import Family
from library.files.model_files import Component, name_kind, resolve
from library.files.unet_layers import original_paths, unet_layers
from library.files.weight_files import Shape, WeightFile, open_weights
from library.files.weight_types import check_types

_KEY = re.compile(r"lllite_unet_(\w+)\.(conditioning1\.\d+|down\.0|mid\.0|up\.0)\.(weight|bias)")
_GUIDE_CHANNELS = 3


@dataclass(frozen=True)
class LLLiteFile:
    """A file that was checked: its weights, and for each layer's path in the U-Net the layer's name in the file."""

    weights: WeightFile
    modules: Mapping[str, str]

    @property
    def name(self) -> str:
        """For people and metadata."""
        return self.weights.path.stem


def find_lllite(given: str, family: Family, unet: Component) -> LLLiteFile:
    """Find and check a ControlNet-LLLite.

    Raises:
        InputError: when it is not there, is something else, or does not fit the model.
    """
    subject = f"--control_net_lllite_models {given}"
    path, _ = resolve(given, "--control_net_lllite_models")
    if path.is_dir():
        raise InputError(subject, "is a folder; give the file in it")
    weights = open_weights(path)
    keys = {key: _KEY.fullmatch(key) for key in weights.shapes}
    names = {match[1] for match in keys.values() if match}
    if not names:
        kind = name_kind(weights) or "no ControlNet-LLLite"
        raise InputError(subject, f"is {kind}; give a ControlNet-LLLite{_option_for(kind)}")
    if left := [key for key, match in keys.items() if match is None]:
        raise InputError(subject, f"holds {left[0]!r}, which no ControlNet-LLLite has; use another file")
    shapes = dict(unet_layers(unet))
    paths = original_paths(shapes, unet.config)
    modules = {}
    for name in sorted(names):
        path = paths.get(name)
        problem = "no such layer" if path is None else _misfit(name, weights.shapes, shapes[path])
        if path is None or problem:
            advice = f"use one made for the model, which is {family.name}; published ones are for SDXL"
            raise InputError(subject, f"does not fit the model at {name!r} ({problem}); {advice}")
        modules[path] = name
    check_types(weights, lambda name: True)
    return LLLiteFile(weights, modules)


def _option_for(kind: str) -> str:
    return ", or this one with --control_net_models" if kind == "a ControlNet" else ""


def _misfit(name: str, shapes: Mapping[str, Shape], layer: Shape) -> str | None:
    """What keeps a layer's small network from fitting it; None when it fits."""

    def shape(part: str) -> Shape:
        return shapes.get(f"lllite_unet_{name}.{part}", ())

    down, mid, up = (shape(f"{part}.0.weight") for part in ("down", "mid", "up"))
    if not (len(down) == len(mid) == len(up) == 2) or len(layer) < 2:
        return "its network is not whole"
    parts = convolution_names(name, shapes)
    convolutions = [shape(part) for part in parts]
    if not convolutions or any(len(each) != 4 for each in convolutions):
        return "it does not read a picture"
    read = [_GUIDE_CHANNELS, *(each[0] for each in convolutions)]
    if any(each[1] != channels for each, channels in zip(convolutions, read)):
        return "its convolutions do not go together"
    for part in (*parts, "down.0.weight", "mid.0.weight", "up.0.weight"):
        if shape(part.replace(".weight", ".bias")) != shape(part)[:1]:
            return f"{part.replace('.weight', '.bias')} is missing or of another size"
    if down[1] != layer[1] or up[0] != layer[1]:
        return f"{down[1]} channels for {layer[1]}"
    return None if mid[1] == convolutions[-1][0] + down[0] and up[1] == mid[0] else "its parts do not go together"


def convolution_names(name: str, shapes: Mapping[str, Shape]) -> list[str]:
    """The weights, in their order, of the convolutions that a layer's network reads the guide with."""
    pattern = re.compile(rf"lllite_unet_{re.escape(name)}\.(conditioning1\.(\d+)\.weight)")
    found = [match for match in map(pattern.fullmatch, shapes) if match]
    return [match[1] for match in sorted(found, key=lambda match: int(match[2]))]
