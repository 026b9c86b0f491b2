"""Prompts from the metadata of pictures, for img2img that is given none."""

import re
from collections.abc import Iterator
from pathlib import Path

from library.errors import InputError
from library.files.picture_programs import is_json, program_of
from library.files.picture_texts import read_texts
from library.files.pictures import opened
from library.plan.prompt_lines import PromptLine, one_line


def read_prompt(path: Path) -> PromptLine:
    """The prompt and negative prompt in a picture's metadata, as this program, sd-scripts or the web UI wrote them.

    Raises:
        InputError: when it holds none, or in another program's way.
    """
    subject = f"--image_path {path}"
    with opened(path, subject) as picture:
        texts = read_texts(picture)
    prompt, parameters = texts.get("prompt", ""), texts.get("parameters", "")
    if prompt and not is_json(prompt):
        return _prompt_line(prompt, texts.get("negative-prompt") or texts.get("negative_prompt", ""))
    if parameters and not is_json(parameters):
        return _prompt_line(*split_parameters(parameters))
    advice = "give --prompt or --from_file"
    if program := program_of(texts):
        raise InputError(subject, f"has the metadata of {program}, which this program does not read; {advice}")
    if prompt or parameters:
        raise InputError(subject, f"has JSON of an unknown program in its metadata, no prompt; {advice}")
    raise InputError(subject, f"has no prompt in its metadata; {advice}")


def _prompt_line(prompt: str, negative_prompt: str) -> PromptLine:
    settings = {"negative_prompt": one_line(negative_prompt)} if negative_prompt else {}
    return PromptLine(one_line(prompt), settings)


# ---------------------------------------------------------------------------------------------------------------------
# The web UI's `parameters`: the prompt, `Negative prompt: …`, and settings beginning with `Steps: …`, each on lines of
# its own, or on one where another program has taken the line breaks out; `Template: …` lines may follow.

_NEGATIVE_LINE = re.compile(r"^[^\S\n]*Negative prompt:", re.IGNORECASE | re.MULTILINE)
_NEGATIVE = re.compile(r"(?<!\w)Negative prompt:", re.IGNORECASE)
_STEPS = re.compile(r"(?<!\S)Steps: *\d+ *(?:,|$)", re.MULTILINE)
_LINE = re.compile(r"^.*$", re.MULTILINE)
_TEMPLATE = re.compile(r"\s*(?:Negative )?Template:")
_PAIR = re.compile(r"(?<![\w ])[\w ]+: *(?:\"(?:\\.|[^\\\"])*\"|[^,]*)(?:,|$)")
_FEWEST_PAIRS = 3  # that make a line settings


def split_parameters(parameters: str) -> tuple[str, str]:
    """Prompt and negative prompt of the web UI's `parameters`."""
    text = re.sub(r"\r\n?", "\n", parameters).strip()
    text = text[: _settings_start(text)]
    mark = _NEGATIVE_LINE.search(text) or _NEGATIVE.search(text)
    prompt, negative = (text[: mark.start()], text[mark.end() :]) if mark else (text, "")
    return one_line(prompt), one_line(negative)


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
