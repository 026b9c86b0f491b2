#!/usr/bin/env python3
"""Write a LoRA of random weights for a model, to measure with and to test with.

    python tools/random_network.py MODEL /tmp/lora.safetensors --rank 32

It changes pictures visibly and means nothing.
"""

import argparse
import math
import sys
from collections.abc import Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from safetensors.torch import save_file

from library.files.model_files import find_model
from networks.keys import UNET, Target, layer_shapes
from networks.kinds import Shape


def kohya_name(target: Target, *, several: bool = False) -> str:
    """A layer's name in the files of sd-scripts, for models of one text encoder or of several."""
    network, path = target
    flat = path.removeprefix("text_model.").replace(".", "_")
    if network == UNET:
        return f"lora_unet_{flat}"
    prefix = {"text_encoder": "te1" if several else "te", "text_encoder_2": "te2"}[network]
    return f"lora_{prefix}_{flat}" if flat == "text_projection" else f"lora_{prefix}_text_model_{flat}"


def random_lora(
    layers: Mapping[Target, Shape], rank: int, *, alpha: float | None, convolutions: bool, seed: int
) -> dict[str, torch.Tensor]:
    """A LoRA for the layers of attention blocks and of the text encoder, and for the other convolutions if wanted.

    Its effect on an output is about a tenth of the output's size, in each layer.
    """
    generator = torch.Generator().manual_seed(seed)
    state = {}
    several = ("text_encoder_2", "text_projection") in layers
    for target, shape in layers.items():
        usual = any(mark in target[1] for mark in ("attn", ".ff.", ".mlp."))
        if len(shape) < 2 or "embeddings." in target[1] or not (convolutions or usual):
            continue
        inputs = math.prod(shape[1:])
        down = torch.randn(rank, *shape[1:], generator=generator) / inputs**0.5
        up = torch.randn(shape[0], rank, *[1] * (len(shape) - 2), generator=generator) * 0.1 / rank**0.5
        name = kohya_name(target, several=several)
        state |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
        if alpha is not None:
            state[f"{name}.alpha"] = torch.tensor(float(alpha))
    return state


def main() -> None:
    """Run the tool."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="what --ckpt takes")
    parser.add_argument("file", type=Path, help="the LoRA, a .safetensors file")
    parser.add_argument("--v2", action="store_true", help="the model is Stable Diffusion 2.x")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--alpha", type=float, help="default: none, which means the rank")
    parser.add_argument("--convolutions", action="store_true", help="for the convolutions too, as LoCon")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    layers = layer_shapes(find_model(args.model, v2=args.v2))
    state = random_lora(layers, args.rank, alpha=args.alpha, convolutions=args.convolutions, seed=args.seed)
    save_file({key: tensor.half() for key, tensor in state.items()}, args.file)


if __name__ == "__main__":
    main()
