"""Train the demo's autoencoder on rendered scenes: crops of 64×64, whole pictures, the decoder alone.

    python -m tools.demo.train_vae --work WORK

Writes WORK/vae.pt as it goes (an interrupted run goes on from there) and WORK/vae/ when the encoder is finished (the
U-Net's training can begin then) and again when the decoder is.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL

from tools.demo.render import render
from tools.demo.scenes import BUCKETS, LORA_STYLES, STYLES, draw_scene
from tools.demo.training import Run, cosine, descend

KL_WEIGHT = 0.0002  # just enough for smooth latents, which a small U-Net predicts well
RAMP = (100, 600)  # steps between which noise and KL grow: from the start on they would empty the latents
FIRST_LOGVAR = -5.0  # the posterior starts narrow …
LARGEST_LOGVAR = -3.0  # … and stays narrow: no channel is given up
LATENT_SPREAD = 0.6  # of scaled latents; below 1, since flat colours outlast the schedule's noise (Chen 2023)
DECODER_NOISE = 0.1  # on latents that spread by about 2
CARRIED = 8  # channels that carry the picture through a new autoencoder: R G B, their negatives, two constants


def new_vae() -> AutoencoderKL:
    """A small autoencoder that begins as "shrink to an eighth, enlarge again"; training adds the detail."""
    vae = AutoencoderKL(
        block_out_channels=(8, 16, 32, 64),
        layers_per_block=1,
        norm_num_groups=1,
        sample_size=128,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    )
    with torch.no_grad():
        for name, module in vae.named_modules():
            if name.endswith(("conv2", "to_out.0")):  # residual branches start at zero
                module.weight.zero_()
                module.bias.zero_()
            elif name.endswith(("conv_shortcut", "upsamplers.0.conv", "downsamplers.0.conv")):
                carry(module, 0.25 if "downsamplers" in name else 1.0)
        for half in (vae.encoder, vae.decoder):
            enter(half.conv_in)
            leave(half.conv_out)
        for conv in (vae.quant_conv, vae.post_quant_conv):
            conv.weight.copy_(torch.eye(len(conv.weight))[..., None, None])
            bias_of(conv).zero_()
        vae.encoder.conv_out.weight[3] *= 6  # the fourth latent starts as a mixture of details, loud enough to be used
        bias_of(vae.quant_conv)[4:] = FIRST_LOGVAR
    return vae


def bias_of(conv: torch.nn.Conv2d) -> torch.Tensor:
    """The bias of a convolution, which all of an autoencoder's have."""
    assert conv.bias is not None
    return conv.bias


def carry(conv: torch.nn.Conv2d, tap: float) -> None:
    """Pass the first channels on: the middle of the kernel, or (tap 0.25) the mean of 2×2 pixels."""
    conv.weight[:CARRIED] = 0
    bias_of(conv)[:CARRIED] = 0
    size = conv.kernel_size[0]
    taps = slice(0, 2) if tap == 0.25 else slice(size // 2, size // 2 + 1)
    for i in range(CARRIED):
        conv.weight[i, i, taps, taps] = tap


def enter(conv: torch.nn.Conv2d) -> None:
    """R G B, -R -G -B, 3, -3: pairs survive normalisation and SiLU, since silu(x) - silu(-x) = x."""
    conv.weight[:CARRIED] = 0
    bias_of(conv)[:CARRIED] = torch.tensor([0.0] * 6 + [3.0, -3.0])
    for i in range(3):
        conv.weight[i, i, 1, 1] = 1
        conv.weight[i + 3, i, 1, 1] = -1


def leave(conv: torch.nn.Conv2d) -> None:
    """Join the pairs again; normalisation has divided by about 1.2."""
    conv.weight[:3] = 0
    bias_of(conv).zero_()
    for i in range(3):
        conv.weight[i, i, 1, 1], conv.weight[i, i + 3, 1, 1] = 1.2, -1.2


def to_tensor(pictures: list[np.ndarray]) -> torch.Tensor:
    """uint8 (height, width, 3) each → float32 (B, 3, H, W) in -1…1."""
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


def whole_pictures(rng: random.Random, count: int) -> torch.Tensor:
    """Scenes of every style: the LoRAs' styles must survive the autoencoder too."""
    return to_tensor(
        [
            render(draw_scene(rng, combinations="all", styles=STYLES if rng.random() < 0.75 else LORA_STYLES))
            for _ in range(count)
        ]
    )


def near(rng: random.Random, centre: float, side: int) -> int:
    """Where a crop of 64 pixels begins that holds a part of an object around `centre`, a share of `side` pixels."""
    return min(max(round(centre * side) - 32 + rng.randint(-30, 30), 0), side - 64)


def crops(rng: random.Random, count: int) -> torch.Tensor:
    """`count` crops of 64×64, four of each scene, (count, 3, 64, 64)."""
    pictures = []
    for _ in range(count // 4):
        styles = STYLES if rng.random() < 0.75 else LORA_STYLES
        scene = draw_scene(rng, combinations="all", styles=styles, size=rng.choice(BUCKETS))
        picture = render(scene)
        for _ in range(4):
            thing = rng.choice(scene.things)
            y, x = near(rng, thing.y, scene.height), near(rng, thing.x, scene.width)
            pictures.append(picture[y : y + 64, x : x + 64])
    return to_tensor(pictures)


def slopes(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return x[..., 1:, :] - x[..., :-1, :], x[..., :, 1:] - x[..., :, :-1]


def errors(decoded: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss (L1 and squares of pixels, L1 of slopes) and the pixels' L1 alone."""
    pixels, squares = (decoded - x).abs().mean(), ((decoded - x) ** 2).mean()
    edges = sum((a - b).abs().mean() for a, b in zip(slopes(decoded), slopes(x)))
    return pixels + squares + 0.5 * edges, pixels.detach()


def step_of_both(vae: AutoencoderKL, x: torch.Tensor, ramp: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss of encoder and decoder with KL divergence, and the pixels' L1."""
    with torch.autocast("cpu", torch.bfloat16):
        mean, logvar = vae.quant_conv(vae.encoder(x)).float().chunk(2, 1)
        logvar = logvar.clamp(-20, LARGEST_LOGVAR)
        latents = mean + ramp * torch.exp(0.5 * logvar) * torch.randn_like(mean)
        decoded = vae.decoder(vae.post_quant_conv(latents)).float()
    loss, pixels = errors(decoded, x)
    divergence = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()
    return loss + KL_WEIGHT * ramp * divergence, pixels


def step_of_decoder(vae: AutoencoderKL, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss of the decoder alone, on latents as inexact as a U-Net's, and the pixels' L1."""
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            mean = vae.quant_conv(vae.encoder(x)).float().chunk(2, 1)[0]
        decoded = vae.decoder(vae.post_quant_conv(mean + DECODER_NOISE * torch.randn_like(mean))).float()
    return errors(decoded, x)


@torch.no_grad()
def finish(vae: AutoencoderKL, folder: Path, seed: int) -> None:
    """Measure the latents' spread, record it as the scaling factor, save."""
    latents = vae.encode(whole_pictures(random.Random(seed), 128)).latent_dist.mean
    vae.register_to_config(scaling_factor=round(LATENT_SPREAD / latents.std().item(), 5))
    vae.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for checkpoints and the log")
    parser.add_argument("--steps", type=int, default=4000, help="steps on 16 crops")
    parser.add_argument("--whole_steps", type=int, default=150, help="steps on 4 whole pictures")
    parser.add_argument("--decoder_steps", type=int, default=2500, help="steps of the decoder alone, on 4 pictures")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=1)
    train(parser.parse_args())


def train(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    vae = new_vae().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=args.lr, weight_decay=1e-4, betas=(0.9, 0.98))
    run = Run(args.work / "vae.pt", vae, optimizer, decay=0.995)
    both = args.steps + args.whole_steps
    total = both + args.decoder_steps

    def gradients(step: int) -> float:
        rng = random.Random(args.seed * 1_000_003 + step)
        x = crops(rng, 16) if step < args.steps else whole_pictures(rng, 4)
        x = x.to(memory_format=torch.channels_last)
        if step < both:
            loss, pixels = step_of_both(vae, x, min(1.0, max(0.0, (step - RAMP[0]) / (RAMP[1] - RAMP[0]))))
        else:
            loss, pixels = step_of_decoder(vae, x)
        loss.backward()
        return pixels.item()

    if run.start < both:
        descend(optimizer, gradients, run.log, cosine(both, args.lr), range(run.start, both), run.after)
        vae.load_state_dict(run.average.module.state_dict())
        finish(vae, args.work / "vae", args.seed)  # the encoder is finished: latents made from here on stay valid
        run.save(both)
    rate = cosine(args.decoder_steps, args.lr)
    descend(optimizer, gradients, run.log, lambda s: rate(s - both), range(max(both, run.start), total), run.after)
    finish(run.average.module, args.work / "vae", args.seed)


if __name__ == "__main__":
    main()
