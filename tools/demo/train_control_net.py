"""Train a ControlNet on Canny edges for the demo model, saved in the original (cldm) layout.

python -m tools.demo.train_control_net --model examples/shapes --work WORK --out canny.safetensors
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Mapping
from pathlib import Path

import cv2
import numpy as np
import torch
from diffusers import ControlNetModel
from safetensors.torch import save_file

from tools.demo.export import half
from tools.demo.fine_tuning import fit, prepare, training_options
from tools.demo.model_files import cldm_key, load_frozen
from tools.demo.render import render
from tools.demo.scenes import Scene, caption, draw_scene
from tools.demo.training import Log, save_checkpoint

HINT_WIDTHS = (16, 32, 96, 256)  # of the original ControlNet's hint block
CANNY = (63, 191)  # thresholds of behaviour.md's `canny`


def new_control_net(unet) -> ControlNetModel:
    return ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=HINT_WIDTHS)


def canny(picture: np.ndarray) -> np.ndarray:
    """uint8 RGB → edges, uint8 (height, width)."""
    return cv2.Canny(cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY), *CANNY)


def guides(edges: list[np.ndarray]) -> torch.Tensor:
    """Edges → the ControlNet's input, (B, 3, height, width) in 0…1."""
    return torch.from_numpy(np.stack(edges)).float().div(255)[:, None].expand(-1, 3, -1, -1)


def words(rng: random.Random, scene: Scene) -> str:
    """Often no text, and half of the texts without all places, so that the edges have to be read."""
    if rng.random() < 0.2:
        return ""
    said, leave_open = caption(rng, scene), rng.random() < 0.5
    while leave_open and all(said.says_place):
        said = caption(rng, scene)
    return said.text


def save_cldm(control_net: ControlNetModel, unet_config: Mapping, path: Path) -> None:
    state = {cldm_key(k, unet_config): v for k, v in half(control_net.state_dict()).items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(state, path, metadata={"format": "pt"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    training_options(parser, steps=700, batch=16, lr=1e-3, seed=6)
    parser.add_argument("--scenes", type=int, default=1500)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    tokenizer, text_encoder, vae, unet = load_frozen(args.model)
    control_net = new_control_net(unet).requires_grad_(True).to(memory_format=torch.channels_last)
    rng = random.Random(f"edges {args.seed}")
    material = prepare(vae, [draw_scene(rng) for _ in range(args.scenes)], words)
    edges = [canny(render(scene)) for scene in material.scenes]

    def predict(noisy, times, ids, chosen):
        text = text_encoder(ids).last_hidden_state
        down, middle = control_net(
            noisy, times, text, controlnet_cond=guides([edges[i] for i in chosen]), return_dict=False
        )
        return unet(
            noisy, times, text, down_block_additional_residuals=down, mid_block_additional_residual=middle
        ).sample

    fit(list(control_net.parameters()), predict, tokenizer, material, Log(args.work / "control_net.jsonl"), args)
    save_checkpoint(args.work / "control_net.pt", control_net.state_dict())
    save_cldm(control_net, unet.config, args.out)


if __name__ == "__main__":
    main()
