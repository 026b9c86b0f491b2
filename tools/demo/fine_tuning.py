"""What the companions' training shares: scenes drawn and encoded once, and the denoising loss."""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from diffusers import DDPMScheduler
from torch.nn.functional import mse_loss

from tools.demo.latents import encode
from tools.demo.scenes import Scene, caption
from tools.demo.train_unet import SCHEDULE, snr_weights, spread_times
from tools.demo.training import Log, cosine, descend

TOKENS = 32  # of the texts, which are all shorter: faster than 77


@dataclass
class Material:
    """Scenes, their latents (N, 4, 16, 16) and a way to word them."""

    scenes: list[Scene]
    latents: torch.Tensor
    word: Callable[[random.Random, Scene], str]


def plain_words(rng: random.Random, scene: Scene) -> str:
    """A caption that does not name the style: a style to be learnt has no word."""
    return caption(rng, replace(scene, things=tuple(replace(t, style="flat") for t in scene.things))).text


def prepare(vae, scenes: list[Scene], word=plain_words) -> Material:
    return Material(scenes, encode(vae, scenes), word)


def fit(
    parameters: Sequence[torch.Tensor],
    predict: Callable,
    tokenizer,
    material: Material,
    log: Log,
    args: argparse.Namespace,
) -> None:
    """Minimise the noise prediction's error; `predict(noisy, times, ids, chosen)` gives the noise, (B, 4, h, w).

    `args` holds `steps`, `batch`, `lr` and `seed`.
    """
    optimizer, scheduler = torch.optim.AdamW(parameters, lr=args.lr, weight_decay=0.0), DDPMScheduler(**SCHEDULE)

    def gradients(step: int) -> float:
        rng = random.Random(args.seed * 1_000_003 + step)
        generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
        chosen = [rng.randrange(len(material.scenes)) for _ in range(args.batch)]
        texts = ["" if rng.random() < 0.2 else material.word(rng, material.scenes[i]) for i in chosen]
        ids = tokenizer(texts, padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt").input_ids
        latents = material.latents[chosen].float().to(memory_format=torch.channels_last)
        noise = torch.randn(latents.shape, generator=generator)
        times = spread_times(args.batch, generator)
        predicted = predict(scheduler.add_noise(latents, noise, times), times, ids, chosen)
        errors = mse_loss(predicted, noise, reduction="none").mean((1, 2, 3))
        loss = (errors * snr_weights(scheduler, times)).mean()
        loss.backward()
        return loss.item()

    descend(optimizer, gradients, log, cosine(args.steps, args.lr, warmup=20), range(args.steps))


def training_options(parser: argparse.ArgumentParser, *, steps: int, batch: int, lr: float, seed: int) -> None:
    """The options that every companion's training has, with its own defaults."""
    parser.add_argument("--model", type=Path, required=True, help="the demo model's folder")
    parser.add_argument("--work", type=Path, required=True, help="folder for the log")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--batch", type=int, default=batch)
    parser.add_argument("--lr", type=float, default=lr)
    parser.add_argument("--seed", type=int, default=seed)
