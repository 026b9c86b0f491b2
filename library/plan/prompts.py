"""Prompt lines: their options, their dynamic variants and their emphasis marks."""

import itertools
import random
import re
from argparse import ArgumentTypeError
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from library import values
from library.errors import InputError
from library.settings import deep_shrink, gradual_latent, sizes

# ---------------------------------------------------------------------------------------------------------------------
# Options of a prompt line


@dataclass(frozen=True)
class PromptOption:
    """One `--name value` that a prompt line may hold; `sets` is what it overrides (see `job.JobSettings.override`)."""

    name: str
    sets: str
    metavar: str
    convert: Callable[[str], object]
    help: str


def _part(part: str, *options: tuple[str, str, str, Callable[[str], object], str]) -> list[PromptOption]:
    return [
        PromptOption(name, f"{part}.{field}", metavar, convert, help) for name, field, metavar, convert, help in options
    ]


PROMPT_OPTIONS = {
    option.name: option
    for option in (
        PromptOption("n", "negative_prompt", "TEXT", str.strip, "negative prompt"),
        PromptOption("w", "width", "PIXELS", values.size_px, "width, a multiple of 8"),
        PromptOption("h", "height", "PIXELS", values.size_px, "height, a multiple of 8"),
        PromptOption("s", "steps", "N", values.steps, "sampling steps, 1 to 1000"),
        PromptOption("d", "seeds", "SEED[,SEED...]", values.seeds, "a seed for each image; the last one stays"),
        PromptOption("l", "guidance_scale", "SCALE", values.guidance_scale, "guidance scale"),
        PromptOption("t", "strength", "STRENGTH", values.strength, "img2img strength"),
        PromptOption(
            "am", "network_multipliers", "M[,M...]", values.multipliers, "a multiplier for each network; the last stays"
        ),
        PromptOption(
            "nl", "negative_scale", "SCALE", values.number_or_none, "guidance scale of the negative prompt, or none"
        ),
        *_part(
            "gradual_latent",
            ("glt", "timesteps", "TIMESTEP", gradual_latent.timesteps_or_none, "Gradual Latent: timestep, or none"),
            ("glr", "ratio", "RATIO", gradual_latent.ratio, "Gradual Latent: first ratio"),
            ("gls", "ratio_step", "STEP", gradual_latent.ratio, "Gradual Latent: growth of the ratio"),
            ("gle", "every_n_steps", "N", gradual_latent.every_n_steps, "Gradual Latent: steps between growths"),
            ("glsn", "s_noise", "FACTOR", gradual_latent.s_noise, "Gradual Latent: noise of growing steps"),
            ("glus", "unsharp", "K,S,X[,T]", gradual_latent.unsharp, "Gradual Latent: unsharp masking, or none"),
        ),
        *_part(
            "deep_shrink",
            (
                "dsd1",
                "depth_1",
                "DEPTH",
                deep_shrink.depth_or_none,
                "Deep Shrink: first depth, 0 to 3 (XL: 8), or none",
            ),
            ("dst1", "timesteps_1", "TIMESTEP", deep_shrink.timesteps, "Deep Shrink: last timestep at that depth"),
            ("dsd2", "depth_2", "DEPTH", deep_shrink.depth_or_none, "Deep Shrink: second depth, or none"),
            ("dst2", "timesteps_2", "TIMESTEP", deep_shrink.timesteps, "Deep Shrink: last timestep at that depth"),
            ("dsr", "ratio", "RATIO", deep_shrink.ratio, "Deep Shrink: ratio"),
        ),
        *_part(
            "sizes",
            ("ow", "original_width", "PIXELS", sizes.pixels, "XL: width of the original that the model is told"),
            ("oh", "original_height", "PIXELS", sizes.pixels, "XL: its height"),
            ("nw", "original_width_negative", "PIXELS", sizes.pixels, "XL: its width for the negative prompt"),
            ("nh", "original_height_negative", "PIXELS", sizes.pixels, "XL: its height for the negative prompt"),
            ("ct", "crop_top", "PIXELS", sizes.pixels, "XL: where the original was cropped, from its top"),
            ("cl", "crop_left", "PIXELS", sizes.pixels, "XL: where it was cropped, from its left"),
        ),
        PromptOption("c", "clip_prompt", "TEXT", str.strip, "text for CLIP guidance, in place of the prompt"),
    )
}

_OPTION_START = re.compile(r"(?:^|(?<=\s))--")
_LONG_DASH_OPTION = re.compile(rf"(?:^|\s)([—–―]({'|'.join(PROMPT_OPTIONS)}))\s", re.IGNORECASE)


@dataclass(frozen=True)
class PromptLine:
    """A prompt line taken apart: the prompt, what its options set (by `PromptOption.sets`), and doubts about it."""

    prompt: str
    settings: dict[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


def one_line(text: str) -> str:
    """The text with its line breaks as spaces; only CR and LF are line breaks in a prompt file."""
    return re.sub(r"\s*[\r\n]+\s*", " ", text).strip()


def parse_prompt_line(line: str, where: str = "") -> PromptLine:
    """Cut `prompt --x value --y value` into the prompt and its options.

    Raises:
        InputError: for an unknown option, one given twice, and a value that its option refuses, with line and column.
    """
    starts = [match.start() for match in _OPTION_START.finditer(line)]
    ends = [*starts[1:], len(line)]
    settings: dict[str, object] = {}
    for start, end in zip(starts, ends):
        place = f"{where}, column {start + 1}" if where else f"column {start + 1}"
        option, value = _parse_option(line[start:end].strip(), place)
        if option.sets in settings:
            raise InputError(f"--{option.name}", "given twice in one prompt; keep one of them", place)
        settings[option.sets] = value
    prompt = line[: starts[0]] if starts else line
    warnings = tuple(
        f"{where + ': ' if where else ''}{match[1]!r} is taken as text; an option begins with two hyphens: --{match[2]}"
        for match in _LONG_DASH_OPTION.finditer(line)
    )
    return PromptLine(prompt.strip(), settings, warnings)


def _parse_option(text: str, place: str) -> tuple[PromptOption, object]:
    """Convert one `--name value`; the name counts in either case."""
    match = re.fullmatch(r"--(\S*)\s*(.*)", text, re.DOTALL)  # fits whatever begins with two hyphens
    name, raw_value = match.groups() if match else (text, "")
    option = PROMPT_OPTIONS.get(name.lower())
    if option is None:
        nearest = get_close_matches(name.lower(), PROMPT_OPTIONS, n=1, cutoff=0.5)
        hint = (
            f"did you mean --{nearest[0]}?" if nearest else f"known are {', '.join('--' + n for n in PROMPT_OPTIONS)}"
        )
        raise InputError(f"--{name}", f"no such prompt option; {hint}", place)
    if not raw_value.strip() and option.name != "n":
        raise InputError(f"--{option.name}", f"needs a value; write --{option.name} {option.metavar}", place)
    try:
        return option, option.convert(raw_value)
    except ArgumentTypeError as problem:
        raise InputError(f"--{option.name} {raw_value.strip()}", str(problem), place) from None


# ---------------------------------------------------------------------------------------------------------------------
# Dynamic prompts: {[e$$][n|n-m$$][sep$$]a|b|c}

# More pictures than this from one line are taken for a slip of the pen.
MAX_COMBINATIONS = 100_000


@dataclass(frozen=True)
class VariantGroup:
    """One `{…}` of a prompt line: `low` to `high` of `variants`, joined by `separator`; `enumerated` takes them all."""

    variants: tuple[str, ...]
    low: int
    high: int
    separator: str
    enumerated: bool

    def count(self) -> int:
        """Number of combinations of an enumerated group, counted to just beyond `MAX_COMBINATIONS`."""
        total = 0
        for size in range(self.low, self.high + 1):
            combinations = 1
            for chosen in range(min(size, len(self.variants) - size)):
                combinations = combinations * (len(self.variants) - chosen) // (chosen + 1)
                if combinations > MAX_COMBINATIONS:
                    return combinations
            total += combinations
            if total > MAX_COMBINATIONS:
                break
        return total

    def combinations(self) -> Iterator[str]:
        """All combinations, smaller ones first, each in the order the variants are written in."""
        for size in range(self.low, self.high + 1):
            for chosen in itertools.combinations(self.variants, size):
                yield self.separator.join(chosen)

    def choose(self, rng: random.Random) -> str:
        """One random choice in random order."""
        return self.separator.join(rng.sample(self.variants, rng.randint(self.low, self.high)))


@dataclass(frozen=True)
class DynamicPrompt:
    """A raw prompt line as literal texts (even places) and variant groups (odd places)."""

    pieces: tuple[str | VariantGroup, ...]

    @property
    def enumerated(self) -> bool:
        """Whether the line gives one image for each combination, whatever the number of images asked for."""
        return any(isinstance(piece, VariantGroup) and piece.enumerated for piece in self.pieces)

    @property
    def is_dynamic(self) -> bool:
        """Whether anything is left to choose."""
        return any(isinstance(piece, VariantGroup) for piece in self.pieces)

    def count(self) -> int:
        """Number of combinations of the enumerated groups, counted to just beyond `MAX_COMBINATIONS`."""
        total = 1
        for piece in self.pieces:
            if isinstance(piece, VariantGroup) and piece.enumerated:
                total *= piece.count()
                if total > MAX_COMBINATIONS:
                    break
        return total

    def combinations(self) -> Iterator["DynamicPrompt"]:
        """The line with its enumerated groups resolved, the first group slowest."""
        choices = [p.combinations() if isinstance(p, VariantGroup) and p.enumerated else (p,) for p in self.pieces]
        return (DynamicPrompt(chosen) for chosen in itertools.product(*choices))

    def resolve(self, seed: int) -> str:
        """The text of the image with this seed: what is left to chance is drawn from it, first group first."""
        rng = random.Random(seed)
        return "".join(p.choose(rng) if isinstance(p, VariantGroup) else p for p in self.pieces)


def parse_dynamic_prompt(line: str, where: str = "") -> DynamicPrompt:
    """Find the variant groups of a raw prompt line, in one pass.

    Raises:
        InputError: for a brace that is never closed, a group within a group, a count no choice can meet, and more
            than `MAX_COMBINATIONS` combinations.
    """
    pieces: list[str | VariantGroup] = []
    position = 0
    while (opened := line.find("{", position)) >= 0:
        place = f"{where}, column {opened + 1}" if where else f"column {opened + 1}"
        closed = line.find("}", opened)
        if closed < 0:
            raise InputError("{", "is never closed; add the } after the last variant", place)
        content = line[opened + 1 : closed]
        if "{" in content:
            raise InputError("{", "holds another {; write the variants in one group", place)
        pieces += [line[position:opened], _parse_group(content, place)]
        position = closed + 1
    dynamic = DynamicPrompt((*pieces, line[position:]))
    if (count := dynamic.count()) > MAX_COMBINATIONS:
        raise InputError(
            "{e$$...}", f"{count:,} combinations or more, the limit is {MAX_COMBINATIONS:,}; use fewer variants", where
        )
    return dynamic


def _parse_group(content: str, place: str) -> VariantGroup:
    """Read what stands between a pair of braces."""
    prefixes = re.match(r"(?:([eE])\$\$)?(?:([0-9]{1,9})(?:-([0-9]{1,9}))?\$\$)?(?:([^|]*?)\$\$)?", content)
    assert prefixes is not None  # each part of the pattern may be absent
    enumerated, least, most, separator = prefixes.groups()
    variants = tuple(content[prefixes.end() :].split("|"))
    low = int(least) if least else 1
    low, high = sorted((low, int(most) if most else low))
    if high > len(variants):
        raise InputError(
            f"{{{content}}}"[:60],
            f"picks {high} of {len(variants)} variants; ask for at most {len(variants)}",
            place,
        )
    return VariantGroup(variants, low, high, ", " if separator is None else separator, enumerated is not None)


# ---------------------------------------------------------------------------------------------------------------------
# Emphasis: (x) [x] (x:1.3) and BREAK

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
