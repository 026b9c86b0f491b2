"""ControlNets at work: loaded beside the U-Net, their guide pictures embedded once, their residuals added step by step.

Zhang et al. 2023, https://arxiv.org/abs/2302.05543
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import ControlNetModel, UNet2DConditionModel
from PIL import Image

from library.draw.text_conditions import TextConditions
from library.files import checkpoint_layout as layout
from library.files.control_net import control_net_names
from library.files.picture_files import encode, save_whole
from library.files.pictures import load_guide
from library.models.models import build, fill
from library.models.weight_reading import CastWeights
from library.plan.file_names import guide_name
from library.plan.job import Job
from library.settings.control_net import Canny, ControlNetSettings, ControlNetSpec

# What ControlNets add inside the U-Net, as its keyword arguments
Residuals = dict[str, torch.Tensor | list[torch.Tensor]]

EmbeddedKey = tuple[int, Path, tuple[int, int]]  # place of the ControlNet, guide picture, (width, height) in pixels


def prepare_guide(path: Path, size: tuple[int, int], preprocess: Canny | None) -> np.ndarray:
    """Read a guide picture at (width, height) pixels and preprocess it: (height, width, 3) uint8."""
    pixels = np.asarray(load_guide(path).resize(size, Image.Resampling.LANCZOS))
    if preprocess is None:
        return pixels
    import cv2  # 25 MB that only some runs need

    edges = cv2.Canny(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY), preprocess.low, preprocess.high)
    return np.stack([edges] * 3, axis=-1)


class ControlNet:
    """One loaded ControlNet.

    Its hint block is taken off the model, so that a guide can be embedded once for all steps.
    """

    def __init__(self, model: ControlNetModel, spec: ControlNetSpec) -> None:
        self.model = model
        self.spec = spec
        self._hint_block = model.controlnet_cond_embedding
        model.controlnet_cond_embedding = torch.nn.Identity()

    def embed(self, guide: np.ndarray) -> torch.Tensor:
        """Embed a prepared guide (height, width, 3): (1, channels, height / 8, width / 8)."""
        pixels = torch.tensor(guide, device=self.model.device).permute(2, 0, 1)[None]
        return self._hint_block((pixels.float() / 255).to(self.model.dtype))

    def works_at(self, progress: float) -> bool:
        """Whether it has a part in the step that begins after this share (0 to 1) of the steps."""
        return self.spec.weight != 0 and self.spec.end > 0 and self.spec.start <= progress <= self.spec.end

    def residuals(
        self, sample: torch.Tensor, timestep: torch.Tensor, text: TextConditions, features: torch.Tensor
    ) -> tuple[list[torch.Tensor], torch.Tensor]:
        """What it adds to the U-Net's skip connections and to its middle block.

        Args:
            sample: the U-Net's input (R, 4, h, w); R is a multiple of the number of pictures.
            timestep: the U-Net's.
            text: the U-Net's.
            features: the embedded guides (pictures, channels, h', w').
        """
        if features.shape[-2:] != sample.shape[-2:]:
            features = F.interpolate(features.float(), sample.shape[-2:], mode="bicubic").to(features.dtype)
        return self.model(
            sample,
            timestep,
            controlnet_cond=features.repeat(len(sample) // len(features), 1, 1, 1),
            conditioning_scale=self.spec.weight,
            return_dict=False,
            **text.unet_arguments(),
        )


class ControlNets:
    """The ControlNets of a run: used in turn, one at each step, or all at every step.

    Args:
        nets: may be none.
        settings: how they work together.
    """

    def __init__(self, nets: Sequence[ControlNet], settings: ControlNetSettings) -> None:
        self.nets = nets
        self.settings = settings
        self._embedded: dict[EmbeddedKey, torch.Tensor] = {}  # of the last batch

    @property
    def models(self) -> list[ControlNetModel]:
        """The models themselves."""
        return [net.model for net in self.nets]

    def steer(self, jobs: Sequence[Job], steps: int) -> "Steering":
        """Embed the guides of a batch's jobs, for so many steps."""
        last, self._embedded = self._embedded, {}
        features = []
        if self.settings.save_guides and jobs[0].stage != 1:
            self._save_guides(jobs)
        if jobs[0].control_net:
            features = [torch.cat([self._embed(place, job, last) for job in jobs]) for place in range(len(self.nets))]
        return Steering(self.nets, features, steps, together=self.settings.together)

    def _save_guides(self, jobs: Sequence[Job]) -> None:
        """Save what the ControlNets see beside each picture; a batch that is drawn once more has saved it."""
        for job in jobs:
            for place, net in enumerate(self.nets):
                file = job.file.with_name(guide_name(job.file.stem, place + 1))
                if not file.exists():
                    guide = prepare_guide(job.guides[place], (job.width, job.height), net.spec.preprocess)
                    save_whole(encode(guide, ".png", {}), file)

    def _embed(self, place: int, job: Job, last: dict[EmbeddedKey, torch.Tensor]) -> torch.Tensor:
        key = (place, job.guides[place], (job.width, job.height))
        if key not in last:
            last[key] = self.nets[place].embed(prepare_guide(*key[1:], self.nets[place].spec.preprocess))
        self._embedded[key] = last[key]
        return last[key]


class Steering:
    """ControlNets with the guides of a batch.

    Args:
        nets: the ControlNets.
        features: for each of them the embedded guides (B, channels, height / 8, width / 8); empty to do without.
        steps: how many steps are run.
        together: see `ControlNetSettings`.
    """

    def __init__(
        self, nets: Sequence[ControlNet], features: Sequence[torch.Tensor], steps: int, *, together: bool
    ) -> None:
        self._nets = list(zip(nets, features))
        self.models = [net.model for net, _ in self._nets]
        self._steps = steps
        self._together = together

    def residuals(self, sample: torch.Tensor, timestep: torch.Tensor, text: TextConditions, index: int) -> Residuals:
        """What the ControlNets of a step add inside the U-Net; empty when none works at it.

        Args:
            sample: the U-Net's input (R, 4, h, w); R is a multiple of B.
            timestep: the U-Net's.
            text: the U-Net's.
            index: the step's place, from 0.
        """
        down, middle = [], None
        for place, (net, features) in enumerate(self._nets):
            its_turn = self._together or index % len(self._nets) == place
            if its_turn and net.works_at(index / self._steps):
                more, more_middle = net.residuals(sample, timestep, text, features)
                down = [a + b for a, b in zip(down, more)] if down else more
                middle = more_middle if middle is None else middle + more_middle
        if middle is None:
            return {}
        return {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}


def load_control_net(spec: ControlNetSpec, unet: UNet2DConditionModel) -> ControlNet:
    """Load a ControlNet beside the U-Net that it steers; networks that are merged are in that, others not on it yet.

    Raises:
        InputError: when tensors are missing, of a wrong shape, or hold NaN or infinite values.
    """
    model = build(spec.component, ControlNetModel.from_config)
    modules = layout.control_net_modules(unet.config, len(model.controlnet_cond_embedding.blocks))

    def names(target: str) -> list[tuple[str, None]]:
        return [(name, None) for name in control_net_names(target, modules)]

    weights = CastWeights(spec.component.weights, unet.device, unet.dtype)
    fill(model, weights, names)
    weights.close()
    if spec.is_difference:
        shared = dict(unet.named_parameters())
        for name, parameter in model.named_parameters():
            if name in shared:
                parameter.copy_(parameter.float() + shared[name].float())
    return ControlNet(model, spec)
