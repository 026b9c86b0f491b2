"""Loading a model's networks: built without memory, filled tensor by tensor from the file, in the type they run in."""

import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from library.errors import InputError
from library.files import checkpoint_layout as layout
from library.files.model_files import SD2_PAD_TOKEN, SHIPPED_TOKENIZER, Component, ModelFiles, check_tokenizer
from library.files.weight_files import WeightFile
from library.models.weight_reading import CastWeights

Model = TypeVar("Model", bound=torch.nn.Module)
# For a parameter's name: the names it may have in a file, each with the third of the tensor that it is (None: all)
NamesInFile = Callable[[str], Iterable[tuple[str, int | None]]]


@dataclass(frozen=True)
class Models:
    """The loaded networks, on their device, ready for inference."""

    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer


def load_models(
    files: ModelFiles, device: torch.device, dtype: torch.dtype, tokenizer_cache_dir: Path | None = None
) -> Models:
    """Load the networks of a model.

    Args:
        files: what `model_files.find_model` found.
        device: where the networks go.
        dtype: the type they run in; each tensor is cast as it is read.
        tokenizer_cache_dir: see `load_tokenizer`.

    Raises:
        InputError: when tensors are missing, of a wrong shape, or hold NaN or infinite values.
    """
    with ThreadPoolExecutor(max_workers=3) as pool:  # reading and casting release the GIL
        unet = pool.submit(load_unet, files.unet, device, dtype)
        vae = pool.submit(load_vae, files.vae, device, dtype)
        text_encoder = pool.submit(load_text_encoder, files.text_encoder, device, dtype)
        tokenizer = load_tokenizer(files, tokenizer_cache_dir)
        models = Models(unet.result(), vae.result(), text_encoder.result(), tokenizer)
    for component in (files.unet, files.vae, files.text_encoder):
        component.weights.close()
    return models


def load_unet(component: Component, device: torch.device, dtype: torch.dtype) -> UNet2DConditionModel:
    """Build and fill the U-Net."""
    unet = build(component, UNet2DConditionModel.from_config)
    modules = layout.unet_modules(unet.config)

    def names(target: str) -> Iterator[tuple[str, int | None]]:
        yield target, None
        if original := layout.original_name(target, modules):
            yield layout.UNET_PREFIX + original, None

    return fill(unet, component.weights, names, device, dtype)


def load_vae(component: Component, device: torch.device, dtype: torch.dtype) -> AutoencoderKL:
    """Build and fill the VAE."""
    vae = build(component, AutoencoderKL.from_config)
    modules = layout.vae_modules(vae.config)

    def names(target: str) -> Iterator[tuple[str, int | None]]:
        yield target, None
        if original := layout.original_name(target, modules):
            yield original, None
            yield layout.VAE_PREFIX + original, None
        for part, (_, older) in layout.VAE_ATTENTION.items():
            if f".attentions.0.{part}." in target:
                yield target.replace(part, older), None

    return fill(vae, component.weights, names, device, dtype)


def empty_text_encoder(component: Component) -> CLIPTextModel:
    """The CLIP text encoder without its weights."""
    return build(component, lambda config: CLIPTextModel(CLIPTextConfig(**config)))


def load_text_encoder(component: Component, device: torch.device, dtype: torch.dtype) -> CLIPTextModel:
    """Build and fill the CLIP text encoder."""
    text_encoder = empty_text_encoder(component)

    def names(target: str) -> Iterator[tuple[str, int | None]]:
        # Files keep a level that transformers has left out of its module names since version 5.6
        target = target.removeprefix("text_model.")
        if component.openclip:
            name, third = layout.openclip_name(target)
            yield layout.SD2_TEXT_PREFIX + name, third
            return
        for prefix in ("", layout.SD1_TEXT_PREFIX):
            yield f"{prefix}text_model.{target}", None
            yield f"{prefix}{target}", None

    return fill(text_encoder, component.weights, names, device, dtype)


def build(component: Component, make: Callable[[dict[str, object]], Model]) -> Model:
    """Make an empty model from its configuration, without memory for its weights."""
    try:
        with torch.device("meta"):
            return make(component.config)
    except Exception as problem:  # whatever diffusers and transformers raise for values they cannot use
        reason = (str(problem).strip().splitlines() or [type(problem).__name__])[0][:160]
        raise InputError(
            str(component.weights.path), f"its configuration makes no model ({reason}); download it again"
        ) from None


def fill(
    model: Model, weights: WeightFile | CastWeights, names: NamesInFile, device: torch.device, dtype: torch.dtype
) -> Model:
    """Give every parameter of a model built on `meta` its tensor.

    Args:
        model: the empty model.
        weights: the file, or its tensors as they are to be.
        names: where a parameter stands in it.
        device: where the model runs.
        dtype: the type it runs in.

    Raises:
        InputError: when tensors are missing, of a wrong shape, or hold NaN or infinite values.
    """
    cast = weights if isinstance(weights, CastWeights) else CastWeights(weights, device, dtype)
    missing = []
    for target, parameter in list(model.named_parameters()):
        source = next(((name, third) for name, third in names(target) if name in cast.shapes), None)
        if source is None:
            missing.append(target)
            continue
        value = _read(cast, *source, parameter.shape)
        owner, _, leaf = target.rpartition(".")
        setattr(model.get_submodule(owner), leaf, torch.nn.Parameter(value, requires_grad=False))
    if missing:
        raise InputError(
            str(cast.path),
            f"lacks {len(missing)} tensors of the {type(model).__name__}, {missing[0]!r} first; download it again",
        )
    _fill_buffers(model, device)
    return model.eval()


def _read(weights: CastWeights, name: str, third: int | None, shape: torch.Size) -> torch.Tensor:
    """Read one tensor, or a third of it, in the shape that the model has for it."""
    whole = weights.shapes[name]
    found = whole if third is None else (whole[0] // 3, *whole[1:])
    # 1×1 convolutions and linear layers stand for each other between versions of the format
    if tuple(d for d in found if d != 1) != tuple(d for d in shape if d != 1):
        problem = f"{name!r} has the shape {list(found)}, the model needs {list(shape)}; use a model that fits"
        raise InputError(str(weights.path), problem)
    value = weights.tensor(name)
    if third is not None:  # asked for twice more
        return value.chunk(3)[third].reshape(shape).clone()
    weights.release(name)
    return value.reshape(shape)


def _fill_buffers(model: torch.nn.Module, device: torch.device) -> None:
    """Compute the buffers that files do not hold: CLIP's position numbers."""
    for module in model.modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            if buffer.is_meta and name != "position_ids":
                raise NotImplementedError(f"{type(module).__name__}.{name} is a buffer this program does not know")
            if buffer.is_meta:
                positions = torch.arange(buffer.shape[-1], device=device).expand(buffer.shape)
                module.register_buffer(name, positions, persistent=False)


def load_tokenizer(files: ModelFiles, cache_dir: Path | None = None) -> CLIPTokenizer:
    """Load the model's tokenizer: a Diffusers folder's own, else the one in `cache_dir`, else the one shipped here.

    Args:
        files: the model.
        cache_dir: a folder of tokenizers by family; the shipped one is written there when it is not there yet, so that
            another vocabulary can be put in its place.
    """
    if files.tokenizer != SHIPPED_TOKENIZER:
        return CLIPTokenizer.from_pretrained(files.tokenizer)
    cached = cache_dir / ("stable-diffusion-2" if files.v2 else "clip-vit-large-patch14") if cache_dir else None
    if cached and cached.is_dir():
        check_tokenizer(cached)
        return CLIPTokenizer.from_pretrained(cached)
    tokenizer = CLIPTokenizer.from_pretrained(SHIPPED_TOKENIZER, **({"pad_token": SD2_PAD_TOKEN} if files.v2 else {}))
    if cached:
        _keep_tokenizer(tokenizer, cached)
    return tokenizer


def _keep_tokenizer(tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Write a tokenizer to a folder that is not there yet, whole or not at all."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
            written = Path(temporary) / folder.name
            tokenizer.save_pretrained(written)
            written.rename(folder)
    except OSError as problem:
        subject = f"--tokenizer_cache_dir {folder.parent}"
        raise InputError(subject, f"cannot be written to ({problem.strerror}); give another folder") from None
