"""What a prompt says in either syntax: its parts with their weights, when its text changes, the networks it names."""

import re
from argparse import ArgumentTypeError
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from library.errors import InputError
from library.plan.prompt_editing import EditedPrompt, parse_editing

SD_SCRIPTS, WEB_UI = "sd-scripts", "webui"
SYNTAXES = (SD_SCRIPTS, WEB_UI)
_KEPT_PROMPTS = 4096

_SEPARATOR = {SD_SCRIPTS: re.compile(" AND "), WEB_UI: re.compile(r"\bAND\b")}
_NUMBER = re.compile(r"[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)")
_TAG = re.compile(r"<(lora|lyco|hypernet):([^<>]+)>", re.IGNORECASE)
# an escaped hash; a line that is all comment; the comment after a text
_COMMENT = re.compile(r"\\#|^[^\S\r\n]*#[^\r\n]*|#.*?(?=\s--\w|[\r\n]|$)", re.MULTILINE)


def prompt_syntax(text: str) -> str:
    """Convert a syntax's name."""
    if text not in SYNTAXES:
        raise ArgumentTypeError(f"no such syntax; give {' or '.join(SYNTAXES)}")
    return text


@dataclass(frozen=True)
class PromptPart:
    """One of the parts of a prompt that AND joins: its text, and how strongly it counts where parts compose."""

    text: EditedPrompt
    weight: float = 1.0


class NetworkTag(NamedTuple):
    """`<lora:name:argument:…>` in a prompt."""

    name: str
    arguments: tuple[str, ...]
    kind: str


@dataclass(frozen=True)
class Prompt:
    """A prompt taken apart; see `read_prompt`."""

    parts: tuple[PromptPart, ...]
    tags: tuple[NetworkTag, ...] = ()


@lru_cache(maxsize=_KEPT_PROMPTS)
def read_prompt(text: str, syntax: str) -> Prompt:
    """Take a prompt apart. In the web UI's syntax its text changes, parts have weights, and tags name networks.

    A weight stands at a part's end, `a cat :0.6 AND a dog`; a prompt of one part has none.
    """
    if syntax == SD_SCRIPTS:
        return Prompt(tuple(PromptPart(EditedPrompt((part.strip(),))) for part in _SEPARATOR[syntax].split(text)))
    tags = tuple(_tag(match) for match in _TAG.finditer(text) if match[1].lower() != "hypernet")
    texts = _SEPARATOR[syntax].split(_TAG.sub("", text))
    weigh: Callable[[str], PromptPart] = _weighted if len(texts) > 1 else lambda part: PromptPart(parse_editing(part))
    return Prompt(tuple(weigh(part.strip()) for part in texts), tags)


def read_negative(text: str, syntax: str) -> EditedPrompt:
    """A negative prompt; its text changes in the web UI's syntax, and it has neither parts nor tags."""
    return parse_editing(text) if syntax == WEB_UI else EditedPrompt((text,))


def _tag(match: re.Match[str]) -> NetworkTag:
    name, *arguments = match[2].split(":")
    return NetworkTag(name.strip(), tuple(argument.strip() for argument in arguments), match[1])


def _weighted(part: str) -> PromptPart:
    text, colon, number = part.rpartition(":")
    if not colon or text.endswith("\\") or not _NUMBER.fullmatch(number.strip()):
        return PromptPart(parse_editing(part))
    return PromptPart(parse_editing(text.rstrip()), float(number))


def without_comments(text: str) -> str:
    """A prompt line without the web UI's comments: from `#` to the line's end, or after a text to the next option.

    `\\#` is the character itself.
    """
    return _COMMENT.sub(lambda comment: "#" if comment[0] == "\\#" else "", text)


def with_hashes_escaped(text: str) -> str:
    """A prompt line of whose hashes none begins a comment."""
    return text.replace("#", "\\#")


def check_tags(prompt: str, negative_prompt: str, where: str) -> None:
    """Refuse tags that nothing can be made of.

    Raises:
        InputError: for a hypernetwork, and for a tag in a negative prompt.
    """
    for match in _TAG.finditer(prompt):
        if match[1].lower() == "hypernet":
            raise InputError(match[0], "hypernetworks are not read; leave it out", where)
    if match := _TAG.search(negative_prompt):
        raise InputError(match[0], "networks are for the whole picture; put it before --n", where)


def web_ui_marks(prompt: str) -> str | None:
    """What in a prompt only the web UI's syntax gives a meaning to, for people; None where nothing is."""
    if tag := _TAG.search(prompt):
        return tag[0]
    if " AND " in prompt and any(part.weight != 1 for part in read_prompt(prompt, WEB_UI).parts):
        return "the weight of a part (AND)"
    if " # " in prompt:
        return "a comment after #"
    if "[" in prompt and ("|" in prompt or ":" in prompt) and parse_editing(prompt).changes:
        return "prompt editing, [a:b:0.5] or [a|b]"
    return None
