"""The families of models: for each a record of all that the program asks about it. Code asks the record, not the name.

A further family is a further record here and, where it names its tensors otherwise, a further table in
`checkpoint_layout`. Families that the program cannot draw with are known well enough to be refused by name.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from library.errors import InputError
from library.files.json_files import read_json

_CONFIGS = Path(__file__).resolve().parent.parent / "configs"


@dataclass(frozen=True)
class TextNames:
    """How a checkpoint file names a text encoder's tensors: their prefix, then OpenCLIP's names or transformers'."""

    prefix: str
    openclip: bool


@dataclass(frozen=True)
class TextEncoderKind:
    """One of a family's text encoders.

    Args:
        part: its folder in Diffusers' layout; networks call their target so, too.
        names: in checkpoint files; the family's usual ones come first.
        pad_token: what the tokenizer that ships here pads with for it.
        spare_layers: last layers that OpenCLIP's files hold and the family does not run.
        final_norm: whether the final layer norm is applied to the layer whose output is taken.
        lora_prefixes: of its layers in network files.
        embedding_key: of its vectors in embeddings that hold some for each of several encoders.
    """

    part: str
    names: tuple[TextNames, ...]
    pad_token: str
    spare_layers: int = 0
    final_norm: bool = True
    lora_prefixes: tuple[str, ...] = ()
    embedding_key: str | None = None


@dataclass(frozen=True)
class Family:
    """What differs between the families.

    Args:
        version: of Stable Diffusion.
        configs: name of the file with the published models' configurations; what a model's own files say wins.
        encoders: the text encoders, in the order in which their features stand side by side.
        tokenizer_name: of its folder below `--tokenizer_cache_dir`.
        head_size: of the U-Net's attention where all widths have the same; None where they have a number of heads.
        size_px: of a picture's sides where nothing says otherwise.
        option: what the user has to say of such a model, without its hyphens; None where the files say enough.
        may_hide_v: models that predict v and do not say so are common.
        deepest_shrink: the last down block of the U-Net, from 0, that Deep Shrink can shrink at.
    """

    version: str
    configs: str
    encoders: tuple[TextEncoderKind, ...]
    tokenizer_name: str
    head_size: int | None = None
    size_px: int = 512
    option: str | None = None
    may_hide_v: bool = False
    deepest_shrink: int = 3

    @property
    def name(self) -> str:
        """For people."""
        return f"Stable Diffusion {self.version}"

    @property
    def text_width(self) -> int:
        """The width of the text that the published models' U-Nets attend to."""
        return self.config("unet")["cross_attention_dim"]

    @property
    def vae_factor(self) -> float:
        """What the published VAEs' latents are scaled by."""
        return self.config("vae")["scaling_factor"]

    def config(self, part: str) -> dict[str, Any]:
        """The published models' configuration of a part: `unet`, `vae` or a text encoder's."""
        return dict(_published(self.configs)[part])

    def fits_file(self, names: Collection[str]) -> bool:
        """Whether a checkpoint file of these tensors has the text encoders as the family usually names them."""
        return all(any(name.startswith(kind.names[0].prefix) for name in names) for kind in self.encoders)

    def fits_texts(self, configs: Mapping[str, Mapping[str, object]]) -> bool:
        """Whether text encoders of these configurations, by their parts, are of the family's kind."""
        own = {kind.part: self.config(kind.part)["hidden_act"] for kind in self.encoders}
        return own == {part: config.get("hidden_act", "quick_gelu") for part, config in configs.items()}


@cache
def _published(name: str) -> Mapping[str, Any]:
    return read_json(_CONFIGS / f"{name}.json")


# What diffusers and transformers take where a folder's configuration says nothing; of what the program itself reads
UNSAID_UNET = {
    "block_out_channels": [320, 640, 1280, 1280],
    "layers_per_block": 2,
    "down_block_types": [*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"],
    "up_block_types": ["UpBlock2D", *["CrossAttnUpBlock2D"] * 3],
}
UNSAID_TEXT = {"vocab_size": 49408, "intermediate_size": 2048}

# ---------------------------------------------------------------------------------------------------------------------
# Records

_CLIP_NAMES = TextNames("cond_stage_model.transformer.", openclip=False)
_OPENCLIP_NAMES = TextNames("cond_stage_model.model.", openclip=True)
_LORA_PREFIXES = ("lora_te1_", "lora_te_", "oft_te_", "text_encoder_")

SD1 = Family(
    version="1.x",
    configs="sd1",
    encoders=(
        TextEncoderKind(
            part="text_encoder",
            names=(_CLIP_NAMES, _OPENCLIP_NAMES),
            pad_token="<|endoftext|>",
            spare_layers=1,
            lora_prefixes=_LORA_PREFIXES,
        ),
    ),
    tokenizer_name="clip-vit-large-patch14",
)
SD2 = Family(
    version="2.x",
    configs="sd2",
    encoders=(
        TextEncoderKind(
            part="text_encoder",
            names=(_OPENCLIP_NAMES, _CLIP_NAMES),
            pad_token="!",  # id 0: OpenCLIP pads with zeros where OpenAI's CLIP repeats the end token
            spare_layers=1,  # it was trained on the last but one layer of OpenCLIP's text encoder
            lora_prefixes=_LORA_PREFIXES,
        ),
    ),
    tokenizer_name="stable-diffusion-2",
    head_size=64,
    option="v2",
    may_hide_v=True,
)
FAMILIES = (SD1, SD2)
_VERSIONS = [family.version for family in FAMILIES]
ANY_FAMILY = f"Stable Diffusion {' or '.join(_VERSIONS)}"
ALL_FAMILIES = f"Stable Diffusion {' and '.join(_VERSIONS)}"
ALL_SHORT = f"SD {' and '.join(_VERSIONS)}"
TEXT_PARTS = tuple(dict.fromkeys(kind.part for family in FAMILIES for kind in family.encoders))


@dataclass(frozen=True)
class ForeignFamily:
    """A family that the program cannot draw with, and what tells its files.

    Args:
        name: for people.
        pipeline: part of the class in a Diffusers folder's model_index.json.
        network_marks: parts of keys that only networks for it have.
        text_width: see `Family`.
        vae_factor: see `Family`.
        unet_mark: what only its U-Nets' configurations set.
        architecture: part of `modelspec.architecture` in its files' metadata.
    """

    name: str
    pipeline: str
    network_marks: tuple[str, ...]
    text_width: int | None = None
    vae_factor: float | None = None
    unet_mark: str | None = None
    architecture: str | None = None

    def has_unet(self, config: Mapping[str, object]) -> bool:
        """Whether a U-Net of this configuration is one of its."""
        by_width = self.text_width is not None and config.get("cross_attention_dim") == self.text_width
        return by_width or (self.unet_mark is not None and bool(config.get(self.unet_mark)))

    def has_vae(self, config: Mapping[str, object], architecture: str) -> bool:
        """Whether a VAE of this configuration, or whose metadata tells of this architecture, is one of its."""
        by_factor = self.vae_factor is not None and config.get("scaling_factor") == self.vae_factor
        return by_factor or (self.architecture is not None and self.architecture in architecture)


FOREIGN_FAMILIES = (
    ForeignFamily(
        "SDXL",
        pipeline="XL",
        network_marks=("lora_te2_", "text_encoder_2."),
        text_width=2048,
        vae_factor=0.13025,
        unet_mark="addition_embed_type",
        architecture="xl",
    ),
    ForeignFamily("Stable Diffusion 3", "Diffusion3", ("joint_blocks",)),
    ForeignFamily("Flux", "Flux", ("double_blocks", "single_transformer_blocks")),
)


def name_of_width(text_width: int | None) -> str | None:
    """The name of the family whose published models attend to texts of a width; None where there is none."""
    known = (*FAMILIES, *FOREIGN_FAMILIES)
    return next((family.name for family in known if text_width and family.text_width == text_width), None)


def encoder_kinds(count: int) -> tuple[TextEncoderKind, ...]:
    """So many text encoders' kinds: families with equally many name them alike in networks.

    Raises:
        InputError: when no family has so many.
    """
    kinds = next((family.encoders for family in FAMILIES if len(family.encoders) == count), None)
    if kinds is None:
        raise InputError(f"{count} text encoders", f"are in no {ANY_FAMILY} model; give a network those of one")
    return kinds
