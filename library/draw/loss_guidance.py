"""Guidance by the loss of CLIP or VGG16: at each step, a picture is moved towards what these models are to see in it.

The U-Net's prediction promises a clean picture. It is decoded, a loss says how far it is from its goal, and the loss's
gradient with respect to the latents changes the step, as a classifier's does in Dhariwal and Nichol 2021
(https://arxiv.org/abs/2105.05233). The losses are the distance of CLIP's embeddings (Radford et al. 2021,
https://arxiv.org/abs/2103.00020) from those of a text or of a picture, their goal, and the distance of VGG16's features
from those of such a picture (Gatys et al. 2015, https://arxiv.org/abs/1508.06576).
"""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, LMSDiscreteScheduler, SchedulerMixin, UNet2DConditionModel
from PIL import Image
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from library.draw.text_conditions import TextConditions
from library.draw.unet_call import timestep_on
from library.files.loss_guidance import VGG16_LAYERS, VGG16_SHRINK, LossGuidanceFiles
from library.files.model_files import Component
from library.files.pictures import load_guide
from library.files.tokenizers import open_tokenizer
from library.files.weight_files import WeightFile
from library.machine import malloc
from library.models.models import Models, Source, build, fill
from library.models.weight_reading import CastWeights
from library.plan.emphasis import BREAK, parse_emphasis
from library.plan.job import Job
from library.plan.tokens import CHUNK_TOKENS
from library.settings.loss_guidance import LossGuidanceSettings

logger = logging.getLogger(__name__)

# Means and standard deviations of red, green and blue that the models' training pictures were normalised with
_CLIP_COLOURS = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
_IMAGENET_COLOURS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

PictureLoss = Callable[[torch.Tensor], torch.Tensor]  # a picture (1, 3, height, width) from 0 to 1 → a number

# ---------------------------------------------------------------------------------------------------------------------
# Losses


def resize(picture: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Resize a picture (1, 3, H, W) to (height, width), averaging where it shrinks."""
    return F.interpolate(picture, size, mode="bilinear", antialias=True)


class _Colours:
    """What pictures (1, 3, H, W) are normalised by; kept on their device, which would be waited for at each step."""

    def __init__(self, mean: Sequence[float], deviation: Sequence[float], device: torch.device) -> None:
        self._mean, self._deviation = (torch.tensor(each, device=device).view(3, 1, 1) for each in (mean, deviation))

    def normalise(self, picture: torch.Tensor) -> torch.Tensor:
        return (picture - self._mean) / self._deviation


def _nearest(goal: Image.Image, size: tuple[int, int]) -> torch.Tensor:
    """A goal picture as (1, 3, height, width) from 0 to 1, resized to (height, width) by taking the nearest pixels."""
    pixels = np.array(goal.resize(size[::-1], Image.Resampling.NEAREST))
    return torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255


def spherical_distance(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Half the square of the angle between unit vectors (..., n), from the length of the chord between them."""
    return 2 * torch.arcsin((first - second).norm(dim=-1) / 2) ** 2


class Clip:
    """A CLIP model as a judge of pictures.

    Args:
        model: in a type that holds small gradients: float32.
        tokenizer: with the model's vocabulary.
    """

    def __init__(self, model: CLIPModel, tokenizer: CLIPTokenizer) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self._colours = _Colours(*_CLIP_COLOURS, model.device)
        side: int = model.vision_model.embeddings.image_size
        self._size = (side, side)

    def embed_text(self, pieces: Sequence[str]) -> torch.Tensor:
        """The unit vector (1, width) of a text, whose pieces are tokenized apart; 75 tokens count."""
        ids = [i for piece in pieces for i in self.tokenizer(piece, add_special_tokens=False, verbose=False).input_ids]
        if len(ids) > CHUNK_TOKENS:
            logger.warning("CLIP guidance reads the first %d tokens of a text only", CHUNK_TOKENS)
        ids = [self.tokenizer.bos_token_id, *ids[:CHUNK_TOKENS], self.tokenizer.eos_token_id]
        pooled = self.model.text_model(torch.tensor([ids], device=self.model.device)).pooler_output
        return F.normalize(self.model.text_projection(pooled), dim=-1)

    def embed_picture(self, picture: torch.Tensor) -> torch.Tensor:
        """The unit vector (1, width) of a picture (1, 3, H, W) of any size, from 0 to 1."""
        pixels = self._colours.normalise(resize(picture, self._size)).to(self.model.dtype)
        pooled = self.model.vision_model(pixels).pooler_output
        return F.normalize(self.model.visual_projection(pooled), dim=-1)

    def embed_goal(self, goal: Image.Image) -> torch.Tensor:
        """The unit vector (1, width) of a goal picture."""
        return self.embed_picture(_nearest(goal, self._size).to(self.model.device))

    def loss(self, goal: torch.Tensor, scale: float) -> PictureLoss:
        """The loss of pictures by their distance from a unit vector."""
        return lambda picture: scale * spherical_distance(self.embed_picture(picture), goal).mean()


class Vgg16:
    """VGG16's features as a judge of pictures; `features` are its layers up to the one that is looked at."""

    def __init__(self, features: torch.nn.Sequential) -> None:
        self.features = features
        self._weight = next(features.parameters())
        self._colours = _Colours(*_IMAGENET_COLOURS, self._weight.device)

    def embed(self, picture: torch.Tensor) -> torch.Tensor:
        """The features (1, channels, h, w) of a picture (1, 3, H, W), from 0 to 1."""
        return self.features(self._colours.normalise(picture).to(self._weight))

    def loss(self, goal: Image.Image, scale: float, size: tuple[int, int]) -> PictureLoss:
        """The loss of pictures of (height, width) by their features' mean squared difference from the goal's."""
        small = (size[0] // VGG16_SHRINK, size[1] // VGG16_SHRINK)
        wanted = self.embed(_nearest(goal, small).to(self._weight.device))
        return lambda picture: scale * F.mse_loss(self.embed(resize(picture, small)), wanted)


class Judges:
    """The models that a run's pictures are judged by, and what each picture is to be like."""

    def __init__(self, settings: LossGuidanceSettings, models: Models, clip: Clip | None, vgg16: Vgg16 | None) -> None:
        self._settings = settings
        self._models = models
        self._clip = clip
        self._vgg16 = vgg16
        self._last: Image.Image | None = None
        self._last_file: Path | None = None  # that it was meant for

    def guide(
        self,
        jobs: Sequence[Job],
        texts: Sequence[Sequence[TextConditions]],
        scheduler: SchedulerMixin,
        timesteps: torch.Tensor,
    ) -> "LossGuidance":
        """What guides the steps of a batch; see `LossGuidance` for the arguments."""
        losses = [self.losses(job) for job in jobs]
        return LossGuidance(self._models.unet, self._models.vae, scheduler, timesteps, texts, losses)

    def remember(self, jobs: Sequence[Job], pictures: Sequence[np.ndarray | None]) -> None:
        """Keep the last of the pictures (height, width, 3) uint8: without goal pictures it is the next one's goal."""
        for job, picture in zip(jobs, pictures):
            if picture is not None:
                self._last, self._last_file = Image.fromarray(picture), job.file

    def losses(self, job: Job) -> list[PictureLoss]:
        """The losses of one picture: by its text, and by its goal picture where it has one."""
        settings, losses = self._settings, []
        goal = self._goal(job) if settings.uses_goal_picture else None
        if self._clip is not None and settings.clip_scale > 0:
            losses.append(self._clip.loss(self._clip.embed_text(clip_text(job)), settings.clip_scale))
        if self._clip is not None and settings.clip_image_scale > 0 and goal is not None:
            losses.append(self._clip.loss(self._clip.embed_goal(goal), settings.clip_image_scale))
        if self._vgg16 is not None and goal is not None:
            losses.append(self._vgg16.loss(goal, settings.vgg16_scale, (job.height, job.width)))
        return losses

    def _goal(self, job: Job) -> Image.Image | None:
        """The job's goal picture, else the picture made before it; None for the first."""
        made_before = job.follows is not None and job.follows != self._last_file and job.follows.is_file()
        if job.goal is not None and (job.guides or made_before):  # before: by a run that this one goes on with
            return load_guide(job.goal)
        return self._last


def clip_text(job: Job) -> list[str]:
    """The text that CLIP gets for a job: `--c` as it stands, else the prompt's pieces without weights and `BREAK`."""
    if job.clip_prompt:
        return [job.clip_prompt]
    return [piece for piece, _ in parse_emphasis(job.parts[0].text.at(job.last_moment)) if piece is not BREAK]


def load_judges(settings: LossGuidanceSettings, files: LossGuidanceFiles, models: Models) -> Judges:
    """Load the models that judge, and make the models that draw ready for gradients.

    They run in float32, whatever the others run in: they are small, and gradients are smaller.
    """
    for model in (models.unet, models.vae):  # without this, what they keep for gradients fills many gigabytes
        model.enable_gradient_checkpointing()
    device = models.unet.device
    return Judges(
        settings,
        models,
        clip=load_clip(files.clip, files.clip_tokenizer, device) if files.clip else None,
        vgg16=load_vgg16(files.vgg16, settings.vgg16_layer, device) if files.vgg16 else None,
    )


def load_clip(component: Component, tokenizer: Path, device: torch.device) -> Clip:
    """Load a CLIP model, and its tokenizer from a folder.

    Raises:
        InputError: when tensors are missing, of a wrong shape, or hold NaN or infinite values.
    """
    model = build(component, lambda config: CLIPModel(CLIPConfig.from_dict(config)))
    weights = CastWeights(component.weights, device, torch.float32)
    fill(model, weights, lambda name: [Source(name)])
    weights.close()
    return Clip(model, open_tokenizer(tokenizer))


def load_vgg16(weights: WeightFile, last_layer: int, device: torch.device) -> Vgg16:
    """Load VGG16's layers up to `last_layer`, as wide as the file's tensors are.

    Raises:
        InputError: when tensors hold NaN or infinite values.
    """
    layers: list[torch.nn.Module] = []
    with torch.device("meta"):
        for place, layer in enumerate(VGG16_LAYERS[: last_layer + 1]):
            if layer == "convolution":
                outputs, inputs, *_ = weights.shapes[f"features.{place}.weight"]
                layers.append(torch.nn.Conv2d(inputs, outputs, 3, padding=1))
            else:
                layers.append(torch.nn.ReLU() if layer == "relu" else torch.nn.MaxPool2d(2))
    features = torch.nn.Sequential(*layers)
    cast = CastWeights(weights, device, torch.float32)
    fill(features, cast, lambda name: [Source(f"features.{name}")])
    cast.close()
    return Vgg16(features)


# ---------------------------------------------------------------------------------------------------------------------
# Steps


@dataclass(frozen=True)
class NoiseLevel:
    """What the U-Net reads at a timestep: alpha * clean latents + sigma * noise, with alpha² + sigma² = 1."""

    alpha: float
    sigma: float


def noise_levels(scheduler: SchedulerMixin, timesteps: torch.Tensor) -> list[NoiseLevel]:
    """The noise level of each timestep of a run, the last ones of the scheduler's."""
    if isinstance(scheduler, LMSDiscreteScheduler):  # its latents are clean + sigma * noise, and end at a sigma of 0
        shares = 1 / (scheduler.sigmas[-1 - len(timesteps) : -1].double() ** 2 + 1)
    else:
        shares = scheduler.alphas_cumprod.double()[timesteps.cpu()]
    return [NoiseLevel(math.sqrt(share), math.sqrt(1 - share)) for share in shares.tolist()]


class LossGuidance:
    """Changes each step so that the loss of the picture that the U-Net promises becomes smaller.

    Pictures are taken one by one: each has its own losses, and its gradient takes much memory.

    Args:
        unet: predicts noise or v.
        vae: decodes.
        scheduler: DDIM, PNDM or LMS, with its timesteps set.
        timesteps: those that are run.
        texts: for each timestep and picture its prompt's embeddings, one row.
        losses: for each picture.
    """

    def __init__(
        self,
        unet: UNet2DConditionModel,
        vae: AutoencoderKL,
        scheduler: SchedulerMixin,
        timesteps: torch.Tensor,
        texts: Sequence[Sequence[TextConditions]],
        losses: Sequence[Sequence[PictureLoss]],
    ) -> None:
        self._unet, self._vae = unet, vae
        self._timesteps = timesteps
        self._levels = noise_levels(scheduler, timesteps)
        self._texts = texts
        self._losses = losses
        self._moves_latents = isinstance(scheduler, LMSDiscreteScheduler)
        self._predicts_v = scheduler.config.prediction_type == "v_prediction"

    def __call__(
        self, prediction: torch.Tensor, latents: torch.Tensor, index: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Change the joined prediction and the latents, both (B, C, h, w), before step `index`."""
        pairs = [
            self._guide(prediction[row : row + 1], latents[row : row + 1], index, row) for row in range(len(latents))
        ]
        predictions, moved = zip(*pairs)
        return torch.cat(predictions), torch.cat(moved)

    def _guide(
        self, prediction: torch.Tensor, latents: torch.Tensor, index: int, row: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Guide one picture: prediction and latents (1, C, h, w)."""
        level, losses = self._levels[index], self._losses[row]
        if not losses:
            return prediction, latents
        if not self._moves_latents:
            noise_change = level.sigma * self.gradient(latents, index, row, losses)
            return prediction + (noise_change / level.alpha if self._predicts_v else noise_change), latents
        for loss in losses:  # as in sd-scripts, each loss sees the latents where the one before has moved them
            move = -self.gradient(latents, index, row, [loss]) * (level.sigma / level.alpha) ** 2
            latents = latents + move
            if self._predicts_v:  # so that it goes on standing for the same noise
                prediction = prediction - level.sigma * move
        return prediction, latents

    @malloc.blocks_from_system()
    def gradient(self, latents: torch.Tensor, index: int, row: int, losses: Sequence[PictureLoss]) -> torch.Tensor:
        """The gradient of the losses' sum with respect to one picture's latents (1, C, h, w) before step `index`."""
        with torch.enable_grad():
            latents = latents.detach().requires_grad_()
            picture = self.promised_picture(latents, index, row)
            seen = picture.detach().requires_grad_()
            (by_picture,) = torch.autograd.grad(reduce(torch.add, [loss(seen) for loss in losses]), seen)
            # float16 in the VAE and the U-Net would lose small numbers: those that go through them are at most 1
            size = by_picture.abs().amax().clamp(min=torch.finfo(by_picture.dtype).tiny)
            (by_latents,) = torch.autograd.grad(picture, latents, by_picture / size)
        return by_latents * size

    def promised_picture(self, latents: torch.Tensor, index: int, row: int) -> torch.Tensor:
        """The picture (1, 3, H, W), from 0 to 1, that latents (1, C, h, w) before step `index` come to."""
        level = self._levels[index]
        sample = latents * level.alpha if self._moves_latents else latents
        text = self._texts[index][row].unet_arguments()
        timestep = timestep_on(sample.device, self._timesteps[index])
        output = self._unet(sample.to(self._unet.dtype), timestep, **text).sample.to(latents.dtype)
        if self._predicts_v:  # Salimans and Ho 2022 (https://arxiv.org/abs/2202.00512), appendix D
            clean = level.alpha * sample - level.sigma * output
        else:
            clean = (sample - level.sigma * output) / level.alpha
        if not self._moves_latents:  # the less noise is left, the more the latents stand for themselves
            clean = level.sigma * clean + (1 - level.sigma) * latents
        decoded = self._vae.decode((clean / self._vae.config.scaling_factor).to(self._vae.dtype)).sample
        return (decoded.to(latents.dtype) / 2 + 0.5).clamp(0, 1)
