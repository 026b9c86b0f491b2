"""Finding the files that make up a Stable Diffusion model, and telling from their headers what model it is.

Nothing is loaded here: a wrong file, family or option is refused before any memory is taken.
"""

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
    REFINER,
    UNSAID_TEXT,
    UNSAID_UNET,
    Family,
    TextEncoderKind,
    TextNames,
    name_of_vae,
)
from library.files.globs import is_glob, matching, near_path
from library.files.hub import fetch_model
from library.files.json_files import read_json
from library.files.model_inputs import DRAWN, OTHERS, PLAIN, ModelInputs, inputs_of
from library.files.prediction import Prediction, decide, read_statements
from library.files.shards import ShardedWeights, choose_index
from library.files.tokenizers import SHIPPED_TOKENIZER, check_tokenizer
from library.files.weight_files import TEXT_STEMS, WEIGHT_STEMS, WeightFile, choose_weights, open_weights
from library.texts import readable

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
    prediction: Prediction
    unet: Component
    vae: Component
    texts: tuple[TextComponent, ...]  # in the family's order
    tokenizer: Path

    @property
    def parts(self) -> dict[str, Component]:
        """The components by their names in a Diffusers folder."""
        return {"unet": self.unet, "vae": self.vae} | {text.kind.part: text for text in self.texts}

    @property
    def inputs(self) -> ModelInputs:
        """What it reads beside the noisy latents."""
        return inputs_of(self.unet.config.get("in_channels", PLAIN.channels)) or PLAIN  # others were refused


def find_model(
    ckpt: str,
    *,
    v2: bool = False,
    v_parameterization: bool = False,
    zero_terminal_snr: bool = False,
    vae: str | None = None,
) -> ModelFiles:
    """Find and check the model that `--ckpt` and its companions name.

    Args:
        ckpt: checkpoint file, Diffusers folder, Hugging Face id, or a glob that matches one of these.
        v2: the user says that it is an SD 2.x model.
        v_parameterization: the user says that it predicts v.
        zero_terminal_snr: the user asks for it.
        vae: another VAE in place of the model's own: file, folder or Hugging Face id.

    Raises:
        InputError: when it is not there, of no family that the program draws with, or not what the options say.
    """
    path, name = resolve(ckpt, "--ckpt")
    subject = f"--ckpt {ckpt}"
    open_model = _open_folder if path.is_dir() else _open_single_file
    family, unet, own_vae, texts = open_model(path, subject, needs_vae=vae is None)
    _check_said(family, {"v2": v2}, subject)
    stated = read_statements(path, unet.weights, subject)
    own_tokenizer = path / "tokenizer"
    if own_tokenizer.is_dir():
        check_tokenizer(own_tokenizer)
    vae_files = own_vae if vae is None else find_vae(vae, family)
    assert vae_files is not None  # a model without one was refused
    if len(vae_files.config.get("block_out_channels") or ()) != VAE_LEVELS:
        raise InputError(str(vae_files.weights.path), f"is no VAE of {VAE_LEVELS} levels, as {ALL_SHORT} have them")
    return ModelFiles(
        path=path,
        name=readable(name),
        family=family,
        prediction=decide(stated, family, predicts_v=v_parameterization, zero_snr=zero_terminal_snr, subject=subject),
        unet=unet,
        vae=vae_files,
        texts=texts,
        tokenizer=own_tokenizer if own_tokenizer.is_dir() else SHIPPED_TOKENIZER,
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
        component = _vae_folder(path / "vae" if (path / "vae").is_dir() else path, family)
    else:
        component = _vae_component(weights := open_weights(path), family)
        _check_same_latents(weights, family, f"--vae {vae}")
    subject = f"--vae {vae}"
    if component.config.get("latent_channels", 4) != 4:
        channels = component.config["latent_channels"]
        raise InputError(subject, f"has {channels} latent channels; {ALL_SHORT} need a VAE with 4")
    architecture = component.weights.metadata.get("modelspec.architecture", "")
    if other := name_of_vae(component.config, architecture, family):
        raise InputError(subject, f"is the VAE of {other}; use one of {family.name}")
    return component


def _check_same_latents(weights: WeightFile, family: Family, subject: str) -> None:
    """Refuse the VAE in a whole checkpoint of a family with latents of another kind."""
    if not any(name.startswith(layout.UNET_PREFIX) for name in weights.shapes):
        return
    try:
        sizes = layout.unet_sizes(_cut(weights.shapes, layout.UNET_PREFIX))
    except (KeyError, IndexError, ZeroDivisionError):
        return  # what there is of a U-Net says nothing
    other = _tell_family(sizes, lambda family: family.fits_file(weights.shapes))
    if other.vae_factor != family.vae_factor:
        raise InputError(subject, f"is a {other.name} model, whose VAE is another; use one of {family.name}")


def _vae_folder(folder: Path, family: Family) -> Component:
    """A VAE in Diffusers' layout, its latents scaled as the family's where its configuration does not say how."""
    return _whole(folder_component(folder, *WEIGHT_STEMS), {"scaling_factor": family.vae_factor})


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
            return path, _path_name(path)
    except (OSError, RuntimeError, ValueError) as problem:
        raise InputError(f"{option} {given}", f"is no path that can be used ({problem}); check it") from None
    if is_glob(given):
        matches = matching(path)
        if len(matches) != 1:
            found = f"matches {len(matches)} paths: {', '.join(matches[:8])}" if matches else "matches nothing"
            raise InputError(f"{option} {given}", f"{found}; give a pattern that matches one")
        if matches[0] != given:
            return resolve(matches[0], option, stems)
    if near := near_path(path):
        raise InputError(f"{option} {given}", f"no such file or folder; did you mean {near}?")
    if _is_hub_id(given):
        return fetch_model(given, f"{option} {given}", stems), given.rpartition("/")[2]
    raise InputError(f"{option} {given}", "no such file or folder; check the path")


def name_of(given: str) -> str:
    """The name that `resolve` gives what a path, glob or id means; nothing is fetched, and nothing refused."""
    try:
        path = Path(given).expanduser()
        if not path.exists() and is_glob(given) and len(matches := matching(path)) == 1:
            path = Path(matches[0])
        if path.exists():
            return _path_name(path)
    except (OSError, RuntimeError, ValueError):
        pass  # told when the model is looked for
    return given.rpartition("/")[2]


def _path_name(path: Path) -> str:
    return path.stem if path.is_file() else path.resolve().name


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


# What a model that was opened is: its family, U-Net, VAE if it has one, and text encoders
_Opened = tuple[Family, Component, Component | None, tuple[TextComponent, ...]]


def _open_folder(path: Path, subject: str, *, needs_vae: bool) -> _Opened:
    index = read_json(path / "model_index.json") if (path / "model_index.json").is_file() else {}
    pipeline = str(index.get("_class_name", ""))
    for foreign in FOREIGN_FAMILIES:
        if foreign.pipeline and foreign.pipeline in pipeline:
            raise InputError(f"--ckpt {path}", f"is {foreign.name}; this program draws with {ALL_FAMILIES}")
    _check_folders(path, "unet")
    unet = _whole(folder_component(path / "unet", *WEIGHT_STEMS), UNSAID_UNET)
    _check_unet(unet.config, subject)
    parts = _text_parts(path)
    _check_folders(path, *(("vae",) if needs_vae else ()), *parts)
    widths = unet.config["block_out_channels"]
    if not isinstance(widths, list) or not widths or not isinstance(unet.config["layers_per_block"], int):
        raise InputError(subject, "its U-Net's configuration makes no model (no widths of levels); download it again")
    found = {part: _whole(folder_component(path / part, *TEXT_STEMS), UNSAID_TEXT) for part in parts}
    family = _tell_family(
        unet.config, lambda family: family.fits_texts({part: text.config for part, text in found.items()})
    )
    if missing := [kind.part for kind in family.encoders if kind.part not in found]:
        raise InputError(subject, f"is a {family.name} model without its {missing[0]}; download it again")
    if bool(unet.config.get("addition_embed_type")) != family.told_sizes:
        raise InputError(subject, "has a U-Net that is told other things than its family's are; use another model")
    texts = tuple(TextComponent(found[kind.part].config, found[kind.part].weights, kind) for kind in family.encoders)
    _check_text_encoders(texts, unet.config, subject)
    return family, unet, _vae_folder(path / "vae", family) if needs_vae else None, texts


def _check_folders(path: Path, *parts: str) -> None:
    """Refuse a model folder without one of these parts."""
    for part in parts:
        if not (path / part / "config.json").is_file():
            problem = f"is no Diffusers model folder: {part}/config.json is missing; give the folder above unet/"
            if part == "vae":
                problem = "has no vae folder; give a VAE with --vae"
            raise InputError(f"--ckpt {path}", problem)


def _text_parts(path: Path) -> list[str]:
    """The folders of text encoders: those of the family that has the most of them here."""
    parts = [[kind.part for kind in family.encoders] for family in FAMILIES]
    return max(parts, key=lambda names: all((path / name).is_dir() for name in names) * len(names))


def folder_component(folder: Path, *stems: str) -> Component:
    """Open the configuration and the weights of one component of a Diffusers folder."""
    if not (folder / "config.json").is_file():
        raise InputError(str(folder), "has no config.json; give a Diffusers folder or a file")
    names = [entry.name for entry in folder.iterdir()]
    config = read_json(folder / "config.json")
    if (weights := choose_weights(names, stems)) is not None:
        return Component(config, open_weights(folder / weights))
    if (index := choose_index(names, stems)) is not None:
        return Component(config, ShardedWeights(folder / index))
    if any("-00001-of-" in name for name in names):
        raise InputError(str(folder), "holds its weights in several files without their index; download that too")
    raise InputError(str(folder), f"holds no weights ({stems[0]}.safetensors or .bin); download them")


# ---------------------------------------------------------------------------------------------------------------------
# Single files

# What a weight file holds, told by its keys, one to a line; the first that fits names it.
_KINDS: tuple[tuple[str, re.Pattern[str]], ...] = tuple(
    (kind, re.compile(keys, re.MULTILINE))
    for kind, keys in (
        ("a Control-LoRA", r"^lora_controlnet$"),
        ("a ControlNet-LLLite", r"^lllite_"),
        ("an IP-Adapter", r"^(image_proj|image_proj_model|ip_adapter)\."),
        ("a T2I-Adapter", r"^(adapter\.)?body\.\d+\."),
        ("a Stable Diffusion 3 checkpoint", r"joint_blocks\."),
        ("a Flux checkpoint", r"double_blocks\."),
        ("a ControlNet", r"^(control_model|zero_convs|controlnet_cond_embedding)\."),
        ("a LoRA or one of its relatives", r"lora_|\.hada_|\.lokr_|\.oft_"),
        ("a textual inversion embedding", r"^(emb_params|clip_[gl]|string_to_param\..*)$"),
        ("a U-Net without text encoders and VAE", r"^(conv_in|input_blocks\.0\.0)\.weight$"),
    )
)


def name_kind(weights: WeightFile) -> str | None:
    """Name what a weight file is when it is none of a model's parts."""
    keys = "\n".join(weights.shapes)  # a search for each kind in all at once, not one in each key
    return next((kind for kind, pattern in _KINDS if pattern.search(keys)), None)


def _open_single_file(path: Path, subject: str, *, needs_vae: bool) -> _Opened:
    weights = open_weights(path)
    for foreign in FOREIGN_FAMILIES:
        if foreign.tensor in weights.shapes:
            raise InputError(subject, f"is {foreign.name}; this program draws with {ALL_FAMILIES}")
    text_prefixes = tuple(names.prefix for family in FAMILIES for kind in family.encoders for names in kind.names)
    parts = {"U-Net": (layout.UNET_PREFIX,), "text encoder": text_prefixes}
    parts |= {"VAE": (layout.VAE_PREFIX,)} if needs_vae else {}
    missing = [part for part, prefixes in parts.items() if not any(key.startswith(prefixes) for key in weights.shapes)]
    kind = name_kind(weights)
    if (kind and (missing or "checkpoint" in kind)) or len(missing) == len(parts):
        raise InputError(subject, f"is {kind or 'no Stable Diffusion checkpoint'}; give a {ANY_FAMILY} model")
    if missing:
        remedy = "a VAE with --vae" if missing == ["VAE"] else "a whole checkpoint"
        raise InputError(subject, f"has no {' and no '.join(missing)}; give {remedy}")
    try:
        return _open_parts(weights, subject, needs_vae=needs_vae)
    except KeyError as problem:
        what = f"{problem} is missing"
    except (IndexError, ZeroDivisionError):
        what = "a tensor has no sizes"
    raise InputError(subject, f"is no whole Stable Diffusion checkpoint: {what}; download it again")


def _open_parts(weights: WeightFile, subject: str, *, needs_vae: bool) -> _Opened:
    sizes = layout.unet_sizes(_cut(weights.shapes, layout.UNET_PREFIX))
    _check_unet(sizes, subject)
    family = _tell_family(sizes, lambda family: family.fits_file(weights.shapes))
    texts = tuple(_text_component(weights, family, kind) for kind in family.encoders)
    unet = _unet_component(weights, family, sizes)
    vae = _vae_component(weights, family) if needs_vae else None
    _check_unet(unet.config, subject)
    _check_text_encoders(texts, unet.config, subject)
    return family, unet, vae, texts


def _cut(shapes: Mapping[str, tuple[int, ...]], prefix: str) -> dict[str, tuple[int, ...]]:
    return {name.removeprefix(prefix): shape for name, shape in shapes.items() if name.startswith(prefix)}


def _unet_component(weights: WeightFile, family: Family, sizes: dict[str, Any]) -> Component:
    config = family.config("unet") | sizes
    if family.head_size is not None:
        config["attention_head_dim"] = [max(1, width // family.head_size) for width in config["block_out_channels"]]
    label = weights.shapes.get(f"{layout.UNET_PREFIX}label_emb.0.0.weight")
    if family.told_sizes:
        if label is None:
            raise KeyError(f"{layout.UNET_PREFIX}label_emb.0.0.weight")
        config["projection_class_embeddings_input_dim"] = label[1]
    elif label is not None:
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
    names = next((n for n in kind.names if any(key.startswith(n.prefix) for key in weights.shapes)), None)
    if names is None:
        raise KeyError(f"{kind.names[0].prefix}...")
    shapes = _cut(weights.shapes, names.prefix)
    if not names.openclip:
        shapes = {name.removeprefix("text_model."): shape for name, shape in shapes.items()}
    config = family.config(kind.part)
    sizes = layout.text_encoder_sizes(shapes, openclip=names.openclip)
    # Diffusers' conversion leaves out the layers that are not run
    if names.openclip and sizes["num_hidden_layers"] != config["num_hidden_layers"]:
        sizes["num_hidden_layers"] -= kind.spare_layers
    if kind.pooled:
        sizes["projection_dim"] = layout.projection_width(shapes)
    heads = max(1, sizes["hidden_size"] // 64)  # CLIP's heads are of size 64 in every published model
    return TextComponent(config | sizes | {"num_attention_heads": heads}, weights, kind, names)


# ---------------------------------------------------------------------------------------------------------------------
# Family


def _tell_family(unet: Mapping[str, object], fits: Callable[[Family], bool]) -> Family:
    """A family is told by the width of the text; of other widths, as in tiny models, by whether all else fits."""
    width = unet.get("cross_attention_dim")
    by_width = [family for family in FAMILIES if family.text_width == width]
    told = [family for family in FAMILIES if family.told_sizes and unet.get("addition_embed_type")]
    fitting = by_width or told or sorted(filter(fits, FAMILIES), key=lambda family: -len(family.encoders))
    return next(iter(fitting), FAMILIES[0])


def _check_text_encoders(texts: Sequence[TextComponent], unet: Mapping[str, Any], subject: str) -> None:
    """Refuse text encoders whose configuration is not one, or whose widths the U-Net does not take."""
    for text in texts:
        for name in ("hidden_size", "num_hidden_layers", *UNSAID_TEXT):
            if not isinstance(text.config.get(name), int):
                problem = f"its text encoder's configuration has no whole number {name}; download it again"
                raise InputError(subject, problem)
    width, wanted = sum(text.config["hidden_size"] for text in texts), unet.get("cross_attention_dim")
    if width != wanted:
        widths = f"its text encoder is {width} wide, its U-Net wants {wanted}"
        raise InputError(subject, f"{widths}; use parts of one model")
    for text in texts:
        beside = _SIZE_NUMBERS * (unet.get("addition_time_embed_dim") or 0)
        pooled, wanted = text.config.get("projection_dim"), unet.get("projection_class_embeddings_input_dim")
        if text.kind.pooled and (not isinstance(pooled, int) or pooled + beside != wanted):
            problem = f"its U-Net is told {wanted} numbers beside the text, its text encoder and the sizes have"
            raise InputError(subject, f"{problem} {pooled} and {beside}; use parts of one model")


_SIZE_NUMBERS = 6  # see `settings.sizes`


def _check_unet(unet: Mapping[str, object], subject: str) -> None:
    """Refuse U-Nets that are conditioned on what this program does not give them."""
    channels = unet.get("in_channels", PLAIN.channels)
    if inputs_of(channels) is None:
        what = OTHERS.get(channels, "a model of another kind")
        drawn = ", ".join(str(inputs.channels) for inputs in DRAWN[:-1])
        advice = f"use one with {drawn} or {DRAWN[-1].channels}"
        raise InputError(subject, f"is {what} (a U-Net with {channels} input channels); {advice}")
    if unet.get("cross_attention_dim") == REFINER.text_width:
        raise InputError(subject, f"is {REFINER.name}; use the base model, this program draws with {ALL_FAMILIES}")
    if unet.get("class_embed_type"):
        raise InputError(subject, "is an image-conditioned (unCLIP) model; use a text-to-image model")
    if unet.get("time_cond_proj_dim"):
        problem = "is a latent consistency model that is told its guidance; use an ordinary model with an LCM-LoRA"
        raise InputError(subject, problem)
