"""InvokeAI, whose metadata has had three forms: `invokeai_metadata` (since 3.0), `sd-metadata`, and `Dream`."""

import re
import shlex
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from library.recipes.emphasis import from_invokeai, has_functions
from library.recipes.recipe import (
    CONTROL_NET,
    MASK,
    SOURCE,
    VAE,
    Recipe,
    ToldNetwork,
    Unreadable,
    as_list,
    as_object,
    file_stem,
    number,
    plain,
    read_object,
    strength_of,
)

_PROGRAM = "InvokeAI"
_OVER = "the picture that it was drawn over"
_NEGATIVE = re.compile(r"(?<!\\)\[((?:[^\[\]\\]|\\.)*)\]")
# What changes pictures and has no like here
_UNTOLD = ("ipAdapters", "t2iAdapters", "refiner_model", "seamless_x", "seamless_y", "hrf_enabled", "regions", "perlin")
_UNTOLD += ("guidance", "ref_images", "control_layers")
_CANVAS = {"controlLayers": "control layers", "regionalGuidance": "regional guidance", "referenceImages": "references"}


def read_invokeai(texts: Mapping[str, str]) -> Recipe:
    """How a picture of InvokeAI was made.

    Raises:
        Unreadable: when its metadata is damaged, or is a graph alone.
    """
    if "invokeai_metadata" in texts:
        return _read_new(read_object(texts["invokeai_metadata"], _PROGRAM))
    if "sd-metadata" in texts and (image := as_object(read_object(texts["sd-metadata"], _PROGRAM).get("image"))):
        return _read_middle(image, plain(read_object(texts["sd-metadata"], _PROGRAM).get("model_weights")))
    if dream := texts.get("Dream", "") or texts.get("dream", ""):
        return _read_old(dream)
    raise Unreadable("has a graph of InvokeAI and no settings")


def _named(model: object) -> str:
    """A model's name, of an object that has had several forms, or was the name alone."""
    if isinstance(model, str):
        return file_stem(model)
    said = as_object(model)
    inner = as_object(said.get("lora") or said.get("model") or said.get("control_model"))
    return file_stem(said.get("name") or said.get("model_name") or inner.get("name") or inner.get("model_name"))


def _read_new(said: Mapping[str, Any]) -> Recipe:
    prompt, negative = plain(said.get("positive_prompt")), plain(said.get("negative_prompt"))
    skip = number(said.get("clip_skip")) or 0  # layers left out: 1 is our 2
    files = [(CONTROL_NET, f"ControlNet {_named(each)}") for each in as_list(said.get("controlnets"))]
    mode = plain(said.get("generation_mode"))
    if "img2img" in mode or "inpaint" in mode or "outpaint" in mode or said.get("init_image"):
        files.append((SOURCE, _OVER))
    canvas = as_object(said.get("canvas_v2_metadata"))
    if "inpaint" in mode or any(as_object(each).get("objects") for each in as_list(canvas.get("inpaintMasks"))):
        files.append((MASK, "the mask"))
    files += [(VAE, f"VAE {_named(said['vae'])}")] if _named(said.get("vae")) else []
    styles = [plain(said.get(name)) for name in ("positive_style_prompt", "negative_style_prompt")]
    untold = [name for name in _UNTOLD if said.get(name)]
    untold += [words for name, words in _CANVAS.items() if as_list(canvas.get(name))]
    untold += ["style prompts"] if any(style not in ("", prompt, negative) for style in styles) else []
    untold += ["prompt functions (.and, .blend, .swap)"] if has_functions(prompt) else []
    loras = [each for each in as_list(said.get("loras")) if _named(each)]
    rescale = number(said.get("cfg_rescale_multiplier")) or 0
    return replace(
        _named_alike(said, prompt, negative),
        sampler=plain(said.get("scheduler")),
        strength=plain(said.get("strength")),
        model=_named(said.get("model")),
        networks=tuple(ToldNetwork(_named(each), strength_of(as_object(each).get("weight"))) for each in loras),
        run=({"clip_skip": plain(skip + 1)} if 0 < skip < 100 else {})
        | ({"guidance_rescale": plain(rescale)} if rescale else {}),
        files=tuple(files),
        untold=tuple(untold),
    )


def _named_alike(said: Mapping[str, Any], prompt: str, negative: str) -> Recipe:
    """What both kinds of JSON call by the same names."""
    return Recipe(
        program=_PROGRAM,
        prompt=from_invokeai(prompt),
        negative_prompt=from_invokeai(negative),
        seed=plain(said.get("seed")),
        width=plain(said.get("width")),
        height=plain(said.get("height")),
        steps=plain(said.get("steps")),
        scale=plain(said.get("cfg_scale")),
    )


def _read_middle(image: Mapping[str, Any], model: str) -> Recipe:
    """`sd-metadata`'s `image`; its prompt is a text, or a list of texts with weights."""
    said = image.get("prompt")
    parts = [as_object(each) for each in as_list(said)]
    prompt, negative = _split_negative(plain(said) or " ".join(plain(each.get("prompt")) for each in parts))
    is_img2img = plain(image.get("type")) == "img2img"
    return replace(
        _named_alike(image, prompt, negative),
        sampler=plain(image.get("sampler")),
        strength=plain(image.get("strength")) if is_img2img else "",
        model=model,
        files=((SOURCE, _OVER),) if is_img2img else (),
        untold=(
            *(name for name in ("variations", "postprocessing", "seamless", "hires_fix", "perlin") if image.get(name)),
            *(["weights of several prompts"] if len(parts) > 1 else []),
        ),
    )


_LONG_FLAGS = {
    "steps": "s",
    "seed": "S",
    "width": "W",
    "height": "H",
    "cfg_scale": "C",
    "sampler": "A",
    "strength": "f",
}


_OLD_UNTOLD = {"V": "variations", "U": "enlarging", "G": "face restoration", "hires_fix": "hires_fix"}
_OLD_UNTOLD |= {"perlin": "perlin", "seamless": "seamless"}


def _read_old(dream: str) -> Recipe:
    """A command line: `"a cat [fog]" -s 20 -S 1 -W 512 -H 512 -C 7.5 -A k_lms`; numbers may follow at once (`-s20`)."""
    quoted = re.match(r'\s*"((?:[^"\\]|\\.)*)"(.*)', dream, re.DOTALL)
    text, rest = (quoted[1], quoted[2]) if quoted else (dream, "")
    try:
        words = shlex.split(rest)
    except ValueError:
        words = rest.split()
    said: dict[str, str] = {}
    for place, word in enumerate(words):
        if flag := re.fullmatch(r"--(\w+)=?(.*)|-([a-zA-Z])(.*)", word):
            name, value = (_LONG_FLAGS.get(flag[1], flag[1]), flag[2]) if flag[1] else (flag[3], flag[4])
            said[name] = value or (words[place + 1] if place + 1 < len(words) else "")
    prompt, negative = _split_negative(text)
    over = ((SOURCE, _OVER),) if "I" in said or "f" in said else ()
    return Recipe(
        program=_PROGRAM,
        prompt=from_invokeai(prompt),
        negative_prompt=from_invokeai(negative),
        files=over,
        seed=said.get("S", ""),
        width=said.get("W", ""),
        height=said.get("H", ""),
        steps=said.get("s", ""),
        sampler=said.get("A", ""),
        scale=said.get("C", ""),
        strength=said.get("f", ""),
        untold=tuple(words for flag, words in _OLD_UNTOLD.items() if flag in said),
    )


def _split_negative(text: str) -> tuple[str, str]:
    """A prompt, and what stands in square brackets, which these versions drew away from."""
    negative = ", ".join(part.strip() for part in _NEGATIVE.findall(text))
    return re.sub(r"\s{2,}", " ", _NEGATIVE.sub("", text)).strip(), negative
