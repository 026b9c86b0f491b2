"""The web UI's `parameters`, which Forge, Fooocus and others write as well.

The prompt, `Negative prompt: …`, and settings beginning with `Steps: …` stand each on lines of their own, or on one
where another program has taken the line breaks out; `Template: …` lines may follow.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from library.recipes.recipe import (
    CONTROL_NET,
    EMBEDDING,
    MASK,
    SOURCE,
    UPSCALER,
    VAE,
    Givers,
    Recipe,
    ToldNetwork,
    as_list,
    as_object,
    file_stem,
    number,
    plain,
    strength_of,
)

_NEGATIVE_LINE = re.compile(r"^[^\S\n]*Negative prompt:", re.IGNORECASE | re.MULTILINE)
_NEGATIVE = re.compile(r"(?<!\w)Negative prompt:", re.IGNORECASE)
_STEPS = re.compile(r"(?<!\S)Steps: *\d+ *(?:,|$)", re.MULTILINE)
_LINE = re.compile(r"^.*$", re.MULTILINE)
_TEMPLATE = re.compile(r"\s*(?:Negative )?Template:")
_PAIR = re.compile(r"(?<![\w ])[\w ]+: *(?:\"(?:\\.|[^\\\"])*\"|[^,]*)(?:,|$)")
_FEWEST_PAIRS = 3  # that make a line settings
_SETTING = re.compile(r"\s*([^:,\"]+?): *(?:(?P<json>[\[{])|(\"(?:\\.|[^\\\"])*\"|[^,]*)(?:,|$))")


def split_parameters(parameters: str) -> tuple[str, str, str]:
    """Prompt, negative prompt and settings of the web UI's `parameters`."""
    text = re.sub(r"\r\n?", "\n", parameters).strip()
    start = _settings_start(text)
    settings = text[start:].partition("\n")[0]
    text = text[:start]
    mark = _NEGATIVE_LINE.search(text) or _NEGATIVE.search(text)
    prompt, negative = (text[: mark.start()], text[mark.end() :]) if mark else (text, "")
    return prompt.strip(), negative.strip(), settings


def _settings_start(text: str) -> int:
    """Where the settings begin; at the text's end where there are none."""
    found = list(_settings(text, _STEPS)) or [
        place for place in _settings(text, _LINE) if _ends_after_line(text, place)
    ]
    ending = (place for place in found if _ends_after_line(text, place))
    return next(ending, found[-1] if found else len(text))


def _settings(text: str, start: re.Pattern[str]) -> Iterator[int]:
    """The places of a pattern from where on a line is settings."""
    for match in start.finditer(text):
        line = text[match.start() :].partition("\n")[0]
        if len(_PAIR.findall(line)) >= _FEWEST_PAIRS:
            yield match.start()


def _ends_after_line(text: str, place: int) -> bool:
    """Whether nothing but templates follows the line of a place."""
    rest = text[place:].partition("\n")[2]
    return not rest.strip() or _TEMPLATE.match(rest) is not None


def read_settings(line: str) -> dict[str, str]:
    """The settings of a line `Name: value, Name: "a, value"`, by name; of a name that stands twice, the first."""
    settings: dict[str, str] = {}
    place = 0
    while found := _SETTING.search(line, place):
        place, value = found.end(), found[3]
        if found["json"]:
            start = found.start("json")
            place = _json_end(line, start)
            value = line[start:place]
            place += line[place : place + 1] == ","
        settings.setdefault(found[1].strip(), unquoted(value.strip()))
    return settings


def _json_end(line: str, start: int) -> int:
    """Where a list or object of JSON ends; at the next comma where it is none."""
    try:
        end = json.JSONDecoder().raw_decode(line, start)[1]
    except (ValueError, RecursionError):
        end = -1
    if end < 0 or line[end : end + 1] not in ("", ","):
        end = line.find(",", start)
    return len(line) if end < 0 else end


def unquoted(value: str) -> str:
    """A value without the JSON quotes that hold commas together."""
    if value.startswith('"') and value.endswith('"'):
        try:
            return str(json.loads(value))
        except ValueError:
            return value.strip('"')
    return value


# ---------------------------------------------------------------------------------------------------------------------
# Settings to a recipe

_IN_LINE = {"Eta": "eta", "Sigma churn": "s_churn", "Image CFG scale": "ig"}
# What says nothing of how the picture looks, or is taken over below
_KNOWN = {
    *("Steps", "Sampler", "Schedule type", "CFG scale", "Seed", "Size", "Model hash", "Model", "Clip skip", "Version"),
    *("Denoising strength", "Hires upscale", "Hires resize", "Hires steps", "Hires upscaler", "Eta", "Sigma churn"),
    *("Image CFG scale", "Lora hashes", "TI hashes", "TI", "VAE hash", "Hashes", "Emphasis", "User", "Batch size"),
    *("Batch pos", "Discard penultimate sigma", "RNG", "Backend", "Parser", "App", "Pipeline", "Operations", "Comment"),
    *("Scheduler", "Metadata scheme", "Lora weights", "Metadata Scheme", "Raw prompt", "Raw negative prompt"),
    *(
        "Module 1",
        "Module 2",
        "Module 3",
        "Base Model",
        "Base Model Hash",
        "VAE",
        "Hires prompt",
        "Hires negative prompt",
    ),
    *("Postprocess upscale by", "Postprocess upscaler", "CFG Scale", "Creator", "Created", "Distilled CFG Scale"),
    *("Beta schedule alpha", "Beta schedule beta", "Civitai resources", "Civitai metadata", "Diffusion in Low Bits"),
    *("VAE", "Created Date", "Raw prompt", "Raw negative prompt", "Styles", "Performance", "Base model", "KSampler"),
    *("Schedule", "Mask blur", "Masked content", "Mask mode", "Inpaint area", "Masked area padding"),
}
_OF_MASKS = ("Mask blur", "Masked content", "Mask mode", "Inpaint area")
# Of Highres. fix's second stage, which has those of the first one here; what says that they are the same
_LATER = {"Hires CFG Scale": "CFG scale", "Hires schedule type": "Schedule type", "Hires sampler": "Sampler"}
_LATER |= {"Hires Module 1": "", "Hires checkpoint": ""}
_SAME = ("Use same choices", "Use same sampler", "Use same scheduler", "Use same checkpoint", "None")
_LORA_WEIGHT = re.compile(r"([^,:]+): *(-?[\d.]+)")
_USUAL_DISTILLED = "3.5"  # what Forge writes of every model


def read_parameters(parameters: str, program: str = "the web UI") -> Recipe:
    """How a picture was made, by its `parameters`."""
    prompt, negative, line = split_parameters(parameters)
    settings = read_settings(line)
    width, height = _size(settings.get("Size", ""))
    run = {"clip_skip": settings["Clip skip"]} if settings.get("Clip skip", "1") != "1" else {}
    run |= {"emb_normalize_mode": "none"} if settings.get("Emphasis") == "No norm" else {}
    run |= {"upscale": settings["Postprocess upscale by"]} if "Postprocess upscale by" in settings else {}
    recipe = Recipe(
        program=program,
        prompt=prompt,
        negative_prompt=negative,
        seed=settings.get("Seed", ""),
        width=str(width or ""),
        height=str(height or ""),
        steps=settings.get("Steps", ""),
        sampler=settings.get("Sampler", ""),
        schedule=next((settings[name] for name in ("Schedule type", "Scheduler", "Schedule") if name in settings), ""),
        scale=settings.get("CFG scale", "") or settings.get("CFG Scale", ""),
        strength=settings.get("Denoising strength", "") if number(settings.get("Denoising strength", "")) else "",
        model=settings.get("Model", "") or next((name for name, _ in _resources(settings, "checkpoint")), ""),
        networks=_networks(settings, prompt),
        line={option: settings[name] for name, option in _IN_LINE.items() if name in settings},
        run=run,
        files=_files(settings),
        untold=_untold(settings),
    )
    if hires := _hires(settings, width, height):
        return replace(recipe, **hires, run={**recipe.run, **_run(settings)})
    if recipe.strength:
        return replace(recipe, files=(*recipe.files, (SOURCE, "the picture that it was drawn over")))
    return recipe


def _untold(settings: Mapping[str, str]) -> tuple[str, ...]:
    """What has no like here."""
    told = _KNOWN | {name for name, first in _LATER.items() if settings.get(name) in (*_SAME, settings.get(first))}
    unknown = [name for name in settings if name not in told and not name.startswith("ControlNet")]
    unknown = [name for name in unknown if not name.startswith("Refiner") or settings[name] != "None"]
    untold = _in_families(unknown)
    untold += [f"{name} {settings[name]!r}" for name in ("Hires prompt", "Hires negative prompt") if name in settings]
    if (upscaler := settings.get("Hires upscaler", "")).startswith("Latent ("):
        untold.append(f"upscaler {upscaler}, for which bilinear is taken")
    if settings.get("Emphasis", "Original") not in ("Original", "No norm"):
        untold.append(f"Emphasis {settings['Emphasis']}")
    if settings.get("Distilled CFG Scale", _USUAL_DISTILLED) != _USUAL_DISTILLED:
        untold.append("Distilled CFG Scale")
    return tuple(untold)


def _in_families(names: Sequence[str]) -> list[str]:
    """Names of settings, those of one extension in one: they begin with the same word."""
    families: dict[str, list[str]] = {}
    for name in names:
        families.setdefault(re.split(r"[ _:]", name, maxsplit=1)[0], []).append(name)
    return [
        each[0] if len(each) == 1 else f"{each[0]} and {len(each) - 1} more of its settings"
        for each in families.values()
    ]


def _resources(settings: Mapping[str, str], *kinds: str) -> list[tuple[str, str]]:
    """Names and weights of what Civitai lists beside a picture."""
    try:
        listed = as_list(json.loads(settings.get("Civitai resources", "[]")))
    except (ValueError, RecursionError):
        return []
    said = [as_object(each) for each in listed]
    return [
        (plain(each.get("modelName")), plain(each.get("weight")))
        for each in said
        if plain(each.get("type")).lower() in kinds and plain(each.get("modelName"))
    ]


def _files(settings: Mapping[str, str]) -> tuple[tuple[Givers, str], ...]:
    """What files it was made with."""
    upscalers = (settings.get("Hires upscaler", ""), settings.get("Postprocess upscaler", ""))
    files = [(UPSCALER, f"upscaler {name}") for name in upscalers if not re.match(r"$|Latent|Lanczos|None", name)]
    files += [(MASK, "the mask")] if any(name in settings for name in _OF_MASKS) else []
    files += [(CONTROL_NET, f"{name} ({settings[name][:60]})") for name in settings if name.startswith("ControlNet")]
    if (vae := settings.get("VAE", "None")) not in ("None", "Automatic", "Default (model)"):
        files.append((VAE, f"VAE {file_stem(vae)}"))
    embeddings = re.findall(r"([^,:]+):", settings.get("TI hashes", ""))
    embeddings += [name for name, _ in _resources(settings, "embed", "textualinversion")]
    files += [(EMBEDDING, f"embedding {name.strip()}") for name in dict.fromkeys(embeddings)]
    return tuple(files)


def _size(text: str) -> tuple[int, int]:
    """Width and height of `512x768`; zeros for anything else."""
    match = re.fullmatch(r"\s*(\d{1,6}) *[x×] *(\d{1,6})\s*", text)
    return (int(match[1]), int(match[2])) if match else (0, 0)


def _hires(settings: Mapping[str, str], width: int, height: int) -> dict[str, Any]:
    """The fields of Highres. fix's final size and steps; none without it. `Size` is that of its first stage."""
    factor = number(settings.get("Hires upscale", "")) or 0
    wide, high = _size(settings.get("Hires resize", ""))
    if 0 in (width, height):
        return {}
    if not wide and not high and 0 < factor <= _MOST_ENLARGED:
        wide, high = int(width * factor), int(height * factor)
    elif wide or high:  # one side follows from the other
        wide, high = wide or width * high // height, high or height * wide // width
    if 0 in (wide, high) or (wide, high) == (width, height):
        return {}
    later = settings.get("Hires steps", "")
    return {
        "width": str(wide),
        "height": str(high),
        "first_stage": (width, height),
        "steps": later if (number(later) or 0) > 0 else settings.get("Steps", ""),
    }


_MOST_ENLARGED = 16


def _run(settings: Mapping[str, str]) -> dict[str, str]:
    """What the command line takes of Highres. fix."""
    of_latents = settings.get("Hires upscaler", "").startswith("Latent")
    latents = {"highres_fix_latents_upscaling": ""} if of_latents else {}
    return {"highres_fix_steps": settings.get("Steps", "")} | latents


def _networks(settings: Mapping[str, str], prompt: str) -> tuple[ToldNetwork, ...]:
    """Networks that Fooocus and Civitai list beside the prompt, as far as no tag names them."""
    listed = _LORA_WEIGHT.findall(settings.get("Lora weights", ""))
    listed += [(name, weight or "1") for name, weight in _resources(settings, "lora", "lycoris", "dora", "locon")]
    return tuple(
        ToldNetwork(file_stem(name), strength_of(weight))
        for name, weight in listed
        if f":{name.strip()}:" not in prompt
    )
