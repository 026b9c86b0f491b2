"""What steers a run's pictures after guides: which ControlNets or ControlNet-LLLites, how strongly, in which steps."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from library.errors import InputError
from library.files.control_net import CONTROL_TYPES, ControlNetFile, find_control_net
from library.files.families import Family
from library.files.lllite import LLLiteFile, find_lllite
from library.files.model_files import Component
from library.settings.options import Options
from library.settings.preprocessing import Preprocess
from library.texts import readable

_NO_TYPE = "none"  # of a ControlNet that is for one kind of guide


@dataclass(frozen=True, kw_only=True)
class Control:
    """How something steers after its guide.

    Args:
        preprocess: of its guide.
        weight: how strongly.
        start: where it begins and where it ends, in shares of the steps.
        end: see `start`.
        kind: of guide, for those that are told.
    """

    preprocess: Preprocess | None = None
    weight: float = 1.0
    start: float = 0.0
    end: float = 1.0
    kind: str | None = None

    def works_at(self, progress: float) -> bool:
        """Whether it has a part in the step that begins after this share (0 to 1) of the steps."""
        return self.weight != 0 and self.end > 0 and self.start <= progress <= self.end


@dataclass(frozen=True)
class ControlNetSpec:
    """One of a run: its checked file, and how it is used."""

    file: ControlNetFile | LLLiteFile
    control: Control

    @property
    def path(self) -> Path:
        """Its weight file."""
        return self.file.weights.path

    @property
    def name(self) -> str:
        """The file's or folder's name for people and metadata."""
        return readable(self.file.name)

    def describe(self) -> str:
        """What a picture's metadata says of it."""
        control = self.control
        kind = f", {control.kind}" if control.kind else ""
        preprocess = f", {str(control.preprocess).replace('_', ' ')}" if control.preprocess else ""
        steps = f"steps {control.start:g} to {control.end:g}"
        return f"{self.name}{kind}, weight {control.weight:g}, {steps}{preprocess}"


@dataclass(frozen=True)
class ControlNetSettings:
    """All of a run: ControlNets, used in turn, one at each step, or all at every step; or ControlNet-LLLites."""

    specs: tuple[ControlNetSpec, ...] = ()
    together: bool = False  # add their residuals up at every step instead of taking turns
    save_guides: bool = False  # save the prepared guides beside the pictures


def control_type(text: str) -> str:
    """Convert the name of a kind of guide, or `none`."""
    if text not in (*CONTROL_TYPES, _NO_TYPE):
        nearest = get_close_matches(text, CONTROL_TYPES, n=1)
        hint = f"did you mean {nearest[0]}?" if nearest else f"known are {', '.join(CONTROL_TYPES)}"
        raise argparse.ArgumentTypeError(f"no such kind of guide; {hint}")
    return text


def given_files(options: Options) -> list[str]:
    """What steers, one for each guide: a single ControlNet Union stands for as many as it is given kinds of guides."""
    files = options.control_net_models or options.control_net_lllite_models or []
    types = options.control_net_types or ()
    return files * len(types) if len(files) == 1 and len(types) > 1 else files


def from_options(options: Options, family: Family, unet: Component) -> ControlNetSettings:
    """Pair their options up by position, and check the files.

    Raises:
        InputError: for more values than files, and a file that does not fit this model.
    """
    files = given_files(options)
    name = "--control_net_models" if options.control_net_models else "--control_net_lllite_models"
    settings = {
        "--control_net_preps": (options.control_net_preps, None),
        "--control_net_weights": (options.control_net_weights, 1.0),
        "--control_net_starts": (options.control_net_starts, 0.0),
        "--control_net_ratios": (options.control_net_ratios, 1.0),
        "--control_net_types": (options.control_net_types, _NO_TYPE),
    }
    for option, (values, _) in settings.items():
        if len(values or ()) > len(files):
            raise InputError(option, f"{len(values)} values for {len(files)} in {name}; give one for each at most")
    columns = [
        [*(values or ()), *[default] * (len(files) - len(values or ()))] for values, default in settings.values()
    ]
    specs: list[ControlNetSpec] = []
    found: dict[str, ControlNetFile | LLLiteFile] = {}
    for given, preprocess, weight, start, end, kind in zip(files, *columns):
        if start >= end > 0:
            problem = f"{given} would begin at {start:g} and end at {end:g} of the steps; give a start below the end"
            raise InputError("--control_net_starts", problem)
        if given not in found:
            lllite = options.control_net_models is None
            found[given] = find_lllite(given, family, unet) if lllite else find_control_net(given, unet.config)
        _check_preprocess(preprocess, found[given], given)
        kind = _kind(given, found[given], kind, preprocess)
        control = Control(preprocess=preprocess, weight=weight, start=start, end=end, kind=kind)
        specs.append(ControlNetSpec(found[given], control))
    return ControlNetSettings(tuple(specs), options.control_net_together, options.control_net_save_guides)


def _check_preprocess(preprocess: Preprocess | None, file: ControlNetFile | LLLiteFile, given: str) -> None:
    """Refuse guides with masked pixels of -1 for what reads none."""
    if preprocess is None or not preprocess.by.by_mask:
        return
    problem = ""
    if isinstance(file, LLLiteFile):
        problem = "is a ControlNet-LLLite; use ControlNet 1.1's inpaint model"
    elif file.control_types:
        problem = "is a ControlNet Union; give it a guide that is black there, and --control_net_types repaint"
    if problem:
        raise InputError(f"--control_net_preps {preprocess}", f"makes -1 of masked pixels, and {given} {problem}")


def _kind(given: str, file: ControlNetFile | LLLiteFile, said: str, preprocess: Preprocess | None) -> str | None:
    """The kind of guide that a ControlNet Union is told; others are told none."""
    kinds = file.control_types if isinstance(file, ControlNetFile) else 0
    if not kinds:
        if said != _NO_TYPE:
            problem = f"{given} is for one kind of guide; give it none, or a ControlNet Union"
            raise InputError(f"--control_net_types {said}", problem)
        return None
    able = [name for name, number in CONTROL_TYPES.items() if number < kinds]
    if said == _NO_TYPE and preprocess is not None and preprocess.by.kind is not None:
        if preprocess.by.kind not in able:
            problem = f"{given} knows no {preprocess.by.kind}; give --control_net_types, one of {', '.join(able)}"
            raise InputError(f"--control_net_preps {preprocess}", problem)
        return preprocess.by.kind
    if said == _NO_TYPE:
        problem = "is a ControlNet Union, which is told the kind of its guide; give --control_net_types, one of"
        raise InputError(f"--control_net_models {given}", f"{problem} {', '.join(able)}")
    if said not in able:
        raise InputError(f"--control_net_types {said}", f"{given} knows {', '.join(able)}; use one of them")
    return said


def kinds_of(specs: Sequence[ControlNetSpec]) -> list[int]:
    """The numbers of the kinds of guides that a ControlNet Union is told."""
    return [CONTROL_TYPES[spec.control.kind] for spec in specs if spec.control.kind is not None]
