"""Emphasis marks of a prompt: (x) [x] (x:1.3) and BREAK."""

import itertools
import re
from functools import lru_cache

BREAK = None  # in place of a piece's text: fill the current chunk of tokens
ROUND_FACTOR = 1.1
SQUARE_FACTOR = 1 / 1.1
MAX_NESTING = 256  # brackets within brackets; deeper ones are text
MAX_WEIGHT = 1000.0  # far beyond use; keeps products of brackets finite in float32

_MARKS = re.compile(
    r"\\[()\[\]\\]"  # a literal bracket or backslash
    r"|\\"  # any other backslash: dropped, as the web UI does
    r"|:\s*(?P<weight>[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+))\s*\)"
    r"|(?<!\w)BREAK(?!\w)"
    r"|[()\[\]]"
)


def parse_emphasis(text: str) -> list[tuple[str | None, float]]:
    """Split a prompt into (text, weight) pieces; neighbours of equal weight make one piece, `BREAK` one by itself.

    `(x)` is ×1.1, `[x]` ÷1.1, `(x:1.3)` ×1.3; nested marks multiply; an unclosed bracket reaches to the end; a closer
    without its bracket is text. The syntax is that of AUTOMATIC1111's web UI. Weights are bounded by `MAX_WEIGHT`.
    """
    marks, texts = _split_at_marks(text)
    factors, opener_of = _match_brackets(marks)
    pieces = [(texts[0], 1.0)]
    open_brackets: list[int] = []
    weights = [1.0]  # outside all brackets, then inside each open one
    for place, (mark, following) in enumerate(zip(marks, texts[1:])):
        literal = ""
        if place in factors:
            open_brackets.append(place)
            weights.append(_bounded(weights[-1] * factors[place]))
        elif place in opener_of:
            _close_bracket(opener_of[place], open_brackets, weights, factors)
        elif mark[0] == "BREAK":
            pieces.append((BREAK, 1.0))
        else:
            literal = mark[0].removeprefix("\\") if mark[0] != "\\\\" else "\\"
        pieces.append((literal + following, weights[-1]))
    return _merge_pieces(pieces)


@lru_cache(maxsize=1024)
def unclosed_weight(text: str) -> str | None:
    """A bracket that is never closed with the weight that is text for that reason, `(red:1.3`; None without one."""
    marks, _ = _split_at_marks(text)
    factors, opener_of = _match_brackets(marks)
    for place in sorted(factors.keys() - set(opener_of.values())):
        mark = marks[place]
        if mark[0] == "(" and (weight := _LOST_WEIGHT.search(text, mark.end())):
            return text[mark.start() : weight.end()]
    return None


_LOST_WEIGHT = re.compile(r":\s*[0-9]*\.?[0-9]+(?![\w.:]|\s*\))")


def _split_at_marks(text: str) -> tuple[list[re.Match], list[str]]:
    """The emphasis marks of a text, and the n + 1 texts around its n marks."""
    marks = list(_MARKS.finditer(text))
    ends = [0, *(mark.end() for mark in marks)]
    starts = [*(mark.start() for mark in marks), len(text)]
    return marks, [text[end:start] for end, start in zip(ends, starts)]


def _match_brackets(marks: list[re.Match]) -> tuple[dict[int, float], dict[int, int]]:
    """The factor of each opening bracket, and the opening bracket of each closing one, by their places in `marks`.

    Round and square brackets pair up independently of each other.
    """
    factors: dict[int, float] = {}
    opener_of: dict[int, int] = {}
    round_open: list[int] = []
    square_open: list[int] = []
    for place, mark in enumerate(marks):
        if mark[0] in "([" and len(round_open) + len(square_open) == MAX_NESTING:
            continue
        if mark[0] == "(":
            round_open.append(place)
            factors[place] = ROUND_FACTOR
        elif mark[0] == "[":
            square_open.append(place)
            factors[place] = SQUARE_FACTOR
        elif mark[0] == "]" and square_open:
            opener_of[place] = square_open.pop()
        elif (mark[0] == ")" or mark["weight"]) and round_open:
            opener_of[place] = round_open.pop()
            if mark["weight"]:
                factors[opener_of[place]] = _bounded(float(mark["weight"]))
    return factors, opener_of


def _close_bracket(opener: int, open_brackets: list[int], weights: list[float], factors: dict[int, float]) -> None:
    """Take `opener` out of the open brackets; those opened after it (of the other kind) stay open."""
    depth = len(open_brackets) - 1 if open_brackets[-1] == opener else open_brackets.index(opener)
    del open_brackets[depth], weights[depth + 1 :]
    for still_open in open_brackets[depth:]:
        weights.append(_bounded(weights[-1] * factors[still_open]))


def _bounded(weight: float) -> float:
    return max(-MAX_WEIGHT, min(MAX_WEIGHT, weight))


def _merge_pieces(pieces: list[tuple[str | None, float]]) -> list[tuple[str | None, float]]:
    """Join neighbours of equal weight, so that a word is tokenized whole, and drop empty texts."""
    merged: list[tuple[str | None, float]] = []
    filled = [piece for piece in pieces if piece[0] is BREAK or piece[0]]
    for (is_break, weight), group in itertools.groupby(filled, key=lambda piece: (piece[0] is BREAK, piece[1])):
        run = list(group)
        merged += run if is_break else [("".join(text or "" for text, _ in run), weight)]
    return merged
