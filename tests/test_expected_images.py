"""The expected images: every case of `expected/*/cases.json` gives the pictures that lie beside it.

expected/README.md says where they come from and how a case is added.
"""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from conftest import Generate
from expected.reduce import rebuild_pack

from tools.expected_images import ExpectedCase, expected_cases

CASES = [pytest.param(case, id=case.described) for case in expected_cases()]


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
@pytest.mark.parametrize("case", CASES)
def test_expected_images(case: ExpectedCase, rebuilt: Callable[[Path], Path], generate: Generate) -> None:
    _, ckpt, *options = case.command_line(rebuilt(case.pack))
    result = generate(ckpt, *options)
    assert result.status == 0, result.stderr
    for distance in case.distances(result.files):
        found = f"{distance.mean:.3f} levels off, {distance.within_one:.2%} of values within one level"
        assert case.allows(distance), f"{distance.file}: {found}"
