"""Dynamic prompts: what is left to choose in a prompt line, {[e$$][n|n-m$$][sep$$]a|b|c}."""

import itertools
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass

from library.errors import InputError

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
