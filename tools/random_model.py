#!/usr/bin/env python3
"""Write a Stable Diffusion model of random weights, for measuring and testing without a published checkpoint.

    python tools/random_model.py /tmp/model --family sd1                  # a Diffusers folder and one checkpoint file
    python tools/random_model.py /tmp/small --family sd2 --tiny --layout folder
    python tools/random_model.py /tmp/repaint --family sdxl --inputs inpainting

The same seed gives the same weights in every layout. The pictures they draw are noise.
"""

import argparse
import copy
import json
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import diffusers
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from library.files import checkpoint_layout as layout
from library.files.families import FAMILIES, Family, TextEncoderKind
from library.files.model_inputs import DRAWN, EDITING, INPAINTING, PLAIN, ModelInputs
from library.files.tokenizers import SHIPPED_TOKENIZER

BY_NAME = {family.configs: family for family in FAMILIES}
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# Widths small enough for tests; head sizes as in the published models, so that both layouts mean the same model
TINY = {
    "unet": {"block_out_channels": [32, 64, 64, 64], "sample_size": 16},
    "vae": {"block_out_channels": [32, 32, 32, 32], "sample_size": 128},
    "text_encoder": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 1},
    "text_encoder_2": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 1},
}
# What Diffusers' pipelines are called for
PIPELINES = {PLAIN.channels: "", INPAINTING.channels: "Inpaint", EDITING.channels: "InstructPix2Pix"}
_TINY_DEPTHS = [1, 1, 2]  # of transformers, where a family's levels differ in them
StateDict = dict[str, torch.Tensor]
Networks = dict[str, Any]  # diffusers' and transformers' models, by their folders' names


def configurations(family: Family, *, tiny: bool, inputs: ModelInputs = PLAIN) -> dict[str, dict[str, Any]]:
    """The configurations of a family's components, by their parts."""
    text_parts = [kind.part for kind in family.encoders]
    configs = {part: family.config(part) for part in ("unet", "vae", *text_parts)}
    if tiny:
        for part, config in configs.items():
            config |= copy.deepcopy(TINY[part])
        unet = configs["unet"]
        levels = len(unet["down_block_types"])
        unet["block_out_channels"] = unet["block_out_channels"][:levels]
        if "transformer_layers_per_block" in unet:
            unet["transformer_layers_per_block"] = _TINY_DEPTHS
        if family.told_sizes:
            configs["text_encoder_2"]["projection_dim"] = pooled = configs["text_encoder_2"]["hidden_size"]
            unet["projection_class_embeddings_input_dim"] = pooled + 6 * unet["addition_time_embed_dim"]
        unet["cross_attention_dim"] = sum(configs[part]["hidden_size"] for part in text_parts)
        if family.head_size is not None:
            unet["attention_head_dim"] = [max(1, w // family.head_size) for w in unet["block_out_channels"]]
    configs["unet"]["in_channels"] = inputs.channels
    return configs


def random_networks(family: str, *, tiny: bool, seed: int, inputs: ModelInputs = PLAIN) -> Networks:
    """A family's components with the random weights their classes start from, by their parts.

    They are made where and in what PyTorch makes tensors: on the CPU in float32, or see `made_on`.
    """
    configs = configurations(BY_NAME[family], tiny=tiny, inputs=inputs)
    texts = {
        kind.part: CLIPTextModelWithProjection if kind.pooled else CLIPTextModel for kind in BY_NAME[family].encoders
    }
    torch.manual_seed(seed)
    return {
        "unet": UNet2DConditionModel.from_config(configs.pop("unet")),
        "vae": AutoencoderKL.from_config(configs.pop("vae")),
    } | {part: texts[part](CLIPTextConfig(**config)) for part, config in configs.items()}


@contextmanager
def made_on(device: str, dtype: torch.dtype) -> Iterator[None]:
    """A block in which networks are made on a device in a type, which takes seconds on a GPU."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


def family_of(networks: Networks) -> Family:
    """The family of components, told by their text encoders."""
    configs = {part: network.config.to_dict() for part, network in networks.items() if part not in ("unet", "vae")}
    return next(family for family in BY_NAME.values() if family.fits_texts(configs))


def write_folder(networks: Networks, folder: Path, prediction_type: str, variant: str | None) -> None:
    """Write a Diffusers folder."""
    family = family_of(networks)
    for part, network in networks.items():
        network.save_pretrained(folder / part, variant=variant)
    classes = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL", "scheduler": "DDIMScheduler"}
    use = PIPELINES[networks["unet"].config.in_channels]
    index: dict[str, Any] = {"_class_name": f"StableDiffusion{'XL' if family.told_sizes else ''}{use}Pipeline"}
    index["_diffusers_version"] = diffusers.__version__
    index |= {part: ["diffusers", name] for part, name in classes.items()}
    index |= {kind.part: ["transformers", type(networks[kind.part]).__name__] for kind in family.encoders}
    tokenizers = {kind.part.replace("text_encoder", "tokenizer"): kind.pad_token for kind in family.encoders}
    index |= {name: ["transformers", "CLIPTokenizer"] for name in tokenizers}
    _write_json(folder / "model_index.json", index)
    _write_json(
        folder / "scheduler" / "scheduler_config.json",
        {
            "_class_name": "DDIMScheduler",
            "num_train_timesteps": 1000,
            "beta_start": 0.00085,
            "beta_end": 0.012,
            "beta_schedule": "scaled_linear",
            "clip_sample": False,
            "steps_offset": 1,
            "prediction_type": prediction_type,
        },
    )
    for name, pad_token in tokenizers.items():
        shutil.copytree(SHIPPED_TOKENIZER, folder / name, dirs_exist_ok=True)
        path = folder / name / "tokenizer_config.json"
        _write_json(path, json.loads(path.read_text(encoding="utf-8")) | {"pad_token": pad_token})


def _write_json(path: Path, content: Mapping[str, object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def original_state_dict(networks: Networks, *, ema: bool) -> StateDict:
    """The components' weights under the names of the original checkpoints, with what training leaves beside them."""
    unet, vae = networks["unet"], networks["vae"]
    state = _renamed(unet.state_dict(), layout.unet_modules(unet.config), layout.UNET_PREFIX)
    if ema:
        prefix = "model."
        state |= {
            f"model_ema.{name.removeprefix(prefix).replace('.', '')}": value.clone() for name, value in state.items()
        }
    state |= _renamed(vae.state_dict(), layout.vae_modules(vae.config), layout.VAE_PREFIX)
    for name in list(state):
        if ".attn_1." in name and name.endswith(".weight") and state[name].dim() == 2:  # 1×1 convolutions there
            state[name] = state[name][:, :, None, None]
    for kind in family_of(networks).encoders:
        state |= _original_text(networks[kind.part].state_dict(), kind)
    state["betas"] = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64).float() ** 2
    return {name: value.contiguous() for name, value in state.items()}


def _renamed(state: StateDict, modules: dict[str, str], prefix: str) -> StateDict:
    renamed: StateDict = {}
    for name, value in state.items():
        original = layout.original_name(name, modules)
        assert original is not None, name  # both families' tensors all have one
        renamed[prefix + original] = value
    return renamed


def _original_text(state: StateDict, kind: TextEncoderKind) -> StateDict:
    names = kind.names[0]
    state = {name.removeprefix("text_model."): value for name, value in state.items() if "position_ids" not in name}
    if not names.openclip:
        return {f"{names.prefix}text_model.{name}": value for name, value in state.items()}
    projection = state.pop(layout.TEXT_PROJECTION, None)
    original = {} if projection is None else {names.prefix + layout.OPENCLIP_PROJECTION: projection.T}
    stacked: dict[str, list[torch.Tensor]] = {}
    for name, value in state.items():
        target, third = layout.openclip_name(name)
        if third is None:
            original[names.prefix + target] = value
        else:
            stacked.setdefault(names.prefix + target, [value] * 3)[third] = value
    original |= {name: torch.cat(thirds) for name, thirds in stacked.items()}
    # last layers that the family does not use stand in its files all the same
    last = max(int(name.split("resblocks.")[1].split(".")[0]) for name in original if "resblocks." in name)
    mark = f"resblocks.{last}."
    for spare in range(last + 1, last + 1 + kind.spare_layers):
        original |= {n.replace(mark, f"resblocks.{spare}."): v.clone() for n, v in original.items() if mark in n}
    return original | {f"{names.prefix}logit_scale": torch.tensor(4.6)}


def write_file(state: StateDict, path: Path) -> None:
    """Write one checkpoint file; a name ending in `.ckpt` makes it a pickle."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".ckpt":
        torch.save({"state_dict": state, "global_step": 840000}, path)
    else:
        save_file(state, path, metadata={"format": "pt"})


def main() -> None:
    """Run the tool."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, help="the folder; files are named like it, with an ending")
    parser.add_argument("--family", choices=BY_NAME, default="sd1")
    parser.add_argument("--layout", choices=["folder", "safetensors", "ckpt", "both"], default="both")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--prediction_type", choices=["epsilon", "v_prediction"], default="epsilon")
    parser.add_argument("--inputs", choices=[each.kind for each in DRAWN], default=PLAIN.kind)
    parser.add_argument("--variant", help="variant in the folder's file names, for instance fp16")
    parser.add_argument("--ema", action="store_true", help="put averaged weights into the file too")
    parser.add_argument("--tiny", action="store_true", help="widths of 32 and 64")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    diffusers.utils.logging.set_verbosity_error()
    inputs = next(each for each in DRAWN if each.kind == args.inputs)
    networks = random_networks(args.family, tiny=args.tiny, seed=args.seed, inputs=inputs)
    networks = {part: network.to(DTYPES[args.dtype]) for part, network in networks.items()}
    if args.layout in ("folder", "both"):
        write_folder(networks, args.path, args.prediction_type, args.variant)
    if args.layout != "folder":
        suffix = ".ckpt" if args.layout == "ckpt" else ".safetensors"
        write_file(original_state_dict(networks, ema=args.ema), args.path.with_name(args.path.name + suffix))


if __name__ == "__main__":
    main()
