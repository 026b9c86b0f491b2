"""What can be made of a guide picture before a ControlNet sees it, without any model, and how users write it."""

import argparse
import re
from dataclasses import dataclass
from difflib import get_close_matches

NONE = "none"  # takes the guide as it is


@dataclass(frozen=True)
class Number:
    """A number that a preprocessing may be given, a whole one."""

    name: str
    usual: int
    low: int
    high: int


@dataclass(frozen=True)
class Preprocessor:
    """One way of preprocessing.

    Args:
        numbers: that it takes, in their order.
        kind: of guide that a ControlNet Union is told where nothing else is said; None where it is not plain.
        by_seed: whether the picture's seed has a say.
        by_mask: whether the picture's mask has one.
    """

    numbers: tuple[Number, ...] = ()
    kind: str | None = None
    by_seed: bool = False
    by_mask: bool = False


PREPROCESSORS = {
    "canny": Preprocessor((Number("low", 63, 0, 99999), Number("high", 191, 0, 99999)), "canny"),
    "scribble": Preprocessor((Number("contrast", 40, 1, 255),), "scribble"),
    "softedge": Preprocessor(kind="softedge"),
    "lineart": Preprocessor((Number("contrast", 20, 1, 255),), "lineart"),
    "mlsd": Preprocessor((Number("length", 16, 1, 99999),), "mlsd"),
    "tile": Preprocessor((Number("factor", 8, 1, 99999),), "tile"),
    "blur": Preprocessor((Number("sigma", 9, 1, 200),), "tile"),
    "gray": Preprocessor(),
    "invert": Preprocessor(),
    "threshold": Preprocessor((Number("level", 127, 0, 254),)),
    "shuffle": Preprocessor((Number("cells", 2, 1, 99),), by_seed=True),
    "inpaint": Preprocessor(by_mask=True),
}


@dataclass(frozen=True)
class Preprocess:
    """A preprocessing that a run asks for: its name and all its numbers."""

    name: str
    numbers: tuple[int, ...] = ()

    @property
    def by(self) -> Preprocessor:
        """What does it."""
        return PREPROCESSORS[self.name]

    def facts(self) -> dict[str, object]:
        """Its name, and its numbers by theirs."""
        return {"name": self.name} | {number.name: value for number, value in zip(self.by.numbers, self.numbers)}

    def __str__(self) -> str:
        return "_".join([self.name, *map(str, self.numbers)])


def preprocessing(text: str) -> Preprocess | None:
    """Convert `none`, or the name of a preprocessing with its numbers behind it, as `canny_63_191`."""
    name, *given = text.split("_")
    if text == NONE:
        return None
    if name not in PREPROCESSORS:
        known = [NONE, *PREPROCESSORS]
        nearest = get_close_matches(name, known, n=1)
        hint = f"did you mean {nearest[0]}? known are" if nearest else "use"
        raise argparse.ArgumentTypeError(f"no such preprocessing; {hint} {', '.join(known[:-1])} or {known[-1]}")
    numbers = PREPROCESSORS[name].numbers
    if len(given) > len(numbers) or not all(re.fullmatch("[0-9]{1,5}", number) for number in given):
        raise argparse.ArgumentTypeError(f"its numbers cannot be used; write {_usage(name)}")
    values = [number.usual for number in numbers]
    values[: len(given)] = map(int, given)
    for number, value in zip(numbers, values):
        if not number.low <= value <= number.high:
            raise argparse.ArgumentTypeError(f"{number.name} is out of range; write {number.low} to {number.high}")
    if name == "canny" and values[0] > values[1]:
        raise argparse.ArgumentTypeError(f"the low threshold is above the high one ({values[1]}); swap them")
    return Preprocess(name, tuple(values))


def written(name: str) -> str:
    """How one is written with its numbers: `canny_LOW_HIGH`."""
    return "_".join([name, *(number.name.upper() for number in PREPROCESSORS[name].numbers)])


def _usage(name: str) -> str:
    numbers = PREPROCESSORS[name].numbers
    usual = Preprocess(name, tuple(number.usual for number in numbers))
    return f"{name} or {written(name)} ({usual})" if numbers else f"{name}, which takes no numbers"
