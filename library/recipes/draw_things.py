"""Draw Things, whose settings are JSON in XMP or Exif, with a second object in it since its second profile."""

import html
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from library.recipes.others import clip_skip_of, first_object
from library.recipes.recipe import (
    CONTROL_NET,
    SOURCE,
    UPSCALER,
    Recipe,
    ToldNetwork,
    as_list,
    as_object,
    file_stem,
    number,
    plain,
    strength_of,
)
from library.recipes.web_ui import read_parameters

_USER_COMMENT = re.compile(r"<exif:UserComment>(.*?)</exif:UserComment>|exif:UserComment=\"([^\"]*)\"", re.DOTALL)
_XML_TAG = re.compile(r"<[^<>]*>")


_DESCRIPTION = re.compile(r"<dc:description>(.*?)</dc:description>", re.DOTALL)


def _xml_text(text: str) -> str:
    return html.unescape(_XML_TAG.sub("", text)).strip()


def _described(text: str) -> Recipe:
    """The description for people, where it stands alone: prompt, `-` with the negative prompt, and settings."""
    text = re.sub(r"\n-(?=[^\n]*\n *Steps:)", "\nNegative prompt: ", text)
    text = text.replace("Guidance Scale:", "CFG scale:").replace(", Strength:", ", Denoising strength:")
    recipe = read_parameters(text, "Draw Things")
    whole = number(recipe.strength) in (1, None)
    files = () if whole else recipe.files
    return replace(recipe, strength="" if whole else recipe.strength, model=file_stem(recipe.model), files=files)


def _file_of(entry: object) -> object:
    """The file of a network or ControlNet, which has two names."""
    said = as_object(entry)
    return said.get("model") or said.get("file")


def _first_stage(said: Mapping[str, Any], second: Mapping[str, Any]) -> tuple[int, int] | None:
    """Width and height of the first stage, where there were two and the picture was drawn from noise."""
    sides = [number(second.get(name)) or 0 for name in ("hiresFixWidth", "hiresFixHeight")]
    wanted = second.get("hiresFix") is True and plain(said.get("strength")) in ("", "1")
    return (int(sides[0]), int(sides[1])) if wanted and all(0 < side < 1 << 20 for side in sides) else None


def read_draw_things(texts: Mapping[str, str]) -> Recipe:
    """Draw Things: JSON in XMP's `exif:UserComment`, or in Exif's."""
    found: dict[str, str] = dict(texts)
    for name in ("XML:com.adobe.xmp", "xmp"):
        if comment := _USER_COMMENT.search(texts.get(name, "")):
            found = {"parameters": _xml_text(comment[1] or comment[2] or "")} | found
        elif described := _DESCRIPTION.search(texts.get(name, "")):
            return _described(_xml_text(described[1]))
    said = first_object(found, "Draw Things", "c", "uc", "sampler", "seed")
    width, _, height = plain(said.get("size")).partition("x")
    second = as_object(said.get("v2"))
    strength, sampler = plain(said.get("strength")), plain(said.get("sampler"))
    timed = re.fullmatch(r"(.+) (AYS|Substep)", sampler)  # steps of its own, which no schedule here is
    is_img2img = strength not in ("", "1")
    controls = as_list(said.get("control")) or as_list(second.get("controls"))
    loras = as_list(said.get("lora")) or as_list(second.get("loras"))
    first = _first_stage(said, second)
    stage_strength = plain(second.get("hiresFixStrength")) if first else ""
    run = {"highres_fix_steps": plain(said.get("steps")), "highres_fix_latents_upscaling": ""} if first else {}
    unlike = [name for name in ("zeroNegativePrompt",) if second.get(name) is True]
    upscaler = plain(said.get("upscaler")) or plain(second.get("upscaler"))
    files = [(SOURCE, "the picture that it was drawn over")] if is_img2img else []
    files += [(CONTROL_NET, f"ControlNet {file_stem(_file_of(each))}") for each in controls]
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
        strength=stage_strength or (strength if is_img2img else ""),
        model=file_stem(said.get("model")),
        networks=tuple(
            ToldNetwork(file_stem(_file_of(each)), strength_of(as_object(each).get("weight")))
            for each in loras
            if file_stem(_file_of(each))
        ),
        first_stage=first,
        run=clip_skip_of(said.get("clip_skip") or second.get("clipSkip")) | run,
        files=tuple(files),
        untold=(*unlike, *(["refiner"] if plain(said.get("refiner")) or plain(second.get("refinerModel")) else [])),
    )
