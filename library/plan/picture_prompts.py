"""Prompts from the metadata of pictures, for img2img that is given none."""

from pathlib import Path

from library.errors import InputError
from library.plan.prompt_lines import PromptLine, one_line
from library.recipes.reading import read_recipe
from library.recipes.recipe import Unreadable


def read_prompt(path: Path) -> PromptLine:
    """The prompt and negative prompt in a picture's metadata, whichever of the known programs wrote it.

    Raises:
        InputError: when it holds none, or in an unknown program's way.
    """
    subject = f"--image_path {path}"
    try:
        recipe, _ = read_recipe(path, subject)
    except Unreadable as problem:
        raise InputError(subject, f"{problem}; give --prompt or --from_file") from None
    if not recipe.prompt and recipe.untold:
        raise InputError(subject, f"has no prompt that can be read ({recipe.untold[-1]}); give --prompt or --from_file")
    settings = {"negative_prompt": one_line(recipe.negative_prompt)} if recipe.negative_prompt else {}
    return PromptLine(one_line(recipe.prompt), settings)
