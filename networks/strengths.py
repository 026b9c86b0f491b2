"""How strongly a network acts: in the text encoders and in the U-Net, in each of the U-Net's blocks, in which steps.

One grammar for `--network_mul`, `--am` and tags: `U`, `U/T`, then `[BLOCKS]`, then `@START-END`. Blocks are named as
the web UI's extension for block weights names them, after the original's input, middle and output blocks.
"""

import re
from argparse import ArgumentTypeError
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import lru_cache
from typing import NamedTuple

from library.errors import InputError
from library.values import multiplier, share

TEXT_BLOCK = "BASE"  # stands for the text encoders


@dataclass(frozen=True, slots=True)
class Strength:
    """How strongly one network acts in one picture.

    Args:
        unet: factor of its changes to the U-Net.
        te: to the text encoders.
        blocks: factors of the blocks, as they are written between the brackets; empty where all are 1.
        start: the share of the steps run from which it acts in the U-Net. The text encoders' part acts in all steps.
        end: the share up to which it does.
    """

    unet: float = 1.0
    te: float = 1.0
    blocks: str = ""
    start: float = 0.0
    end: float = 1.0

    @classmethod
    def of(cls, number: float) -> "Strength":
        """One number for everything."""
        return cls(number, number)

    @property
    def number(self) -> float | None:
        """The number that says it all; None where it takes more to say."""
        return self.unet if self.te == self.unet and not self.blocks and not self.has_range else None

    @property
    def in_text(self) -> float:
        """The factor of its changes to the text encoders."""
        return self.te * self.in_block(TEXT_BLOCK) if self.blocks else self.te

    @property
    def acts(self) -> bool:
        """Whether it changes anything."""
        return self.unet != 0 or self.in_text != 0

    @property
    def has_range(self) -> bool:
        """Whether there are steps in which its part for the U-Net does not act."""
        return (self.start, self.end) != (0, 1)

    @property
    def without_text(self) -> "Strength":
        """The same for the U-Net alone."""
        return replace(self, te=0.0)

    def in_unet(self, block: str | None) -> float:
        """The factor of its changes to the U-Net's layers in a block; None for layers that are in none."""
        return self.unet if block is None else self.unet * self.in_block(block)

    def in_block(self, block: str) -> float:
        """A block's factor, 1 where none are given."""
        return block_factors(self.blocks).of(block)

    def at(self, step: int, steps: int) -> "Strength":
        """What it comes to in one of the steps run, the first of which is 0."""
        if not self.has_range:
            return self
        acts = self.start <= step / steps < self.end
        return replace(self, unet=self.unet if acts else 0.0, start=0.0, end=1.0)

    def __str__(self) -> str:
        text = _short(self.unet)
        if self.te != self.unet:
            text += f"/{_short(self.te)}"
        if self.blocks:
            text += f"[{self.blocks}]"
        return f"{text}@{_short(self.start)}-{_short(self.end)}" if self.has_range else text


OFF = Strength.of(0.0)


def _short(number: float) -> str:
    """A number in full, without a needless `.0`."""
    return repr(number).removesuffix(".0")


# ---------------------------------------------------------------------------------------------------------------------
# Blocks

_SHORT_17 = (
    *("BASE", "IN01", "IN02", "IN04", "IN05", "IN07", "IN08", "M00"),
    *("OUT03", "OUT04", "OUT05", "OUT06", "OUT07", "OUT08", "OUT09", "OUT10", "OUT11"),
)
_SHORT_12 = (
    *("BASE", "IN04", "IN05", "IN07", "IN08", "M00"),
    *("OUT00", "OUT01", "OUT02", "OUT03", "OUT04", "OUT05"),
)


def block_names(count: int) -> tuple[str, ...]:
    """The names of all blocks, for a U-Net of so many input blocks and as many output blocks."""
    inputs, outputs = ([f"{side}{place:02}" for place in range(count)] for side in ("IN", "OUT"))
    return (TEXT_BLOCK, *inputs, "M00", *outputs)


# What a list's numbers are for, by how many they are; blocks that a short list leaves out get 0
_LISTS = {len(names): names for names in (_SHORT_12, _SHORT_17, block_names(9), block_names(12))}
_FAMILIES = ((17, 26), (12, 20))  # the lengths of lists that go together
_LENGTHS = "17 or 26 for SD 1.x and 2.x, 12 or 20 for XL"
_OUT_DEEP, _OUT_SHALLOW = ("OUT03", "OUT04", "OUT05", "OUT06"), ("OUT07", "OUT08", "OUT09", "OUT10", "OUT11")
_IN_SHALLOW, _IN_DEEP = ("IN01", "IN02", "IN04"), ("IN05", "IN07", "IN08")
# The extension's names for some lists of 17: the blocks that have 1
_PRESETS = {
    "NONE": (),
    "ALL": _SHORT_17,
    "INS": (TEXT_BLOCK, *_IN_SHALLOW),
    "IND": (TEXT_BLOCK, *_IN_DEEP),
    "INALL": (TEXT_BLOCK, *_IN_SHALLOW, *_IN_DEEP),
    "MIDD": (TEXT_BLOCK, *_IN_DEEP, "M00", *_OUT_DEEP),
    "OUTD": (TEXT_BLOCK, *_OUT_DEEP),
    "OUTS": (TEXT_BLOCK, *_OUT_SHALLOW),
    "OUTALL": (TEXT_BLOCK, *_OUT_DEEP, *_OUT_SHALLOW),
}
_BLOCKS_RULE = "name blocks, as in [IN04=0.5,OUT03=0]"


class BlockFactors(NamedTuple):
    """Factors by block, that of the others, and for how many blocks the list is that they come from (0: for any)."""

    factors: Mapping[str, float]
    others: float = 1.0
    listed: int = 0

    def of(self, block: str) -> float:
        """A block's factor."""
        return self.factors.get(block, self.others)


@lru_cache(maxsize=1024)
def block_factors(blocks: str) -> BlockFactors:
    """What stands between brackets.

    Raises:
        ArgumentTypeError: for what is neither names with factors, nor a list of numbers, nor a preset.
    """
    if not blocks:
        return BlockFactors({})
    if blocks in _PRESETS:
        return BlockFactors(dict.fromkeys(_PRESETS[blocks], 1.0), others=0.0, listed=len(_SHORT_17))
    parts = [part.strip() for part in blocks.split(",")]
    if any("=" in part for part in parts):
        return BlockFactors(_named(parts))
    if len(parts) == 1:
        near = get_close_matches(parts[0], _PRESETS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(_PRESETS)}; or {_BLOCKS_RULE}"
        raise ArgumentTypeError(f"there is no preset {parts[0]}; {hint}")
    if len(parts) not in _LISTS:
        raise ArgumentTypeError(f"{len(parts)} factors of blocks; give {_LENGTHS}, or {_BLOCKS_RULE}")
    return BlockFactors(dict(zip(_LISTS[len(parts)], map(multiplier, parts))), others=0.0, listed=len(parts))


def _named(parts: Sequence[str]) -> dict[str, float]:
    factors: dict[str, float] = {}
    known = _LISTS[26]
    for part in parts:
        name, equals, number = (each.strip() for each in part.partition("="))
        if not equals:
            raise ArgumentTypeError(f"{part!r} between names of blocks; {_BLOCKS_RULE}")
        if name not in known:
            near = get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else "they are BASE, IN00 to IN11, M00, OUT00 to OUT11"
            raise ArgumentTypeError(f"there is no block {name}; {hint}")
        if name in factors:
            raise ArgumentTypeError(f"{name} is given twice; keep one")
        factors[name] = multiplier(number)
    return factors


def blocks_problem(blocks: str, has: Collection[str], published: int) -> str | None:
    """Why factors of blocks are not for a model: what is wrong and what to do. None where they are.

    Args:
        blocks: see `Strength`.
        has: the model's blocks, from `block_names`.
        published: how many there are in its family's published models.
    """
    factors = block_factors(blocks)
    if factors.listed:
        lengths = next(pair for pair in _FAMILIES if published in pair)
        if factors.listed in lengths:
            return None
        if blocks in _PRESETS:
            return f"the preset {blocks} is for the blocks of SD 1.x and 2.x; {_BLOCKS_RULE}"
        fitting = " or ".join(map(str, lengths))
        return f"{factors.listed} factors of blocks are for another family's; give {fitting}, or {_BLOCKS_RULE}"
    if unknown := [name for name in factors.factors if name not in has]:
        last = max(name for name in has if name.startswith("IN")).removeprefix("IN")
        return f"this model has no block {unknown[0]}; it has BASE, IN00 to IN{last}, M00, OUT00 to OUT{last}"
    return None


# ---------------------------------------------------------------------------------------------------------------------
# Text to strengths

_GRAMMAR = re.compile(
    r"(?P<unet>[^/\[\]@]*)(?:/(?P<te>[^/\[\]@]*))?(?:\[(?P<blocks>[^\[\]@]*)\])?(?:@(?P<steps>[^/\[\]@]*))?"
)
_RULE = "write U or U/T, then [BLOCKS], then @START-END, as in 0.8/0.4[MIDD]@0.2-0.7"
_SHARE = r"\s*([0-9]*\.?[0-9]+(?:[eE]-?[0-9]+)?)\s*"
_RANGE = re.compile(f"{_SHARE}-{_SHARE}")


def parse_strength(text: str) -> Strength:
    """Convert `U`, `U/T`, `…[BLOCKS]`, `…@START-END`: see the table in docs/networks.md.

    Raises:
        ArgumentTypeError: for anything else.
    """
    match = _GRAMMAR.fullmatch(text.strip())
    if match is None:
        raise ArgumentTypeError(f"not a strength; {_RULE}")
    unet = multiplier(match["unet"])
    te = unet if match["te"] is None else multiplier(match["te"])
    blocks = "" if match["blocks"] is None else _canonical_blocks(match["blocks"])
    start, end = (0.0, 1.0) if match["steps"] is None else _steps(match["steps"])
    return Strength(unet, te, blocks, start, end)


def parse_strengths(text: str) -> tuple[Strength, ...]:
    """Convert `a` or `a,b,c`: a strength for each network; commas within brackets divide none."""
    return tuple(parse_strength(part) for part in re.split(r",(?![^\[]*\])", text))


def _canonical_blocks(text: str) -> str:
    """Blocks in capitals, without spaces, each number in its shortest form."""
    blocks = re.sub(r"\s", "", text).upper()
    if not blocks:
        raise ArgumentTypeError(f"no blocks between the brackets; {_BLOCKS_RULE}")
    factors = block_factors(blocks)
    if blocks in _PRESETS:
        return blocks
    if factors.listed:
        return ",".join(_short(factors.factors[name]) for name in _LISTS[factors.listed])
    return ",".join(f"{name}={_short(factor)}" for name, factor in factors.factors.items())


def _steps(text: str) -> tuple[float, float]:
    """Convert `START-END`, shares of the steps."""
    match = _RANGE.fullmatch(text)
    if match is None:
        raise ArgumentTypeError(f"@{text} is no range of steps; write shares of them, as in @0.2-0.7")
    return _checked_range(*(share(part) for part in match.groups()))


def _checked_range(start: float, end: float) -> tuple[float, float]:
    if start >= end:
        raise ArgumentTypeError(f"the range of steps ends at {end:g}, where it has not begun; give a later end")
    return start, end


# ---------------------------------------------------------------------------------------------------------------------
# Tags

_TAG_NAMES = ("te", "unet", "lbw", "start", "stop")
_DYN = "a rank that is cut when it is used (dyn) is not known here; leave it out, or resize the file"


def parse_tag(name: str, arguments: Sequence[str], kind: str = "lora", where: str = "") -> tuple[str, Strength]:
    """A tag's network and how strongly it acts.

    Args:
        name: what stands after the first colon.
        arguments: what stands between the others: one strength, or two numbers, for the text encoders and the U-Net, as
            in the web UI; then a list or a preset of blocks; `te=`, `unet=`, `lbw=`, `start=`, `stop=`. As there,
            the U-Net takes the text encoders' number where it is given none.
        kind: `lora` or `lyco`, which mean the same.
        where: the tag's place, for messages.

    Raises:
        InputError: naming the tag, for what is not known.
    """
    try:
        if not name.strip():
            raise ArgumentTypeError(f"names no network; write <{kind}:NAME:STRENGTH>")
        return name.strip(), _tag_strength(arguments)
    except ArgumentTypeError as problem:
        raise InputError(f"<{kind}:{':'.join((name, *arguments))}>", str(problem), where) from None


def _tag_strength(arguments: Sequence[str]) -> Strength:
    named, numbers = _sorted_arguments(arguments)
    blocks = [named["lbw"]] if "lbw" in named else []
    if numbers and ("," in re.sub(r"\[.*\]", "", numbers[-1]) or numbers[-1].upper() in _PRESETS):
        blocks.append(numbers.pop())
    if len(numbers) > 2:
        raise ArgumentTypeError(f"{numbers[2]!r} is a third number; {_DYN}")
    if len(numbers) == 2:
        te, unet = map(multiplier, numbers)
        strength, has_both = Strength(unet, te), True
    else:
        strength, has_both = parse_strength(numbers[0] if numbers else "1"), "/" in "".join(numbers)
    if "te" in named:
        te = multiplier(named["te"])
        strength = replace(strength, te=te, unet=strength.unet if has_both else te)
    if "unet" in named:
        strength = replace(strength, unet=multiplier(named["unet"]))
    if len(blocks) + bool(strength.blocks) > 1:
        raise ArgumentTypeError("blocks are given twice; keep one of them")
    if blocks:
        strength = replace(strength, blocks=_canonical_blocks(blocks[0]))
    return _with_range(strength, named)


def _sorted_arguments(arguments: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """A tag's arguments with names, and those without."""
    named: dict[str, str] = {}
    others = []
    for argument in arguments:
        match = re.fullmatch(r"\s*(\w+)\s*=(.*)", argument, re.DOTALL)
        if match is None:
            others.append(argument.strip())
            continue
        name = match[1].lower()
        if name == "dyn":
            raise ArgumentTypeError(_DYN)
        if name not in _TAG_NAMES:
            near = get_close_matches(name, _TAG_NAMES, n=1)
            hint = f"did you mean {near[0]}=?" if near else f"known are {', '.join(_TAG_NAMES)}"
            raise ArgumentTypeError(f"there is no {match[1]}=; {hint}")
        if name in named:
            raise ArgumentTypeError(f"{name}= is given twice; keep one of them")
        named[name] = match[2].strip()
    return named, others


def _with_range(strength: Strength, named: Mapping[str, str]) -> Strength:
    """A strength with the range of steps that `start` and `stop` give, as shares."""
    given = {name: _share_of_steps(name, named[name]) for name in ("start", "stop") if name in named}
    if given and strength.has_range:
        raise ArgumentTypeError("a range of steps is given twice; keep one of them")
    start, end = given.get("start", strength.start), given.get("stop", strength.end)
    _checked_range(start, end)
    return replace(strength, start=start, end=end)


def _share_of_steps(name: str, text: str) -> float:
    if re.fullmatch(r"[0-9]*[1-9][0-9]*", text):
        raise ArgumentTypeError(f"{name}={text} counts steps; write a share of them, as in {name}=0.5")
    return share(text)
