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
        pooled: whether it gives the text's pooled vector as well, through a projection of its own.
        lora_prefixes: of its layers in network files.
        embedding_keys: of its vectors in embeddings that hold some for each of several encoders, in each format.
    """

    part: str
    names: tuple[TextNames, ...]
    pad_token: str
    spare_layers: int = 0
    final_norm: bool = True
    pooled: bool = False
    lora_prefixes: tuple[str, ...] = ()
    embedding_keys: tuple[str, ...] = ()


@dataclass(frozen=True)
class Family:
    """What differs between the families.

    Args:
        version: of Stable Diffusion.
        configs: name of the file with the published models' configurations; what a model's own files say wins.
        encoders: the text encoders, in the order in which their features stand side by side.
        tokenizer_name: of its folder below `--tokenizer_cache_dir`.
        network_marks: parts of flat module names that only networks for models of its shape have.
        architecture: how `modelspec.architecture` begins in its files' metadata.
        network_base: how `ss_base_model_version` begins in those of networks that sd-scripts trained.
        head_size: of the U-Net's attention where all widths have the same; None where they have a number of heads.
        size_px: of a picture's sides where nothing says otherwise.
        clip_skip: which of the text encoders' layers, counted from the last, is taken where nothing says otherwise.
        option: what the user has to say of such a model, without its hyphens; None where the files say enough.
        may_hide_v: models that predict v and do not say so are common.
        follows_zero_snr: zero terminal SNR is used where a model's files state it.
        told_sizes: its U-Nets are told a pooled vector and sizes (see `settings.sizes`).
        shrinks_input_blocks: Deep Shrink's depths are the original's input blocks, else the U-Net's down blocks.
        vae_overflows: the published VAE's features are too large for float16.
        extended_inversion: there are embeddings with vectors for each layer (XTI).
    """

    version: str
    configs: str
    encoders: tuple[TextEncoderKind, ...]
    tokenizer_name: str
    network_marks: tuple[str, ...]
    architecture: str
    network_base: str
    head_size: int | None = None
    size_px: int = 512
    clip_skip: int = 1
    option: str | None = None
    may_hide_v: bool = False
    follows_zero_snr: bool = False
    told_sizes: bool = False
    shrinks_input_blocks: bool = False
    vae_overflows: bool = False
    extended_inversion: bool = True

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

    def shrink_points(self, unet_config: Mapping[str, Any]) -> tuple[str, ...]:
        """The modules of a U-Net whose input Deep Shrink can shrink, by its depth."""
        levels = range(len(unet_config["block_out_channels"]))
        if not self.shrinks_input_blocks:
            return tuple(f"down_blocks.{level}" for level in levels)
        points = ["conv_in"]
        for level in levels:
            points += [f"down_blocks.{level}.resnets.{layer}" for layer in range(unet_config["layers_per_block"])]
            points += [f"down_blocks.{level}.downsamplers.0"] if level != levels[-1] else []
        return tuple(points)

    def config(self, part: str) -> dict[str, Any]:
        """The published models' configuration of a part: `unet`, `vae` or a text encoder's."""
        return dict(_published(self.configs)[part])

    def fits_file(self, names: Collection[str]) -> bool:
        """Whether a checkpoint file of these tensors has the text encoders as the family usually names them."""

        def is_there(kind: TextEncoderKind) -> bool:
            usual = tuple(n.prefix for n in kind.names if n.openclip == kind.names[0].openclip)
            return any(name.startswith(usual) for name in names)

        return all(map(is_there, self.encoders))

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
# Stability AI's later training code, which XL was made with, names those of the older families so, too
_FIRST_CLIP_NAMES = TextNames("conditioner.embedders.0.transformer.", openclip=False)
_FIRST_OPENCLIP_NAMES = TextNames("conditioner.embedders.0.model.", openclip=True)
_LORA_PREFIXES = (
    *("lora_te1_", "lora_te_", "oft_te1_", "oft_te_", "text_encoder_", "text_encoders_clip_l_transformer_"),
    *("lora_clip_l_", "clip_l_", "cond_stage_model_transformer_", "conditioner_embedders_0_transformer_"),
    # Stable Diffusion 2.x
    *("text_encoders_clip_h_transformer_", "cond_stage_model_model_", "conditioner_embedders_0_model_"),
)
_MARKS_OF_FOUR_LEVELS = (
    *("down_blocks_0_attentions", "input_blocks_1_1_", "input_blocks_2_1_", "down_blocks_3_", "up_blocks_3_"),
    *(f"{blocks}_{number}_" for blocks in ("input_blocks", "output_blocks") for number in (9, 10, 11)),
)

SD1 = Family(
    version="1.x",
    configs="sd1",
    encoders=(
        TextEncoderKind(
            part="text_encoder",
            names=(_CLIP_NAMES, _OPENCLIP_NAMES, _FIRST_CLIP_NAMES),
            pad_token="<|endoftext|>",
            spare_layers=1,
            lora_prefixes=_LORA_PREFIXES,
        ),
    ),
    tokenizer_name="clip-vit-large-patch14",
    network_marks=_MARKS_OF_FOUR_LEVELS,
    architecture="stable-diffusion-v1",
    network_base="sd_v1",
)
SD2 = Family(
    version="2.x",
    configs="sd2",
    encoders=(
        TextEncoderKind(
            part="text_encoder",
            names=(_OPENCLIP_NAMES, _CLIP_NAMES, _FIRST_OPENCLIP_NAMES),
            pad_token="!",  # id 0: OpenCLIP pads with zeros where OpenAI's CLIP repeats the end token
            spare_layers=1,  # it was trained on the last but one layer of OpenCLIP's text encoder
            lora_prefixes=_LORA_PREFIXES,
        ),
    ),
    tokenizer_name="stable-diffusion-2",
    network_marks=_MARKS_OF_FOUR_LEVELS,
    architecture="stable-diffusion-v2",
    network_base="sd_v2",
    head_size=64,
    option="v2",
    may_hide_v=True,
)
SDXL = Family(  # Podell et al. 2023, https://arxiv.org/abs/2307.01952
    version="XL",
    configs="sdxl",
    encoders=(
        TextEncoderKind(
            part="text_encoder",
            names=(_FIRST_CLIP_NAMES,),
            pad_token="<|endoftext|>",
            final_norm=False,
            lora_prefixes=_LORA_PREFIXES,
            embedding_keys=("clip_l", "text_encoders_0"),
        ),
        TextEncoderKind(
            part="text_encoder_2",
            names=(TextNames("conditioner.embedders.1.model.", openclip=True),),
            pad_token="!",
            final_norm=False,
            pooled=True,
            lora_prefixes=(
                *("lora_te2_", "lora_te_", "oft_te2_", "text_encoder_2_", "text_encoders_clip_g_transformer_"),
                *("lora_clip_g_", "clip_g_", "conditioner_embedders_1_model_"),
            ),
            embedding_keys=("clip_g", "text_encoders_1"),
        ),
    ),
    tokenizer_name="clip-vit-large-patch14",
    network_marks=(
        *("lora_te2_", "oft_te2_", "lora_clip_g_", "text_encoder_2_", "text_encoders_clip_g_"),
        *("conditioner_embedders_1_", "label_emb_", "add_embedding_", "output_blocks_2_2_conv"),
        *(f"transformer_blocks_{block}_" for block in range(1, 10)),
        *("up_blocks_0_attentions", *(f"output_blocks_{block}_1_transformer" for block in (0, 1, 2))),
    ),
    architecture="stable-diffusion-xl",
    network_base="sdxl",
    head_size=64,
    size_px=1024,
    clip_skip=2,
    follows_zero_snr=True,
    told_sizes=True,
    shrinks_input_blocks=True,
    vae_overflows=True,
    extended_inversion=False,
)
FAMILIES = (SD1, SD2, SDXL)
_VERSIONS = [family.version for family in FAMILIES]
_ALL_BUT_LAST = ", ".join(_VERSIONS[:-1])
ANY_FAMILY = f"Stable Diffusion {_ALL_BUT_LAST} or {_VERSIONS[-1]}"
ALL_FAMILIES = f"Stable Diffusion {_ALL_BUT_LAST} and {_VERSIONS[-1]}"
ALL_SHORT = f"SD {_ALL_BUT_LAST} and {_VERSIONS[-1]}"
TEXT_PARTS = tuple(dict.fromkeys(kind.part for family in FAMILIES for kind in family.encoders))


@dataclass(frozen=True)
class ForeignFamily:
    """A family that the program cannot draw with, and what tells its files.

    Args:
        name: for people, with an article.
        pipeline: part of the class in a Diffusers folder's model_index.json.
        network_marks: see `Family`.
        tensor: one that only its checkpoint files hold.
        scheduler: how the class in a Diffusers folder's scheduler configuration begins.
        text_width: see `Family`.
    """

    name: str
    pipeline: str | None = None
    network_marks: tuple[str, ...] = ()
    tensor: str | None = None
    scheduler: str | None = None
    text_width: int | None = None


REFINER = ForeignFamily("an SDXL refiner", text_width=1280)
FOREIGN_FAMILIES = (
    REFINER,
    # their noise and their latents are scaled otherwise (Karras et al. 2022, https://arxiv.org/abs/2206.00364)
    ForeignFamily("a Playground 2.5 model (EDM)", tensor="edm_mean"),
    ForeignFamily("a CosXL model (EDM)", tensor="edm_vpred.sigma_max"),
    ForeignFamily("an EDM model, as Playground 2.5 is", scheduler="EDM"),
    ForeignFamily("a flow-matching model", scheduler="FlowMatch"),  # as some fine-tunes of XL are
    ForeignFamily("a Stable Diffusion 3 model", "Diffusion3", ("joint_blocks_",)),
    ForeignFamily("a Flux model", "Flux", ("double_blocks_", "single_transformer_blocks_")),
    # of as many input channels as edit models
    ForeignFamily("an upscaler of latents", "LatentUpscale"),
    ForeignFamily("a Marigold model, which sees depth and its like", "Marigold"),
)


def name_of_width(text_width: int | None) -> str | None:
    """The name of the family whose published models attend to texts of a width; None where there is none."""
    names = {family.text_width: family.name for family in FAMILIES} | {REFINER.text_width: "the SDXL refiner"}
    return names.get(text_width) if text_width else None


def name_of_vae(config: Mapping[str, object], architecture: str, family: Family) -> str | None:
    """The name of another family that a VAE is for, told by its configuration and metadata; None where there is none.

    Families that share a factor share their VAEs.
    """
    own = {other.vae_factor for other in FAMILIES if architecture.startswith(other.architecture)}
    factors = own or {config.get("scaling_factor")}
    fitting = [other for other in FAMILIES if other.vae_factor in factors]
    alike = any(other.vae_factor == family.vae_factor for other in fitting)
    return fitting[0].name if fitting and not alike else None


def encoder_kinds(count: int) -> tuple[TextEncoderKind, ...]:
    """So many text encoders' kinds: families with equally many name them alike in networks.

    Raises:
        InputError: when no family has so many.
    """
    kinds = next((family.encoders for family in FAMILIES if len(family.encoders) == count), None)
    if kinds is None:
        raise InputError(f"{count} text encoders", f"are in no {ANY_FAMILY} model; give a network those of one")
    return kinds
