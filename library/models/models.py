"""Loading a model's components: built without memory, filled tensor by tensor from a file, in the type they run in."""

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection
from transformers.initialization import no_init_weights

from library.errors import InputError
from library.files import checkpoint_layout as layout
from library.files.families import TextEncoderKind
from library.files.model_files import Component, ModelFiles, TextComponent
from library.models.kept_weights import KeptWeights
from library.models.weight_reading import CastWeights, ModelWeights

Model = TypeVar("Model", bound=torch.nn.Module)


@dataclass(frozen=True)
class Source:
    """Where a parameter stands in a file.

    Args:
        name: of the tensor.
        third: which of three parts of the tensor it is, one below the other; None for all of it.
        transposed: it stands with its axes swapped.
    """

    name: str
    third: int | None = None
    transposed: bool = False


Sources = Callable[[str], Iterable[Source]]  # a parameter's name → where it may stand, the first that is there counts


TextModel = CLIPTextModel | CLIPTextModelWithProjection


@dataclass(frozen=True)
class TextEncoder:
    """One of a model's text encoders, loaded."""

    kind: TextEncoderKind
    model: TextModel  # with a projection where the kind gives a pooled vector

    @property
    def transformer(self) -> CLIPTextModel:
        """The model without its projection."""
        return self.model.text_model if isinstance(self.model, CLIPTextModelWithProjection) else self.model


@dataclass(frozen=True)
class Models:
    """The loaded components of a model, on their device, ready for inference."""

    unet: UNet2DConditionModel
    vae: AutoencoderKL
    texts: tuple[TextEncoder, ...]  # in the family's order

    @property
    def parts(self) -> dict[str, torch.nn.Module]:
        """They, by their names in a Diffusers folder."""
        return {"unet": self.unet, "vae": self.vae} | {text.kind.part: text.model for text in self.texts}


def load_texts(files: ModelFiles, weights: ModelWeights) -> tuple[TextEncoder, ...]:
    """Build the text encoders of a model alone, as `load_models` does."""
    return tuple(load_text_encoder(*pair) for pair in zip(files.texts, weights.texts))


def load_models(files: ModelFiles, weights: ModelWeights, texts: Sequence[TextEncoder] | None = None) -> Models:
    """Build the components of a model and fill them with weights that are being read.

    Args:
        files: of the model.
        weights: of it.
        texts: its text encoders; None to load them.

    Raises:
        InputError: when tensors are missing, of a wrong shape, or hold NaN or infinite values.
    """
    with ThreadPoolExecutor(max_workers=2) as pool:  # reading and casting release the GIL
        unet = pool.submit(load_unet, files.unet, weights.unet)
        vae = pool.submit(load_vae, files.vae, weights.vae)
        texts = load_texts(files, weights) if texts is None else texts
        models = Models(unet.result(), vae.result(), tuple(texts))
    for read in (weights.unet, weights.vae, *weights.texts):
        read.close()
    return models


def load_unet(component: Component, weights: CastWeights | KeptWeights) -> UNet2DConditionModel:
    """Build and fill the U-Net."""
    config = {name: value for name, value in component.config.items() if name != layout.BLOCKS_PER_LEVEL}
    unet = build(replace(component, config=config), UNet2DConditionModel.from_config)
    modules = layout.unet_modules(component.config)

    def sources(target: str) -> Iterator[Source]:
        yield Source(target)
        if original := layout.original_name(target, modules):
            yield Source(layout.UNET_PREFIX + original)

    return fill(unet, weights, sources)


def load_vae(component: Component, weights: CastWeights | KeptWeights) -> AutoencoderKL:
    """Build and fill the VAE."""
    vae = build(component, AutoencoderKL.from_config)
    modules = layout.vae_modules(vae.config)

    def sources(target: str) -> Iterator[Source]:
        yield Source(target)
        if original := layout.original_name(target, modules):
            yield Source(original)
            yield Source(layout.VAE_PREFIX + original)
        for part, (_, older) in layout.VAE_ATTENTION.items():
            if f".attentions.0.{part}." in target:
                yield Source(target.replace(part, older))

    return fill(vae, weights, sources)


def load_text_encoder(component: TextComponent, weights: CastWeights | KeptWeights) -> TextEncoder:
    """Build and fill a CLIP text encoder."""
    model_class = CLIPTextModelWithProjection if component.kind.pooled else CLIPTextModel
    text_encoder = build(component, lambda config: model_class(CLIPTextConfig(**config)))
    in_file = component.names

    def sources(target: str) -> Iterator[Source]:
        # Files keep a level that transformers has left out of most module names since version 5.6
        target = target.removeprefix("text_model.")
        prefixes = ("", in_file.prefix) if in_file else ("",)
        if target == layout.TEXT_PROJECTION:
            yield from (Source(prefix + target) for prefix in prefixes)
            yield from (Source(prefix + layout.OPENCLIP_PROJECTION, transposed=True) for prefix in prefixes)
        elif in_file is not None and in_file.openclip:
            name, third = layout.openclip_name(target)
            yield Source(in_file.prefix + name, third)
        else:
            for prefix in prefixes:
                yield Source(f"{prefix}text_model.{target}")
                yield Source(f"{prefix}{target}")

    return TextEncoder(component.kind, fill(text_encoder, weights, sources))


_building = threading.Lock()  # `no_init_weights` changes what all threads have, and puts back what it found


def build(component: Component, make: Callable[[dict[str, Any]], Model]) -> Model:
    """Make an empty model from its configuration, without memory for its weights."""
    try:
        with _building, torch.device("meta"), no_init_weights():
            return make(component.config)
    except Exception as problem:  # whatever diffusers and transformers raise for values they cannot use
        reason = (str(problem).strip().splitlines() or [type(problem).__name__])[0][:160]
        raise InputError(
            str(component.weights.path), f"its configuration makes no model ({reason}); download it again"
        ) from None


def fill(model: Model, weights: CastWeights | KeptWeights, sources: Sources) -> Model:
    """Give every parameter of a model built on `meta` its tensor.

    Args:
        model: the empty model.
        weights: a file's tensors as they are to be.
        sources: where a parameter may stand in the file.

    Raises:
        InputError: when tensors are missing, of a wrong shape, or hold NaN or infinite values.
    """
    if isinstance(weights, KeptWeights):  # they are kept under the model's own names
        sources = _as_named
    missing, in_thirds = [], set[str]()
    for target, parameter in list(model.named_parameters()):
        source = next((source for source in sources(target) if source.name in weights.shapes), None)
        if source is None:
            missing.append(target)
            continue
        value = _read(weights, source, parameter.shape)
        if source.third is None:
            weights.release(source.name)
        else:  # asked for twice more, and all three lie in one memory
            in_thirds.add(source.name)
        owner, _, leaf = target.rpartition(".")
        setattr(model.get_submodule(owner), leaf, torch.nn.Parameter(value, requires_grad=False))
    for name in in_thirds:
        weights.release(name)
    if missing:
        raise InputError(
            str(weights.path),
            f"lacks {len(missing)} tensors of the {type(model).__name__}, {missing[0]!r} first; download it again",
        )
    _fill_buffers(model, weights.device)
    return model.eval()


def _as_named(target: str) -> list[Source]:
    return [Source(target)]


def _read(weights: CastWeights | KeptWeights, source: Source, shape: torch.Size) -> torch.Tensor:
    """Read one tensor, or a third of it, in the shape that the model has for it."""
    found = weights.shapes[source.name]
    if source.third is not None:
        found = (found[0] // 3, *found[1:])
    if source.transposed:
        found = found[::-1]
    # 1×1 convolutions and linear layers stand for each other between versions of the format
    if tuple(d for d in found if d != 1) != tuple(d for d in shape if d != 1):
        problem = f"{source.name!r} has the shape {list(found)}, the model needs {list(shape)}; use a model that fits"
        raise InputError(str(weights.path), problem)
    value = weights.tensor(source.name)
    if source.third is not None:
        return value.chunk(3)[source.third].reshape(shape)
    return value.T.contiguous() if source.transposed else value.reshape(shape)


def _fill_buffers(model: torch.nn.Module, device: torch.device) -> None:
    """Compute the buffers that files do not hold: CLIP's position numbers."""
    for module in model.modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            if buffer.is_meta and name != "position_ids":
                raise NotImplementedError(f"{type(module).__name__}.{name} is a buffer this program does not know")
            if buffer.is_meta:
                positions = torch.arange(buffer.shape[-1], device=device).expand(buffer.shape)
                module.register_buffer(name, positions, persistent=False)
