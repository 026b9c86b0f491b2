"""Train a LoRA for a style the model has not seen, saved in kohya's format.

python -m tools.demo.train_lora --model examples/shapes --style dotted --work WORK --out DOTTED.safetensors
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import torch
from safetensors.torch import save_file

from tools.demo.fine_tuning import fit, prepare, training_options
from tools.demo.model_files import kohya_name, load_frozen
from tools.demo.scenes import LORA_STYLES, Scene, draw_scene
from tools.demo.training import Log

UNET_PARTS = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out", "conv1", "conv2")
TEXT_PARTS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")


def pair(sizes: tuple[int, ...]) -> tuple[int, int]:
    """A convolution's sizes on pixels: height and width."""
    height, width = sizes
    return height, width


class LowRank(torch.nn.Module):
    """A LoRA on one module: adds alpha / rank · multiplier · up(down(x)) to its output."""

    def __init__(self, target: torch.nn.Linear | torch.nn.Conv2d, rank: int, alpha: float):
        super().__init__()
        if isinstance(target, torch.nn.Conv2d):
            assert not isinstance(target.padding, str)  # diffusers gives numbers
            window = (pair(target.kernel_size), pair(target.stride), pair(target.padding))
            self.down = torch.nn.Conv2d(target.in_channels, rank, *window, bias=False)
            self.up = torch.nn.Conv2d(rank, target.out_channels, 1, bias=False)
        else:
            self.down = torch.nn.Linear(target.in_features, rank, bias=False)
            self.up = torch.nn.Linear(rank, target.out_features, bias=False)
        torch.nn.init.kaiming_uniform_(self.down.weight, a=5**0.5)
        torch.nn.init.zeros_(self.up.weight)
        self.alpha, self.multiplier = alpha, 1.0
        self.scale = alpha / rank
        self.handle = target.register_forward_hook(self.add)

    def add(self, module: torch.nn.Module, inputs: tuple, output: torch.Tensor) -> torch.Tensor:
        return output + self.multiplier * self.scale * self.up(self.down(inputs[0]))


def attach(unet, text_encoder, rank: int, alpha: float) -> dict[str, LowRank]:
    """LoRAs on every transformer's projections and every residual block's convolutions, by kohya's names."""
    loras = {}
    for prefix, model, parts in (("lora_unet", unet, UNET_PARTS), ("lora_te", text_encoder, TEXT_PARTS)):
        for path, module in model.named_modules():
            inside = prefix == "lora_te" or "attentions" in path or "resnets" in path
            if inside and path.endswith(parts) and isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)):
                loras[kohya_name(prefix, path)] = LowRank(module, rank, alpha)
    return loras


def load_loras(file_state: dict[str, torch.Tensor], loras: dict[str, LowRank]) -> None:
    for name, lora in loras.items():
        lora.down.weight.data = file_state[f"{name}.lora_down.weight"].float()
        lora.up.weight.data = file_state[f"{name}.lora_up.weight"].float()


def save_loras(loras: dict[str, LowRank], path: Path, rank: int, alpha: float) -> None:
    state = {}
    for name, lora in loras.items():
        state[f"{name}.lora_down.weight"] = lora.down.weight.detach().half().contiguous()
        state[f"{name}.lora_up.weight"] = lora.up.weight.detach().half().contiguous()
        state[f"{name}.alpha"] = torch.tensor(alpha).half()
    metadata = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(rank),
        "ss_network_alpha": str(alpha),
        "ss_v2": "False",
        "ss_base_model_version": "sd_v1",
        "ss_output_name": path.stem,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(state, path, metadata=metadata)


def style_scenes(style: str, count: int, seed: int) -> list[Scene]:
    """Scenes in one style; what is black, or on black, cannot be seen dipped into it."""
    rng, scenes = random.Random(f"{style} {seed}"), []
    while len(scenes) < count:
        scene = draw_scene(rng, combinations="seen", styles=(style,))
        black = scene.ground == "black" or "black" in [t.colour for t in scene.things]
        if style != "dipped" or not black:
            scenes.append(scene)
    return scenes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    training_options(parser, steps=400, batch=16, lr=2e-3, seed=4)
    parser.add_argument("--style", choices=LORA_STYLES, required=True)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--alpha", type=float, default=8.0)
    parser.add_argument("--scenes", type=int, default=800)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    tokenizer, text_encoder, vae, unet = load_frozen(args.model)
    material = prepare(vae, style_scenes(args.style, args.scenes, args.seed))
    loras = attach(unet, text_encoder, args.rank, args.alpha)

    def predict(noisy, times, ids, chosen):
        return unet(noisy, times, text_encoder(ids).last_hidden_state).sample

    parameters = [p for lora in loras.values() for p in lora.parameters()]
    fit(parameters, predict, tokenizer, material, Log(args.work / f"lora_{args.style}.jsonl"), args)
    save_loras(loras, args.out, args.rank, args.alpha)


if __name__ == "__main__":
    main()
