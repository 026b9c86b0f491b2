"""Finding the files that make up a Stable Diffusion model, and telling from their headers what model it is.

Nothing is loaded here: a wrong file, family or option is refused before any memory is taken.
"""

import glob
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from library.errors import InputError
from library.files import checkpoint_layout as layout
from library.files.families import (
    ALL_FAMILIES,
    ALL_SHORT,
    ANY_FAMILY,
    FAMILIES,
    FOREIGN_FAMILIES,
    UNSAID_TEXT,
    UNSAID_UNET,
    Family,
    TextEncoderKind,
    TextNames,
)
from library.files.hub import fetch_model
from library.files.json_files import read_json
from library.files.tokenizers import SHIPPED_TOKENIZER, check_tokenizer
from library.files.weight_files import TEXT_STEMS, WEIGHT_STEMS, WeightFile, choose_weights, open_weights

CHECKPOINT_SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")
VAE_LEVELS = 4  # each but the last halves the size: a latent cell is 8 × 8 pixels


@dataclass(frozen=True)
class Component:
    """One part of the model: its diffusers or transformers configuration, and the file that holds its weights."""

    config: dict[str, Any]
    weights: WeightFile


@dataclass(frozen=True)
class TextComponent(Component):
    """A text encoder: of which kind, and how its checkpoint file names its tensors (None: a Diffusers folder's)."""

    kind: TextEncoderKind
    names: TextNames | None = None


@dataclass(frozen=True)
class ModelFiles:
    """A model that was found and checked, not yet loaded."""

    path: Path  # the checkpoint file, or the Diffusers folder
    name: str  # for people and metadata, without characters that cannot be written
    family: Family
    prediction_type: str  # "epsilon" or "v_prediction"
    unet: Component
    vae: Component
    texts: tuple[TextComponent, ...]  # in the family's order
    tokenizer: Path
    warnings: tuple[str, ...] = ()

    @property
    def parts(self) -> dict[str, Component]:
        """The components by their names in a Diffusers folder."""
        return {"unet": self.unet, "vae": self.vae} | {text.kind.part: text for text in self.texts}


def find_model(ckpt: str, *, v2: bool, v_parameterization: bool, vae: str | None = None) -> ModelFiles:
    """Find and check the model that `--ckpt` and its companions name.

    Args:
        ckpt: checkpoint file, Diffusers folder, Hugging Face id, or a glob that matches one of these.
        v2: the user says that it is an SD 2.x model.
        v_parameterization: the user says that it predicts v.
        vae: another VAE in place of the model's own: file, folder or Hugging Face id.

    Raises:
        InputError: when it is not there, of no family that the program draws with, or not what the options say.
    """
    path, name = resolve(ckpt, "--ckpt")
    subject = f"--ckpt {ckpt}"
    family, unet, own_vae, texts = _open_folder(path, subject) if path.is_dir() else _open_single_file(path, subject)
    _check_said(family, {"v2": v2}, subject)
    prediction_type, warnings = _prediction_type(path, unet.weights, family, v_parameterization, subject)
    own_tokenizer = path / "tokenizer"
    if own_tokenizer.is_dir():
        check_tokenizer(own_tokenizer)
    vae_files = find_vae(vae, family) if vae is not None else own_vae
    if len(vae_files.config.get("block_out_channels") or ()) != VAE_LEVELS:
        raise InputError(str(vae_files.weights.path), f"is no VAE of {VAE_LEVELS} levels, as {ALL_SHORT} have them")
    return ModelFiles(
        path=path,
        name=name.encode("utf-8", "replace").decode(),
        family=family,
        prediction_type=prediction_type,
        unet=unet,
        vae=vae_files,
        texts=texts,
        tokenizer=own_tokenizer if own_tokenizer.is_dir() else SHIPPED_TOKENIZER,
        warnings=warnings,
    )


def _check_said(family: Family, said: Mapping[str, bool], subject: str) -> None:
    """Refuse what the user says of a model's family and is not so, and what is not said and has to be."""
    for option, given in said.items():
        if given and family.option != option:
            raise InputError(subject, f"is a {family.name} model; leave out --{option}")
        if not given and family.option == option:
            raise InputError(subject, f"is a {family.name} model; add --{option}")


def find_vae(vae: str, family: Family) -> Component:
    """Find and check the VAE that `--vae` names: a file, a folder, or a model folder with a `vae` inside."""
    path, _ = resolve(vae, "--vae")
    if path.is_dir():
        component = folder_component(path / "vae" if (path / "vae").is_dir() else path, *WEIGHT_STEMS)
    else:
        component = _vae_component(open_weights(path), family)
    subject = f"--vae {vae}"
    if component.config.get("latent_channels", 4) != 4:
        channels = component.config["latent_channels"]
        raise InputError(subject, f"has {channels} latent channels; {ALL_SHORT} need a VAE with 4")
    architecture = component.weights.metadata.get("modelspec.architecture", "")
    for foreign in FOREIGN_FAMILIES:
        if foreign.has_vae(component.config, architecture):
            raise InputError(subject, f"is the VAE of {foreign.name}; use one of {ANY_FAMILY}")
    return component


# ---------------------------------------------------------------------------------------------------------------------
# Paths


def resolve(given: str, option: str, stems: tuple[str, ...] = WEIGHT_STEMS) -> tuple[Path, str]:
    """Find the file or folder that a path, glob or Hugging Face id means, and its name for people.

    Args:
        given: what the user wrote.
        option: where.
        stems: how the weight file's name may begin where an id names a single component.
    """
    try:
        path = Path(given).expanduser()
        if path.exists():
            return path, path.stem if path.is_file() else path.resolve().name
    except (OSError, RuntimeError, ValueError) as problem:
        raise InputError(f"{option} {given}", f"is no path that can be used ({problem}); check it") from None
    if any(character in given for character in "*?["):
        matches = sorted(glob.glob(str(path)))  # noqa: PTH207  # Path.glob takes no absolute patterns
        if len(matches) != 1:
            found = f"matches {len(matches)} paths: {', '.join(matches[:8])}" if matches else "matches nothing"
            raise InputError(f"{option} {given}", f"{found}; give a pattern that matches one")
        if matches[0] != given:
            return resolve(matches[0], option, stems)
    if _is_hub_id(given):
        return fetch_model(given, f"{option} {given}", stems), given.rpartition("/")[2]
    raise InputError(f"{option} {given}", "no such file or folder; check the path")


def _is_hub_id(given: str) -> bool:
    """Tell `owner/name` from a path that is not there, which has an existing folder, a file's ending, or more parts."""
    owner, slash, name = given.partition("/")
    plain = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w][\w.-]*", given, re.ASCII)
    return bool(plain and slash and not Path(owner).exists() and not name.lower().endswith(CHECKPOINT_SUFFIXES))


# ---------------------------------------------------------------------------------------------------------------------
# Diffusers folders


def _whole(component: Component, unsaid: Mapping[str, object]) -> Component:
    """A component whose configuration says what the program reads of it."""
    return replace(component, config=dict(unsaid) | component.config)


# What a model that was opened is: its family, U-Net, VAE and text encoders
_Opened = tuple[Family, Component, Component, tuple[TextComponent, ...]]


def _open_folder(path: Path, subject: str) -> _Opened:
    index = read_json(path / "model_index.json") if (path / "model_index.json").is_file() else {}
    pipeline = str(index.get("_class_name", ""))
    for foreign in FOREIGN_FAMILIES:
        if foreign.pipeline in pipeline:
            raise InputError(f"--ckpt {path}", f"is a {foreign.name} model; this program draws with {ALL_FAMILIES}")
    parts = _text_parts(path)
    for part in ("unet", "vae", *parts):
        if not (path / part / "config.json").is_file():
            raise InputError(
                f"--ckpt {path}",
                f"is no Diffusers model folder: {part}/config.json is missing; give the folder above unet/",
            )
    unet = folder_component(path / "unet", *WEIGHT_STEMS)
    vae = folder_component(path / "vae", *WEIGHT_STEMS)
    found = {part: folder_component(path / part, *TEXT_STEMS) for part in parts}
    unet = _whole(unet, UNSAID_UNET)
    found = {part: _whole(text, UNSAID_TEXT) for part, text in found.items()}
    _check_unet(unet.config, subject)
    _check_text_encoders([text.config for text in found.values()], unet.config, subject)
    family = _tell_family(
        unet.config, lambda family: family.fits_texts({part: text.config for part, text in found.items()})
    )
    texts = (TextComponent(found[kind.part].config, found[kind.part].weights, kind) for kind in family.encoders)
    return family, unet, vae, tuple(texts)


def _text_parts(path: Path) -> list[str]:
    """The folders of text encoders: those of the family that has the most of them here."""
    parts = [[kind.part for kind in family.encoders] for family in FAMILIES]
    return max(parts, key=lambda names: all((path / name).is_dir() for name in names) * len(names))


def folder_component(folder: Path, *stems: str) -> Component:
    """Open the configuration and the weights of one component of a Diffusers folder."""
    if not (folder / "config.json").is_file():
        raise InputError(str(folder), "has no config.json; give a Diffusers folder or a file")
    weights = choose_weights([entry.name for entry in folder.iterdir()], stems)
    if weights is None and any("-00001-of-" in entry.name for entry in folder.iterdir()):
        raise InputError(str(folder), "holds its weights in several shards; save them as one file")
    if weights is None:
        raise InputError(str(folder), f"holds no weights ({stems[0]}.safetensors or .bin); download them")
    return Component(read_json(folder / "config.json"), open_weights(folder / weights))


# ---------------------------------------------------------------------------------------------------------------------
# Single files

# What a weight file holds, told by its keys; the first that fits names it.
_KINDS: tuple[tuple[str, Callable[[str], bool]], ...] = (
    ("a Control-LoRA", lambda key: key == "lora_controlnet"),
    ("a ControlNet-LLLite", lambda key: key.startswith("lllite_")),
    ("an IP-Adapter", lambda key: key.startswith(("image_proj.", "image_proj_model.", "ip_adapter."))),
    ("a T2I-Adapter", lambda key: re.match(r"(adapter\.)?body\.\d+\.", key) is not None),
    ("an SDXL checkpoint", lambda key: key.startswith("conditioner.embedders.")),
    ("a Stable Diffusion 3 checkpoint", lambda key: "joint_blocks." in key),
    ("a Flux checkpoint", lambda key: "double_blocks." in key),
    ("a ControlNet", lambda key: key.startswith(("control_model.", "zero_convs.", "controlnet_cond_embedding."))),
    ("a LoRA or one of its relatives", lambda key: re.search(r"lora_|\.hada_|\.lokr_|\.oft_", key) is not None),
    (
        "a textual inversion embedding",
        lambda key: re.fullmatch(r"emb_params|clip_[gl]|string_to_param\..*", key) is not None,
    ),
)


def name_kind(weights: WeightFile) -> str | None:
    """Name what a weight file is when it is none of a model's parts."""
    return next((kind for kind, fits in _KINDS if any(map(fits, weights.shapes))), None)


def _open_single_file(path: Path, subject: str) -> _Opened:
    weights = open_weights(path)
    text_prefixes = tuple(names.prefix for family in FAMILIES for kind in family.encoders for names in kind.names)
    parts = {"U-Net": (layout.UNET_PREFIX,), "VAE": (layout.VAE_PREFIX,), "text encoder": text_prefixes}
    missing = [part for part, prefixes in parts.items() if not any(key.startswith(prefixes) for key in weights.shapes)]
    kind = name_kind(weights)
    if (kind and (missing or "checkpoint" in kind)) or len(missing) == len(parts):
        raise InputError(subject, f"is {kind or 'no Stable Diffusion checkpoint'}; give a {ANY_FAMILY} model")
    if missing:
        raise InputError(subject, f"has no {' and no '.join(missing)}; give a whole checkpoint")
    try:
        return _open_parts(weights, subject)
    except KeyError as problem:
        what = f"{problem} is missing"
    except (IndexError, ZeroDivisionError):
        what = "a tensor has no sizes"
    raise InputError(subject, f"is no whole Stable Diffusion checkpoint: {what}; download it again")


def _open_parts(weights: WeightFile, subject: str) -> _Opened:
    sizes = layout.unet_sizes(_cut(weights.shapes, layout.UNET_PREFIX))
    family = _tell_family(sizes, lambda family: family.fits_file(weights.shapes))
    texts = tuple(_text_component(weights, family, kind) for kind in family.encoders)
    unet = _unet_component(weights, family, sizes)
    vae = _vae_component(weights, family)
    _check_unet(unet.config, subject)
    _check_text_encoders([text.config for text in texts], unet.config, subject)
    return family, unet, vae, texts


def _cut(shapes: Mapping[str, tuple[int, ...]], prefix: str) -> dict[str, tuple[int, ...]]:
    return {name.removeprefix(prefix): shape for name, shape in shapes.items() if name.startswith(prefix)}


def _unet_component(weights: WeightFile, family: Family, sizes: dict[str, Any]) -> Component:
    config = family.config("unet") | sizes
    if family.head_size is not None:
        config["attention_head_dim"] = [max(1, width // family.head_size) for width in config["block_out_channels"]]
    if f"{layout.UNET_PREFIX}label_emb.0.0.weight" in weights.shapes:
        config["class_embed_type"] = "projection"
    return Component(config, weights)


def _vae_component(weights: WeightFile, family: Family) -> Component:
    shapes = _cut(weights.shapes, layout.VAE_PREFIX) or weights.shapes
    if (kind := name_kind(weights)) and kind.endswith("checkpoint"):
        raise InputError(str(weights.path), f"is {kind}; give the VAE of a {ANY_FAMILY} model")
    try:
        sizes = layout.vae_sizes(shapes)
    except KeyError:
        kind = name_kind(weights) or "no VAE"
        raise InputError(str(weights.path), f"is {kind}; give the VAE of a {ANY_FAMILY} model") from None
    return Component(family.config("vae") | sizes, weights)


def _text_component(weights: WeightFile, family: Family, kind: TextEncoderKind) -> TextComponent:
    names = next(n for n in kind.names if any(key.startswith(n.prefix) for key in weights.shapes))
    shapes = _cut(weights.shapes, names.prefix)
    if not names.openclip:
        shapes = {name.removeprefix("text_model."): shape for name, shape in shapes.items()}
    sizes = layout.text_encoder_sizes(shapes, openclip=names.openclip, spare_layers=kind.spare_layers)
    heads = max(1, sizes["hidden_size"] // 64)  # CLIP's heads are of size 64 in every published model
    config = family.config(kind.part) | sizes | {"num_attention_heads": heads}
    return TextComponent(config, weights, kind, names)


# ---------------------------------------------------------------------------------------------------------------------
# Family and prediction type


def _tell_family(unet: Mapping[str, object], fits: Callable[[Family], bool]) -> Family:
    """A family is told by the width of the text; of other widths, as in tiny models, by whether all else fits."""
    width = unet.get("cross_attention_dim")
    by_width = [family for family in FAMILIES if family.text_width == width]
    return next(iter(by_width or filter(fits, FAMILIES)), FAMILIES[0])


def _check_text_encoders(texts: Sequence[Mapping[str, Any]], unet: Mapping[str, Any], subject: str) -> None:
    """Refuse text encoders whose configuration is not one, or whose width the U-Net does not take."""
    for config in texts:
        for name in ("hidden_size", "num_hidden_layers", *UNSAID_TEXT):
            if not isinstance(config.get(name), int):
                problem = f"its text encoder's configuration has no whole number {name}; download it again"
                raise InputError(subject, problem)
    width, wanted = sum(config["hidden_size"] for config in texts), unet.get("cross_attention_dim")
    if width != wanted:
        widths = f"its text encoder is {width} wide, its U-Net wants {wanted}"
        raise InputError(subject, f"{widths}; use parts of one model")


_OTHER_INPUTS = {9: "an inpainting model", 8: "an instruct-pix2pix model", 5: "a depth model", 7: "an upscaler"}


def _check_unet(unet: Mapping[str, object], subject: str) -> None:
    """Refuse U-Nets that are conditioned on more than text."""
    if (channels := unet.get("in_channels", 4)) != 4:
        what = _OTHER_INPUTS.get(channels, "a model of another kind")
        raise InputError(subject, f"is {what} (a U-Net with {channels} input channels); use one with 4")
    for foreign in FOREIGN_FAMILIES:
        if foreign.has_unet(unet):
            raise InputError(subject, f"is an {foreign.name} model; this program draws with {ALL_FAMILIES}")
    if unet.get("class_embed_type"):
        raise InputError(subject, "is an image-conditioned (unCLIP) model; use a text-to-image model")
    if unet.get("time_cond_proj_dim"):
        problem = "is a latent consistency model that is told its guidance; use an ordinary model with an LCM-LoRA"
        raise InputError(subject, problem)


def _prediction_type(
    path: Path, weights: WeightFile, family: Family, v_parameterization: bool, subject: str
) -> tuple[str, tuple[str, ...]]:
    """Decide what the U-Net predicts: the user's word first, then what the files say; contradictions are warned of."""
    evidence, source = _prediction_evidence(path, weights)
    if v_parameterization and evidence == "epsilon":
        return "v_prediction", (
            f"{subject}: {source} says that it predicts noise; --v_parameterization overrides that",
        )
    if not v_parameterization and evidence == "v_prediction":
        return "v_prediction", (
            f"{subject}: taken for a v-prediction model, as {source} says; add --v_parameterization",
        )
    if family.may_hide_v and evidence is None and not v_parameterization:
        doubt = f"{subject}: nothing tells noise from v prediction; if pictures are brown, add --v_parameterization"
        return "epsilon", (doubt,)
    return "v_prediction" if v_parameterization else "epsilon", ()


def _prediction_evidence(path: Path, weights: WeightFile) -> tuple[str | None, str]:
    scheduler = path / "scheduler" / "scheduler_config.json"
    if scheduler.is_file():
        stated = str(read_json(scheduler).get("prediction_type", "epsilon"))
        if stated not in ("epsilon", "v_prediction"):
            raise InputError(
                str(scheduler), f"has the prediction type {stated!r}; use a model that predicts noise or v"
            )
        return stated, f"{path.name}{os.sep}scheduler"
    stated = weights.metadata.get("modelspec.prediction_type", "").lower()
    if stated:
        return "v_prediction" if stated.startswith("v") else "epsilon", "its metadata"
    marks = [name for name in ("v_pred", "ztsnr") if name in weights.shapes]
    return ("v_prediction", f"its tensor {marks[0]!r}") if marks else (None, "")
