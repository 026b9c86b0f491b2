"""Programs that write prompts into pictures in ways of their own, told by what they write."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

# The beginning of an object, or of a list of them, in JSON or in Python's writing; no prompt begins so
_JSON = re.compile(r"""[\s\ufeff]*(?:\{\s*["'}]|\[\s*\{)""")
_NAMES = re.compile(r"""["']([\w-]+)["']\s*:""")
_LOOKED_AT = 1 << 16  # characters of a text in which names are looked for


@dataclass(frozen=True)
class Program:
    """A program and what tells it, any of: texts that it alone writes, names that its JSON holds together, its mark.

    A mark stands in the texts that tell of programs (`_TELLING`).
    """

    name: str
    texts: tuple[str, ...] = ()
    json_names: tuple[frozenset[str], ...] = ()
    mark: str = ""


_PROGRAMS = (  # the surest first
    Program("SwarmUI", (), (frozenset({"sui_image_params"}),), "SwarmUI"),
    Program("ComfyUI", ("workflow",), (frozenset({"class_type"}), frozenset({"nodes", "links"})), "ComfyUI"),
    Program(
        "InvokeAI",
        ("invokeai_metadata", "invokeai_graph", "invokeai_workflow", "sd-metadata", "Dream"),
        (frozenset({"generation_mode"}), frozenset({"app_id", "app_version"}), frozenset({"nodes", "edges"})),
        "InvokeAI",
    ),
    Program("RuinedFooocus", (), (frozenset({"base_model_name", "sampler_name"}),), "RuinedFooocus"),
    Program(
        "Fooocus",
        ("fooocus_scheme",),
        (
            *(frozenset({"metadata_scheme"}), frozenset({"base_model_hash"})),
            *(frozenset({"Performance", "Resolution", "Sharpness"}), frozenset({"performance", "guidance_scale"})),
        ),
        "Fooocus",
    ),
    Program(
        "NovelAI", (), (frozenset({"signed_hash"}), frozenset({"request_type"}), frozenset({"v4_prompt"})), "NovelAI"
    ),
    Program("Draw Things", (), (frozenset({"c", "uc"}),), "Draw Things"),
    Program("Easy Diffusion", (), (frozenset({"use_stable_diffusion_model"}),), "Easy Diffusion"),
)
_TELLING = ("Software", "software", "Source", "Title", "Make", "Model", "ImageDescription", "xmp", "XML:com.adobe.xmp")


def is_json(text: str) -> bool:
    """Whether a text is JSON, whole or cut short, and so no prompt."""
    return _JSON.match(text) is not None


def program_of(texts: Mapping[str, str]) -> str | None:
    """The name of the program that wrote a picture's texts, where they tell it; this program's do not."""
    pieces = [text[:_LOOKED_AT] for text in texts.values() if _holds_json(text)]
    names = [set(_NAMES.findall(piece)) for piece in pieces]
    told = " ".join(texts.get(name, "")[:_LOOKED_AT] for name in _TELLING) + " ".join(
        found for piece in pieces for found in re.findall(r'"(?:[Ss]oftware|[Vv]ersion)"\s*:\s*"([^"]*)"', piece)
    )
    for program in _PROGRAMS:
        if any(text in texts for text in program.texts):
            return program.name
        if any(wanted <= found for wanted in program.json_names for found in names):
            return program.name
    return next((program.name for program in _PROGRAMS if program.mark and program.mark in told), None)


def _holds_json(text: str) -> bool:
    """Whether a text is JSON, or JSON behind a word, as ComfyUI writes it into Exif: `workflow:{…}`."""
    return is_json(text) or is_json(re.sub(r"^\s*\w+:", "", text[:_LOOKED_AT]))
