"""Prompts of other programs written in the web UI's syntax, so that they mean the same there."""

import re
from collections.abc import Iterable

_WORDS = re.compile(r"\b(AND|BREAK)\b")  # mean something in the web UI alone; encoders read lower case anyway
_TAG = re.compile(r"<(?=(?:lora|lyco|hypernet):)", re.IGNORECASE)
_NETWORK_TAG = re.compile(r"\s*<(?:lora|lyco|hypernet):([^<>:]*)[^<>]*>", re.IGNORECASE)
_EMBEDDING = re.compile(r"\bembedding:([^\s,:()\[\]]+)", re.IGNORECASE)
_MARKS = re.compile(r"\\(?=[\\\[\]])|[\[\]]")  # a backslash that would escape, and brackets that would weaken
_ALL_MARKS = re.compile(r"\\(?=[\\()\[\]])|[()\[\]]")


def _without_meaning(text: str) -> str:
    """Words and tags that another program does not know, as mere text: the same tokens, spelled otherwise."""
    return _TAG.sub("< ", _WORDS.sub(lambda word: word[0].lower(), text))


def from_comfyui(text: str) -> str:
    """ComfyUI's: round brackets and weights are the web UI's, square ones are mere text."""
    text = _EMBEDDING.sub(lambda named: re.sub(r"\.(?:pt|bin|safetensors)$", "", named[1]), text)
    return _MARKS.sub(lambda mark: f"\\{mark[0]}", _without_meaning(text))


def without_networks(text: str, but: Iterable[str] = ()) -> str:
    """A prompt without the tags of networks, but the first one for each of some names."""
    kept = set(but)

    def keep_or_drop(tag: re.Match[str]) -> str:
        name = tag[1].strip()
        if name not in kept or "hypernet" in tag[0].lower():
            return ""
        kept.remove(name)
        return tag[0]

    return _NETWORK_TAG.sub(keep_or_drop, text).strip()


def network_tags(text: str) -> list[tuple[str, str]]:
    """Names and strengths of the networks that tags of a prompt name: `<lora:ink:0.8>`, `<lora:ink:0.8:0.5>`."""
    tags = re.findall(r"<(?:lora|lyco):([^<>:]+)((?::-?[\d.]+){0,2})>", text, re.IGNORECASE)
    return [(name.strip(), values.strip(":").replace(":", "/") or "1") for name, values in tags]


def _weighted(runs: Iterable[tuple[str, float]]) -> str:
    """Runs of mere text with their weights."""
    pieces: list[tuple[str, float]] = []
    for text, weight in runs:
        if pieces and abs(pieces[-1][1] - weight) < 1e-9:
            pieces[-1] = (pieces[-1][0] + text, weight)
        elif text:
            pieces.append((text, weight))
    return "".join(_piece(_without_meaning(text), weight) for text, weight in pieces)


def _piece(text: str, weight: float) -> str:
    text = _ALL_MARKS.sub(lambda mark: f"\\{mark[0]}", text)
    if abs(weight - 1) < 1e-9 or not text.strip():
        return text
    start, end = len(text) - len(text.lstrip()), len(text.rstrip())
    return f"{text[:start]}({text[start:end]}:{weight:.4g}){text[end:]}"


# ---------------------------------------------------------------------------------------------------------------------
# NovelAI: {…} strengthens by 1.05, […] weakens by it; since its fourth model `1.5::…::` weighs, too

_NOVELAI = re.compile(r"[{}\[\]]|(-?\d*\.?\d+)::|::")
_NOVELAI_STEP = 1.05


def from_novelai(text: str) -> str:
    """NovelAI's prompt; its round brackets are mere text."""
    runs: list[tuple[str, float]] = []
    depth, factor, place = 0, 1.0, 0
    for mark in _NOVELAI.finditer(text):
        runs.append((text[place : mark.start()], factor * _NOVELAI_STEP**depth))
        place = mark.end()
        if mark[1]:
            factor = float(mark[1])
        elif mark[0] == "::":
            factor = 1.0
        else:
            depth += 1 if mark[0] in "{]" else -1
    runs.append((text[place:], factor * _NOVELAI_STEP**depth))
    return _weighted(runs)


# ---------------------------------------------------------------------------------------------------------------------
# InvokeAI (compel): a weight or + and - stand behind a word or a bracket; brackets alone only group

_INVOKE = re.compile(
    r"""\\(?P<escaped>[()"+\-\\])|(?P<open>\()|\)(?P<close>[+]+|-+|\d*\.?\d+|)"""
    r"""|(?P<word>[^\s()\\,+]*[^\s()\\,+\-])(?P<signs>\++|-+)(?=[\s),.]|$)|(?P<other>[^\s()\\,]+|[\s,]+|\\)"""
)
_FUNCTION = re.compile(r"\)\.(?:and|blend|swap)\(|\)\.(?:and|blend)\b", re.IGNORECASE)
_STRONGER, _WEAKER = 1.1, 0.9
_MOST_BRACKETS = 200


def has_functions(text: str) -> bool:
    """Whether a prompt of InvokeAI joins or swaps parts, which has no like here."""
    return _FUNCTION.search(text) is not None


_JOINED = re.compile(
    r"""\s*\((?P<parts>\s*(?P<quote>["']).*?(?P=quote)\s*)\)\.(?P<how>and|blend)\((?P<weights>[^()]*)\)\s*""", re.DOTALL
)


def _joined(text: str) -> str | None:
    """A prompt that is parts alone, blended or one behind the other; None for any other."""
    if (found := _JOINED.fullmatch(text)) is None:
        return None
    quote = found["quote"]
    parts = [from_invokeai(part) for part in re.split(rf"{quote}\s*,\s*{quote}", found["parts"].strip()[1:-1])]
    if found["how"] == "and":
        return " BREAK ".join(parts)
    weights = [float(each) for each in re.findall(r"\d*\.?\d+", found["weights"])]
    if len(weights) != len(parts) or sum(weights) <= 0:
        return None
    return " AND ".join(f"{part} :{weight / sum(weights):.4g}" for part, weight in zip(parts, weights))


def from_invokeai(text: str) -> str:
    """InvokeAI's prompt; what its brackets close on weighs all that is between them."""
    text = re.sub(r"<([\w.-]+)>", r"\1", text)  # an embedding, whose name is a word here
    if (joined := _joined(text)) is not None:
        return joined
    levels: list[list[tuple[str, float]]] = [[]]
    for found in _INVOKE.finditer(text):
        if found["open"]:
            if len(levels) > _MOST_BRACKETS:
                return _weighted([(text, 1.0)])
            levels.append([])
        elif found["close"] is not None:
            inner = levels.pop() if len(levels) > 1 else []
            factor = _factor(found["close"])
            levels[-1] += [(each, weight * factor) for each, weight in inner]
        elif found["word"]:
            levels[-1].append((found["word"], _factor(found["signs"])))
        else:
            levels[-1].append((found["escaped"] or found["other"] or "", 1.0))
    return _weighted(run for level in levels for run in level)


def _factor(written: str) -> float:
    """What stands behind a bracket or word."""
    if written.startswith("+"):
        return _STRONGER ** len(written)
    if written.startswith("-"):
        return _WEAKER ** len(written)
    return float(written) if written else 1.0
