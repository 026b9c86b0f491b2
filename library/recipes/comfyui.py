"""ComfyUI's graph, walked back from the picture to its sampler, and from there to texts, networks and size."""

import re
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from library.recipes.comfyui_graph import Graph, Node, as_link
from library.recipes.emphasis import from_comfyui
from library.recipes.recipe import (
    CONTROL_NET,
    SOURCE,
    Givers,
    Recipe,
    ToldNetwork,
    Unreadable,
    as_object,
    file_stem,
    number,
    plain,
    strength_of,
)

_SAMPLER = re.compile(
    r"^(?:KSampler(?!Select)|SamplerCustom|FaceDetailer|UltimateSDUpscale)|\bKSampler\b", re.IGNORECASE
)
_SAVES = re.compile(r"save.*image|image.*save|preview.*image|SaveAnimatedWEBP", re.IGNORECASE)
_DEEPEST = 300
_PLAIN_MODEL_NODES = re.compile(r"loader|reroute|ModelSamplingDiscrete|checkpoint", re.IGNORECASE)


@dataclass
class _Found:
    """What the walk from one sampler has gathered."""

    graph: Graph
    files: list[tuple[Givers, str]] = field(default_factory=list)
    networks: list[ToldNetwork] = field(default_factory=list)
    clip_skip: str = ""
    model: str = ""


def read_comfyui(texts: dict[str, str]) -> Recipe:
    """How a picture of ComfyUI was made.

    Raises:
        Unreadable: when there is no graph, or no sampler in it.
    """
    graph = Graph.of(texts)
    sampler, others = _samplers(graph)
    found = _Found(graph)
    said = _sampling(graph, sampler)
    first, first_said = _earlier(graph, sampler)
    if first is not None and _continues(sampler):  # a refiner ends what the first one began
        graph.tell(f"the refining sampler (node {sampler.id})")
        sampler, said, first, first_said = first, first_said, None, {}
    others -= {sampler.id} | ({first.id} if first else set())
    if others:
        graph.tell(f"the samplers before or beside it (node {', '.join(sorted(others))})")
    positive, negative = _sides(graph, sampler)
    prompt = _Texts(found, "positive").prompt(positive)
    negative_prompt = _Texts(found, "negative").negative(negative)
    _models(found, sampler)
    latent = sampler.inputs.get("latent_image", sampler.inputs.get("samples", sampler.inputs.get("latent")))
    width, height = _Size(found).of(latent)
    drawn_over = 0 < (number(said["strength"]) or 1) < 1
    run = {"clip_skip": found.clip_skip} if found.clip_skip else {}
    first_stage = None
    if first is not None and drawn_over:
        first_stage = _Size(_Found(graph)).of(first.inputs.get("latent_image"))
        run |= {"highres_fix_steps": first_said["steps"]}
        run |= {"highres_fix_latents_upscaling": ""} if _enlarges_latents(graph, latent) else {}
        if first_said["seed"] != said["seed"]:
            graph.tell(f"the first sampler's seed {first_said['seed']}")
    elif not drawn_over and not found.files:
        said["strength"] = ""
    return Recipe(
        program="ComfyUI",
        prompt=prompt,
        negative_prompt=negative_prompt,
        seed=said["seed"],
        steps=said["steps"],
        sampler=said["sampler"],
        schedule=said["schedule"],
        scale=said["scale"],
        strength=said["strength"],
        width=str(width or ""),
        height=str(height or ""),
        model=found.model,
        networks=tuple(found.networks),
        first_stage=first_stage if first_stage and 0 not in first_stage else None,
        run=run,
        files=tuple(dict.fromkeys(found.files)),
        untold=tuple(graph.untold),
    )


# ---------------------------------------------------------------------------------------------------------------------
# Samplers


def _is_sampler(node: Node) -> bool:
    given = node.inputs
    looks_like_one = any(name in given for name in ("seed", "noise_seed")) and "positive" in given and "steps" in given
    return _SAMPLER.search(node.kind) is not None or looks_like_one


def _samplers(graph: Graph) -> tuple[Node, set[str]]:
    """The sampler nearest to what is saved, and the ids of all others.

    Raises:
        Unreadable: when there is none.
    """
    all_of_them = {name for name, node in graph.nodes.items() if _is_sampler(node)}
    if not all_of_them:
        raise Unreadable("has a graph of ComfyUI without a sampler that is known here")
    used = {link for node in graph.nodes.values() for link in graph.links(node)}
    ends = [name for name, node in graph.nodes.items() if _SAVES.search(node.kind)]
    ends = [name for name in ends if "save" in graph.nodes[name].kind.lower()] or ends
    ends = ends or [name for name in graph.nodes if name not in used] or list(graph.nodes)
    waiting, seen = deque(ends), set(ends)
    while waiting:
        name = waiting.popleft()
        if name in all_of_them:
            return graph.nodes[name], all_of_them - {name}
        for link in graph.links(graph.nodes[name]):
            if link not in seen:
                seen.add(link)
                waiting.append(link)
    last = list(all_of_them)[-1]
    return graph.nodes[last], all_of_them - {last}


def _sampling(graph: Graph, sampler: Node) -> dict[str, str]:
    """Seed, steps, sampler, schedule, scale and strength of a sampler, by the names of `Recipe`."""
    given = sampler.inputs
    noise, guider = graph.node(given.get("noise")), graph.node(given.get("guider"))
    chosen, sigmas = graph.node(given.get("sampler")), _sigmas(graph, given.get("sigmas"))
    seed = given.get("seed", given.get("noise_seed"))
    if noise is not None:
        seed = noise.inputs.get("noise_seed", noise.inputs.get("seed"))
    scale = given.get("cfg", guider.inputs.get("cfg", guider.inputs.get("cfg_conds")) if guider else None)
    if scale is None and guider is not None and "Basic" in guider.kind:
        scale = 1
    name = given.get("sampler_name")
    if name is None and chosen is not None:
        name = chosen.inputs.get("sampler_name") or _sampler_of_class(chosen.kind)
    schedule = given.get("scheduler")
    if schedule is None and sigmas is not None:
        schedule = sigmas.inputs.get("scheduler") or _schedule_of_class(sigmas.kind)
    steps, strength = (
        given.get(each) or (sigmas.inputs.get(each) if sigmas else None) for each in ("steps", "denoise")
    )
    said = {
        "seed": graph.number(seed),
        "steps": graph.number(steps),
        "sampler": graph.text(name),
        "schedule": graph.text(schedule),
        "scale": graph.number(scale),
        "strength": graph.number(strength),
    }
    for what in ("seed", "steps", "sampler", "scale"):
        if not said[what]:
            graph.tell(f"the {what}")
    return said


def _sigmas(graph: Graph, value: object) -> Node | None:
    """The node that makes the noise levels, past those that split or turn them."""
    chain = graph.follow(graph.node(value), lambda node: node.inputs.get("sigmas"))
    nodes = list(chain)
    for node in nodes[:-1]:
        graph.tell(f"{node.kind} (node {node.id})")
    return nodes[-1] if nodes else None


def _sampler_of_class(kind: str) -> str:
    """`SamplerDPMPP_2M_SDE`, `SamplerEulerAncestral` as names in ComfyUI's list."""
    name = kind.removeprefix("Sampler")
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()


def _schedule_of_class(kind: str) -> str:
    """`KarrasScheduler` as a name in ComfyUI's list."""
    name = re.sub(r"(?:Sampling)?Scheduler$", "", kind)
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()


def _earlier(graph: Graph, sampler: Node) -> tuple[Node | None, dict[str, str]]:
    """The sampler whose picture or latents a sampler draws over, if there is one."""
    chain = graph.follow(graph.node(sampler.inputs.get("latent_image")), _toward_latent)
    first = next((node for node in chain if _is_sampler(node) and node.id != sampler.id), None)
    return (None, {}) if first is None else (first, _sampling(graph, first))


def _continues(sampler: Node) -> bool:
    """Whether a sampler goes on with another one's steps, as refiners do."""
    begins = number(sampler.inputs.get("start_at_step")) or 0
    return plain(sampler.inputs.get("add_noise")) == "disable" or begins > 0


def _toward_latent(node: Node) -> object:
    """The input through which a picture or latents come."""
    names = ("latent_image", "samples", "latent", "pixels", "image", "images", "upscaled_image")
    return next((node.inputs[name] for name in names if as_link(node.inputs.get(name))), None)


def _enlarges_latents(graph: Graph, latent: object) -> bool:
    chain = graph.follow(graph.node(latent), _toward_latent)
    return any(node.kind.startswith("LatentUpscale") for node in chain)


def _sides(graph: Graph, sampler: Node) -> tuple[object, object]:
    """The inputs of the prompt and of the negative prompt."""
    guider = graph.node(sampler.inputs.get("guider"))
    given = guider.inputs if guider else sampler.inputs
    positive = given.get("positive", given.get("conditioning", given.get("cond1")))
    if guider is not None and "cond2" in given:
        graph.tell(f"{guider.kind} (node {guider.id})")
    return positive, given.get("negative")


# ---------------------------------------------------------------------------------------------------------------------
# Texts


class _Texts:
    """Walks conditioning back to its texts.

    Args:
        found: what is gathered on the way.
        side: which of a node's two outputs is followed, `positive` or `negative`.
    """

    def __init__(self, found: _Found, side: str) -> None:
        self.found, self.graph, self.side = found, found.graph, side

    def prompt(self, value: object) -> str:
        """The prompt: parts that are combined compose, each with an equal share."""
        if self.graph.node(value) is None:
            self.graph.tell("the prompt")
        parts = list(dict.fromkeys(filter(None, self._parts(value, frozenset()))))
        if len(parts) < 2:
            return "".join(parts)
        return " AND ".join(f"{part} :{1 / len(parts):.4g}" for part in parts)

    def negative(self, value: object) -> str:
        """The negative prompt, which has no parts here."""
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
        if node.kind.startswith("CLIPTextEncode") or "clip" in given:
            return [self._encoded(node)]
        return self._through(node, above)

    def _encoded(self, node: Node) -> str:
        """The text of a node that encodes it."""
        given = node.inputs
        self._clip(given.get("clip"))
        names = [name for name in ("text", "text_g", "text_l", "clip_l", "t5xxl", "prompt", "string") if name in given]
        texts = list(dict.fromkeys(filter(None, (self.graph.text(given[name]).strip() for name in names))))
        if len(texts) > 1:
            self.graph.tell(f"a text of its own for each encoder (node {node.id}); they are joined")
        if not names:
            self.graph.tell(f"the text of {node.kind} (node {node.id})")
        return from_comfyui(", ".join(texts))

    def _clip(self, value: object) -> None:
        for node in self.graph.follow(self.graph.node(value), lambda each: each.inputs.get("clip")):
            if node.kind == "CLIPSetLastLayer" and not self.found.clip_skip:
                skip = number(self.graph.number(node.inputs.get("stop_at_clip_layer"))) or -1
                self.found.clip_skip = plain(abs(skip)) if abs(skip) > 1 else ""

    def _through(self, node: Node, above: frozenset[str]) -> list[str]:
        """Past a node that changes conditioning, or that holds texts itself as loaders of some packages do."""
        given = node.inputs
        control = self.graph.node(given.get("control_net"))
        if control is not None:
            name = file_stem(control.inputs.get("control_net_name")) or f"of node {control.id}"
            self.found.files.append((CONTROL_NET, f"ControlNet {name}"))
        else:
            self.graph.tell(f"{node.kind} (node {node.id})")
        own = given.get(self.side)
        if isinstance(own, str):
            return [from_comfyui(own.strip())]
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


def _models(found: _Found, sampler: Node) -> None:
    """The model that a sampler uses, its networks, and what else changes it."""
    guider = found.graph.node(sampler.inputs.get("guider"))
    start = sampler.inputs.get("model", guider.inputs.get("model") if guider else None)
    networks: list[ToldNetwork] = []
    for node in found.graph.follow(found.graph.node(start), lambda each: each.inputs.get("model")):
        given = node.inputs
        here = _networks_of(found.graph, node)
        networks += here
        name = next((given[each] for each in ("ckpt_name", "unet_name", "model_name") if each in given), None)
        if isinstance(name, str):
            found.model = file_stem(name)
        elif not here and "lora" not in node.kind.lower() and not _PLAIN_MODEL_NODES.search(node.kind):
            found.graph.tell(f"{node.kind} (node {node.id})")
        skip = number(given.get("clip_skip"))
        if skip is not None and abs(skip) > 1:
            found.clip_skip = found.clip_skip or plain(abs(skip))
    found.networks += reversed(networks)  # in the order in which they are loaded


def _networks_of(graph: Graph, node: Node) -> list[ToldNetwork]:
    """The networks that a node loads: one, or a list of numbered ones, or of objects with switches."""
    given, found = node.inputs, []
    for name, value in given.items():
        entry: Any = as_object(value)
        if entry.get("lora") and entry.get("on", True):
            second = entry.get("strengthTwo")
            found.append(ToldNetwork(file_stem(entry["lora"]), strength_of(entry.get("strength"), second)))
        match = re.fullmatch(r"lora_name(?:_?(\d+))?|lora_(\d+)", name)
        if match and isinstance(value, str) and value not in ("", "None") and file_stem(value):
            number_of = match[1] or match[2]
            unet, text = (_strength(graph, given, kind, number_of) for kind in ("model", "clip"))
            text = unet if text is None and "OnlyModel" not in node.kind and "ModelOnly" not in node.kind else text
            found.append(ToldNetwork(file_stem(value), strength_of(unet, "0" if text is None else text)))
    return found[::-1]


def _strength(graph: Graph, given: Any, kind: str, number_of: str | None) -> str | None:
    """A network's strength for the U-Net (`model`) or the text encoders (`clip`)."""
    if not number_of:
        names = [f"strength_{kind}", f"lora_{kind}_strength", f"{kind}_strength"]
    else:
        names = [f"strength_{kind}_{number_of}", f"{kind}_str_{number_of}", f"{kind}_weight_{number_of}"]
        names += [f"strength_{number_of}", f"lora_wt_{number_of}", f"lora_weight_{number_of}"]
    value = next((given[name] for name in names if name in given), None)
    return None if value is None else graph.number(value) or None


class _Size:
    """Follows latents back to the size that they have, in pixels; zeros where nothing tells it."""

    def __init__(self, found: _Found) -> None:
        self.found, self.graph = found, found.graph

    def of(self, value: object, above: frozenset[str] = frozenset()) -> tuple[int, int]:
        """Width and height of what an input is given."""
        node = self.graph.node(value)
        if node is None or node.id in above or len(above) > _DEEPEST:
            return 0, 0
        above, given = above | {node.id}, node.inputs
        if (number(self.graph.number(given.get("batch_size"))) or 1) > 1:
            self.graph.tell(f"which of the {plain(given.get('batch_size'))} pictures of its batch it is")
        if node.kind.startswith("LoadImage") or node.kind.startswith("ETN_LoadImage"):
            name = plain(given.get("image")).rpartition("/")[2][:80]
            self.found.files.append((SOURCE, f"picture {name} that it was drawn over".replace("  ", " ")))
            return 0, 0
        prefix = "empty_latent_" if "empty_latent_width" in given else ""
        wide, high = (_pixels(self.graph.number(given.get(f"{prefix}{side}"))) for side in ("width", "height"))
        inner = self.of(_toward_latent(node), above)
        if wide and high and not (_is_sampler(node) and any(inner)):
            return wide, high
        if (wide or high) and all(inner):  # one side of 0 keeps the shape
            return wide or inner[0] * high // inner[1], high or inner[1] * wide // inner[0]
        factor = number(self.graph.number(given.get("scale_by", given.get("upscale_by")))) or self._of_model(node)
        return (int(inner[0] * factor), int(inner[1] * factor)) if 0 < factor <= 16 else inner

    def _of_model(self, node: Node) -> float:
        """By how much a node with an upscaling model enlarges, as the model's name tells: `4x_…`, `…x4`."""
        model = self.graph.node(node.inputs.get("upscale_model"))
        if model is None:
            return 1.0
        told = re.search(r"(?<![0-9])([1-9])x|x([1-9])(?![0-9])", plain(model.inputs.get("model_name")), re.IGNORECASE)
        return float(told[1] or told[2]) if told else 1.0


def _pixels(text: str) -> int:
    value = number(text) or 0
    return int(value) if 0 < value < 1 << 20 else 0
