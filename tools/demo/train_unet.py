"""Train the demo's text encoder and U-Net together on prepared latents.

    python -m tools.demo.train_unet --work WORK

Reads WORK/vae and WORK/latents.pt; writes WORK/unet.pt as it goes (an interrupted run goes on from there). Batches are
drawn from (seed, step) alone.
"""

from __future__ import annotations

import argparse
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from torch.nn.functional import mse_loss
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from tools.demo.scenes import BUCKETS, caption
from tools.demo.tokenizer import save_tokenizer
from tools.demo.training import Average, Log, learning_rate, save_checkpoint

SCHEDULE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "clip_sample": False,
}
MIN_SNR_GAMMA = 5.0  # Hang et al. 2023, "Efficient Diffusion Training via Min-SNR Weighting Strategy"
TEXT_WIDTH = 128


def new_unet() -> UNet2DConditionModel:
    """SD 1.x's layout, narrow: two layers a block, so that every key of a full-size model exists here too."""
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(32, 64, 128, 128),
        layers_per_block=2,
        attention_head_dim=(1, 2, 4, 4),
        cross_attention_dim=TEXT_WIDTH,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    )
    for name, module in unet.named_modules():  # residual branches start at zero, as in the original code
        if name.endswith(("conv2", "proj_out", "conv_out")):
            torch.nn.init.zeros_(module.weight)
            torch.nn.init.zeros_(module.bias)
    return unet


def new_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=4 * TEXT_WIDTH,
            num_hidden_layers=3,
            num_attention_heads=4,
            projection_dim=TEXT_WIDTH,
            max_position_embeddings=77,
            hidden_act="quick_gelu",
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


class Conditioned(torch.nn.Module):
    """Text encoder and U-Net as one function: noisy latents, times, token ids → predicted noise."""

    def __init__(self, text_encoder: CLIPTextModel, unet: UNet2DConditionModel):
        super().__init__()
        self.text_encoder, self.unet = text_encoder, unet

    def forward(self, noisy: torch.Tensor, times: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return self.unet(noisy, times, self.text_encoder(ids).last_hidden_state).sample


def snr_weights(scheduler: DDPMScheduler, times: torch.Tensor) -> torch.Tensor:
    """Min-SNR weight of each sample of a noise prediction, (B)."""
    signal = scheduler.alphas_cumprod[times]
    snr = signal / (1 - signal)
    return snr.clamp(max=MIN_SNR_GAMMA) / snr


class Batches:
    """Batches of latents and freshly worded captions; which ones follows from seed and step."""

    def __init__(self, latents_file: Path, tokenizer: CLIPTokenizer, seed: int, size: int):
        self.kept = torch.load(latents_file, weights_only=False)
        self.tokenizer, self.seed, self.size = tokenizer, seed, size

    def draw(self, step: int, share_two: float, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents (B, 4, h, w) and ids (B, length); `share_two` of the scenes have two objects."""
        rng = random.Random(self.seed * 1_000_003 + step)
        bucket = self.kept[BUCKETS[0] if rng.random() < 0.8 else rng.choice(BUCKETS[1:])]
        ones, count = bucket["ones"], len(bucket["scenes"])
        chosen = [
            rng.randrange(ones, count) if rng.random() < share_two else rng.randrange(ones) for _ in range(self.size)
        ]
        texts = ["" if rng.random() < 0.1 else caption(rng, bucket["scenes"][i]).text for i in chosen]
        ids = self.tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        latents = bucket["latents"][chosen].float()
        return latents.to(memory_format=torch.channels_last), ids.input_ids


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=20000)
    parser.add_argument("--batch", type=int, default=24)
    parser.add_argument("--lr", type=float, default=8e-4)
    parser.add_argument("--short_tokens", type=int, default=32, help="length of texts in three of four batches: faster")
    parser.add_argument("--short_share", type=float, default=0.8, help="of the training, before all texts are 77 long")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=3)
    train(parser.parse_args())


def train(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    tokenizer = save_tokenizer(args.work / "tokenizer")
    model = Conditioned(new_text_encoder(tokenizer), new_unet()).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.01, betas=(0.9, 0.99), fused=True)
    average, start, log = Average(model), 0, Log(args.work / "unet.jsonl")
    path = args.work / "unet.pt"
    if path.exists():
        state = torch.load(path, weights_only=False)
        model.load_state_dict(state["model"])
        average.module.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        start, log.spent, average.updates = state["step"], state["cpu_hours"], state["step"]
    scheduler, batches = DDPMScheduler(**SCHEDULE), Batches(args.work / "latents.pt", tokenizer, args.seed, args.batch)
    workers = ThreadPoolExecutor(args.threads, initializer=torch.set_num_threads, initargs=(1,))
    log.write(step=start, settings={k: str(v) for k, v in vars(args).items()})
    recent = None
    for step in range(start, args.steps):
        loss = train_step(model, optimizer, workers, scheduler, batches, step, args)
        average.update(model)
        recent = loss if recent is None else recent + 0.02 * (loss - recent)
        if step % 50 == 0:
            log.write(step=step, loss=recent)
        if step % 100 == 99 or step == args.steps - 1:
            save_checkpoint(
                path,
                {
                    "model": model.state_dict(),
                    "average": average.module.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "step": step + 1,
                    "cpu_hours": log.cpu_hours(),
                },
            )


def train_step(
    model, optimizer, workers: ThreadPoolExecutor, scheduler, batches: Batches, step: int, args: argparse.Namespace
) -> float:
    """One step: each thread takes a part of the batch, the gradients are added up."""
    progress = step / args.steps
    length = 77 if step % 4 == 0 or progress >= args.short_share else args.short_tokens
    latents, ids = batches.draw(step, share_two=min(0.45, 0.1 + step / 10_000), length=length)
    generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
    noise = torch.randn(latents.shape, generator=generator)
    times = torch.randint(0, 1000, (len(latents),), generator=generator)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, args.steps, args.lr)
    parameters = list(model.parameters())

    def gradients(part: slice) -> tuple[float, tuple[torch.Tensor, ...]]:
        noisy = scheduler.add_noise(latents[part], noise[part], times[part])
        errors = mse_loss(model(noisy, times[part], ids[part]), noise[part], reduction="none").mean((1, 2, 3))
        loss = (errors * snr_weights(scheduler, times[part])).sum() / len(latents)
        return loss.item(), torch.autograd.grad(loss, parameters)

    share = -(-len(latents) // args.threads)
    parts = [slice(i, i + share) for i in range(0, len(latents), share)]
    results = list(workers.map(gradients, parts))
    for parameter, *grads in zip(parameters, *(g for _, g in results)):
        parameter.grad = sum(grads[1:], start=grads[0])
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    return sum(loss for loss, _ in results)


if __name__ == "__main__":
    main()
