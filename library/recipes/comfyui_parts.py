"""What a sampler of ComfyUI's graph is connected with, walked back: texts, models and networks, sizes."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from library.recipes.comfyui_graph import TAGGED, Graph, Node, as_link, holds_tags, is_sampler, toward_latent
from library.recipes.emphasis import from_comfyui, network_tags, without_networks
from library.recipes.recipe import (
    CONTROL_NET,
    MASK,
    SOURCE,
    Givers,
    ToldNetwork,
    as_list,
    as_object,
    file_stem,
    number,
    plain,
    strength_of,
)

_MANY = 1000  # networks of a list, more than any has
_DEEPEST = 300  # nodes one behind the other that are followed
_ENCODED = ("text", "text_g", "text_l", "clip_l", "t5xxl", "prompt", "string", "populated_text")
_PLAIN_MODEL_NODES = re.compile(r"loader|reroute|ModelSamplingDiscrete|checkpoint|^Context\b|pipe", re.IGNORECASE)

_BUNDLES = re.compile(r"^Context\b|pipe", re.IGNORECASE)  # several inputs of a sampler in one


@dataclass
class Found:
    """What the walk from one sampler has gathered."""

    graph: Graph
    files: list[tuple[Givers, str]] = field(default_factory=list)
    networks: list[ToldNetwork] = field(default_factory=list)
    clip_skip: str = ""
    model: str = ""
    line: dict[str, str] = field(default_factory=dict)


# ---------------------------------------------------------------------------------------------------------------------
# Texts


class Texts:
    """Walks conditioning back to its texts.

    Args:
        found: what is gathered on the way.
        side: which of a node's two outputs is followed, `positive` or `negative`.
    """

    def __init__(self, found: Found, side: str) -> None:
        self.found, self.graph, self.side = found, found.graph, side

    def prompt(self, value: object) -> str:
        """The prompt: parts that are combined compose, each with an equal share."""
        if isinstance(value, str):
            return from_comfyui(value.strip())
        if self.graph.node(value) is None:
            self.graph.tell("the prompt, whose node is missing")
        parts = list(dict.fromkeys(filter(None, self._parts(value, frozenset()))))
        if len(parts) < 2:
            return "".join(parts)
        return " AND ".join(f"{part} :{1 / len(parts):.4g}" for part in parts)

    def negative(self, value: object) -> str:
        """The negative prompt, which has no parts here."""
        if isinstance(value, str):
            return from_comfyui(value.strip())
        parts = list(dict.fromkeys(filter(None, self._parts(value, frozenset()))))
        if len(parts) > 1:
            self.graph.tell("a combined negative prompt, which is joined")
        return ", ".join(parts)

    def _parts(self, value: object, above: frozenset[str]) -> list[str]:
        """The texts that are drawn side by side."""
        node = self.graph.node(value)
        if node is None:
            return []
        if node.id in above or len(above) > _DEEPEST:
            self.graph.tell("conditioning that goes round in circles")
            return []
        above, given = above | {node.id}, node.inputs
        if node.kind == "ConditioningCombine":
            return [
                text
                for name in sorted(given)
                if name.startswith("conditioning")
                for text in self._parts(given[name], above)
            ]
        if node.kind == "ConditioningConcat":
            first, second = (self._parts(given.get(f"conditioning_{end}"), above) for end in ("to", "from"))
            return [" BREAK ".join(filter(None, (", ".join(first), ", ".join(second))))]
        if node.kind == "ConditioningZeroOut":
            return []
        if node.kind == "ConditioningAverage":
            self.graph.tell(f"ConditioningAverage (node {node.id})")
            return self._parts(given.get("conditioning_to"), above)
        encodes = ("clip" in given or "opt_clip" in given) and any(name in given for name in _ENCODED)
        if node.kind.startswith("CLIPTextEncode") or encodes:
            return [self._encoded(node)]
        if _BUNDLES.search(node.kind):
            return self._parts(self.graph.with_pipe(node).inputs.get(self.side), above)
        return self._through(node, above)

    def _encoded(self, node: Node) -> str:
        """The text of a node that encodes it."""
        given = node.inputs
        self._clip(given.get("clip", given.get("opt_clip")))
        if node.kind == "CLIPTextEncodeSDXL" and self.side == "positive":
            sizes = (("ow", "width"), ("oh", "height"), ("cl", "crop_w"), ("ct", "crop_h"))
            self.found.line |= {option: self.graph.number(given.get(name)) for option, name in sizes}
        names = [name for name in (TAGGED[:1] if TAGGED[0] in given else _ENCODED) if name in given]
        texts = list(dict.fromkeys(filter(None, (self.graph.text(given[name]).strip() for name in names))))
        if len(texts) > 1:
            self.graph.tell(f"a text of its own for each encoder (node {node.id}); they are joined")
        if not names:
            self.graph.tell(f"the text of {node.kind} (node {node.id})")
        if holds_tags(node):
            texts = [without_networks(text) for text in texts]
        return ", ".join(texts) if _reads_as_web_ui(node) else from_comfyui(", ".join(texts))

    def _clip(self, value: object) -> None:
        for node in self.graph.follow(self.graph.node(value), lambda each: each.inputs.get("clip")):
            if node.kind == "CLIPSetLastLayer" and not self.found.clip_skip:
                skip = number(self.graph.number(node.inputs.get("stop_at_clip_layer"))) or -1
                self.found.clip_skip = plain(abs(skip))  # the last layer, too: XL's usual one is the last but one

    def _through(self, node: Node, above: frozenset[str]) -> list[str]:
        """Past a node that changes conditioning, or that holds texts itself as loaders of some packages do."""
        given = node.inputs
        own, control = given.get(self.side), self.graph.node(given.get("control_net"))
        if isinstance(own, str):
            return [from_comfyui(own.strip())]
        if control is not None:
            name = file_stem(control.inputs.get("control_net_name")) or f"of node {control.id}"
            self.found.files.append((CONTROL_NET, f"ControlNet {name}"))
        else:
            self.graph.tell(f"{node.kind} (node {node.id})")
        names = (
            self.side,
            "conditioning",
            "positive",
            "conditioning_1",
            "conditioning_to",
            "cond",
            "base_ctx",
            "context",
        )
        for name in names:
            if as_link(given.get(name)):
                return self._parts(given[name], above)
        if text := self.graph.text(given["text"]) if "text" in given else "":
            return [from_comfyui(text.strip())]
        return []


# ---------------------------------------------------------------------------------------------------------------------
# Models and sizes


def read_models(found: Found, sampler: Node) -> None:
    """The model that a sampler uses, its networks, and what else changes it."""
    guider = found.graph.node(sampler.inputs.get("guider"))
    start = sampler.inputs.get("model", guider.inputs.get("model") if guider else None)
    networks: list[ToldNetwork] = []
    chain = [sampler, *found.graph.follow(found.graph.node(start), _toward_model)]
    for node in chain:
        given = node.inputs
        here = _networks_of(found.graph, node)
        networks += here
        name = next((given[each] for each in ("ckpt_name", "unet_name", "model_name") if each in given), None)
        if name := _name_in(found.graph, name):
            found.model = file_stem(name)
        elif not here and node is not sampler and not _is_plain(node):
            found.graph.tell(f"{node.kind} (node {node.id})")
        skip = number(given.get("clip_skip"))
        if skip is not None and abs(skip) > 1:
            found.clip_skip = found.clip_skip or plain(abs(skip))
    found.networks += reversed(networks)  # in the order in which they are loaded


def _toward_model(node: Node) -> object:
    return node.inputs.get("model", node.inputs.get("opt_model"))


def _is_plain(node: Node) -> bool:
    """Whether a node that a model goes through leaves it as it is."""
    return holds_tags(node) or "lora" in node.kind.lower() or _PLAIN_MODEL_NODES.search(node.kind) is not None


def _reads_as_web_ui(node: Node) -> bool:
    return node.inputs.get("parser") == "A1111"


def _networks_of(graph: Graph, node: Node) -> list[ToldNetwork]:
    """The networks that a node loads: one, or a list of numbered ones, or of objects with switches."""
    given, found = node.inputs, []
    for stack in ("lora_stack", "optional_lora_stack"):
        for each in graph.follow(graph.node(given.get(stack)), lambda other: other.inputs.get("lora_stack")):
            found += _networks_of(graph, Node(each.id, each.kind, {**each.inputs, "lora_stack": None}))[::-1]
    if holds_tags(node):
        tagged = next(given[name] for name in TAGGED if isinstance(given.get(name), str))
        found += [ToldNetwork(name, strength) for name, strength in network_tags(tagged)]
    for name, value in given.items():
        entry: Any = as_object(value)
        for each in as_list(entry.get("__value__")):
            entry_of = as_object(each)
            if entry_of.get("active", True) and file_stem(entry_of.get("name")):
                found.append(ToldNetwork(file_stem(entry_of["name"]), strength_of(entry_of.get("strength"))))
        if entry.get("lora") and entry.get("on", True):
            second = entry.get("strengthTwo")
            found.append(ToldNetwork(file_stem(entry["lora"]), strength_of(entry.get("strength"), second)))
        match = re.fullmatch(r"lora_name(?:_?(\d+))?|lora_(\d+)", name)
        file = _name_in(graph, value) if match else ""
        if match and file_stem(file) not in ("", "None"):
            number_of = match[1] or match[2]
            beyond = (number(given.get("lora_count")) or _MANY) < (number(number_of) or 0)
            if beyond or given.get(f"switch_{number_of}") == "Off":
                continue
            unet, text = (_strength(graph, given, kind, number_of) for kind in ("model", "clip"))
            text = unet if text is None and "OnlyModel" not in node.kind and "ModelOnly" not in node.kind else text
            found.append(ToldNetwork(file_stem(file), strength_of(unet, "0" if text is None else text)))
    return found[::-1]


def _name_in(graph: Graph, value: object) -> str:
    """A file's name, which may come from another node, or stand in an object beside its picture."""
    if isinstance(content := as_object(value).get("content"), str):
        return content
    return graph.text(value) if isinstance(value, str) or as_link(value) else ""


def _strength(graph: Graph, given: Any, kind: str, number_of: str | None) -> str | None:
    """A network's strength for the U-Net (`model`) or the text encoders (`clip`)."""
    if number_of and given.get("input_mode") == "simple":
        names = [f"lora_wt_{number_of}"]
    elif not number_of:
        names = [f"strength_{kind}", f"lora_{kind}_strength", f"{kind}_strength"]
    else:
        names = [f"strength_{kind}_{number_of}", f"{kind}_str_{number_of}", f"{kind}_weight_{number_of}"]
        names += [f"strength_{number_of}", f"lora_wt_{number_of}", f"lora_weight_{number_of}"]
    value = next((given[name] for name in names if name in given), None)
    return None if value is None else graph.number(value) or None


class Size:
    """Follows latents back to the size that they have, in pixels; zeros where nothing tells it."""

    def __init__(self, found: Found) -> None:
        self.found, self.graph = found, found.graph

    def of(self, value: object, above: frozenset[str] = frozenset()) -> tuple[int, int]:
        """Width and height of what an input is given."""
        node = self.graph.node(value)
        return (0, 0) if node is None else self.of_node(node, above)

    def of_node(self, node: Node, above: frozenset[str] = frozenset()) -> tuple[int, int]:
        """Width and height of what a node makes."""
        if node.id in above or len(above) > _DEEPEST:
            return 0, 0
        above, given = above | {node.id}, node.inputs
        if (number(self.graph.number(given.get("batch_size"))) or 1) > 1:
            self.graph.tell(f"which of the {plain(given.get('batch_size'))} pictures of its batch it is")
        if as_link(given.get("mask")):
            self.found.files.append((MASK, f"mask of node {node.id}"))
        if node.kind.startswith("LoadImage") or node.kind.startswith("ETN_LoadImage"):
            name = plain(given.get("image")).rpartition("/")[2][:80]
            self.found.files.append((SOURCE, f"picture {name} that it was drawn over".replace("  ", " ")))
            return 0, 0
        prefix = "empty_latent_" if "empty_latent_width" in given else ""
        wide, high = _chosen_size(node)
        if not wide:
            wide, high = (self._side(given.get(f"{prefix}{side}"), side) for side in ("width", "height"))
        inner = self.of(toward_latent(node), above)
        if wide and high and not (is_sampler(node) and any(inner)):
            return wide, high
        if (wide or high) and all(inner):  # one side of 0 keeps the shape
            return wide or inner[0] * high // inner[1], high or inner[1] * wide // inner[0]
        factor = number(self.graph.number(_factor(given))) or self._of_model(node)
        return (int(inner[0] * factor), int(inner[1] * factor)) if 0 < factor <= 16 else inner

    def _side(self, value: object, side: str) -> int:
        """A side in pixels; of a node that makes both, the one of its name."""
        node = self.graph.node(value)
        chosen = (0, 0) if node is None else _chosen_size(node)
        return chosen[side == "height"] or _pixels(self.graph.number(value, side))

    def _of_model(self, node: Node) -> float:
        """By how much a node with an upscaling model enlarges, as the model's name tells: `4x_…`, `…x4`."""
        model = self.graph.node(node.inputs.get("upscale_model"))
        if model is None:
            return 1.0
        told = re.search(r"(?<![0-9])([1-9])x|x([1-9])(?![0-9])", plain(model.inputs.get("model_name")), re.IGNORECASE)
        return float(told[1] or told[2]) if told else 1.0


def _factor(given: Mapping[str, Any]) -> object:
    """By how much a node says that it enlarges."""
    return next(
        (given[name] for name in ("scale_by", "upscale_by", "upscale", "upscale_factor") if name in given), None
    )


def _chosen_size(node: Node) -> tuple[int, int]:
    """The size in a choice of a list, `3:4 portrait 896x1152`; zeros where there is none."""
    for name in ("aspect_ratio", "resolution", "dimensions", "ratio", "preset"):
        text = plain(node.inputs.get(name))
        if (found := re.search(r"(?<!\d)(\d{2,5}) *[x×] *(\d{2,5})(?!\d)", text)) and "custom" not in text.lower():
            sides = int(found[1]), int(found[2])
            return sides[::-1] if node.inputs.get("swap_dimensions") == "On" else sides
    return 0, 0


def _pixels(text: str) -> int:
    value = number(text) or 0
    return int(value) if 0 < value < 1 << 20 else 0
