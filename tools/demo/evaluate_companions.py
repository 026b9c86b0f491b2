"""Measure the companions: LoRAs, textual inversion, ControlNet, CLIP.

python -m tools.demo.evaluate_companions --model examples/shapes --count 40 --out results.json
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import numpy as np
import torch
from diffusers import ControlNetModel
from safetensors.torch import load_file
from transformers import CLIPModel, CLIPTokenizer

from tools.demo.drawing import Drawer
from tools.demo.evaluate import FRESH_SEED, draw_all, share
from tools.demo.fine_tuning import plain_words
from tools.demo.judge import overlap, see_objects
from tools.demo.model_files import cldm_key
from tools.demo.render import border, coverage, render
from tools.demo.scenes import LORA_STYLES, Caption, Scene, caption, draw_scene
from tools.demo.style_judge import STYLE_JUDGES
from tools.demo.train_clip import features, right_and_wrong, to_pixels
from tools.demo.train_control_net import canny, guides, new_control_net
from tools.demo.train_embedding import THING, WORD, teach_word, thing_scene, word_thing
from tools.demo.train_lora import attach, load_loras, style_scenes


def measure_lora(folder: Path, path: Path, style: str, count: int) -> dict:
    """Share of pictures in the style with the LoRA at 1, without it, and whether 0 changes nothing."""
    drawer, rng = Drawer.load(folder), random.Random(f"lora {FRESH_SEED}")
    tasks = [
        (s, Caption(plain_words(rng, s), True, (True,) * len(s.things))) for s in style_scenes(style, count, FRESH_SEED)
    ]
    before = draw_all(drawer, tasks)
    few = draw_all(drawer, tasks[:5])
    state = load_file(path)
    loras = attach(
        drawer.unet,
        drawer.text_encoder,
        rank=next(v.shape[0] for k, v in state.items() if "down" in k),
        alpha=float(next(v for k, v in state.items() if k.endswith("alpha"))),
    )
    load_loras(state, loras)
    after = draw_all(drawer, tasks)
    for lora in loras.values():
        lora.multiplier = 0.0
    off = draw_all(drawer, tasks[:5])
    judge = STYLE_JUDGES[style]
    return {
        "pictures": count,
        "with": share([judge(p) for p in after]),
        "without": share([judge(p) for p in before]),
        "zero changes nothing": all(np.array_equal(a, b) for a, b in zip(off, few)),
    }


def measure_embedding(folder: Path, path: Path, count: int) -> dict:
    """Share of pictures of the new word with the right shape, colour, and both."""
    drawer, rng = Drawer.load(folder), random.Random(f"word {FRESH_SEED}")
    vectors = load_file(path)["emb_params"].float()
    _, names = teach_word(drawer.tokenizer, drawer.text_encoder, vectors)
    scenes = [thing_scene(rng) for _ in range(count)]
    tasks = [(s, Caption(word_thing(rng, s).replace(WORD, "".join(names)), True, (True,))) for s in scenes]
    seen = [see_objects(p, 1) for p in draw_all(drawer, tasks)]
    shape = [bool(s) and s[0].shape == THING["shape"] for s in seen]
    colour = [bool(s) and s[0].colour == THING["colour"] for s in seen]
    return {
        "pictures": count,
        "shape": share(shape),
        "colour": share(colour),
        "both": share([a and b for a, b in zip(shape, colour)]),
    }


def load_control_net(unet, path: Path) -> ControlNetModel:
    """Read a cldm file back into Diffusers' module."""
    control_net, state = new_control_net(unet), load_file(path)
    control_net.load_state_dict({k: state[cldm_key(k, unet.config)].float() for k in control_net.state_dict()})
    return control_net.eval()


def silhouette(scene: Scene) -> np.ndarray:
    """All pixels of a scene that some object covers."""
    mask = np.zeros((scene.height, scene.width), bool)
    for thing in scene.things:
        mask |= coverage(thing, scene.width, scene.height) > 0.5
        if thing.style == "outlined":
            mask |= border(thing, scene.width, scene.height) > 0.5
    return mask


def measure_control_net(folder: Path, path: Path, count: int) -> dict:
    """Share of pictures whose objects overlap the guide's with an IoU of 0.6 or more; captions say no place."""
    drawer, rng = Drawer.load(folder), random.Random(f"edges {FRESH_SEED}")
    drawer.control_net = load_control_net(drawer.unet, path)
    scenes = [draw_scene(rng, combinations="all") for _ in range(count)]
    overlaps = []
    for i, scene in enumerate(scenes):
        picture = drawer.draw([caption(rng, scene).text], [i], guides=guides([canny(render(scene))]))[0]
        seen = [s.mask for s in see_objects(picture, len(scene.things))]
        drawn = np.any(seen, axis=0) if seen else np.zeros((scene.height, scene.width), bool)
        overlaps.append(overlap(drawn, silhouette(scene)))
    return {
        "pictures": count,
        "overlap 0.6 or more": share([o >= 0.6 for o in overlaps]),
        "mean overlap": round(float(np.mean(overlaps)), 3),
    }


@torch.no_grad()
def measure_clip(folder: Path, count: int) -> dict:
    """How often a rendered picture is nearer to its caption than to another's, or to one with one thing changed."""
    clip = CLIPModel.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    rng = random.Random(f"clip {FRESH_SEED}")
    scenes = [draw_scene(rng, combinations="all") for _ in range(count)]
    right, wrong, _ = zip(*(right_and_wrong(rng, scene) for scene in scenes))
    ids = tokenizer([c.text for c in (*right, *wrong)], padding="longest", return_tensors="pt").input_ids
    image, text = features(clip, to_pixels([render(s) for s in scenes]), ids)
    scores = image @ text.T
    own, changed, other = scores.diagonal(), scores[:, count:].diagonal(), scores[:, :count].roll(1, 1).diagonal()
    return {
        "pictures": count,
        "right above another's": share((own > other).tolist()),
        "right above one thing changed": share((own > changed).tolist()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--count", type=int, default=40, help="pictures for each companion")
    parser.add_argument("--out", type=Path, help="write the figures here as JSON")
    args = parser.parse_args()
    folder = args.model / "companions"
    results = {}
    for style in LORA_STYLES:
        if (path := folder / f"{style}.safetensors").exists():
            results[f"LoRA {style}"] = measure_lora(args.model, path, style, args.count)
    if (path := folder / f"{WORD}.safetensors").exists():
        results[f"textual inversion {WORD}"] = measure_embedding(args.model, path, args.count)
    if (path := folder / "canny.safetensors").exists():
        results["ControlNet canny"] = measure_control_net(args.model, path, args.count)
    if (folder / "clip").is_dir():
        results["CLIP"] = measure_clip(folder / "clip", 400)
    print(json.dumps(results, indent=1))
    if args.out:
        args.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
