"""Importing Diffusers and Transformers without what they import for others, which takes a third of the time.

Diffusers' packages of models each import all of their kind; Transformers' reads thousands of files for their names;
SciPy's statistics are for noise schedules that are not used here; PyTorch's compiler is imported to mark functions that
it should leave alone.
"""

import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from types import ModuleType
from typing import Any

_POSTPONED = (
    *(f"diffusers.models.{kind}" for kind in ("autoencoders", "controlnets", "transformers", "unets")),
    *("diffusers.hooks", "transformers.models", "scipy.stats"),
)
_COMPILER = "torch._dynamo"
_MARKS = ("allow_in_graph", "assume_constant_result", "disable")  # decorators of the compiler's


class _Postponed(ModuleType):
    """A package that runs once something of its own is asked for; its modules are imported without that."""

    def __getattr__(self, name: str) -> object:
        spec = self.__spec__
        special = name.startswith("__") and name != "__all__"  # which `import *` reads
        if special or spec is None or spec.loader is None:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        object.__setattr__(self, "__class__", ModuleType)
        spec.loader.exec_module(self)
        in_place = sys.modules[self.__name__]
        if in_place is not self:  # a package may put another module into its place; some have this one
            vars(self)["__getattr__"] = partial(getattr, in_place)
        return getattr(in_place, name)


def import_light(*, compiles: bool) -> None:
    """Import what models are made of, unless that has been done.

    Args:
        compiles: PyTorch's compiler is used.
    """
    if "diffusers" in sys.modules:  # a custom module has imported it
        _quieten()
    elif compiles:
        _import_models()
    else:
        with _compiler_unmarked():
            _import_models()


def _quieten() -> None:
    import diffusers.utils.logging
    import transformers.utils.logging

    diffusers.utils.logging.set_verbosity_error()
    transformers.utils.logging.set_verbosity_error()


def _import_models() -> None:
    import torch.distributed

    _quieten()
    for name in _POSTPONED:
        if package := _postpone(name):
            above, _, last = name.rpartition(".")
            setattr(sys.modules[above], last, package)  # as an import does: `import diffusers.models.unets` asks for it
    distribution = vars(torch.distributed)
    in_truth = distribution["is_available"]
    distribution["is_available"] = lambda: False  # what shards models over machines is not imported
    try:
        import library.models.models  # noqa: F401
    finally:
        distribution["is_available"] = in_truth


def _postpone(name: str) -> ModuleType | None:
    """Have a package run later; None where there is none of that name, or it has run."""
    spec = None
    with suppress(ModuleNotFoundError):  # what it is a part of is not installed
        spec = None if name in sys.modules else importlib.util.find_spec(name)
    if spec is None:
        return None
    package: Any = importlib.util.module_from_spec(spec)
    package.__class__ = _Postponed
    sys.modules[name] = package
    return package


@contextmanager
def _compiler_unmarked() -> Iterator[None]:
    """A block in which nothing is marked for the compiler, which is not used."""
    import torch  # noqa: F401  # of which it is a part

    compiler = _postpone(_COMPILER)
    if compiler is not None:
        vars(compiler).update(dict.fromkeys(_MARKS, _unmarked))
    try:
        yield
    finally:
        if isinstance(compiler, _Postponed):  # it has not run meanwhile; who wants it later imports it as ever
            del sys.modules[_COMPILER]


def _unmarked(what: Callable | None = None, *_: object, **__: object) -> Callable:
    return what or (lambda decorated: decorated)
