"""Train a small CLIP of the demo's world: pictures and captions in one space.

    python -m tools.demo.train_clip --model examples/shapes --work WORK --out examples/shapes/companions/clip

Each batch holds, for every picture, its caption and one that differs in a single thing; both compete with all others.
Both towers are also asked what stands where, see `hints`. Half of the pictures are the demo model's unfinished
ones, which are what guidance shows to CLIP.
"""

from __future__ import annotations

import argparse
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from diffusers import DDPMScheduler
from safetensors.torch import save_file
from torch.nn.functional import cross_entropy, normalize
from transformers import CLIPConfig, CLIPModel

from tools.demo.drawing import SCHEDULE, Drawer
from tools.demo.export import half, write_json
from tools.demo.hints import UNTOLD, patch_answers, patch_errors, told, whole_errors
from tools.demo.latents import encode
from tools.demo.render import render
from tools.demo.scenes import (
    GROUND_COLOURS,
    OBJECT_COLOURS,
    OPPOSITE,
    PLACES,
    SHAPES,
    Caption,
    Scene,
    caption,
    draw_scene,
)
from tools.demo.tokenizer import save_tokenizer
from tools.demo.train_unet import spread_times
from tools.demo.training import Run, cosine, descend

MEAN = (0.48145466, 0.4578275, 0.40821073)  # OpenAI's CLIP
DEVIATION = (0.26862954, 0.26130258, 0.27577711)
WIDTH = 128
PROJECTION = 128
SIDE, PATCH = 128, 16  # of the pictures and of what is one token of them, in pixels


def new_clip(tokenizer) -> CLIPModel:
    """A text tower of two layers, an image tower of four; pictures in 8×8 patches."""
    ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    text = dict(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=77,
        hidden_act="quick_gelu",
        projection_dim=PROJECTION,
        **ids,
    )
    vision = {
        "hidden_size": WIDTH,
        "intermediate_size": 4 * WIDTH,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "image_size": SIDE,
        "patch_size": PATCH,
        "hidden_act": "quick_gelu",
        "projection_dim": PROJECTION,
    }
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=PROJECTION))
    # as strong as the patches' colours: with the usual 0.02 the picture stays a bag of patches for a thousand steps
    torch.nn.init.normal_(clip.vision_model.embeddings.position_embedding.weight, std=0.5)
    return clip


def to_pixels(pictures: list[np.ndarray]) -> torch.Tensor:
    """uint8 RGB of SIDE×SIDE → normalised pixels (B, 3, SIDE, SIDE)."""
    x = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255
    return (x - torch.tensor(MEAN)[:, None, None]) / torch.tensor(DEVIATION)[:, None, None]


def alter(rng: random.Random, scene: Scene) -> Scene:
    """The scene with one thing changed: the ground, or an object's colour, shape or place."""
    kind = rng.choice(("ground", "colour", "shape", "place"))
    taken = {scene.ground, *(t.colour for t in scene.things)}
    if kind == "ground":
        return replace(scene, ground=rng.choice([c for c in GROUND_COLOURS if c not in taken]))
    index = rng.randrange(len(scene.things))
    thing, things = scene.things[index], list(scene.things)
    if kind == "colour":
        things[index] = replace(thing, colour=rng.choice([c for c in OBJECT_COLOURS if c not in taken]))
    elif kind == "shape":
        things[index] = replace(thing, shape=rng.choice([s for s in SHAPES if s != thing.shape]))
    elif len(things) == 2:
        things = [replace(t, place=OPPOSITE[t.place]) for t in things]
    else:
        things = [replace(thing, place=rng.choice([p for p in PLACES if p != thing.place]))]
    return replace(scene, things=tuple(things))


def right_and_wrong(rng: random.Random, scene: Scene) -> tuple[Caption, Caption, Scene]:
    """A caption, one worded alike that differs in a single thing the text says, and the scene that one is true of."""
    while True:
        state = rng.getstate()
        right = caption(rng, scene)
        after = rng.getstate()
        other = alter(rng, scene)
        resume = rng.getstate()
        rng.setstate(state)
        wrong = caption(rng, other)
        rng.setstate(resume if wrong.text != right.text else after)
        if wrong.text != right.text:
            return right, wrong, other


def project(clip: CLIPModel, image: torch.Tensor, text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Unit vectors (B, PROJECTION) and (T, PROJECTION) of what the towers make of pictures and texts, (…, WIDTH)."""
    return normalize(clip.visual_projection(image), dim=-1), normalize(clip.text_projection(text), dim=-1)


def features(clip: CLIPModel, pixels: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Unit vectors of pictures and texts."""
    return project(clip, clip.vision_model(pixels).pooler_output, clip.text_model(ids).pooler_output)


def hint(embeddings: torch.Tensor, scenes: list[Scene], said: list[Caption]) -> torch.Tensor:
    """The mean error of pooled pictures or texts about what a caption says of its scene."""
    grounds = [GROUND_COLOURS.index(s.ground) if c.says_ground else UNTOLD for s, c in zip(scenes, said)]
    answers = torch.tensor([told(s, c) for s, c in zip(scenes, said)])
    return whole_errors(embeddings, torch.tensor(grounds), answers).mean()


@torch.no_grad()
def unfinished(drawer: Drawer, count: int, seed: int, batch: int = 50) -> list[tuple[Scene, np.ndarray]]:
    """Scenes and what the demo model makes of their noisy latents in one step, mixed as guidance mixes them.

    The mixture is that of `draw.loss_guidance`: the clean latents that are promised, weighted by the noise, and the
    noisy ones themselves.
    """
    rng, generator = random.Random(f"unfinished {seed}"), torch.Generator().manual_seed(seed)
    scheduler, made = DDPMScheduler(**SCHEDULE), []
    for _ in range(0, count, batch):
        scenes = [draw_scene(rng, combinations="all") for _ in range(batch)]
        latents = encode(drawer.vae, scenes).float()
        noise, times = torch.randn(latents.shape, generator=generator), spread_times(batch, generator)
        noisy, text = scheduler.add_noise(latents, noise, times), drawer.encode([caption(rng, s).text for s in scenes])
        share = scheduler.alphas_cumprod[times].view(-1, 1, 1, 1)
        sigma = (1 - share).sqrt()
        clean = (noisy - sigma * drawer.unet(noisy, times, text).sample) / share.sqrt()
        made += zip(scenes, drawer.decode(sigma * clean + (1 - sigma) * noisy))
    return made


def train(args: argparse.Namespace, tokenizer) -> CLIPModel:
    seen_before = unfinished(Drawer.load(args.model), args.unfinished, args.seed)
    clip, target = new_clip(tokenizer), torch.arange(args.batch)
    optimizer = torch.optim.AdamW(clip.parameters(), lr=args.lr, weight_decay=0.02, betas=(0.9, 0.98))

    def gradients(step: int) -> float:
        rng = random.Random(args.seed * 1_000_003 + step)
        old, pictures = zip(*rng.sample(seen_before, args.batch // 2))
        new = [draw_scene(rng, combinations="all") for _ in range(args.batch - len(old))]
        scenes, pixels = [*old, *new], to_pixels([*pictures, *map(render, new)])
        right, wrong, others = zip(*(right_and_wrong(rng, scene) for scene in scenes))
        texts = tokenizer([c.text for c in (*right, *wrong)], padding="longest", return_tensors="pt").input_ids
        seen, read = clip.vision_model(pixels), clip.text_model(texts).pooler_output
        image, text = project(clip, seen.pooler_output, read)
        scores = clip.logit_scale.exp().clamp(max=100) * image @ text.T  # (B, 2B)
        loss = (cross_entropy(scores, target) + cross_entropy(scores[:, : args.batch].T, target)) / 2
        everything = [Caption("", True, (True,) * len(scene.things)) for scene in scenes]
        hints = hint(seen.pooler_output, scenes, everything) + hint(read, [*scenes, *others], [*right, *wrong])
        patches = torch.tensor([patch_answers(scene, SIDE // PATCH) for scene in scenes])
        hints = hints + patch_errors(seen.last_hidden_state[:, 1:], patches).mean()
        (loss + hints).backward()
        return loss.item()

    run = Run(args.work / "clip.pt", clip, optimizer, decay=0.998)
    descend(optimizer, gradients, run.log, cosine(args.steps, args.lr), range(run.start, args.steps), run.after)
    run.save(args.steps)
    return run.average.module


def save_clip(clip: CLIPModel, folder: Path) -> None:
    """A transformers CLIPModel folder with tokenizer and image processor, in half precision."""
    save_tokenizer(folder)
    configuration = clip.config.to_dict()
    configuration.update(architectures=["CLIPModel"], dtype="float16")
    write_json(folder / "config.json", configuration)
    save_file(half(clip.state_dict()), folder / "model.safetensors", metadata={"format": "pt"})
    write_json(
        folder / "preprocessor_config.json",
        {
            "image_processor_type": "CLIPImageProcessor",
            "crop_size": SIDE,
            "size": SIDE,
            "do_resize": True,
            "do_center_crop": True,
            "do_normalize": True,
            "image_mean": MEAN,
            "image_std": DEVIATION,
            "resample": 3,
        },
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="the demo model's folder")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--unfinished", type=int, default=5000, help="unfinished pictures to learn from")
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=7)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    tokenizer = save_tokenizer(args.work / "tokenizer")
    save_clip(train(args, tokenizer), args.out)


if __name__ == "__main__":
    main()
