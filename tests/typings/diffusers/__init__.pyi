"""diffusers ships no types; here is what this program uses of it."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self, overload

import numpy as np
import torch
from diffusers import utils as utils
from diffusers.schedulers.scheduling_euler_ancestral_discrete import EulerAncestralDiscreteSchedulerOutput
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteSchedulerOutput
from diffusers.schedulers.scheduling_lms_discrete import LMSDiscreteSchedulerOutput
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from PIL.Image import Image

__version__: str

# ---------------------------------------------------------------------------------------------------------------------
# Models

class _Module(torch.nn.Module):
    # torch's own may have any attribute; with this, only those that are declared
    __getattr__: None  # ty: ignore[incompatible-attribute-override]  # narrower on purpose

class _Model(_Module):
    @property
    def device(self) -> torch.device: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self: ...
    @classmethod
    def load_config(cls, path: str | Path, /, *, subfolder: str = ...) -> dict[str, Any]: ...
    @classmethod
    def from_pretrained(cls, path: str | Path, /, *, subfolder: str = ..., dtype: torch.dtype = ...) -> Self: ...
    # torch's own leaves memory_format out
    def to(  # ty: ignore[incompatible-method-override]  # the program uses no more of it
        self, device: torch.device = ..., dtype: torch.dtype = ..., *, memory_format: torch.memory_format = ...
    ) -> Self: ...
    def save_pretrained(self, folder: str | Path, /, *, variant: str | None = ...) -> None: ...
    def enable_gradient_checkpointing(self) -> None: ...

class _ModelWithText(_Model):
    @property
    def attn_processors(self) -> dict[str, Callable[..., torch.Tensor]]: ...
    def set_attn_processor(
        self, processor: Callable[..., torch.Tensor] | Mapping[str, Callable[..., torch.Tensor]]
    ) -> None: ...

class _UNetConfig(Mapping[str, Any]):
    addition_embed_type: str | None
    addition_time_embed_dim: int
    projection_class_embeddings_input_dim: int
    in_channels: int
    cross_attention_dim: int

class _UNetOutput:
    sample: torch.Tensor

class UNet2DConditionModel(_ModelWithText):
    @property
    def config(self) -> _UNetConfig: ...
    def __init__(
        self,
        *,
        sample_size: int = ...,
        block_out_channels: tuple[int, ...] = ...,
        layers_per_block: int = ...,
        norm_num_groups: int = ...,
        attention_head_dim: int = ...,
        cross_attention_dim: int = ...,
        down_block_types: tuple[str, ...] = ...,
        up_block_types: tuple[str, ...] = ...,
    ) -> None: ...
    def __call__(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        *,
        cross_attention_kwargs: dict[str, Any] | None = ...,
        added_cond_kwargs: dict[str, torch.Tensor] | None = ...,
        down_block_additional_residuals: Sequence[torch.Tensor] | None = ...,
        mid_block_additional_residual: torch.Tensor | None = ...,
    ) -> _UNetOutput: ...

class _HintBlock(_Module):
    blocks: torch.nn.ModuleList
    def __call__(self, conditioning: torch.Tensor) -> torch.Tensor: ...

class ControlNetModel(_ModelWithText):
    @property
    def config(self) -> _ControlNetConfig: ...
    @property
    def controlnet_cond_embedding(self) -> _HintBlock: ...
    @controlnet_cond_embedding.setter
    def controlnet_cond_embedding(self, block: torch.nn.Module) -> None: ...
    @classmethod
    def from_unet(
        cls, unet: UNet2DConditionModel, *, conditioning_embedding_out_channels: tuple[int, ...] = ...
    ) -> Self: ...
    @overload
    def __call__(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        controlnet_cond: torch.Tensor,
        conditioning_scale: float = ...,
        *,
        added_cond_kwargs: dict[str, torch.Tensor] | None = ...,
        return_dict: Literal[False],
    ) -> tuple[list[torch.Tensor], torch.Tensor]: ...
    @overload
    def __call__(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        controlnet_cond: torch.Tensor,
        *,
        added_cond_kwargs: dict[str, torch.Tensor] | None = ...,
    ) -> object: ...

class _ControlNetConfig(Mapping[str, Any]):
    in_channels: int

class _UnionConfig(_ControlNetConfig):
    num_control_type: int

class ControlNetUnionModel(_ModelWithText):
    @property
    def config(self) -> _UnionConfig: ...
    @property
    def controlnet_cond_embedding(self) -> _HintBlock: ...
    @controlnet_cond_embedding.setter
    def controlnet_cond_embedding(self, block: torch.nn.Module) -> None: ...
    def __call__(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        controlnet_cond: list[torch.Tensor],
        control_type: torch.Tensor,
        control_type_idx: list[int],
        conditioning_scale: list[float] = ...,
        *,
        added_cond_kwargs: dict[str, torch.Tensor] | None = ...,
        return_dict: Literal[False],
    ) -> tuple[list[torch.Tensor], torch.Tensor]: ...

class _AutoencoderConfig(Mapping[str, Any]):
    block_out_channels: Sequence[int]
    scaling_factor: float
    latent_channels: int

class _AutoencoderHalf(_Module):
    conv_in: torch.nn.Conv2d
    conv_out: torch.nn.Conv2d
    def __call__(self, sample: torch.Tensor) -> torch.Tensor: ...

class _Distribution:
    mean: torch.Tensor

class _Encoded:
    latent_dist: _Distribution

class _Decoded:
    sample: torch.Tensor

class AutoencoderKL(_Model):
    encoder: _AutoencoderHalf
    decoder: _AutoencoderHalf
    quant_conv: torch.nn.Conv2d
    post_quant_conv: torch.nn.Conv2d
    @property
    def config(self) -> _AutoencoderConfig: ...
    def __init__(
        self,
        *,
        block_out_channels: tuple[int, ...] = ...,
        layers_per_block: int = ...,
        norm_num_groups: int = ...,
        sample_size: int = ...,
        down_block_types: tuple[str, ...] = ...,
        up_block_types: tuple[str, ...] = ...,
    ) -> None: ...
    def encode(self, x: torch.Tensor) -> _Encoded: ...
    def decode(self, z: torch.Tensor) -> _Decoded: ...
    def register_to_config(self, *, scaling_factor: float) -> None: ...

# ---------------------------------------------------------------------------------------------------------------------
# Schedulers

class _SchedulerConfig(Mapping[str, Any]):
    num_train_timesteps: int
    prediction_type: str

class SchedulerMixin:
    # diffusers' own declares none of this, but all of its schedulers that the program makes have it
    order: int
    alphas_cumprod: torch.Tensor
    timesteps: torch.Tensor
    @property
    def config(self) -> _SchedulerConfig: ...
    @property
    def init_noise_sigma(self) -> float | torch.Tensor: ...
    # the program has what they are made with in mappings of values of several types
    def __init__(self, **config: Any) -> None: ...
    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self: ...
    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = ...) -> None: ...
    def scale_model_input(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor: ...
    def add_noise(
        self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
    ) -> torch.Tensor: ...
    # a tuple if that is asked for; further arguments are each scheduler's own
    def step(
        self, model_output: torch.Tensor, timestep: torch.Tensor, sample: torch.Tensor, *args: Any, **kwargs: Any
    ) -> SchedulerOutput | Any: ...

class DDIMScheduler(SchedulerMixin): ...
class DDPMScheduler(SchedulerMixin): ...
class DPMSolverMultistepScheduler(SchedulerMixin): ...
class SASolverScheduler(SchedulerMixin): ...

class UniPCMultistepScheduler(SchedulerMixin):
    model_outputs: list[torch.Tensor | None]
    def multistep_uni_p_bh_update(
        self, model_output: torch.Tensor, *, sample: torch.Tensor, order: int
    ) -> torch.Tensor: ...
    def multistep_uni_c_bh_update(
        self, this_model_output: torch.Tensor, *, last_sample: torch.Tensor, this_sample: torch.Tensor, order: int
    ) -> torch.Tensor: ...

class PNDMScheduler(SchedulerMixin):
    num_inference_steps: int
    counter: int
    prk_timesteps: np.ndarray
    plms_timesteps: np.ndarray
    _timesteps: np.ndarray
    def step(
        self, model_output: torch.Tensor, timestep: torch.Tensor, sample: torch.Tensor, return_dict: bool = ...
    ) -> SchedulerOutput | tuple: ...
    def step_prk(
        self, model_output: torch.Tensor, timestep: torch.Tensor, sample: torch.Tensor, return_dict: bool = ...
    ) -> SchedulerOutput | tuple: ...
    def step_plms(
        self, model_output: torch.Tensor, timestep: torch.Tensor, sample: torch.Tensor, return_dict: bool = ...
    ) -> SchedulerOutput | tuple: ...

class LMSDiscreteScheduler(SchedulerMixin):
    sigmas: torch.Tensor
    derivatives: list[torch.Tensor]
    def step(
        self,
        model_output: torch.Tensor,
        timestep: torch.Tensor,
        sample: torch.Tensor,
        order: int = ...,
        return_dict: bool = ...,
    ) -> LMSDiscreteSchedulerOutput | tuple: ...

class EulerDiscreteScheduler(SchedulerMixin):
    sigmas: torch.Tensor
    @property
    def step_index(self) -> int | Any: ...  # None before the first step
    def set_timesteps(
        self,
        num_inference_steps: int | None = ...,
        device: str | torch.device | None = ...,
        timesteps: list[int] | None = ...,
    ) -> None: ...
    def step(
        self,
        model_output: torch.Tensor,
        timestep: torch.Tensor,
        sample: torch.Tensor,
        *,
        generator: list[torch.Generator] | None = ...,
    ) -> EulerDiscreteSchedulerOutput: ...

class EulerAncestralDiscreteScheduler(SchedulerMixin):
    sigmas: torch.Tensor
    _step_index: int
    @property
    def step_index(self) -> int | Any: ...  # None before the first step
    def _init_step_index(self, timestep: torch.Tensor) -> None: ...
    def step(
        self,
        model_output: torch.Tensor,
        timestep: torch.Tensor,
        sample: torch.Tensor,
        generator: list[torch.Generator] | None = ...,
        return_dict: bool = ...,
    ) -> EulerAncestralDiscreteSchedulerOutput | tuple: ...

# ---------------------------------------------------------------------------------------------------------------------
# Pipelines, which tools/ measure the program against

class _Drawn:
    images: list[Image]

class DiffusionPipeline:
    unet: Callable[..., Any]
    scheduler: SchedulerMixin
    @classmethod
    def from_pretrained(cls, path: str | Path, /, **components: Any) -> Self: ...
    def to(self, device: torch.device) -> Self: ...
    def set_progress_bar_config(self, *, disable: bool) -> None: ...
    def load_lora_weights(self, file: str, /) -> None: ...  # those of Stable Diffusion have it
    def __call__(self, **arguments: Any) -> _Drawn: ...

class StableDiffusionPipeline(DiffusionPipeline): ...
class StableDiffusionControlNetPipeline(DiffusionPipeline): ...
