"""Machines that Ray draws on: where its cluster is, and how many workers a run has there."""

import importlib.util
import re
from argparse import ArgumentTypeError
from dataclasses import dataclass

from library import values
from library.errors import InputError
from library.settings.options import Options

HERE = "local"  # a cluster of this machine alone, for this run alone
USUAL_CPUS = 2  # processor cores of a worker that has no GPU
_INSTALL = "run `pip install -r requirements-ray.txt`"


@dataclass(frozen=True)
class Fleet:
    """What the user said of it."""

    address: str  # `HERE`, `auto` for the cluster that this machine belongs to, HOST:PORT, or ray://HOST:PORT
    workers: tuple[int, int] | None  # how many at least and at most; None for as many as the cluster has room for
    cpus: int | None  # of each worker
    ships: bool  # input files that a node lacks are sent to it


def address(text: str) -> str:
    """Convert the place of a cluster."""
    place = re.fullmatch(r"(?:ray://)?(?:\[[0-9a-fA-F:]+\]|[\w.-]+):(\d{1,5})", text)
    if text in (HERE, "auto") or (place and 0 < int(place[1]) < 1 << 16):
        return text
    raise ArgumentTypeError(f"no place of a cluster; write {HERE}, auto, HOST:PORT or ray://HOST:PORT")


def worker_count(text: str) -> tuple[int, int]:
    """Convert a number of workers, or `MIN,MAX`."""
    least, *more = (values.whole_number(1)(part) for part in text.split(",", 1))
    most = more[0] if more else least
    if most < least:
        raise ArgumentTypeError("more at least than at most; write MIN,MAX")
    return least, most


def from_options(options: Options) -> Fleet | None:
    """What the options say of it; None for a run that this process draws.

    Raises:
        InputError: when Ray is not installed.
    """
    if options.ray is None:
        return None
    if importlib.util.find_spec("ray") is None:
        raise InputError("--ray", f"needs the package ray; {_INSTALL}")
    return Fleet(options.ray, options.ray_workers, options.ray_cpus, options.ray_ship)
