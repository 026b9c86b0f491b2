"""Programs whose metadata is one JSON object with a value under each name: Fooocus, SwarmUI, NovelAI, Draw Things."""

import html
import re
from collections.abc import Mapping
from typing import Any

from library.recipes.emphasis import from_comfyui, from_novelai, without_networks
from library.recipes.recipe import (
    CONTROL_NET,
    SOURCE,
    UPSCALER,
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


def _first_object(texts: Mapping[str, str], program: str, *names: str) -> Mapping[str, Any]:
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


def _clip_skip(value: object) -> dict[str, str]:
    """`--clip_skip` where it is above 1; some programs count it downwards, as -2."""
    skip = number(value)
    return {} if skip is None or abs(skip) <= 1 else {"clip_skip": plain(abs(skip))}


# ---------------------------------------------------------------------------------------------------------------------
# Fooocus


def read_fooocus(texts: Mapping[str, str]) -> Recipe:
    """Fooocus' own scheme; its other one is the web UI's."""
    said = _first_object(texts, "Fooocus", "prompt", "Prompt")
    said = {str(name).lower().replace(" ", "_"): value for name, value in said.items()}
    size = re.findall(r"\d{1,6}", plain(said.get("resolution")))[:2]
    untold = []
    styles = said.get("styles")
    if named := re.findall(r"""["']([^"']+)["']""", plain(styles)) or [plain(each) for each in as_list(styles)]:
        untold.append(f"styles {', '.join(named)}")
    if (refiner := plain(said.get("refiner_model"))) not in ("", "None"):
        untold.append(f"refiner {refiner}")
    return Recipe(
        program="Fooocus",
        prompt=from_comfyui(without_networks(plain(said.get("prompt")))),
        negative_prompt=from_comfyui(plain(said.get("negative_prompt"))),
        seed=plain(said.get("seed")),
        width=size[0] if len(size) == 2 else "",
        height=size[1] if len(size) == 2 else "",
        steps=plain(said.get("steps")),
        sampler=plain(said.get("sampler") or said.get("sampler_name")),
        schedule=plain(said.get("scheduler")),
        scale=plain(said.get("guidance_scale")),
        model=file_stem(said.get("base_model")),
        networks=_fooocus_networks(said),
        run=_clip_skip(said.get("clip_skip")),
        untold=tuple(untold),
    )


def _fooocus_networks(said: Mapping[str, Any]) -> tuple[ToldNetwork, ...]:
    """Lists of name, weight and hash; before, `lora_combined_1` with `name : weight`."""
    listed = [each for each in as_list(said.get("loras")) if isinstance(each, list) and len(each) >= 2]
    listed += [
        plain(text).rsplit(" : ", 1) for name, text in said.items() if name.startswith("lora") and " : " in plain(text)
    ]
    return tuple(ToldNetwork(file_stem(name), strength_of(weight)) for name, weight, *_ in listed if file_stem(name))


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


def read_swarmui(texts: Mapping[str, str]) -> Recipe:
    """SwarmUI: `sui_image_params`."""
    said = as_object(_first_object(texts, "SwarmUI", "sui_image_params").get("sui_image_params"))
    prompt = without_networks(plain(said.get("prompt")))
    tags = {tag.lower() for tag in _SWARM_TAG.findall(prompt)}
    strength, vae = plain(said.get("initimagecreativity")), plain(said.get("vae"))
    files = [(SOURCE, "the picture that it was drawn over")] if strength or "initimage" in said else []
    files += [(VAE, f"VAE {file_stem(vae)}")] if vae not in ("", "None", "Automatic") else []
    return Recipe(
        program="SwarmUI",
        prompt=from_comfyui(_SWARM_TAG.sub("", prompt).strip()),
        negative_prompt=from_comfyui(_SWARM_TAG.sub("", plain(said.get("negativeprompt"))).strip()),
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
        run=_clip_skip(said.get("clipstopatlayer")),
        files=tuple(files),
        untold=(*(f"<{tag}:…>" for tag in sorted(tags)), *_swarm_untold(said)),
    )


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


def read_novelai(texts: Mapping[str, str]) -> Recipe:
    """NovelAI: `Comment`, beside `Description`, which is the prompt alone."""
    said = _first_object(texts, "NovelAI", "prompt", "uc", "Comment", "steps")
    if isinstance(said.get("Comment"), str):  # in WebP all texts stand in one object
        said = {**said, **read_object(said["Comment"], "NovelAI")}
    caption, negative = (
        as_object(as_object(said.get(name)).get("caption")) for name in ("v4_prompt", "v4_negative_prompt")
    )
    untold = [name for name in _NOVELAI_UNTOLD if said.get(name)]
    untold += ["characters' prompts"] if as_list(caption.get("char_captions")) else []
    prompt = plain(said.get("prompt")) or plain(caption.get("base_caption")) or texts.get("Description", "")
    is_img2img = "Img2Img" in plain(said.get("request_type")) or bool(plain(said.get("strength")))
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
        model=texts.get("Source", ""),
        files=((SOURCE, "the picture that it was drawn over"),) if is_img2img else (),
        untold=tuple(untold),
    )


# ---------------------------------------------------------------------------------------------------------------------
# Draw Things

_USER_COMMENT = re.compile(r"<exif:UserComment>(.*?)</exif:UserComment>|exif:UserComment=\"([^\"]*)\"", re.DOTALL)
_XML_TAG = re.compile(r"<[^<>]*>")


def read_draw_things(texts: Mapping[str, str]) -> Recipe:
    """Draw Things: JSON in XMP's `exif:UserComment`, or in Exif's."""
    found: dict[str, str] = dict(texts)
    for name in ("XML:com.adobe.xmp", "xmp"):
        if comment := _USER_COMMENT.search(texts.get(name, "")):
            found = {"parameters": html.unescape(_XML_TAG.sub("", comment[1] or comment[2] or "")).strip()} | found
    said = _first_object(found, "Draw Things", "c", "uc", "sampler", "seed")
    width, _, height = plain(said.get("size")).partition("x")
    second = as_object(said.get("v2"))
    strength, sampler = plain(said.get("strength")), plain(said.get("sampler"))
    timed = re.fullmatch(r"(.+) (AYS|Substep)", sampler)  # steps of its own, which no schedule here is
    is_img2img = strength not in ("", "1")
    controls = as_list(said.get("control"))
    upscaler = plain(said.get("upscaler")) or plain(second.get("upscaler"))
    files = [(SOURCE, "the picture that it was drawn over")] if is_img2img else []
    files += [(CONTROL_NET, f"ControlNet {file_stem(as_object(each).get('model'))}") for each in controls]
    files += [(UPSCALER, f"upscaler {file_stem(upscaler)}")] if upscaler else []
    return Recipe(
        program="Draw Things",
        prompt=plain(said.get("c")),
        negative_prompt=plain(said.get("uc")),
        seed=plain(said.get("seed")),
        width=width or plain(second.get("width")),
        height=height or plain(second.get("height")),
        steps=plain(said.get("steps")),
        sampler=timed[1] if timed else sampler,
        schedule=timed[2] if timed else "",
        scale=plain(said.get("scale")),
        strength=strength if is_img2img else "",
        model=file_stem(said.get("model")),
        networks=tuple(
            ToldNetwork(file_stem(as_object(each).get("model")), strength_of(as_object(each).get("weight")))
            for each in as_list(said.get("lora"))
            if file_stem(as_object(each).get("model"))
        ),
        run=_clip_skip(said.get("clip_skip") or second.get("clipSkip")),
        files=tuple(files),
        untold=("refiner",) if plain(said.get("refiner")) or plain(second.get("refinerModel")) else (),
    )
