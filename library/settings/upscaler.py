"""What enlarges pictures, in Highres. fix and by `--upscale`: LANCZOS, or a Python module with `create_upscaler`."""

import importlib.util
from argparse import ArgumentTypeError
from dataclasses import dataclass
from pathlib import Path

from library import values
from library.console import others_at_work
from library.errors import InputError
from library.files import checkpoint_layout as layout
from library.files.model_files import name_kind
from library.files.weight_files import open_weights
from library.settings.options import Options

LATENT_UPSCALER = "tools.latent_upscaler"
MODEL_UPSCALER = "tools.esrgan"
INSTALL_SPANDREL = "run `pip install --no-deps -r requirements-upscalers.txt`"
ONLY_LATENTS = f"that module gives latents, not finished pictures; use {MODEL_UPSCALER}, or leave the module out"
MAX_FACTOR = 16
_PACKAGES = ("spandrel", "einops")  # that it needs beside those of the program
# What also fits the names of tensors in models that enlarge pictures
_NOT_TELLING = ("a T2I-Adapter", "a U-Net without text encoders and VAE")

factor = values.number(1, MAX_FACTOR, above=True)


@dataclass(frozen=True)
class UpscalerSpec:
    """A module with `create_upscaler(**arguments)`, which enlarges pictures, to pictures or to latents."""

    module: str
    arguments: tuple[tuple[str, str], ...] = ()

    @property
    def subject(self) -> str:
        """What error messages call it."""
        return f"--highres_fix_upscaler {self.module}"

    @property
    def name(self) -> str:
        """What metadata calls it: its module, or the model that it only runs."""
        weights = dict(self.arguments).get("weights")
        return Path(weights).stem if weights and self.module == MODEL_UPSCALER else self.module


def upscaler_arguments(text: str) -> tuple[tuple[str, str], ...]:
    """Convert `key=value;key=value`; a value may hold `=`."""
    pairs = []
    for part in filter(None, (part.strip() for part in text.split(";"))):
        key, equals, value = part.partition("=")
        if not equals or not key.isidentifier():
            raise ArgumentTypeError(f"{part!r} is not KEY=VALUE; write KEY=VALUE;KEY=VALUE")
        pairs.append((key, value))
    return tuple(pairs)


def check_upscaler(spec: UpscalerSpec) -> None:
    """Refuse an upscaler that is not there, and one whose weights are not, before anything is loaded.

    Raises:
        InputError: naming the module or the file.
    """
    try:
        with others_at_work():
            found = importlib.util.find_spec(spec.module) is not None
    except Exception:  # whatever the packages that it is in raise
        found = False
    if not found:
        problem = f"no such Python module; those that come along are {MODEL_UPSCALER} and {LATENT_UPSCALER}"
        raise InputError(spec.subject, problem)
    weights = dict(spec.arguments).get("weights")
    if weights is not None and not Path(weights).expanduser().is_file():
        raise InputError("--highres_fix_upscaler_args", f"no such file: weights={weights}; check the path")
    if spec.module == MODEL_UPSCALER:
        _check_model(spec, weights)


def _check_model(spec: UpscalerSpec, weights: str | None) -> None:
    """Refuse what spandrel cannot read, as far as that shows before it and torch are imported."""
    for package in _PACKAGES:
        if importlib.util.find_spec(package) is None:
            raise InputError(spec.subject, f"needs the package {package}; {INSTALL_SPANDREL}")
    if weights is None:
        problem = "needs the file of a model that enlarges pictures; give --highres_fix_upscaler_args weights=FILE"
        raise InputError(spec.subject, problem)
    file = open_weights(Path(weights).expanduser())
    is_checkpoint = any(name.startswith(layout.UNET_PREFIX) for name in file.shapes)
    kind = "a Stable Diffusion checkpoint" if is_checkpoint else name_kind(file)
    file.close()
    if kind is not None and kind not in _NOT_TELLING:
        raise InputError(str(file.path), f"is {kind}; give a model that enlarges pictures, such as an ESRGAN")


def from_options(options: Options) -> UpscalerSpec | None:
    """The module that enlarges pictures; None for LANCZOS.

    Raises:
        InputError: when it is not there, and for one of latents where pictures are to be enlarged.
    """
    if not options.highres_fix_upscaler:
        return None
    spec = UpscalerSpec(options.highres_fix_upscaler, options.highres_fix_upscaler_args or ())
    if options.upscale is not None and spec.module == LATENT_UPSCALER:
        raise InputError(f"--upscale and {spec.subject}", ONLY_LATENTS)
    check_upscaler(spec)
    return spec
