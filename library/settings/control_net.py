"""ControlNets' settings: which, how strongly, in which steps, and how their guides are prepared."""

import argparse
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from library.errors import InputError
from library.files.control_net import find_control_net
from library.files.model_files import Component
from library.settings.options import Options
from library.texts import readable


@dataclass(frozen=True)
class Canny:
    """Preprocessing by Canny's edge detector (1986), with its hysteresis thresholds."""

    low: int = 63
    high: int = 191


@dataclass(frozen=True)
class ControlNetSpec:
    """One ControlNet of a run: its checked file, and how it is used."""

    component: Component
    is_difference: bool  # whether the U-Net's weights are to be added to the file's
    preprocess: Canny | None
    weight: float
    start: float  # shares of the steps: where it begins and where it ends
    end: float

    def describe(self) -> str:
        """What a picture's metadata says of it."""
        name = readable(self.component.weights.path.stem)
        preprocess = f", canny {self.preprocess.low} {self.preprocess.high}" if self.preprocess else ""
        return f"{name}, weight {self.weight:g}, steps {self.start:g} to {self.end:g}{preprocess}"


def preprocessing(text: str) -> Canny | None:
    """Convert `none`, `canny` or `canny_LOW_HIGH`."""
    if text == "none":
        return None
    match = re.fullmatch(r"canny(?:_([0-9]{1,5})(?:_([0-9]{1,5}))?)?", text)
    if match is None:
        raise argparse.ArgumentTypeError("no such preprocessing; use none, canny or canny_LOW_HIGH (canny_63_191)")
    thresholds = Canny(*(int(number) for number in match.groups() if number is not None))
    if thresholds.low > thresholds.high:
        raise argparse.ArgumentTypeError(f"the low threshold is above the high one ({thresholds.high}); swap them")
    return thresholds


@dataclass(frozen=True)
class ControlNetSettings:
    """The ControlNets of a run: used in turn, one at each step, or all at every step."""

    specs: tuple[ControlNetSpec, ...] = ()
    together: bool = False  # add their residuals up at every step instead of taking turns
    save_guides: bool = False  # save the prepared guides beside the pictures


def from_options(options: Options, unet_config: Mapping[str, Any]) -> ControlNetSettings:
    """Pair the ControlNets' options up by position, and check the files.

    Raises:
        InputError: for more values than ControlNets, and a file that is no ControlNet for this model.
    """
    files = options.control_net_models or []
    settings = {
        "--control_net_preps": (options.control_net_preps, None),
        "--control_net_weights": (options.control_net_weights, 1.0),
        "--control_net_starts": (options.control_net_starts, 0.0),
        "--control_net_ratios": (options.control_net_ratios, 1.0),
    }
    for option, (values, _) in settings.items():
        if len(values or ()) > len(files):
            problem = f"{len(values)} values for {len(files)} in --control_net_models; give one for each at most"
            raise InputError(option, problem)
    columns = [
        [*(values or ()), *[default] * (len(files) - len(values or ()))] for values, default in settings.values()
    ]
    specs = []
    for given, preprocess, weight, start, end in zip(files, *columns):
        if start >= end > 0:
            problem = f"{given} would begin at {start:g} and end at {end:g} of the steps; give a start below the end"
            raise InputError("--control_net_starts", problem)
        specs.append(ControlNetSpec(*find_control_net(given, unet_config), preprocess, weight, start, end))
    return ControlNetSettings(tuple(specs), options.control_net_together, options.control_net_save_guides)
