"""How a picture was made, as its metadata tells it, in one form for all programs."""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from library.files.picture_programs import is_json

PLAIN, WEB_UI = "sd-scripts", "webui"  # how prompts are to be read; the names of `--prompt_syntax`


# The options that give what metadata only names
Givers = tuple[str, ...]
SOURCE: Givers = ("image_path",)
MASK: Givers = ("mask_path", "mask_from_alpha")
GUIDE: Givers = ("guide_image_path",)
CONTROL_NET: Givers = ("control_net_models", "control_net_lllite_models")
UPSCALER: Givers = ("highres_fix_upscaler",)
VAE: Givers = ("vae",)
EMBEDDING: Givers = ("textual_inversion_embeddings", "XTI_embeddings")


class Unreadable(ValueError):
    """Metadata that nothing can be made of: what is wrong with it, for people."""


@dataclass(frozen=True)
class ToldNetwork:
    """A network by its name, without folders and ending, and its strength as `--network_mul` writes it."""

    name: str
    strength: str = "1"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a picture was made. Values are texts, checked by nobody yet; empty where they are not told.

    Args:
        program: that wrote it.
        prompt: in the syntax that is named beside it.
        negative_prompt: likewise.
        syntax: `PLAIN` or `WEB_UI`.
        seed: a whole number.
        width: of the picture as it was drawn, in pixels.
        height: likewise.
        steps: of the sampler; with Highres. fix, of its second stage.
        sampler: by the program's name for it; it may hold the schedule, too.
        schedule: by the program's name for it.
        scale: of guidance.
        strength: of img2img, or of Highres. fix's second stage.
        model: its name.
        zero_snr_of_model: the model's files say that it begins at pure noise, so that no option has to.
        control_nets: the names of the ControlNets that `run` says something of.
        networks: those that no tag in the prompt names.
        first_stage: width and height in pixels of Highres. fix's first stage.
        line: more options of a prompt line, by their names.
        run: options of the command line that it takes beside; "" for one that is on.
        files: what was drawn with and is not in the metadata: the options that give such files, and what it is.
        untold: what cannot be taken over, for people.
    """

    program: str
    prompt: str
    negative_prompt: str = ""
    syntax: str = WEB_UI
    seed: str = ""
    width: str = ""
    height: str = ""
    steps: str = ""
    sampler: str = ""
    schedule: str = ""
    scale: str = ""
    strength: str = ""
    model: str = ""
    zero_snr_of_model: bool = False
    control_nets: tuple[str, ...] = ()
    networks: tuple[ToldNetwork, ...] = ()
    first_stage: tuple[int, int] | None = None
    line: Mapping[str, str] = field(default_factory=dict)
    run: Mapping[str, str] = field(default_factory=dict)
    files: tuple[tuple[Givers, str], ...] = ()
    untold: tuple[str, ...] = ()


# ---------------------------------------------------------------------------------------------------------------------
# JSON of other programs, in which anything may stand anywhere


def plain(value: object) -> str:
    """A text or number of JSON as it would be typed; empty for anything else."""
    if isinstance(value, bool) or value is None:
        return ""
    if isinstance(value, float):
        return str(int(value)) if math.isfinite(value) and value == int(value) else repr(value)
    return str(value).strip() if isinstance(value, int | str) else ""


def number(value: object) -> float | None:
    """A finite number, or the text of one; None for anything else."""
    try:
        read = float(plain(value))
    except (ValueError, OverflowError):
        return None
    return read if math.isfinite(read) else None


def as_object(value: object) -> Mapping[str, Any]:
    """A JSON object; an empty one for anything else."""
    return value if isinstance(value, dict) else {}


def as_list(value: object) -> list[Any]:
    """A JSON list; an empty one for anything else."""
    return value if isinstance(value, list) else []


def read_object(text: str, program: str) -> Mapping[str, Any]:
    """The object that a text is.

    Raises:
        Unreadable: when it is none.
    """
    try:
        content = json.loads(text)
    except RecursionError:
        raise Unreadable(f"has metadata of {program} that is nested too deep to be read") from None
    except ValueError:
        raise Unreadable(f"has metadata of {program} that is damaged or cut short") from None
    if not isinstance(content, dict):
        raise Unreadable(f"has metadata of {program} that is no JSON object")
    return content


def json_texts(texts: Mapping[str, str]) -> Iterator[str]:
    """The texts of a picture that are JSON, those of the usual names first; behind a word, too (`prompt:{…}`)."""
    usual = ("parameters", "prompt", "Comment", "ImageDescription", "Description")
    for name in (*usual, *(name for name in texts if name not in usual)):
        text = texts.get(name, "")
        word, colon, _ = text[:40].partition(":")
        if is_json(text):
            yield text
        elif colon and word.strip().isalnum() and is_json(text[len(word) + 1 :]):
            yield text[len(word) + 1 :]


def file_stem(name: object) -> str:
    """A model's or network's name without folders and ending."""
    last = plain(name).replace("\\", "/").rpartition("/")[2]
    for ending in (".safetensors", ".ckpt", ".pt", ".bin", ".pth", ".sft"):
        last = last.removesuffix(ending)
    return last


def strength_of(unet: object, text: object = None) -> str:
    """A network's strength for `--network_mul`: one number, or one for the U-Net and one for the text encoders."""
    first, second = plain(unet) or "1", plain(text)
    return first if not second or second == first else f"{first}/{second}"
