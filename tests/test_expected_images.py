"""The expected images: every case of `expected/*/cases.json` gives the pictures that lie beside it.

expected/README.md says where they come from and how a case is added.
"""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Generate
from expected.reduce import PACKS, PLACES, rebuild_pack
from PIL import Image

CASES = [
    pytest.param(file.parent, case, id=f"{file.parent.name}-{case['name']}")
    for file in sorted(PACKS.glob("*/cases.json"))
    for case in json.loads(file.read_text(encoding="utf-8"))
]
# Sums taken in another order (other threads, another attention, another CPU) end on the other side of a rounding here
# and there: then a few values in a thousand are one level off, and a picture some thousandths of a level in the mean.
# The limits leave room for that. An error in the arithmetic moves pictures by whole levels. What a case states itself
# goes before these; expected/README.md says which does, and why.
MEAN = 0.2  # largest mean difference, in levels of 255
WITHIN_ONE = 0.99  # smallest share of values that are at most one level off


@pytest.fixture(scope="session")
def rebuilt(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], Path]:
    """Gives the folder with a pack's models and assets in full, which is written at the first call."""
    return cache(lambda pack: rebuild_pack(pack, tmp_path_factory.mktemp(pack.name)))


@pytest.fixture
def cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The program finds nothing but the CPU, on which the images were drawn."""
    for backend in (torch.cuda, torch.xpu, torch.backends.mps):
        monkeypatch.setattr(backend, "is_available", lambda: False)


@pytest.mark.usefixtures("cpu")
@pytest.mark.parametrize(("pack", "case"), CASES)
def test_expected_images(pack: Path, case: dict, rebuilt: Callable[[Path], Path], generate: Generate) -> None:
    full = rebuilt(pack)
    options = case["argv"]
    for mark, folder in PLACES.items():
        options = [option.replace(mark, str(full / folder)) for option in options]
    result = generate(full / "models" / case["model"], *options)
    assert result.status == 0, result.stderr
    expected = sorted((pack / "expected" / case["name"]).glob("*.png"))
    assert len(result.files) == len(expected)
    largest_mean, smallest_share = case.get("mean", MEAN), case.get("within1", WITHIN_ONE)
    for picture, file in zip(result.pictures, expected):
        wanted = np.asarray(Image.open(file)).astype(int)
        assert picture.shape == wanted.shape, file.name
        difference = np.abs(picture - wanted)
        mean, share = difference.mean(), (difference <= 1).mean()
        assert mean <= largest_mean, f"{file.name}: {mean:.3f} levels off, {share:.2%} of values within one level"
        assert share >= smallest_share, f"{file.name}: {share:.2%} of values within one level"
