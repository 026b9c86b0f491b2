"""Render the U-Net's training scenes once and keep their latents.

    python -m tools.demo.latents --work WORK

Reads WORK/vae, or the autoencoder of `--model`; writes WORK/latents.pt: for each size, scenes and latents
(N, 4, height/8, width/8), scaled.
"""

from __future__ import annotations

import argparse
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from diffusers import AutoencoderKL

from tools.demo.render import render
from tools.demo.scenes import BUCKETS, Scene, draw_scene
from tools.demo.train_vae import to_tensor


def encode(vae: AutoencoderKL, scenes: list[Scene], batch: int = 32, threads: int = 2) -> torch.Tensor:
    """Scenes of one size → scaled latents (N, 4, height/8, width/8), float16."""

    @torch.no_grad()
    def encode_batch(start: int) -> torch.Tensor:
        x = to_tensor([render(s) for s in scenes[start : start + batch]]).to(memory_format=torch.channels_last)
        return (vae.encode(x).latent_dist.mean * vae.config.scaling_factor).half()

    with ThreadPoolExecutor(threads) as pool:
        return torch.cat(list(pool.map(encode_batch, range(0, len(scenes), batch))))


def training_scenes(seed: int, ones: int, twos: int, size: tuple[int, int]) -> list[Scene]:
    """`ones` scenes of one object, then `twos` of two, without the combinations held out."""
    rng = random.Random(f"{seed} {size}")
    return [draw_scene(rng, 1 if i < ones else 2, size=size) for i in range(ones + twos)]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--model", type=Path, help="take the autoencoder of this model folder")
    parser.add_argument("--scenes", type=int, default=12000, help="of 128×128; a sixth as many of each other size")
    parser.add_argument("--seed", type=int, default=2)
    args = parser.parse_args(arguments)
    vae = AutoencoderKL.from_pretrained((args.model or args.work) / "vae", dtype=torch.float32).to(
        memory_format=torch.channels_last
    )
    kept = {}
    for size in BUCKETS:
        count = args.scenes if size == (128, 128) else args.scenes // 6
        scenes = training_scenes(args.seed, count // 2, count - count // 2, size)
        kept[size] = {"scenes": scenes, "latents": encode(vae, scenes), "ones": count // 2}
        print(f"{size}: {count} scenes", flush=True)
    torch.save(kept, args.work / "latents.pt")


if __name__ == "__main__":
    main()
