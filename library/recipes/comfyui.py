"""ComfyUI's graph, walked back from the picture to its sampler, and from there to texts, networks and size."""

import re
from collections import deque
from collections.abc import Collection, Iterator

from library.recipes.comfyui_graph import DETAILER, Graph, Node, is_sampler, toward_latent
from library.recipes.comfyui_parts import Found, Size, Texts, read_models
from library.recipes.recipe import SOURCE, Recipe, Unreadable, number

_SAVES = re.compile(r"save.*image|image.*save|preview.*image|SaveAnimatedWEBP", re.IGNORECASE)

_ENLARGES = re.compile(r"^ImageUpscaleWithModel|^ImageScale|^Upscale Image", re.IGNORECASE)  # a picture that is drawn


def read_comfyui(texts: dict[str, str]) -> Recipe:
    """How a picture of ComfyUI was made.

    Raises:
        Unreadable: when there is no graph, or no sampler in it.
    """
    graph = Graph.of(texts)
    sampler, others = _samplers(graph)
    sampler = graph.with_pipe(sampler)
    found = Found(graph)
    said = _sampling(graph, sampler)
    first, first_said = _earlier(graph, sampler)
    if first is not None and _continues(sampler):  # a refiner ends what the first one began
        graph.tell(f"the refining sampler (node {sampler.id})")
        sampler, said, first, first_said = first, first_said, None, {}
    others -= {sampler.id} | ({first.id} if first else set())
    if others:
        graph.tell(f"the samplers before or beside it (node {', '.join(sorted(others))})")
    positive, negative = _sides(graph, sampler)
    prompt = Texts(found, "positive").prompt(positive)
    negative_prompt = Texts(found, "negative").negative(negative)
    read_models(found, sampler)
    latent = sampler.inputs.get("latent_image", sampler.inputs.get("samples", sampler.inputs.get("latent")))
    width, height = Size(found).of(latent) if latent else Size(found).of_node(sampler)
    drawn_over = 0 < (number(said["strength"]) or 1) < 1
    run = {"clip_skip": found.clip_skip} if found.clip_skip else {}
    first_stage = None
    if first is not None and drawn_over:
        first_stage = Size(Found(graph)).of(first.inputs.get("latent_image"))
        run |= {"highres_fix_steps": first_said["steps"]}
        run |= {"highres_fix_latents_upscaling": ""} if _enlarges_latents(graph, latent) else {}
        if first_said["seed"] != said["seed"]:
            graph.tell(f"the first sampler's seed {first_said['seed']}")
    elif drawn_over and not any(options == SOURCE for options, _ in found.files):
        graph.tell("what it was drawn over")
    elif not drawn_over:
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
        line=found.line,
        run=run,
        files=tuple(dict.fromkeys(found.files)),
        untold=tuple(graph.untold),
    )


# ---------------------------------------------------------------------------------------------------------------------
# Samplers


def _samplers(graph: Graph) -> tuple[Node, set[str]]:
    """The sampler nearest to what is saved, and the ids of all others.

    Raises:
        Unreadable: when there is none.
    """
    all_of_them = [name for name, node in graph.nodes.items() if is_sampler(node)]
    if not all_of_them:
        raise Unreadable("has a graph of ComfyUI without a sampler that is known here")
    used = {link for node in graph.nodes.values() for link in graph.links(node)}
    ends = [name for name, node in graph.nodes.items() if _SAVES.search(node.kind)]
    ends = [name for name in ends if "save" in graph.nodes[name].kind.lower()] or ends
    ends = ends or [name for name in graph.nodes if name not in used] or list(graph.nodes)
    nearest = list(dict.fromkeys(filter(None, (_nearest(graph, end, all_of_them) for end in ends))))
    # of several that are saved, one that another goes on from is a stage of its picture
    stages = {name for each in nearest for link in graph.links(graph.nodes[each]) for name in _behind(graph, link)}
    last = next((name for name in nearest if name not in stages), [*nearest, *all_of_them][0])
    return graph.nodes[last], set(all_of_them) - {last}


def _behind(graph: Graph, start: str) -> Iterator[str]:
    """A node, and those that it is made from, the nearest first."""
    waiting, seen = deque([start]), {start}
    while waiting:
        name = waiting.popleft()
        yield name
        for link in graph.links(graph.nodes[name]):
            if link not in seen:
                seen.add(link)
                waiting.append(link)


def _nearest(graph: Graph, end: str, samplers: Collection[str]) -> str | None:
    """The sampler nearest to a node that saves; what changes its picture in between is told of."""
    passed: list[str] = []
    for name in _behind(graph, end):
        if name in samplers:
            for kind in passed:
                graph.tell(kind)
            return name
        if DETAILER.search(graph.nodes[name].kind) or _ENLARGES.search(graph.nodes[name].kind):
            passed.append(f"{graph.nodes[name].kind} (node {name})")
    return None


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
        "seed": graph.number(seed, "seed"),
        "steps": graph.number(steps, "steps"),
        "sampler": graph.text(name, wanted="sampler_name"),
        "schedule": graph.text(schedule, wanted="scheduler"),
        "scale": graph.number(scale, "cfg"),
        "strength": graph.number(strength, "denoise"),
    }
    if (script := graph.node(given.get("script"))) is not None:
        graph.tell(f"{script.kind} (node {script.id})")
    begins, last = number(given.get("start_at_step")) or 0, number(said["steps"]) or 0
    if not said["strength"] and 0 < begins < last:
        said["strength"] = f"{1 - begins / last:.4g}"
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
    chain = graph.follow(graph.node(sampler.inputs.get("latent_image")), toward_latent)
    first = next((node for node in chain if is_sampler(node) and node.id != sampler.id), None)
    if first is None:
        return None, {}
    first = graph.with_pipe(first)
    return first, _sampling(graph, first)


def _continues(sampler: Node) -> bool:
    """Whether a sampler goes on with another one's steps, as refiners do."""
    begins = number(sampler.inputs.get("start_at_step")) or 0
    return sampler.inputs.get("add_noise") in (False, "disable") or begins > 0


def _enlarges_latents(graph: Graph, latent: object) -> bool:
    chain = graph.follow(graph.node(latent), toward_latent)
    return any("LatentUpscale" in node.kind for node in chain)


def _sides(graph: Graph, sampler: Node) -> tuple[object, object]:
    """The inputs of the prompt and of the negative prompt."""
    guider = graph.node(sampler.inputs.get("guider"))
    given = guider.inputs if guider else sampler.inputs
    positive = given.get("positive", given.get("conditioning", given.get("cond1")))
    if guider is not None and guider.kind not in ("CFGGuider", "BasicGuider"):
        graph.tell(f"{guider.kind} (node {guider.id})")
    return positive, given.get("negative")
