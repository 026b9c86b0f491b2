"""What OpenVINO's own conversion of a model takes, for tools/benchmark.py: static shapes, no text encoders.

    python tools/benchmark_openvino.py MEASUREMENT CASE

MEASUREMENT is `convert`, which writes the U-Net and the VAE's decoder into the case's folder, or `steady`, which
computes guided steps and decodings with them; CASE is as for tools/benchmark_child.py.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel

from library.machine.openvino_itself import openvino
from tools.benchmark_child import CELL_PX, TOKENS, Case

_LEAST, _SECONDS = 3, 20  # calls that are measured, and how long at most


class Step(torch.nn.Module):
    """A U-Net called with tensors alone."""

    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.unet: Any = unet

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        text: torch.Tensor,
        pooled: torch.Tensor | None = None,
        sizes: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """(R, C, h, w), (), (R, tokens, width), and for XL (R, width) and (R, 6) → (R, C, h, w)"""
        told = None if pooled is None else {"text_embeds": pooled, "time_ids": sizes}
        return self.unet(sample, timestep, text, added_cond_kwargs=told).sample


class Decode(torch.nn.Module):
    """A VAE's decoding."""

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        """(B, C, h, w) → (B, 3, 8h, 8w)"""
        return self.vae.decode(latents).sample


def folder_of(case: Case) -> Path:
    """Where the converted models lie."""
    return Path(case.outdir) / "openvino"


def convert(case: Case) -> dict[str, float]:
    """Convert the case's U-Net and decoder for its sizes."""
    folder = folder_of(case)
    folder.mkdir(exist_ok=True)
    unet = UNet2DConditionModel.from_pretrained(case.ckpt, subfolder="unet", dtype=torch.float32).eval()
    _convert(Step(unet), unet_inputs(case), folder / "unet.xml")
    del unet
    vae = AutoencoderKL.from_pretrained(case.ckpt, subfolder="vae", dtype=torch.float32).eval()
    _convert(Decode(vae), [latents_of(case, case.batch_size)], folder / "vae.xml")
    return {}


def _convert(model: torch.nn.Module, inputs: Sequence[torch.Tensor], file: Path) -> None:
    with torch.no_grad():
        converted = openvino.convert_model(model, example_input=tuple(inputs))
    converted.reshape({place: list(each.shape) for place, each in enumerate(inputs)})
    openvino.save_model(converted, file, compress_to_fp16=True)


def latents_of(case: Case, rows: int, channels: int = 4) -> torch.Tensor:
    """Latents of noise."""
    return torch.randn(rows, channels, case.height // CELL_PX, case.width // CELL_PX)


def unet_inputs(case: Case) -> list[torch.Tensor]:
    """What `Step` is called with for a guided step of the case's batch."""
    config = UNet2DConditionModel.load_config(case.ckpt, subfolder="unet")
    rows = 2 * case.batch_size
    inputs = [latents_of(case, rows, config["in_channels"]), torch.tensor(500.0)]
    inputs.append(torch.randn(rows, TOKENS, config["cross_attention_dim"]))
    if config.get("addition_embed_type"):
        pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
        inputs += [torch.randn(rows, pooled), torch.full((rows, 6), 1024.0)]
    return inputs


def steady(case: Case) -> dict[str, float]:
    """Medians of the seconds that a guided step and the decoding of a picture take."""
    latents = latents_of(case, case.batch_size)
    return {
        "step_s": _seconds(case, "unet", unet_inputs(case)),
        "vae_s": _seconds(case, "vae", [latents]) / case.batch_size,
    }


def _seconds(case: Case, name: str, inputs: Sequence[torch.Tensor]) -> float:
    settings = {
        "INFERENCE_PRECISION_HINT": "bf16" if case.precision == "bf16" else "f32",
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }
    request = openvino.Core().compile_model(folder_of(case) / f"{name}.xml", "CPU", settings).create_infer_request()
    arrays = {place: np.asarray(each) for place, each in enumerate(inputs)}
    request.infer(arrays)  # what happens once
    seconds: list[float] = []
    while len(seconds) < _LEAST or (sum(seconds) < _SECONDS and len(seconds) < 100):
        begun = time.perf_counter()
        request.infer(arrays)
        seconds.append(time.perf_counter() - begun)
    return statistics.median(seconds)


if __name__ == "__main__":
    print(json.dumps({"convert": convert, "steady": steady}[sys.argv[1]](Case(**json.loads(sys.argv[2])))))
