"""Loading a model's components: built without memory, filled tensor by tensor from a file, in the type they run in."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from library.errors import InputError
from library.files import checkpoint_layout as layout
from library.files.families import TextEncoderKind
from library.files.model_files import Component, ModelFiles, TextComponent
from library.models.weight_reading import CastWeights, ModelWeights

Model = TypeVar("Model", bound=torch.nn.Module)
# For a parameter's name: the names it may have in a file, each with the third of the tensor that it is (None: all)
NamesInFile = Callable[[str], Iterable[tuple[str, int | None]]]


@dataclass(frozen=True)
class TextEncoder:
    """One of a model's text encoders, loaded."""

    kind: TextEncoderKind
    model: CLIPTextModel


@dataclass(frozen=True)
class Models:
    """The loaded components of a model, on their device, ready for inference."""

    unet: UNet2DConditionModel
    vae: AutoencoderKL
    texts: tuple[TextEncoder, ...]  # in the family's order


def load_models(files: ModelFiles, weights: ModelWeights) -> Models:
    """Build the components of a model and fill them with weights that are being read.

    Raises:
        InputError: when tensors are missing, of a wrong shape, or hold NaN or infinite values.
    """
    with ThreadPoolExecutor(max_workers=2 + len(files.texts)) as pool:  # reading and casting release the GIL
        unet = pool.submit(load_unet, files.unet, weights.unet)
        vae = pool.submit(load_vae, files.vae, weights.vae)
        texts = [pool.submit(load_text_encoder, *pair) for pair in zip(files.texts, weights.texts)]
        models = Models(unet.result(), vae.result(), tuple(text.result() for text in texts))
    for read in (weights.unet, weights.vae, *weights.texts):
        read.close()
    return models


def load_unet(component: Component, weights: CastWeights) -> UNet2DConditionModel:
    """Build and fill the U-Net."""
    unet = build(component, UNet2DConditionModel.from_config)
    modules = layout.unet_modules(unet.config)

    def names(target: str) -> Iterator[tuple[str, int | None]]:
        yield target, None
        if original := layout.original_name(target, modules):
            yield layout.UNET_PREFIX + original, None

    return fill(unet, weights, names)


def load_vae(component: Component, weights: CastWeights) -> AutoencoderKL:
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

    return fill(vae, weights, names)


def load_text_encoder(component: TextComponent, weights: CastWeights) -> TextEncoder:
    """Build and fill a CLIP text encoder."""
    text_encoder = build(component, lambda config: CLIPTextModel(CLIPTextConfig(**config)))
    in_file = component.names

    def names(target: str) -> Iterator[tuple[str, int | None]]:
        # Files keep a level that transformers has left out of its module names since version 5.6
        target = target.removeprefix("text_model.")
        if in_file is not None and in_file.openclip:
            name, third = layout.openclip_name(target)
            yield in_file.prefix + name, third
            return
        for prefix in ("", in_file.prefix) if in_file else ("",):
            yield f"{prefix}text_model.{target}", None
            yield f"{prefix}{target}", None

    return TextEncoder(component.kind, fill(text_encoder, weights, names))


def build(component: Component, make: Callable[[dict[str, Any]], Model]) -> Model:
    """Make an empty model from its configuration, without memory for its weights."""
    try:
        with torch.device("meta"):
            return make(component.config)
    except Exception as problem:  # whatever diffusers and transformers raise for values they cannot use
        reason = (str(problem).strip().splitlines() or [type(problem).__name__])[0][:160]
        raise InputError(
            str(component.weights.path), f"its configuration makes no model ({reason}); download it again"
        ) from None


def fill(model: Model, weights: CastWeights, names: NamesInFile) -> Model:
    """Give every parameter of a model built on `meta` its tensor.

    Args:
        model: the empty model.
        weights: a file's tensors as they are to be.
        names: where a parameter stands in the file.

    Raises:
        InputError: when tensors are missing, of a wrong shape, or hold NaN or infinite values.
    """
    missing = []
    for target, parameter in list(model.named_parameters()):
        source = next(((name, third) for name, third in names(target) if name in weights.shapes), None)
        if source is None:
            missing.append(target)
            continue
        value = _read(weights, *source, parameter.shape)
        owner, _, leaf = target.rpartition(".")
        setattr(model.get_submodule(owner), leaf, torch.nn.Parameter(value, requires_grad=False))
    if missing:
        raise InputError(
            str(weights.path),
            f"lacks {len(missing)} tensors of the {type(model).__name__}, {missing[0]!r} first; download it again",
        )
    _fill_buffers(model, weights.device)
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
