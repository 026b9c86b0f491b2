"""The models that pictures are guided by, CLIP and VGG16: their files, found and checked from their headers."""

import os
from dataclasses import dataclass
from pathlib import Path

from library.errors import InputError
from library.files.hub import fetch_file
from library.files.model_files import Component, folder_component, resolve
from library.files.tokenizers import SHIPPED_TOKENIZER, check_tokenizer
from library.files.weight_files import WeightFile, open_weights
from library.files.weight_types import check_types

USUAL_CLIP = "laion/CLIP-ViT-B-32-laion2B-s34B-b79K"
VGG16_URL = "https://download.pytorch.org/models/vgg16-397923af.pth"
_VGG16_SHA256 = "397923af"  # the first digits; torchvision keeps them in the file's name

# VGG16's convolutions between poolings (Simonyan and Zisserman 2014, https://arxiv.org/abs/1409.1556, column D)
_VGG16_BLOCKS = (2, 2, 3, 3, 3)
VGG16_LAYERS = tuple(
    layer for convolutions in _VGG16_BLOCKS for layer in (*("convolution", "relu") * convolutions, "pooling")
)
VGG16_SHRINK = 4  # VGG16 sees pictures at a quarter of their size

_CLIP_TOKENS = 49408  # in the vocabulary of OpenAI's CLIP, which ships with this program
_CLIP_POSITIONS = 77
_CLIP_MODULES = ("text_model.", "vision_model.", "text_projection.", "visual_projection.")


@dataclass(frozen=True)
class LossGuidanceFiles:
    """The models that guidance needs, found and checked, not yet loaded."""

    clip: Component | None = None
    clip_tokenizer: Path = SHIPPED_TOKENIZER
    vgg16: WeightFile | None = None


def find_clip(given: str) -> tuple[Component, Path]:
    """Find and check the CLIP model that a folder or a Hugging Face id names, and the folder of its tokenizer.

    A model that comes without a tokenizer has OpenAI's vocabulary, as published ones do.

    Raises:
        InputError: when it is not there, or no CLIP model of texts and pictures whose vocabulary is known.
    """
    subject = f"--clip_model {given}"
    path, _ = resolve(given, "--clip_model", ("model", "pytorch_model"))
    if not path.is_dir():
        raise InputError(subject, "is a file; give the folder with the CLIP model's config.json and its weights")
    component = folder_component(path, "model", "pytorch_model")
    shapes, config = component.weights.shapes, component.config
    if config.get("model_type") != "clip" or not isinstance(config.get("vision_config"), dict):
        kind = config.get("model_type") or "of no kind that transformers knows"
        raise InputError(subject, f"is no CLIP model of texts and pictures (its config.json says {kind}); give one")
    words = shapes.get("text_model.embeddings.token_embedding.weight", (0,))[0]
    positions = shapes.get("text_model.embeddings.position_embedding.weight", (0,))[0]
    tokenizer = SHIPPED_TOKENIZER
    if any((path / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        check_tokenizer(path)
        tokenizer = path
    if positions != _CLIP_POSITIONS or (tokenizer == SHIPPED_TOKENIZER and words != _CLIP_TOKENS):
        problem = (
            f"reads texts of {positions} tokens out of {words:,}; "
            f"give a CLIP model with OpenAI's vocabulary ({_CLIP_POSITIONS} out of {_CLIP_TOKENS:,}) or a tokenizer"
        )
        raise InputError(subject, problem)
    check_types(component.weights, lambda name: name.startswith(_CLIP_MODULES))
    return component, tokenizer


def find_vgg16(given: str | None) -> WeightFile:
    """Find and check VGG16's weights: the file that is given, else torchvision's in torch's cache, else its download.

    Raises:
        InputError: when they are not to be had, or not VGG16's in torchvision's layout.
    """
    if given is None:
        path = _torch_cache() / VGG16_URL.rpartition("/")[2]
        fetch_file(VGG16_URL, path, _VGG16_SHA256, "--vgg16_guidance_scale", "--vgg16_model")
    else:
        path = Path(given).expanduser()
        if not path.is_file():
            raise InputError(f"--vgg16_model {given}", "no such file; check the path")
    weights = open_weights(path)
    wrong = _wrong_vgg16_tensor(weights)
    if wrong is not None:
        raise InputError(
            str(path),
            f"is not VGG16 in torchvision's layout ({wrong!r}); give the file vgg16-397923af.pth or one like it",
        )
    check_types(weights, lambda name: name.startswith("features."))
    return weights


def _torch_cache() -> Path:
    """Where torch.hub and torchvision keep published weights."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = os.environ.get("TORCH_HOME") or f"{cache}/torch"
    return Path(home).expanduser() / "hub" / "checkpoints"


def _wrong_vgg16_tensor(weights: WeightFile) -> str | None:
    """The first convolution's tensor that is missing, too much or of a shape that does not fit; None when all do."""
    places = [place for place, layer in enumerate(VGG16_LAYERS) if layer == "convolution"]
    found = {name for name in weights.shapes if name.startswith("features.")}
    wanted = {f"features.{place}.{part}" for place in places for part in ("weight", "bias")}
    if found != wanted:
        return min(found ^ wanted)
    channels = 3
    for place in places:
        weight, bias = (weights.shapes[f"features.{place}.{part}"] for part in ("weight", "bias"))
        if weight[1:] != (channels, 3, 3) or weight[:1] != bias:
            return f"features.{place}.weight"
        channels = weight[0]
    return None
