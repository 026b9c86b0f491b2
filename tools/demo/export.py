"""Write the trained demo model as a Diffusers folder in half precision.

python -m tools.demo.export --work WORK --out examples/shapes
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from safetensors.torch import save_file

from tools.demo.tokenizer import save_tokenizer
from tools.demo.train_unet import Conditioned, new_text_encoder, new_unet

SCHEDULER = {
    "_class_name": "PNDMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
    "clip_sample": False,
}
MODEL_INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "PNDMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def published_key(key: str) -> str:
    """Checkpoints keep the level `text_model.` that transformers 5.6 dropped from the module names."""
    return key if key.startswith("text_model.") else f"text_model.{key}"


def write_json(path: Path, values: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values, indent=2) + "\n")


def half(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Float tensors in float16, contiguous as safetensors wants them."""
    return {k: v.detach().to(torch.float16).contiguous() for k, v in state.items() if v.is_floating_point()}


def save_text_encoder(text_encoder, folder: Path) -> None:
    configuration = text_encoder.config.to_dict()
    configuration.update(architectures=["CLIPTextModel"], dtype="float16", model_type="clip_text_model")
    write_json(folder / "config.json", configuration)
    state = {published_key(k): v for k, v in half(text_encoder.state_dict()).items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def save_diffusers(model, folder: Path) -> None:
    configuration = json.loads(model.to_json_string())
    configuration.pop("_name_or_path", None)  # a folder of whoever trained it
    write_json(folder / "config.json", configuration)
    save_file(half(model.state_dict()), folder / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})


def export(work: Path, vae: Path, out: Path) -> None:
    """The averaged weights of WORK/unet.pt and an autoencoder's folder → a model folder."""
    tokenizer = save_tokenizer(out / "tokenizer")
    model = Conditioned(new_text_encoder(tokenizer), new_unet())
    model.load_state_dict(torch.load(work / "unet.pt", weights_only=True)["average"])
    save_text_encoder(model.text_encoder, out / "text_encoder")
    save_diffusers(model.unet, out / "unet")
    save_diffusers(AutoencoderKL.from_pretrained(vae), out / "vae")
    write_json(out / "scheduler" / "scheduler_config.json", SCHEDULER)
    write_json(out / "model_index.json", MODEL_INDEX)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--vae", type=Path, help="the autoencoder's folder; default: WORK/vae")
    args = parser.parse_args(arguments)
    export(args.work, args.vae or args.work / "vae", args.out)


if __name__ == "__main__":
    main()
