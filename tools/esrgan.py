"""An upscaler of pictures, for Highres. fix and for `--upscale`: runs the models that spandrel reads.

Those are super-resolution models of RGB pictures: ESRGAN and Real-ESRGAN, SwinIR, DAT, HAT, SPAN, Compact and many
more. spandrel (https://github.com/chaiNNer-org/spandrel) tells them apart by their weights.
"""

from __future__ import annotations

import importlib
import logging
import sys
import warnings
from argparse import ArgumentTypeError
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from library.errors import InputError
from library.files.weight_files import PickleFile, load_pickle, open_weights
from library.machine.devices import try_to_run
from library.settings.upscaler import INSTALL_SPANDREL
from library.values import MAX_SIZE_PX, whole_number

if TYPE_CHECKING:
    from spandrel import ImageModelDescriptor

logger = logging.getLogger(__name__)

# With 64 features in float32, as ESRGAN has them, a tile of 256 pixels takes about 1.5 GB
USUAL_TILE_PX = 256
# Tiles overlap by so much, and their sides and places are multiples of it, so that the windows of transformers (8, 16
# or 32 pixels) lie in each of them as they do in the whole picture
OVERLAP_PX = 32
SMALLEST_TILE_PX = 2 * OVERLAP_PX  # so that of a row of tiles no more than two overlap


def create_upscaler(weights: str, tile: str = str(USUAL_TILE_PX)) -> ModelUpscaler:
    """Make the upscaler.

    Args:
        weights: the model's weight file.
        tile: the longest side of what the model is given at a time, in pixels; larger ones are faster and take more
            memory.

    Raises:
        InputError: when the file is no such model, the size cannot be one, or spandrel is not there.
    """
    tile_px = _tile_px(tile)
    return ModelUpscaler(load_model(Path(weights).expanduser()), tile_px, weights)


def _tile_px(text: str) -> int:
    subject = f"--highres_fix_upscaler_args tile={text}"
    try:
        value = whole_number(SMALLEST_TILE_PX, MAX_SIZE_PX)(text)
    except ArgumentTypeError as problem:
        raise InputError(subject, str(problem)) from None
    if remainder := value % OVERLAP_PX:
        lower = value - remainder
        raise InputError(subject, f"must be a multiple of {OVERLAP_PX}; use {lower} or {lower + OVERLAP_PX}")
    return value


# ---------------------------------------------------------------------------------------------------------------------
# Enlarging


class ModelUpscaler:
    """Enlarges pictures by a model, one after the other, in tiles that overlap.

    Args:
        model: of spandrel; enlarges (1, 3, h, w) from 0 to 1 by its scale.
        tile_px: the longest side of what it is given at a time.
        name: of the model, for messages.
    """

    def __init__(self, model: ImageModelDescriptor, tile_px: int, name: str) -> None:
        self._model, self._tile_px, self._name = model, tile_px, name

    def to(self, device: torch.device, dtype: torch.dtype) -> None:
        """Go to a device; in half precision where the run is, if the device is no CPU and the model stands it.

        Of bfloat16's numbers below 1 there are no more than of a picture's levels, so that float16 is taken before it.
        """
        kind = torch.float32
        if device.type != "cpu" and dtype != torch.float32:
            if self._model.supports_half:
                kind = torch.float16
            elif self._model.supports_bfloat16:
                kind = torch.bfloat16
        self._model.to(device, kind)

    def enlarge(self, pictures: Sequence[Image.Image], width: int, height: int) -> list[Image.Image]:
        """Enlarge RGB pictures by the model, and then to exactly this size by LANCZOS."""
        large = (Image.fromarray(self._enlarge(np.array(picture))) for picture in pictures)
        return [picture.resize((width, height), Image.Resampling.LANCZOS) for picture in large]

    def _enlarge(self, picture: np.ndarray) -> np.ndarray:
        """(H, W, 3) uint8 → (scale × H, scale × W, 3), in tiles as large as the memory takes."""
        pixels = torch.from_numpy(picture).permute(2, 0, 1)[None].float() / 255
        while (large := try_to_run(lambda: self._in_tiles(pixels))) is None:
            if self._tile_px == SMALLEST_TILE_PX:
                raise torch.OutOfMemoryError("the upscaler does not fit into memory")
            half = min(self._tile_px, max(picture.shape)) // 2
            self._tile_px = max(half // OVERLAP_PX * OVERLAP_PX, SMALLEST_TILE_PX)
            logger.warning("out of memory in the upscaler; enlarging in tiles of %d pixels", self._tile_px)
        return large.numpy()

    @torch.inference_mode()
    def _in_tiles(self, pixels: torch.Tensor) -> torch.Tensor:
        """(1, 3, H, W) float32 → (scale × H, scale × W, 3) uint8 on the CPU; tiles pass into each other gradually."""
        scale = self._model.scale
        height, width = pixels.shape[-2:]
        large = torch.zeros(1, 3, scale * height, scale * width)
        for top, bottom in tiles(height, self._tile_px):
            down = _share(top, bottom, height, scale)
            for left, right in tiles(width, self._tile_px):
                part = self._run(pixels[..., top:bottom, left:right])
                part *= down[:, None] * _share(left, right, width, scale)
                large[..., scale * top : scale * bottom, scale * left : scale * right] += part
        return large[0].mul_(255).round_().byte().permute(1, 2, 0)

    def _run(self, pixels: torch.Tensor) -> torch.Tensor:
        """What the model makes of pixels; once more in float32 where half precision does not hold it."""
        large = self._model(pixels.to(self._model.device, self._model.dtype)).float().cpu()
        if large.isfinite().all():
            return large
        if self._model.dtype == torch.float32:
            raise InputError(self._name, "gives NaN or infinite values; give another model")
        logger.warning("the upscaler overflows in %s; going on in float32", self._model.dtype)
        self._model.to(torch.float32)
        return self._run(pixels)


def tiles(length: int, tile_px: int) -> list[tuple[int, int]]:
    """The begin and end of each tile along a side; all but the last are `tile_px` long."""
    step = tile_px - OVERLAP_PX
    steps = -(-max(length - tile_px, 0) // step)
    return [(number * step, min(number * step + tile_px, length)) for number in range(steps + 1)]


def _share(begin: int, end: int, length: int, scale: int) -> torch.Tensor:
    """How much a tile counts along a side, enlarged: ((end − begin) × scale,); those of all tiles add up to 1.

    In the middle half of an overlap one tile passes into the other; the quarters beyond are left to the tile that sees
    what lies around them.
    """
    share = torch.ones((end - begin) * scale)
    overlap = OVERLAP_PX * scale
    rise = ((torch.arange(overlap) + 0.5 - overlap / 4) / (overlap / 2)).clamp(0, 1)
    if begin > 0:
        share[:overlap] = rise
    if end < length:
        share[-overlap:] = 1 - rise
    return share


# ---------------------------------------------------------------------------------------------------------------------
# Models


def load_model(path: Path) -> ImageModelDescriptor:
    """Load a model that enlarges RGB pictures, in float32; no code in its file ever runs.

    Raises:
        InputError: when the file is none of these, or spandrel is not there.
    """
    spandrel = import_spandrel()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # architectures call functions of torch in ways that it calls outdated
            model = spandrel.ModelLoader().load_from_state_dict(_read(path))
    except spandrel.UnsupportedModelError:
        problem = "is no model of a kind that spandrel reads; give one that enlarges pictures, such as an ESRGAN"
        raise InputError(str(path), problem) from None
    except (InputError, MemoryError):
        raise
    except Exception as problem:  # whatever an architecture makes of weights that only look like its own
        reason = (str(problem).strip().splitlines() or [type(problem).__name__])[0][:160]
        raise InputError(str(path), f"spandrel cannot load it ({reason}); get it again, or another model") from None
    channels = {model.input_channels, model.output_channels}
    if model.purpose != "SR" or model.scale < 2 or channels != {3}:
        what = f"scale {model.scale}, {model.input_channels} channels to {model.output_channels}"
        problem = f"is a model of another kind ({model.architecture.name}, {model.purpose}, {what})"
        raise InputError(str(path), f"{problem}; give one that enlarges pictures of 3 channels")
    model.model.eval().requires_grad_(False)
    return model


def _read(path: Path) -> dict[str, Any]:
    """What a weight file holds; a pickle as it is, whose dictionaries in dictionaries spandrel knows its way about."""
    file = open_weights(path)
    if not isinstance(file, PickleFile):
        return {name: file.tensor(name) for name in file.shapes}
    content = load_pickle(path)
    if not isinstance(content, dict):
        raise InputError(str(path), "is a checkpoint without names of weights; give another file of the model")
    return content


# ---------------------------------------------------------------------------------------------------------------------
# spandrel


def import_spandrel() -> ModuleType:
    """Import spandrel, with torchvision or without.

    Raises:
        InputError: when that fails.
    """
    if "spandrel" in sys.modules:
        return sys.modules["spandrel"]
    with _torchvision():
        try:
            return importlib.import_module("spandrel")
        except Exception as problem:  # whatever a package built for another version of torch raises
            reason = (str(problem).strip().splitlines() or [type(problem).__name__])[0][:160]
            raise InputError("spandrel", f"cannot be imported ({reason}); {INSTALL_SPANDREL}") from None


@contextmanager
def _torchvision() -> Iterator[None]:
    """A block with something in torchvision's place where that is not there or does not load.

    spandrel imports three functions of it, for LaMa and RestoreFormer, which enlarge no pictures. PyPI's wheel does not
    load beside a torch for CPUs alone, and once it is installed transformers does not load either. After the block
    nobody finds what stood in.
    """
    try:
        importlib.import_module("torchvision.transforms.functional")
    except Exception:  # whatever a package built for another version of torch raises
        _forget_torchvision()
    else:
        yield
        return
    functional = ModuleType("torchvision.transforms.functional")
    for name in ("InterpolationMode", "rotate", "normalize"):
        setattr(functional, name, None)
    transforms, top = ModuleType("torchvision.transforms"), ModuleType("torchvision")
    for module in (top, transforms, functional):
        sys.modules[module.__name__] = module
    try:
        yield
    finally:
        _forget_torchvision()


def _forget_torchvision() -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
