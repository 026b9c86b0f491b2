"""Prompts in the metadata of pictures, for img2img that is given none."""

import re
from pathlib import Path

from library.errors import InputError
from library.files.picture_files import read_texts
from library.files.pictures import opened
from library.plan.prompts import PromptLine, one_line


def read_prompt(path: Path) -> PromptLine:
    """The prompt and negative prompt in a picture's metadata, as this program, sd-scripts or the web UI wrote them.

    Raises:
        InputError: when it holds none.
    """
    subject = f"--image_path {path}"
    with opened(path, subject) as picture:
        texts = read_texts(picture)
    if "prompt" in texts:
        return _prompt_line(texts["prompt"], texts.get("negative-prompt", ""))
    parameters = texts.get("parameters")
    if not parameters:
        raise InputError(subject, "has no prompt in its metadata; give --prompt or --from_file")
    return _prompt_line(*_split_parameters(parameters))


def _prompt_line(prompt: str, negative_prompt: str) -> PromptLine:
    settings = {"negative_prompt": one_line(negative_prompt)} if negative_prompt else {}
    return PromptLine(one_line(prompt), settings)


def _split_parameters(parameters: str) -> tuple[str, str]:
    """Prompt and negative prompt of the web UI's `parameters`; its last line is settings when it looks like them."""
    lines = re.split(r"\r\n|\r|\n", parameters.strip())
    if lines and len(re.findall(r"[\w ]+: *(?:\"(?:\\.|[^\\\"])*\"|[^,]*)(?:,|$)", lines[-1])) >= 3:
        lines.pop()
    mark = "Negative prompt:"
    start = next((number for number, line in enumerate(lines) if line.strip().startswith(mark)), len(lines))
    negative = [line.strip().removeprefix(mark).strip() if not n else line for n, line in enumerate(lines[start:])]
    return " ".join(lines[:start]).strip(), " ".join(negative).strip()
