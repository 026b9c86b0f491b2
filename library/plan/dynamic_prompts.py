"""Dynamic prompts: what is left to choose in a prompt line.

Groups are `{[e$$][n|n-m$$][sep$$]a|b|c}`, each variant with a weight if it begins with `N::`; `__name__` is a wildcard,
which stands for an entry of a list (see `plan.wildcards`).
"""

import itertools
import math
import random
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from library.errors import InputError

_MOST_KNOWN, _MOST_VARIANTS = 10_000, 1_000  # groups that are kept for the next line, and what they may hold
# More pictures than this from one line are taken for a slip of the pen.
MAX_COMBINATIONS = 100_000

# ---------------------------------------------------------------------------------------------------------------------
# What there is to choose from


@dataclass(frozen=True)
class Alternatives:
    """Texts of which some are chosen, with their weights; without weights all are alike."""

    texts: tuple["Text", ...]
    weights: tuple[float, ...] | None = None

    def one(self, rng: random.Random) -> "Text":
        """One of them."""
        if self.weights is None:
            return rng.choice(self.texts)
        return rng.choices(self.texts, cum_weights=self._cumulative)[0]

    def several(self, rng: random.Random, count: int) -> list["Text"]:
        """So many of them, in random order, none twice.

        With weights each is drawn from those that are left, which is done by exponential clocks: the first to ring are
        chosen (Efraimidis and Spirakis 2006, Weighted random sampling with a reservoir).
        """
        if self.weights is None:
            return rng.sample(self.texts, count)
        rings = [-math.log(1 - rng.random()) / weight if weight else math.inf for weight in self.weights]
        first = sorted(range(len(rings)), key=rings.__getitem__)[:count]
        return [self.texts[place] for place in first]

    @cached_property
    def _cumulative(self) -> list[float]:
        return list(itertools.accumulate(self.weights or ()))

    @cached_property
    def possible(self) -> int:
        """How many of them can be chosen."""
        return len(self.texts) if self.weights is None else sum(weight > 0 for weight in self.weights)

    @cached_property
    def reach(self) -> int:
        """The most that one of them comes to; see `reach`."""
        return max(map(reach, self.texts), default=0)

    @cached_property
    def depth(self) -> int:
        """How deep wildcards stand within wildcards in them."""
        return depth(self.texts)


@dataclass(frozen=True)
class Wildcard:
    """One `__name__`, which stands for one of its entries."""

    name: str
    entries: Alternatives

    @property
    def depth(self) -> int:
        """How deep wildcards stand within wildcards in it, which counts, too."""
        return 1 + self.entries.depth

    @property
    def reach(self) -> int:
        """The most that it comes to; see `reach`."""
        return self.entries.reach

    def choose(self, rng: random.Random) -> str:
        """One random entry."""
        return resolved(self.entries.one(rng), rng)


@dataclass(frozen=True)
class VariantGroup:
    """One `{…}` of a prompt line: `low` to `high` of its variants, joined by `separator`; all, where `enumerated`."""

    variants: Alternatives
    low: int
    high: int
    separator: str
    enumerated: bool

    @property
    def depth(self) -> int:
        """How deep wildcards stand within wildcards in it."""
        return self.variants.depth

    @property
    def reach(self) -> int:
        """The most that it comes to; see `reach`."""
        return self.high * (self.variants.reach + len(self.separator))

    def count(self) -> int:
        """Number of combinations of an enumerated group, counted to just beyond `MAX_COMBINATIONS`."""
        total, variants = 0, len(self.variants.texts)
        for size in range(self.low, self.high + 1):
            combinations = 1
            for chosen in range(min(size, variants - size)):
                combinations = combinations * (variants - chosen) // (chosen + 1)
                if combinations > MAX_COMBINATIONS:
                    return combinations
            total += combinations
            if total > MAX_COMBINATIONS:
                break
        return total

    def combinations(self) -> Iterator["Text"]:
        """All combinations, smaller ones first, each in the order the variants are written in."""
        for size in range(self.low, self.high + 1):
            for chosen in itertools.combinations(self.variants.texts, size):
                yield tuple(_joined(chosen, self.separator))

    def choose(self, rng: random.Random) -> str:
        """One random choice in random order; what the chosen variants leave to choose follows, one after the other."""
        chosen = self.variants.several(rng, rng.randint(self.low, self.high))
        return self.separator.join([resolved(text, rng) for text in chosen])


Piece = str | VariantGroup | Wildcard
Text = tuple[Piece, ...]  # one after the other; none for an empty text


def _joined(texts: Sequence[Text], separator: str) -> Iterator[Piece]:
    for place, text in enumerate(texts):
        if place:
            yield separator
        yield from text


def resolved(text: Text, rng: random.Random) -> str:
    """A text with its choices made, from left to right, and what a choice brings before what follows it."""
    return "".join([piece if isinstance(piece, str) else piece.choose(rng) for piece in text])


def reach(text: Text) -> int:
    """The most that a text can come to: its characters, and the choices that are made for it."""
    return sum(len(piece) if isinstance(piece, str) else 1 + piece.reach for piece in text)


def depth(texts: Iterable[Text]) -> int:
    """How deep wildcards stand within wildcards in any of several texts."""
    return max((piece.depth for text in texts for piece in text if not isinstance(piece, str)), default=0)


@dataclass(frozen=True)
class DynamicPrompt:
    """A raw prompt line as literal texts, variant groups and wildcards."""

    pieces: Text

    @property
    def enumerated(self) -> bool:
        """Whether the line gives one image for each combination, whatever the number of images asked for."""
        return any(isinstance(piece, VariantGroup) and piece.enumerated for piece in self.pieces)

    @property
    def is_dynamic(self) -> bool:
        """Whether anything is left to choose."""
        return not all(isinstance(piece, str) for piece in self.pieces)

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
        choices = [
            piece.combinations() if isinstance(piece, VariantGroup) and piece.enumerated else ((piece,),)
            for piece in self.pieces
        ]
        return (DynamicPrompt(tuple(itertools.chain(*chosen))) for chosen in itertools.product(*choices))

    def resolve(self, seed: int) -> str:
        """The text of the image with this seed: what is left to chance is drawn from it, first group first."""
        return resolved(self.pieces, random.Random(seed))


# ---------------------------------------------------------------------------------------------------------------------
# Grammar

Find = Callable[[str, str], Wildcard | None]  # a wildcard's name, and the place it is named at → it; None: it is text
Known = dict[str, VariantGroup]  # groups by what stands in their braces: lines made by one program have the same ones
PlaceOf = Callable[[int], str]  # where a character of a text stands, for messages

WILDCARD = re.compile(r"__((?:[^\W_]|\*)[\w*./-]*?)__")
_MARK = re.compile(rf"\{{|{WILDCARD.pattern}")
_WEIGHT = re.compile(r"\s*([0-9]{1,9}(?:\.[0-9]{0,9})?|\.[0-9]{1,9})\s*::")
_PREFIXES = re.compile(r"(?:([eE])\$\$)?(?:([0-9]{1,9})(?:-([0-9]{1,9}))?\$\$)?(?:([^|]*?)\$\$)?")


def no_wildcards(name: str, where: str) -> None:
    """Find no wildcard: all of them are text."""


def parse_dynamic_prompt(
    line: str,
    where: str = "",
    find: Find = no_wildcards,
    place_of: PlaceOf | None = None,
    known: Known | None = None,
) -> DynamicPrompt:
    """Find the variant groups and wildcards of a raw prompt line, in one pass.

    Args:
        line: the line.
        where: its place.
        find: finds wildcards.
        place_of: the place of a character of it; None for its column.
        known: groups that lines before it had.

    Raises:
        InputError: for a brace that is never closed, a group within a group, a count no choice can meet, and more
            than `MAX_COMBINATIONS` combinations.
    """

    def column_of(start: int) -> str:
        return f"{where}, column {start + 1}" if where else f"column {start + 1}"

    dynamic = DynamicPrompt(parse_choices(line, place_of or column_of, find, known))
    if (count := dynamic.count()) > MAX_COMBINATIONS:
        raise InputError(
            "{e$$...}", f"{count:,} combinations or more, the limit is {MAX_COMBINATIONS:,}; use fewer variants", where
        )
    return dynamic


def parse_choices(
    text: str, place_of: PlaceOf, find: Find, known: Known | None = None, *, may_enumerate: bool = True
) -> Text:
    """Find the variant groups and wildcards of a text.

    Raises:
        InputError: see `parse_dynamic_prompt`; and for a group that enumerates where none may.
    """
    if "{" not in text and "__" not in text:
        return (text,) if text else ()
    pieces: list[Piece] = []
    taken = searched = 0
    while mark := _MARK.search(text, searched):
        opened, ended = mark.span()
        place = place_of(opened)
        piece: Piece | None = None
        if mark[0] == "{":
            piece, ended = _group_at(text, opened, place, find, known)
            if piece.enumerated and not may_enumerate:
                problem = "only a prompt line can enumerate (e$$); write it there, or leave e$$ out"
                raise InputError(text[opened:ended][:60], problem, place)
        else:
            piece = find(mark[1], place)
        if piece is not None:
            if opened > taken:
                pieces.append(text[taken:opened])
            pieces.append(piece)
            taken = ended
        searched = ended if piece is not None else ended - 2  # the end of what is text may begin a name
    return (*pieces, text[taken:]) if taken < len(text) else tuple(pieces)


def _group_at(text: str, opened: int, place: str, find: Find, known: Known | None) -> tuple[VariantGroup, int]:
    """The group whose brace opens at a place of a text, and where it ends."""
    closed = text.find("}", opened)
    if closed < 0:
        raise InputError("{", "is never closed; add the } after the last variant", place)
    content = text[opened + 1 : closed]
    if known is not None and content in known:
        return known[content], closed + 1
    if "{" in content:
        raise InputError("{", "holds another {; write the variants in one group", place)
    group = _parse_group(content, place, find)
    if known is not None and len(known) < _MOST_KNOWN and len(group.variants.texts) < _MOST_VARIANTS:
        known[content] = group
    return group, closed + 1


def _parse_group(content: str, place: str, find: Find) -> VariantGroup:
    """Read what stands between a pair of braces."""
    prefixes = _PREFIXES.match(content)
    assert prefixes is not None  # each part of the pattern may be absent
    enumerated, least, most, separator = prefixes.groups()
    variants = _variants(content[prefixes.end() :].split("|"), place, find, opened_up=enumerated is not None)
    low = int(least) if least else 1
    low, high = sorted((low, int(most) if most else low))
    possible = len(variants.texts) if enumerated else variants.possible
    if high > possible:
        weighed = "" if possible == len(variants.texts) else " whose weight is above 0"
        raise InputError(
            f"{{{content}}}"[:60],
            f"picks {high} of {possible} variants{weighed}; ask for at most {possible}",
            place,
        )
    return VariantGroup(variants, low, high, ", " if separator is None else separator, enumerated is not None)


def _variants(variants: Sequence[str], place: str, find: Find, *, opened_up: bool) -> Alternatives:
    """The variants of a group; a wildcard that is one gives all its entries where `opened_up`, or where it is alone."""
    texts: list[Text] = []
    weights: list[float | None] = []
    for variant in variants:
        weight, text = split_weight(variant)
        parsed = parse_choices(text, lambda start: place, find)
        only = parsed[0] if len(parsed) == 1 else None
        if isinstance(only, Wildcard) and len(variants) == 1:
            return only.entries
        if isinstance(only, Wildcard) and opened_up:
            texts += only.entries.texts
            weights += only.entries.weights or [None] * len(only.entries.texts)
        else:
            texts.append(parsed)
            weights.append(weight)
    return alternatives(texts, weights)


def split_weight(text: str) -> tuple[float | None, str]:
    """The weight of `N::text`, None where it says none, and the text."""
    weight = _WEIGHT.match(text)
    return (float(weight[1]), text[weight.end() :]) if weight else (None, text)


def alternatives(texts: Sequence[Text], weights: Sequence[float | None]) -> Alternatives:
    """Texts with their weights; 1 where others have one and they do not."""
    if all(weight is None for weight in weights):
        return Alternatives(tuple(texts))
    return Alternatives(tuple(texts), tuple(1.0 if weight is None else weight for weight in weights))
