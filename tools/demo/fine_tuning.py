"""What the companions' training shares: scenes drawn and encoded once, and the denoising loss."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from diffusers import DDPMScheduler
from torch.nn.functional import mse_loss

from tools.demo.latents import encode
from tools.demo.scenes import Scene, caption
from tools.demo.train_unet import SCHEDULE, snr_weights
from tools.demo.training import Log, learning_rate


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
    parameters: list[torch.Tensor],
    predict: Callable,
    tokenizer,
    material: Material,
    log: Log,
    *,
    steps: int,
    batch: int,
    lr: float,
    seed: int,
) -> None:
    """Minimise the noise prediction's error; `predict(noisy, times, ids, chosen)` gives the noise, (B, 4, h, w)."""
    optimizer, scheduler = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0), DDPMScheduler(**SCHEDULE)
    recent = 1.0
    for step in range(steps):
        rng = random.Random(seed * 1_000_003 + step)
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        chosen = [rng.randrange(len(material.scenes)) for _ in range(batch)]
        texts = ["" if rng.random() < 0.1 else material.word(rng, material.scenes[i]) for i in chosen]
        ids = tokenizer(texts, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
        latents = material.latents[chosen].float().to(memory_format=torch.channels_last)
        noise = torch.randn(latents.shape, generator=generator)
        times = torch.randint(0, 1000, (batch,), generator=generator)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, lr, warmup=20)
        predicted = predict(scheduler.add_noise(latents, noise, times), times, ids, chosen)
        errors = mse_loss(predicted, noise, reduction="none").mean((1, 2, 3))
        loss = (errors * snr_weights(scheduler, times)).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        recent += 0.05 * (loss.item() - recent)
        if step % 25 == 0 or step == steps - 1:
            log.write(step=step, loss=recent)
