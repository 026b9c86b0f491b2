"""The expected images of `tests/expected/`: their cases, and how far a picture may be from the one that is expected.

`tests/expected/README.md` says where they come from and how a case is added. The tests compare them on the CPU,
`tools/check_device.py` on a GPU.
"""

import importlib.util
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "tests" / "expected"
# Sums taken in another order (other threads, another attention, another CPU) end on the other side of a rounding here
# and there: then a few values in a thousand are one level off, and a picture some thousandths of a level in the mean.
# The limits leave room for that. An error in the arithmetic moves pictures by whole levels. What a case states itself
# goes before these; expected/README.md says which does, and why.
MEAN = 0.2  # largest mean difference, in levels of 255
WITHIN_ONE = 0.99  # smallest share of values that are at most one level off


@dataclass(frozen=True)
class Distance:
    """How far a picture is from the expected one."""

    file: str
    mean: float  # of the differences, in levels of 255
    within_one: float  # share of the values that are at most one level off


@dataclass(frozen=True)
class ExpectedCase:
    """A command line of a pack, and the pictures that it must give."""

    pack: Path
    name: str
    model: str
    argv: tuple[str, ...]
    mean: float = MEAN  # limits, as above
    within1: float = WITHIN_ONE

    @property
    def described(self) -> str:
        """Its name among those of all packs."""
        return f"{self.pack.name}-{self.name}"

    def command_line(self, full: Path) -> list[str]:
        """The options, with the model of the pack that was rebuilt in a folder."""
        options = ["--ckpt", str(full / "models" / self.model), *self.argv]
        for mark, folder in packs().PLACES.items():
            options = [option.replace(mark, str(full / folder)) for option in options]
        return options

    def distances(self, files: list[Path]) -> list[Distance]:
        """How far pictures, in the order of their names, are from the expected ones.

        Raises:
            ValueError: when they are not as many, or not of these sizes.
        """
        expected = sorted((self.pack / "expected" / self.name).glob("*.png"))
        if len(files) != len(expected):
            raise ValueError(f"{self.described}: {len(files)} pictures, expected are {len(expected)}")
        return [self._distance(*pair) for pair in zip(files, expected)]

    def _distance(self, file: Path, expected: Path) -> Distance:
        picture, wanted = (np.asarray(Image.open(each)).astype(int) for each in (file, expected))
        if picture.shape != wanted.shape:
            raise ValueError(f"{self.described}, {expected.name}: {picture.shape}, expected is {wanted.shape}")
        difference = np.abs(picture - wanted)
        return Distance(expected.name, float(difference.mean()), float((difference <= 1).mean()))

    def allows(self, distance: Distance) -> bool:
        """Whether a picture is as near as it must be."""
        return distance.mean <= self.mean and distance.within_one >= self.within1


def expected_cases() -> Iterator[ExpectedCase]:
    """All cases of all packs."""
    for file in sorted(FOLDER.glob("*/cases.json")):
        for case in json.loads(file.read_text(encoding="utf-8")):
            yield ExpectedCase(pack=file.parent, **(case | {"argv": tuple(case["argv"])}))


@cache
def packs() -> ModuleType:
    """`tests/expected/reduce.py`, which rebuilds packs; tests are no package to import from."""
    spec = importlib.util.spec_from_file_location("expected_packs", FOLDER / "reduce.py")
    assert spec is not None and spec.loader is not None  # it is a file
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
