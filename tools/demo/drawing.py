"""Draw with the demo model by a plain diffusers loop: what the training is measured with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import diffusers
import numpy as np
import torch
from transformers import CLIPTextModel, CLIPTokenizer

SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
SAMPLERS = {
    "ddim": ("DDIMScheduler", {"clip_sample": False, "steps_offset": 1}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": False, "steps_offset": 1}),
    "lms": ("LMSDiscreteScheduler", {"steps_offset": 1}),
    "euler": ("EulerDiscreteScheduler", {"steps_offset": 1}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {"steps_offset": 1}),
    "heun": ("HeunDiscreteScheduler", {"steps_offset": 1}),
    "dpm_2": ("KDPM2DiscreteScheduler", {"steps_offset": 1}),
    "dpm_2_a": ("KDPM2AncestralDiscreteScheduler", {"steps_offset": 1}),
    "dpmsolver": (
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "dpmsolver", "steps_offset": 1, "final_sigmas_type": "sigma_min"},
    ),
    "dpmsolver++": ("DPMSolverMultistepScheduler", {"steps_offset": 1}),
    "dpmsingle": ("DPMSolverSinglestepScheduler", {}),
}


def new_scheduler(sampler: str):
    name, arguments = SAMPLERS[sampler]
    return getattr(diffusers, name)(**SCHEDULE, **arguments)


@dataclass
class Drawer:
    """The demo model's parts; a ControlNet is optional."""

    tokenizer: CLIPTokenizer
    text_encoder: CLIPTextModel
    vae: diffusers.AutoencoderKL
    unet: diffusers.UNet2DConditionModel
    control_net: diffusers.ControlNetModel | None = None

    @classmethod
    def load(cls, folder: Path) -> Drawer:
        return cls(
            CLIPTokenizer.from_pretrained(folder / "tokenizer"),
            CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=torch.float32).eval(),
            diffusers.AutoencoderKL.from_pretrained(folder / "vae", dtype=torch.float32).eval(),
            diffusers.UNet2DConditionModel.from_pretrained(folder / "unet", dtype=torch.float32).eval(),
        )

    def encode(self, texts: list[str]) -> torch.Tensor:
        """Texts → embeddings (B, 77, width)."""
        ids = self.tokenizer(texts, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
        return self.text_encoder(ids).last_hidden_state

    def predict(self, x: torch.Tensor, time: torch.Tensor, text: torch.Tensor, guides: torch.Tensor | None):
        if guides is None:
            return self.unet(x, time, text).sample
        assert self.control_net is not None  # who has guides has set one
        down, middle = self.control_net(x, time, text, controlnet_cond=guides, return_dict=False)
        return self.unet(
            x, time, text, down_block_additional_residuals=down, mid_block_additional_residual=middle
        ).sample

    @torch.no_grad()
    def draw(
        self,
        texts: list[str],
        seeds: list[int],
        sampler: str = "ddim",
        steps: int = 20,
        scale: float = 5.0,
        size: tuple[int, int] = (128, 128),
        negative: str = "",
        guides: torch.Tensor | None = None,
        vectors: torch.Tensor | None = None,
    ) -> np.ndarray:
        """Draw one picture for each text, uint8 (B, height, width, 3); `size` is (width, height) in pixels.

        `guides` are a ControlNet's pictures (B, 3, height, width) in 0…1; `vectors` stand in for `texts`' embeddings.
        """
        generators = [torch.Generator().manual_seed(s) for s in seeds]
        shape = (4, size[1] // 8, size[0] // 8)
        x = torch.stack([torch.randn(shape, generator=g) for g in generators])
        wanted = self.encode(texts) if vectors is None else vectors
        text = torch.cat([self.encode([negative] * len(texts)), wanted])
        both = None if guides is None else torch.cat([guides, guides])
        scheduler = new_scheduler(sampler)
        scheduler.set_timesteps(steps)
        x = x * scheduler.init_noise_sigma
        accepts_generator = "generator" in scheduler.step.__code__.co_varnames
        for time in scheduler.timesteps:
            scaled = scheduler.scale_model_input(x, time)
            without, with_text = self.predict(torch.cat([scaled, scaled]), time, text, both).chunk(2)
            noise = without + scale * (with_text - without)
            extra = {"generator": generators} if accepts_generator else {}
            x = scheduler.step(noise, time, x, **extra).prev_sample
        return self.decode(x)

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> np.ndarray:
        pictures = self.vae.decode(latents / self.vae.config.scaling_factor).sample
        return ((pictures / 2 + 0.5).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()
