"""Train the demo's text encoder and U-Net together on prepared latents.

    python -m tools.demo.train_unet --work WORK

Reads WORK/vae and WORK/latents.pt; writes WORK/unet.pt as it goes (an interrupted run goes on from there). Batches are
drawn from (seed, step) alone.
"""

from __future__ import annotations

import argparse
import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from library.draw.text_encoding import weigh
from library.files.families import SD1
from library.files.tokenizers import load_tokenizer
from library.plan.tokens import PromptTokens
from tools.demo.emphasis import emphasised, padded
from tools.demo.halves import allow_halves, halves_masks, halves_words
from tools.demo.hints import NOTHING_TOLD, token_errors, told
from tools.demo.model_files import load_frozen
from tools.demo.scenes import BUCKETS, Scene, caption
from tools.demo.tokenizer import save_tokenizer
from tools.demo.training import Run, descend, plateau

SCHEDULE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "clip_sample": False,
}
LARGEST_WEIGHT = 15.0
GUIDANCE_SCALE = 5.0  # what lessons in guidance are held at
GUIDED_TIMES = 400  # below them a picture shows most of what its text says
TEXT_WIDTH = 128


def new_unet() -> UNet2DConditionModel:
    """SD 1.x's layout, narrow, with one layer a block: what two cores can train in a few hours."""
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(40, 80, 120, 120),
        layers_per_block=1,
        norm_num_groups=8,  # groups of several channels: one channel alone would lose its mean, a flat ground's colour
        attention_head_dim=2,
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
            num_hidden_layers=2,
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

    def forward(
        self,
        noisy: torch.Tensor,
        times: torch.Tensor,
        ids: torch.Tensor,
        emphasis: torch.Tensor,
        halves: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The predicted noise, and the texts' embeddings before their tokens' weights, `emphasis`, are applied.

        For `halves` see `HalvesAttention`.
        """
        text = self.text_encoder(ids).last_hidden_state
        arguments = None if halves is None else {"halves": halves}
        return self.unet(noisy, times, weigh(text, emphasis[..., None]), cross_attention_kwargs=arguments).sample, text


def snr_weights(scheduler: DDPMScheduler, times: torch.Tensor) -> torch.Tensor:
    """Loss weight of each sample of a noise prediction, (B): 1 / √SNR.

    Halfway between the noise's error (weight 1) and the picture's (1 / SNR): where an object stands is decided in
    the noisiest third of the times, where the noise's error alone hardly depends on it.
    """
    signal = scheduler.alphas_cumprod[times]
    return ((1 - signal) / signal).sqrt().clamp(max=LARGEST_WEIGHT)


def spread_times(count: int, generator: torch.Generator, least: int = 0, end: int = 1000) -> torch.Tensor:
    """Random times from `least` up to, not including, `end`, one from each of `count` equal parts.

    So batches differ less (Kingma et al. 2021, "Variational Diffusion Models", app. I.1).
    """
    share = (torch.arange(count) + torch.rand(count, generator=generator)) / count
    return (least + (end - least) * share).long().clamp(max=end - 1)


@dataclass(frozen=True)
class Batch:
    """What one step needs: latents with noise and the noise, (B, 4, h, w); times, loss weights (B); ids (B, texts, n).

    `emphasis` is the weight of each token. `answers`, (B, places, 2), is what `told` says of the texts. Where pictures
    have a text for each half, `halves` are their masks (B, 2, h, w). Where the lesson is `guided`, each picture has no
    words, then its text.
    """

    noisy: torch.Tensor
    noise: torch.Tensor
    times: torch.Tensor
    weights: torch.Tensor
    ids: torch.Tensor
    emphasis: torch.Tensor
    answers: torch.Tensor
    halves: torch.Tensor | None
    guided: bool


class Batches:
    """Batches of latents and freshly worded captions; which ones follows from seed and step."""

    def __init__(self, latents_file: Path, prompts: PromptTokens, args: argparse.Namespace):
        self.kept = torch.load(latents_file, weights_only=False)
        self.prompts, self.args, self.scheduler = prompts, args, DDPMScheduler(**SCHEDULE)

    def word(self, rng: random.Random, scene: Scene, weighted: bool) -> tuple[str, list[tuple[int, int]]]:
        """A caption, or none, which is what guidance compares with; and what it puts where, unless weights decide."""
        if rng.random() < 0.1:
            return "", NOTHING_TOLD
        said = caption(rng, scene)
        if self.args.open_places is not None:
            leave_open = rng.random() < self.args.open_places
            while all(said.says_place) == leave_open:
                said = caption(rng, scene)
        return (emphasised(rng, scene, said.text), NOTHING_TOLD) if weighted else (said.text, told(scene, said))

    def draw(self, step: int) -> Batch:
        args, rng = self.args, random.Random(self.args.seed * 1_000_003 + step)
        kind = rng.random()
        by_halves, guided = kind < args.share_halves, kind > 1 - args.share_guided
        weighted = not by_halves and kind < args.share_halves + args.share_weighted
        bucket = self.kept[BUCKETS[0] if by_halves or rng.random() < 0.9 else rng.choice(BUCKETS[1:])]
        count = args.batch // 2 if guided else args.batch  # each is predicted twice
        ones, every = bucket["ones"], bucket["scenes"]
        share_two = 1.0 if by_halves else min(args.share_two, 0.05 + step / 10_000)  # begin with one object
        chosen = [
            rng.randrange(ones, len(every)) if rng.random() < share_two else rng.randrange(ones) for _ in range(count)
        ]
        scenes, halves = [every[i] for i in chosen], None
        if by_halves:
            texts = [text for scene in scenes for text in halves_words(rng, scene)]
            halves, answers = halves_masks(scenes), [NOTHING_TOLD] * count
        else:
            texts, answers = zip(*(self.word(rng, scene, weighted) for scene in scenes))
            if guided:
                texts = [text for said in texts for text in ("", said)]
        length = 77 if step % 4 == 0 or step >= args.short_share * args.steps else args.short_tokens
        tokens = padded(self.prompts, [self.prompts.tokenize(text) for text in texts], length)
        latents = bucket["latents"][chosen].float()
        generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
        noise = torch.randn(latents.shape, generator=generator)
        times = spread_times(count, generator, *((0, GUIDED_TIMES) if guided else (args.least_time,)))
        noisy = self.scheduler.add_noise(latents, noise, times).to(memory_format=torch.channels_last)
        weights = torch.ones(count) if guided else snr_weights(self.scheduler, times)
        ids, emphasis = (x.unflatten(0, (count, -1)) for x in tokens)
        return Batch(noisy, noise, times, weights, ids, emphasis, torch.tensor(answers), halves, guided)


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--resume_from", type=Path, help="without WORK/unet.pt: begin with this model folder's weights")
    parser.add_argument("--steps", type=int, default=20000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--share_two", type=float, default=0.4, help="of scenes with two objects, reached by and by")
    parser.add_argument("--share_halves", type=float, default=0.1, help="of batches with a text for each half")
    parser.add_argument("--share_weighted", type=float, default=0.1, help="of batches with weights on words")
    parser.add_argument("--share_guided", type=float, default=0.2, help="of batches that are lessons in guidance")
    parser.add_argument("--short_tokens", type=int, default=32, help="length of texts in three of four batches: faster")
    parser.add_argument("--short_share", type=float, default=0.8, help="of the training, before all texts are 77 long")
    parser.add_argument("--least_time", type=int, default=0, help="e.g. 700: only noisy times, which settle places")
    parser.add_argument("--hint", type=float, default=0.02, help="weight of the text encoder's own loss")
    parser.add_argument("--open_places", type=float, help="share of captions that leave a place open; 0: none does")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=3)
    return parser


def main(arguments: list[str] | None = None) -> None:
    train(options().parse_args(arguments))


def train(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    torch.set_num_threads(1)  # the workers share each batch; operations shared as well would spin in each other's way
    tokenizer = save_tokenizer(args.work / "tokenizer")
    model = Conditioned(new_text_encoder(tokenizer), new_unet().to(memory_format=torch.channels_last))
    if args.resume_from:
        _, text_encoder, _, unet = load_frozen(args.resume_from)
        model = Conditioned(text_encoder, unet).requires_grad_(True)
    allow_halves(model.unet)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.01, betas=(0.9, 0.99), fused=True)
    run = Run(args.work / "unet.pt", model, optimizer, decay=0.999)
    run.log.write(step=run.start, settings={k: str(v) for k, v in vars(args).items()})
    prompts = PromptTokens(load_tokenizer(args.work / "tokenizer", SD1), SD1.encoders, len(tokenizer))
    batches = Batches(args.work / "latents.pt", prompts, args)
    workers = ThreadPoolExecutor(args.threads, initializer=torch.set_num_threads, initargs=(1,))
    descend(
        optimizer,
        lambda step: gradients(model, workers, batches.draw(step), args.threads, args.hint),
        run.log,
        plateau(args.steps, args.lr),
        range(run.start, args.steps),
        run.after,
    )
    run.save(args.steps)


def noise_errors(model: Conditioned, batch: Batch, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
    """Squared errors of the predicted noise, (rows), and the texts' embeddings, (rows, texts, n, width).

    A lesson in guidance adds the errors without words, with them, and that of the guided prediction over its scale:
    guidance enlarges the difference of the two, and where the noise is faint they differ by little but their errors.
    """
    noisy, noise, times, ids = batch.noisy[rows], batch.noise[rows], batch.times[rows], batch.ids[rows]
    emphasis = batch.emphasis[rows].flatten(0, 1)
    if batch.guided:
        noisy, times = noisy.repeat_interleave(2, 0), times.repeat_interleave(2, 0)
    halves = None if batch.halves is None else batch.halves[rows]
    predicted, text = model(noisy, times, ids.flatten(0, 1), emphasis, halves)
    text = text.unflatten(0, ids.shape[:2])
    if not batch.guided:
        return (predicted - noise).square().mean((1, 2, 3)), text
    without, with_words = predicted.unflatten(0, (-1, 2)).unbind(1)
    guided = without + GUIDANCE_SCALE * (with_words - without)
    parts = ((without, 1.0), (with_words, 1.0), (guided, GUIDANCE_SCALE))
    return sum((p - noise).square().mean((1, 2, 3)) / scale for p, scale in parts), text


def gradients(model: Conditioned, workers: ThreadPoolExecutor, batch: Batch, threads: int, hint: float) -> float:
    """One batch's loss; each thread takes a part of the batch, the gradients are added up.

    Beside the noise the text encoder is asked what stands where, weighted by `hint`; the loss returned is the noise's.
    """
    parameters = list(model.parameters())
    count = len(batch.noise)
    end = model.text_encoder.config.eos_token_id
    assert isinstance(end, int)  # as CLIP's is

    def part(rows: slice) -> tuple[float, tuple[torch.Tensor, ...]]:
        errors, text = noise_errors(model, batch, rows)
        loss = (errors * batch.weights[rows]).sum() / count
        extra = 0.0
        if batch.halves is None:
            ids = batch.ids[rows, -1]
            extra = token_errors(text[:, -1], ids == end, batch.answers[rows]).sum() / count
        return loss.item(), torch.autograd.grad(loss + hint * extra, parameters)

    share = -(-count // threads)
    results = list(workers.map(part, [slice(i, i + share) for i in range(0, count, share)]))
    for parameter, *grads in zip(parameters, *(g for _, g in results)):
        parameter.grad = sum(grads[1:], start=grads[0])
    return sum(loss for loss, _ in results)


if __name__ == "__main__":
    main()
