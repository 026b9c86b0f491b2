"""Which program wrote a picture's metadata, and how it says the picture was made: one place for all of them."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from library.files.picture_programs import is_json, program_of
from library.files.picture_texts import read_texts
from library.files.pictures import opened
from library.recipes.comfyui import read_comfyui
from library.recipes.draw_things import read_draw_things
from library.recipes.invokeai import read_invokeai
from library.recipes.others import read_fooocus, read_novelai, read_swarmui
from library.recipes.own import read_own
from library.recipes.recipe import Recipe, Unreadable
from library.recipes.web_ui import read_parameters
from library.texts import readable

_READERS: Mapping[str, Callable[[dict[str, str]], Recipe]] = {
    "ComfyUI": read_comfyui,
    "InvokeAI": read_invokeai,
    "Fooocus": read_fooocus,
    "RuinedFooocus": read_fooocus,
    "SwarmUI": read_swarmui,
    "NovelAI": read_novelai,
    "Draw Things": read_draw_things,
}
PROGRAMS = ("this program", "sd-scripts", "the web UI and Forge", *_READERS)
_LONGEST = 1 << 22  # characters of a text that are read


def read_recipe(path: Path, subject: str) -> tuple[Recipe, tuple[int, int]]:
    """How a picture was made, by its metadata; and its width and height in pixels, as it is stored.

    Raises:
        InputError: for `subject`, when it cannot be read.
        Unreadable: when nothing can be made of its metadata.
    """
    with opened(path, subject) as picture:
        texts, size = read_texts(picture), picture.size
    return recipe_of(texts), size


def recipe_of(texts: dict[str, str]) -> Recipe:
    """How a picture was made, by its texts.

    Raises:
        Unreadable: when nothing can be made of them.
    """
    recipe = _recipe_of(texts)  # in whose JSON halves of characters may be escaped
    prompt, negative = (readable(text).replace("\0", "") for text in (recipe.prompt, recipe.negative_prompt))
    return replace(recipe, prompt=prompt, negative_prompt=negative)


def _recipe_of(texts: dict[str, str]) -> Recipe:
    """How a picture was made, by its texts, by the program that wrote them.

    Raises:
        Unreadable: when nothing can be made of them.
    """
    is_long = any(len(text) > _LONGEST for text in texts.values())
    texts = {name: text for name, text in texts.items() if len(text) <= _LONGEST}
    prompt, parameters = texts.get("prompt", ""), texts.get("parameters", "")
    if not texts and is_long:
        raise Unreadable(f"has metadata of more than {_LONGEST:,} characters")
    if prompt and not is_json(prompt):
        return read_own(texts)
    program = program_of(texts)
    if parameters and not is_json(parameters):
        return read_parameters(parameters, "Fooocus" if program == "Fooocus" else "the web UI")
    if program is not None and program in _READERS:
        try:
            recipe = _READERS[program](texts)
        except RecursionError:
            raise Unreadable(f"has metadata of {program} that is nested too deep to be read") from None
        if not (recipe.prompt or recipe.seed or recipe.steps):
            raise Unreadable(f"has the mark of {program} and no settings")
        return recipe
    if program:
        raise Unreadable(f"has the metadata of {program}, which this program does not read")
    if prompt or parameters:
        raise Unreadable("has JSON of an unknown program in its metadata, no prompt")
    raise Unreadable("has no prompt in its metadata")
