"""Programs whose metadata is one JSON object with a value under each name: Fooocus, SwarmUI, NovelAI."""

import re
from collections.abc import Mapping
from typing import Any

from library.recipes.emphasis import from_comfyui, from_novelai, without_networks
from library.recipes.recipe import (
    MASK,
    SOURCE,
    VAE,
    Recipe,
    ToldNetwork,
    Unreadable,
    as_list,
    as_object,
    file_stem,
    json_texts,
    number,
    plain,
    read_object,
    strength_of,
)

_MANY_UNTOLD = 40  # names, of which more say nothing


def first_object(texts: Mapping[str, str], program: str, *names: str) -> Mapping[str, Any]:
    """The first JSON object of a picture's texts that has one of these names; without names, the first at all.

    Raises:
        Unreadable: when there is none that is whole.
    """
    problem = Unreadable(f"has the mark of {program} and no settings")
    for text in json_texts(texts):
        try:
            content = read_object(text, program)
        except Unreadable as fault:
            problem = fault
            continue
        if not names or any(name in content for name in names):
            return content
    raise problem


def clip_skip_of(value: object) -> dict[str, str]:
    """`--clip_skip` where it is above 1; some programs count it downwards, as -2."""
    skip = number(value)
    return {} if skip is None or abs(skip) <= 1 else {"clip_skip": plain(abs(skip))}


# ---------------------------------------------------------------------------------------------------------------------
# Fooocus


# Steps of what Fooocus calls performance, where only that is told
_PERFORMANCE = {"Quality": "60", "Speed": "30", "Extreme Speed": "8", "Lightning": "4", "Hyper-SD": "4"}


def read_fooocus(texts: Mapping[str, str]) -> Recipe:
    """Fooocus' own scheme, also that of its descendants; its other one is the web UI's."""
    said = first_object(texts, "Fooocus", "prompt", "Prompt")
    said = {str(name).lower().replace(" ", "_"): value for name, value in said.items()}
    size = re.findall(r"\d{1,6}", plain(said.get("resolution")))[:2]
    size = size if len(size) == 2 else [plain(said.get("width")), plain(said.get("height"))]
    untold = []
    styles = said.get("styles")
    if named := re.findall(r"""["']([^"']+)["']""", plain(styles)) or [plain(each) for each in as_list(styles)]:
        untold.append(f"styles {', '.join(named)}")
    if (refiner := plain(said.get("refiner_model"))) not in ("", "None"):
        untold.append(f"refiner {refiner}")
    return Recipe(
        program="RuinedFooocus" if "sampler_name" in said else "Fooocus",
        prompt=from_comfyui(without_networks(plain(said.get("prompt")))),
        negative_prompt=from_comfyui(plain(said.get("negative_prompt") or said.get("negative"))),
        seed=plain(said.get("seed")),
        width=size[0],
        height=size[1],
        steps=plain(said.get("steps")) or _PERFORMANCE.get(plain(said.get("performance")), ""),
        sampler=plain(said.get("sampler") or said.get("sampler_name")),
        schedule=plain(said.get("scheduler")),
        scale=plain(said.get("guidance_scale") or said.get("cfg")),
        model=file_stem(said.get("base_model") or said.get("base_model_name")),
        networks=_fooocus_networks(said),
        run=clip_skip_of(said.get("clip_skip")),
        untold=tuple(untold),
    )


def _fooocus_networks(said: Mapping[str, Any]) -> tuple[ToldNetwork, ...]:
    """Lists of name, weight, hash; or of hash, `weight - name`; before, `lora_combined_1` with `name : weight`."""
    listed = [each for each in as_list(said.get("loras")) if isinstance(each, list) and len(each) >= 2]
    ruined = [re.fullmatch(r"(-?[\d.]+) - (.+)", plain(each[1])) for each in listed]
    listed = [[match[2], match[1]] if match else each for match, each in zip(ruined, listed)]
    listed += re.findall(r"<([^<>:]+):(-?[\d.]+)>", plain(said.get("loras")))
    listed += [
        plain(text).rsplit(" : ", 1) for name, text in said.items() if name.startswith("lora") and " : " in plain(text)
    ]
    return tuple(
        ToldNetwork(file_stem(name), strength_of(weight))
        for name, weight, *_ in listed
        if file_stem(name) not in ("", "None")
    )


# ---------------------------------------------------------------------------------------------------------------------
# SwarmUI

_SWARM_KNOWN = {
    *("prompt", "negativeprompt", "model", "seed", "steps", "cfgscale", "aspectratio", "width", "height", "sampler"),
    *("scheduler", "comfyuisampler", "comfyuischeduler", "loras", "loraweights", "loratencweights", "images", "date"),
    *("swarm_version", "generation_time", "initimage", "initimagecreativity", "clipstopatlayer", "automaticvae"),
    *("sidelength", "nopreviews", "wildcardseed", "imageformat", "original_prompt", "original_negativeprompt", "vae"),
    *(
        "used_wildcards",
        "used_embeddings",
        "variationseed",
        "personalnote",
        "batchsize",
        "savesegmentmask",
        "resolution",
    ),
    *("donotsave", "presets", "prompt_images", "internalbackendtype", "modelspecificenhancements", "unused_parameters"),
    *("donotsaveintermediates", "colordepth", "loramodelhashes"),
}
_SWARM_TAG = re.compile(r"<(\w+)[^<>]*>")
# What follows these is the prompt of a part of the picture, or of another stage, up to the next of them
_SWARM_SECTION = re.compile(
    r"<((?:segment|object|region|clear|refiner|video|videoswap|extend|base)\b)[^<>]*>", re.IGNORECASE
)
_SWARM_WEIGHT = re.compile(r"<weight\[(-?[\d.]+)\]:([^<>]*)>", re.IGNORECASE)


def read_swarmui(texts: Mapping[str, str]) -> Recipe:
    """SwarmUI: `sui_image_params`."""
    said = as_object(first_object(texts, "SwarmUI", "sui_image_params").get("sui_image_params"))
    prompt, sections = _swarm_main(without_networks(plain(said.get("prompt"))))
    negative, _ = _swarm_main(plain(said.get("negativeprompt")))
    tags = sections | {tag.lower() for tag in _SWARM_TAG.findall(prompt)} - {"break"}
    strength, vae = plain(said.get("initimagecreativity")), plain(said.get("vae"))
    files = [(SOURCE, "the picture that it was drawn over")] if strength or "initimage" in said else []
    files += [(VAE, f"VAE {file_stem(vae)}")] if vae not in ("", "None", "Automatic") else []
    return Recipe(
        program="SwarmUI",
        prompt=" BREAK ".join(from_comfyui(_SWARM_TAG.sub("", part).strip()) for part in prompt.split("<break>")),
        negative_prompt=from_comfyui(_SWARM_TAG.sub("", negative).strip()),
        seed=plain(said.get("seed")),
        width=plain(said.get("width")),
        height=plain(said.get("height")),
        steps=plain(said.get("steps")),
        sampler=plain(said.get("sampler") or said.get("comfyuisampler")),
        schedule=plain(said.get("scheduler") or said.get("comfyuischeduler")),
        scale=plain(said.get("cfgscale")),
        strength=strength,
        model=file_stem(said.get("model")),
        networks=_swarm_networks(said),
        run=clip_skip_of(said.get("clipstopatlayer")),
        files=tuple(files),
        untold=(*(f"<{tag}:…>" for tag in sorted(tags)), *_swarm_untold(said)),
    )


def _swarm_main(prompt: str) -> tuple[str, set[str]]:
    """A prompt without those of parts and stages, and the names of their tags."""
    prompt = re.sub(r"<embed(?:ding)?:([^<>]*)>", lambda named: file_stem(named[1]), prompt, flags=re.IGNORECASE)
    pieces = _SWARM_SECTION.split(_SWARM_WEIGHT.sub(r"(\2:\1)", prompt))
    names, texts = [name.lower() for name in pieces[1::2]], pieces[2::2]
    main = [pieces[0], *(text for name, text in zip(names, texts) if name == "base")]
    return "".join(main), set(names) - {"base"}


def _swarm_networks(said: Mapping[str, Any]) -> tuple[ToldNetwork, ...]:
    """Names and weights in lists side by side, or in texts with commas."""
    columns = []
    for name in ("loras", "loraweights", "loratencweights"):
        value = said.get(name)
        columns.append(as_list(value) or [part for part in plain(value).split(",") if part.strip()])
    names, weights, of_text = columns
    return tuple(
        ToldNetwork(
            file_stem(name),
            strength_of(
                weights[place] if place < len(weights) else 1, of_text[place] if place < len(of_text) else None
            ),
        )
        for place, name in enumerate(names)
        if file_stem(name)
    )


def _swarm_untold(said: Mapping[str, Any]) -> list[str]:
    names = [name for name in said if name not in _SWARM_KNOWN and not name.startswith("controlnet")]
    names += ["controlnet"] if any(name.startswith("controlnet") for name in said) else []
    return names[:_MANY_UNTOLD]


# ---------------------------------------------------------------------------------------------------------------------
# NovelAI

_NOVELAI_UNTOLD = ("cfg_rescale", "dynamic_thresholding", "sm", "sm_dyn", "director_reference_strengths")
_NOVELAI_UNTOLD += ("skip_cfg_above_sigma", "reference_strength_multiple", "controlnet_model")


def read_novelai(texts: Mapping[str, str]) -> Recipe:
    """NovelAI: `Comment`, beside `Description`, which is the prompt alone."""
    said = first_object(texts, "NovelAI", "prompt", "uc", "Comment", "steps")
    if isinstance(said.get("Comment"), str):  # in WebP all texts stand in one object
        said = {**said, **read_object(said["Comment"], "NovelAI")}
    caption, negative = (
        as_object(as_object(said.get(name)).get("caption")) for name in ("v4_prompt", "v4_negative_prompt")
    )
    untold = [name for name in _NOVELAI_UNTOLD if said.get(name)]
    untold += ["characters' prompts"] if as_list(caption.get("char_captions")) else []
    prompt = plain(said.get("prompt")) or plain(caption.get("base_caption")) or texts.get("Description", "")
    kind = plain(said.get("request_type"))
    is_img2img = "Img2Img" in kind or bool(plain(said.get("strength")))
    over = "the picture that it was drawn over" + ("" if kind else ", if there was one")  # the first ones told none
    files = [(SOURCE, over)] if is_img2img else []
    files += [(MASK, "the mask")] if "Infill" in kind else []
    if number(said.get("uncond_scale", 1)) != 1:
        untold.append("uncond_scale")
    noised = plain(said.get("noise_schedule"))
    return Recipe(
        program="NovelAI",
        prompt=from_novelai(prompt.strip()),
        negative_prompt=from_novelai(plain(said.get("uc")) or plain(negative.get("base_caption"))),
        seed=plain(said.get("seed")),
        width=plain(said.get("width")),
        height=plain(said.get("height")),
        steps=plain(said.get("steps")),
        sampler=plain(said.get("sampler")),
        schedule="" if noised == "native" else noised,
        scale=plain(said.get("scale")),
        strength=plain(said.get("strength")) if is_img2img else "",
        model=texts.get("Source", "") or plain(said.get("Source")),
        files=tuple(files),
        untold=tuple(untold),
    )
