"""Finding the files that make up a Stable Diffusion model, and telling from their headers what model it is.

Nothing is loaded here: a wrong file, family or option is refused before any memory is taken.
"""

import glob
import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from library.errors import InputError
from library.files import checkpoint_layout as layout
from library.files.weight_files import WeightFile, choose_weights, open_weights

_LIBRARY = Path(__file__).resolve().parent.parent
SHIPPED_TOKENIZER = _LIBRARY / "clip_tokenizer"
SD2_PAD_TOKEN = "!"  # id 0: OpenCLIP pads with zeros where OpenAI's CLIP repeats the end token
CHECKPOINT_SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")
SDXL_SCALING_FACTOR = 0.13025
VAE_LEVELS = 4  # each but the last halves the size: a latent cell is 8 × 8 pixels


@dataclass(frozen=True)
class Component:
    """One network of the model: its diffusers or transformers configuration, and the file that holds its weights."""

    config: dict[str, object]
    weights: WeightFile
    openclip: bool = False  # a text encoder under OpenCLIP's names


@dataclass(frozen=True)
class ModelFiles:
    """A model that was found and checked, not yet loaded."""

    path: Path  # the checkpoint file, or the Diffusers folder
    name: str  # for people and metadata, without characters that cannot be written
    v2: bool
    prediction_type: str  # "epsilon" or "v_prediction"
    unet: Component
    vae: Component
    text_encoder: Component
    tokenizer: Path
    warnings: tuple[str, ...] = field(default=())


def find_model(ckpt: str, *, v2: bool, v_parameterization: bool, vae: str | None = None) -> ModelFiles:
    """Find and check the model that `--ckpt` and its companions name.

    Args:
        ckpt: checkpoint file, Diffusers folder, Hugging Face id, or a glob that matches one of these.
        v2: the user says that it is an SD 2.x model.
        v_parameterization: the user says that it predicts v.
        vae: another VAE in place of the model's own: file, folder or Hugging Face id.

    Raises:
        InputError: when it is not there, not Stable Diffusion 1.x or 2.x, or not what the options say.
    """
    path, name = resolve(ckpt, "--ckpt")
    unet, own_vae, text_encoder = _open_folder(path) if path.is_dir() else _open_single_file(path)
    subject = f"--ckpt {ckpt}"
    _check_unet(unet.config, subject)
    _check_text_encoder(text_encoder.config, unet.config, subject)
    is_v2 = _is_v2(unet.config, text_encoder)
    if is_v2 and not v2:
        raise InputError(subject, "is a Stable Diffusion 2.x model; add --v2")
    if v2 and not is_v2:
        raise InputError(subject, "is a Stable Diffusion 1.x model; leave out --v2")
    prediction_type, warnings = _prediction_type(path, unet.weights, is_v2, v_parameterization, subject)
    own_tokenizer = path / "tokenizer"
    if own_tokenizer.is_dir():
        check_tokenizer(own_tokenizer)
    vae_files = find_vae(vae) if vae is not None else own_vae
    if len(vae_files.config.get("block_out_channels") or ()) != VAE_LEVELS:
        raise InputError(str(vae_files.weights.path), f"is no VAE of {VAE_LEVELS} levels, as SD 1.x and 2.x have them")
    return ModelFiles(
        path=path,
        name=name.encode("utf-8", "replace").decode(),
        v2=is_v2,
        prediction_type=prediction_type,
        unet=unet,
        vae=vae_files,
        text_encoder=text_encoder,
        tokenizer=own_tokenizer if own_tokenizer.is_dir() else SHIPPED_TOKENIZER,
        warnings=warnings,
    )


def find_vae(vae: str) -> Component:
    """Find and check the VAE that `--vae` names: a file, a folder, or a model folder with a `vae` inside."""
    path, _ = resolve(vae, "--vae")
    if path.is_dir():
        folder = path / "vae" if (path / "vae").is_dir() else path
        component = folder_component(folder, "diffusion_pytorch_model")
    else:
        component = _vae_component(open_weights(path))
    subject = f"--vae {vae}"
    if component.config.get("latent_channels", 4) != 4:
        channels = component.config["latent_channels"]
        raise InputError(subject, f"has {channels} latent channels; SD 1.x and 2.x need a VAE with 4")
    architecture = component.weights.metadata.get("modelspec.architecture", "")
    if component.config.get("scaling_factor") == SDXL_SCALING_FACTOR or "xl" in architecture:
        raise InputError(subject, "is the VAE of SDXL; use one of Stable Diffusion 1.x or 2.x")
    return component


# ---------------------------------------------------------------------------------------------------------------------
# Paths


def resolve(given: str, option: str, stems: tuple[str, ...] = ("diffusion_pytorch_model",)) -> tuple[Path, str]:
    """Find the file or folder that a path, glob or Hugging Face id means, and its name for people.

    Args:
        given: what the user wrote.
        option: where.
        stems: how the weight file's name may begin where an id names a single network.
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
        from library.files.hub import fetch_model

        return fetch_model(given, f"{option} {given}", stems), given.rpartition("/")[2]
    raise InputError(f"{option} {given}", "no such file or folder; check the path")


def _is_hub_id(given: str) -> bool:
    """Tell `owner/name` from a path that is not there, which has an existing folder, a file's ending, or more parts."""
    owner, slash, name = given.partition("/")
    plain = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w][\w.-]*", given, re.ASCII)
    return bool(plain and slash and not Path(owner).exists() and not name.lower().endswith(CHECKPOINT_SUFFIXES))


# ---------------------------------------------------------------------------------------------------------------------
# Diffusers folders


def _open_folder(path: Path) -> tuple[Component, Component, Component]:
    index = _read_json(path / "model_index.json") if (path / "model_index.json").is_file() else {}
    pipeline = str(index.get("_class_name", ""))
    for mark, family in (("XL", "SDXL"), ("Diffusion3", "Stable Diffusion 3"), ("Flux", "Flux")):
        if mark in pipeline:
            raise InputError(
                f"--ckpt {path}", f"is a {family} model; this program draws with Stable Diffusion 1.x and 2.x"
            )
    for part in ("unet", "vae", "text_encoder"):
        if not (path / part / "config.json").is_file():
            raise InputError(
                f"--ckpt {path}",
                f"is no Diffusers model folder: {part}/config.json is missing; give the folder above unet/",
            )
    return (
        folder_component(path / "unet", "diffusion_pytorch_model"),
        folder_component(path / "vae", "diffusion_pytorch_model"),
        folder_component(path / "text_encoder", "model", "pytorch_model"),
    )


def folder_component(folder: Path, *stems: str) -> Component:
    """Open the configuration and the weights of one network of a Diffusers folder."""
    if not (folder / "config.json").is_file():
        raise InputError(str(folder), "has no config.json; give a Diffusers folder or a file")
    weights = choose_weights([entry.name for entry in folder.iterdir()], stems)
    if weights is None and any("-00001-of-" in entry.name for entry in folder.iterdir()):
        raise InputError(str(folder), "holds its weights in several shards; save them as one file")
    if weights is None:
        raise InputError(str(folder), f"holds no weights ({stems[0]}.safetensors or .bin); download them")
    return Component(_read_json(folder / "config.json"), open_weights(folder / weights))


def _read_json(path: Path) -> dict[str, object]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as problem:
        raise InputError(str(path), f"cannot be read as JSON ({problem}); download it again") from None
    if not isinstance(content, dict):
        raise InputError(str(path), "is no configuration (a JSON object); download it again")
    return content


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


def _open_single_file(path: Path) -> tuple[Component, Component, Component]:
    weights = open_weights(path)
    subject = f"--ckpt {path}"
    parts = {
        "U-Net": (layout.UNET_PREFIX,),
        "VAE": (layout.VAE_PREFIX,),
        "text encoder": (layout.SD1_TEXT_PREFIX, layout.SD2_TEXT_PREFIX),
    }
    missing = [part for part, prefixes in parts.items() if not any(key.startswith(prefixes) for key in weights.shapes)]
    kind = name_kind(weights)
    if (kind and (missing or "checkpoint" in kind)) or len(missing) == len(parts):
        raise InputError(
            subject, f"is {kind or 'no Stable Diffusion checkpoint'}; give a Stable Diffusion 1.x or 2.x model"
        )
    if missing:
        raise InputError(subject, f"has no {' and no '.join(missing)}; give a whole checkpoint")
    try:
        text_encoder = _text_component(weights)
        return _unet_component(weights, text_encoder), _vae_component(weights), text_encoder
    except KeyError as problem:
        what = f"{problem} is missing"
    except (IndexError, ZeroDivisionError):
        what = "a tensor has no sizes"
    raise InputError(subject, f"is no whole Stable Diffusion checkpoint: {what}; download it again")


def _cut(shapes: Mapping[str, tuple[int, ...]], prefix: str) -> dict[str, tuple[int, ...]]:
    return {name.removeprefix(prefix): shape for name, shape in shapes.items() if name.startswith(prefix)}


def _unet_component(weights: WeightFile, text_encoder: Component) -> Component:
    shapes = _cut(weights.shapes, layout.UNET_PREFIX)
    sizes = layout.unet_sizes(shapes)
    v2 = _is_v2(sizes, text_encoder)
    config = _shipped_config("sd2" if v2 else "sd1", "unet") | sizes
    if v2:  # heads of size 64 at every width
        config["attention_head_dim"] = [max(1, width // 64) for width in config["block_out_channels"]]
    if "label_emb.0.0.weight" in shapes:
        config["class_embed_type"] = "projection"
    return Component(config, weights)


def _vae_component(weights: WeightFile) -> Component:
    shapes = _cut(weights.shapes, layout.VAE_PREFIX) or weights.shapes
    if (kind := name_kind(weights)) and kind.endswith("checkpoint"):
        raise InputError(str(weights.path), f"is {kind}; give the VAE of a Stable Diffusion 1.x or 2.x model")
    try:
        sizes = layout.vae_sizes(shapes)
    except KeyError:
        kind = name_kind(weights) or "no VAE"
        raise InputError(str(weights.path), f"is {kind}; give the VAE of a Stable Diffusion 1.x or 2.x model") from None
    return Component(_shipped_config("sd1", "vae") | sizes, weights)


def _text_component(weights: WeightFile) -> Component:
    openclip = any(key.startswith(layout.SD2_TEXT_PREFIX) for key in weights.shapes)
    shapes = _cut(weights.shapes, layout.SD2_TEXT_PREFIX if openclip else layout.SD1_TEXT_PREFIX)
    if not openclip:
        shapes = {name.removeprefix("text_model."): shape for name, shape in shapes.items()}
    sizes = layout.text_encoder_sizes(shapes, openclip=openclip)
    heads = max(1, sizes["hidden_size"] // 64)  # CLIP's heads are of size 64 in every published model
    config = _shipped_config("sd2" if openclip else "sd1", "text_encoder") | sizes | {"num_attention_heads": heads}
    return Component(config, weights, openclip)


def _shipped_config(family: str, part: str) -> dict[str, object]:
    return _read_json(_LIBRARY / "configs" / f"{family}.json")[part]


# ---------------------------------------------------------------------------------------------------------------------
# Family and prediction type


def _is_v2(unet: Mapping[str, object], text_encoder: Component) -> bool:
    """SD 2.x is told by the text's width; for other widths by the text encoder's layout and activation."""
    width = unet.get("cross_attention_dim")
    if width in (768, 1024):
        return width == 1024
    return text_encoder.openclip or text_encoder.config.get("hidden_act") == "gelu"


def _check_text_encoder(text_encoder: Mapping[str, object], unet: Mapping[str, object], subject: str) -> None:
    """Refuse a text encoder whose configuration is not one, or whose width the U-Net does not take."""
    for name in ("hidden_size", "num_hidden_layers"):
        if not isinstance(text_encoder.get(name), int):
            raise InputError(subject, f"its text encoder's configuration has no whole number {name}; download it again")
    if text_encoder["hidden_size"] != unet.get("cross_attention_dim"):
        widths = (
            f"its text encoder is {text_encoder['hidden_size']} wide, its U-Net wants {unet.get('cross_attention_dim')}"
        )
        raise InputError(subject, f"{widths}; use parts of one model")


def check_tokenizer(folder: Path) -> None:
    """Refuse a folder that holds no tokenizer; transformers would make an empty one.

    Raises:
        InputError: naming the file that is missing or damaged.
    """
    if (folder / "tokenizer.json").is_file():
        _read_json(folder / "tokenizer.json")
        return
    for name in ("vocab.json", "merges.txt"):
        if not (folder / name).is_file():
            raise InputError(str(folder), f"is no tokenizer: {name} is missing; download it again or remove the folder")
    _read_json(folder / "vocab.json")


_OTHER_INPUTS = {9: "an inpainting model", 8: "an instruct-pix2pix model", 5: "a depth model", 7: "an upscaler"}


def _check_unet(unet: Mapping[str, object], subject: str) -> None:
    """Refuse U-Nets that are conditioned on more than text."""
    if (channels := unet.get("in_channels", 4)) != 4:
        what = _OTHER_INPUTS.get(channels, "a model of another kind")
        raise InputError(subject, f"is {what} (a U-Net with {channels} input channels); use one with 4")
    if unet.get("cross_attention_dim") == 2048 or unet.get("addition_embed_type"):
        raise InputError(subject, "is an SDXL model; this program draws with Stable Diffusion 1.x and 2.x")
    if unet.get("class_embed_type"):
        raise InputError(subject, "is an image-conditioned (unCLIP) model; use a text-to-image model")
    if unet.get("time_cond_proj_dim"):
        problem = "is a latent consistency model that is told its guidance; use an ordinary model with an LCM-LoRA"
        raise InputError(subject, problem)


def _prediction_type(
    path: Path, weights: WeightFile, v2: bool, v_parameterization: bool, subject: str
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
    if v2 and evidence is None and not v_parameterization:
        doubt = f"{subject}: nothing tells noise from v prediction; if pictures are brown, add --v_parameterization"
        return "epsilon", (doubt,)
    return "v_prediction" if v_parameterization else "epsilon", ()


def _prediction_evidence(path: Path, weights: WeightFile) -> tuple[str | None, str]:
    scheduler = path / "scheduler" / "scheduler_config.json"
    if scheduler.is_file():
        stated = str(_read_json(scheduler).get("prediction_type", "epsilon"))
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
