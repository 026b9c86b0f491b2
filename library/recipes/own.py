"""The texts of this program, and of sd-scripts, whose names it shares: each value under a name of its own.

What sd-scripts does not write stands in this program's `parameters`, by the web UI's names where that has any.
"""

import re
from collections.abc import Mapping

from library.files.control_net import CONTROL_TYPES
from library.files.pictures import SUFFIXES
from library.recipes.recipe import (
    CONTROL_NET,
    EMBEDDING,
    GUIDE,
    MASK,
    PLAIN,
    SOURCE,
    UPSCALER,
    Givers,
    Recipe,
    ToldNetwork,
)
from library.recipes.web_ui import read_settings

# Settings' names → options of prompt lines, and → options of the command line
_IN_LINE = {"Timesteps": "timesteps", "Eta": "eta", "Sigma churn": "s_churn"}
_IN_RUN = {
    "Clip skip": "clip_skip",
    "Guidance start": "guidance_start",
    "Guidance end": "guidance_end",
    "Guidance rescale": "guidance_rescale",
    "Emphasis normalization": "emb_normalize_mode",
    "Prompt syntax": "prompt_syntax",
    "First stage steps": "highres_fix_steps",
    "Postprocess upscale by": "upscale",
    "Region colors": "network_regional_mask_max_color_codes",
    "Mask blur": "mask_blur",
    "Masked content": "fill",
    "Masked area padding": "inpaint_padding",
    "Extend": "extend",
    "CLIP guidance scale": "clip_guidance_scale",
    "CLIP image guidance scale": "clip_image_guidance_scale",
    "VGG16 guidance scale": "vgg16_guidance_scale",
    "VGG16 guidance layer": "vgg16_guidance_layer",
}
_SWITCHES = {
    ("Zero empty negative", "True"): {"zero_empty_negative": ""},
    ("V parameterization", "True"): {"v_parameterization": ""},
    ("Zero terminal SNR", "True"): {"zero_terminal_snr": ""},
    ("ControlNet together", "True"): {"control_net_together": ""},
    ("ControlNet in second stage", "False"): {"highres_fix_disable_control_net": ""},
    ("Keep unmasked", "True"): {"keep_unmasked": ""},
    ("Upscaler", "Latent (bilinear)"): {"highres_fix_latents_upscaling": ""},
    ("Mask mode", "Inpaint not masked"): {"mask_invert": ""},
    ("Mask", "transparency"): {"mask_from_alpha": ""},
    ("Inpaint area", "Only masked"): {"inpaint_area": "mask"},
}
_PARTS = {
    "Gradual Latent": {
        **{"timesteps": "glt", "ratio": "glr", "ratio_step": "gls", "every_n_steps": "gle", "s_noise": "glsn"},
        "unsharp": "glus",
    },
    "Deep Shrink": {
        **{"depth_1": "dsd1", "timesteps_1": "dst1", "depth_2": "dsd2", "timesteps_2": "dst2", "ratio": "dsr"},
    },
}
_SIZES = {
    **{"original-width": "ow", "original-height": "oh", "original-width-negative": "nw"},
    **{"original-height-negative": "nh", "crop-top": "ct", "crop-left": "cl"},
}
# What is told of each ControlNet between its name and its guide's, and a guide's name before the next ControlNet's
_KINDS = "|".join(CONTROL_TYPES)
_CONTROL = re.compile(rf"(?:, ({_KINDS}))?, weight (\S+), steps (\S+) to ([^\s,]+)(?:, ((?!guide )[^,;]+))?, guide ")
_ENDINGS = "|".join(suffix.removeprefix(".") for suffix in SUFFIXES)
_GUIDE = re.compile(rf"^(?:.*?\.(?:{_ENDINGS})|[^;]*); ", re.IGNORECASE)
# The options that say so, with what they have where nothing is said
_OF_CONTROL = {
    **{"control_net_types": "none", "control_net_weights": "1", "control_net_starts": "0", "control_net_ratios": "1"},
    "control_net_preps": "none",
}
_UNSHARP = re.compile(r"Unsharp\(kernel_size=(\d+), sigma=([^,]+), strength=([^,]+), on_sample=(True|False)\)")


def read_own(texts: Mapping[str, str]) -> Recipe:
    """How a picture of this program or of sd-scripts was made."""
    prompt, negative = texts["prompt"], texts.get("negative-prompt") or texts.get("negative_prompt", "")
    settings = read_settings(_settings_line(prompt, negative, texts.get("parameters", "")))
    run = _run(settings)
    width, _, height = settings.get("Size", "").partition("x")
    first = re.fullmatch(r"(\d{1,6})x(\d{1,6})", settings.get("First stage", ""))
    return Recipe(
        program="this program" if settings else "sd-scripts",
        prompt=prompt,
        negative_prompt=negative,
        syntax=run.pop("prompt_syntax", PLAIN),
        seed=texts.get("seed", ""),
        width=width,
        height=height,
        steps=texts.get("steps", ""),
        sampler=texts.get("sampler", ""),
        schedule=settings.get("Schedule type", "") or settings.get("Timestep spacing", ""),
        scale=texts.get("scale", ""),
        strength=settings.get("Denoising strength", ""),
        model=settings.get("Model", ""),
        zero_snr_of_model=settings.get("Zero terminal SNR", "").startswith("True ("),
        control_nets=_control_nets(settings),
        networks=_networks(texts.get("networks", "")),
        first_stage=(int(first[1]), int(first[2])) if first else None,
        line=_line(texts, settings),
        run=run,
        files=_files(settings),
    )


def _settings_line(prompt: str, negative: str, parameters: str) -> str:
    """The settings in `parameters`, behind the texts that are known."""
    for text in (prompt, f"Negative prompt: {negative}" if negative else ""):
        parameters = parameters.removeprefix(text).removeprefix("\n") if text else parameters
    return parameters.rpartition("\n")[2]


def _line(texts: Mapping[str, str], settings: Mapping[str, str]) -> dict[str, str]:
    """Options of a prompt line."""
    said = {"nl": texts.get("negative-scale"), "ig": texts.get("image-guidance"), "c": texts.get("clip-prompt")}
    said |= {option: texts.get(name) for name, option in _SIZES.items()}
    said |= {option: settings.get(name) for name, option in _IN_LINE.items()}
    for name, parts in _PARTS.items():
        for part, option in parts.items():
            if found := re.search(rf"(?:^|, ){part} (.*?)(?=, [a-z]+(?:_\w+)? |$)", settings.get(name, "")):
                said[option] = found[1]
    if sharpened := _UNSHARP.search(settings.get("Gradual Latent", "")):
        size, sigma, strength, on_sample = sharpened.groups()
        said["glus"] = f"{size},{sigma},{strength},{int(on_sample == 'True')}"
    return {option: value for option, value in said.items() if value and value != "None"}


def _run(settings: Mapping[str, str]) -> dict[str, str]:
    """Options of the command line."""
    run = {option: settings[name] for name, option in _IN_RUN.items() if name in settings}
    for (name, value), options in _SWITCHES.items():
        if settings.get(name) == value:
            run |= options
    if tile := re.fullmatch(r"(\d+), overlap (\d+)", settings.get("Tile", "")):
        run |= {"tile": tile[1], "tile_overlap": tile[2]}
    if settings.get("Regions in turn"):
        run["inpaint_regions"] = "each"
    for (option, usual), values in zip(_OF_CONTROL.items(), zip(*(values for _, *values in _controls(settings)))):
        if set(values) - {"", usual}:
            run[option] = " ".join(value.replace(" ", "_") or usual for value in values)
    return run


def _networks(described: str) -> tuple[ToldNetwork, ...]:
    """The networks of `style: 0.8, detail: 0.3/1[IN01=0,IN02=1]@0.2-1`; commas within brackets divide none."""
    found = (part.rpartition(":") for part in re.split(r", (?![^\[]*\])", described) if part)
    return tuple(ToldNetwork(name.strip(), strength.strip()) for name, _, strength in found if name.strip())


def _control_nets(settings: Mapping[str, str]) -> tuple[str, ...]:
    whole = [name for name, *_ in _controls(settings)]
    names = whole or [part.split(",")[0] for part in settings.get("ControlNet", "").split(";")]  # of texts cut short
    return tuple(filter(None, map(str.strip, names)))


def _controls(settings: Mapping[str, str]) -> list[tuple[str, ...]]:
    """Each ControlNet's name, and the values of `_OF_CONTROL`; names may hold commas and semicolons."""
    text, begin = settings.get("ControlNet", ""), 0
    found = []
    for said in _CONTROL.finditer(text):
        name = text[begin : said.start()]  # after the guide of the one before
        found.append((_GUIDE.sub("", name) if found else name, *said.groups("")))
        begin = said.end()
    return found


def _files(settings: Mapping[str, str]) -> tuple[tuple[Givers, str], ...]:
    """What only files can say: which they are is told, not where."""
    files = [(CONTROL_NET, f"ControlNet {name}") for name in _control_nets(settings)]
    named = (("Source image", SOURCE, "picture"), ("Mask", MASK, "mask"), ("Regions", MASK, "map of regions"))
    for name, options, word in (*named, ("Guide image", GUIDE, "guide")):
        if (file := settings.get(name)) and file != "transparency":
            files.append((options, f"{word} {file}"))
    for name, usual in (("Upscaler", ("Lanczos", "Latent (bilinear)")), ("Postprocess upscaler", ("Lanczos",))):
        if (upscaler := settings.get(name, usual[0])) not in usual:
            files.append((UPSCALER, f"upscaler {upscaler}"))
    words = filter(None, settings.get("Embeddings", "").split(", "))
    return (*files, *((EMBEDDING, f"embedding {word}") for word in words))
