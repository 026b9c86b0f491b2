"""ControlNets at work: loaded beside the U-Net, their guide pictures embedded once, their residuals added step by step.

Zhang et al. 2023, https://arxiv.org/abs/2302.05543
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import ControlNetModel, ControlNetUnionModel, UNet2DConditionModel

from library.draw.guides import Guide
from library.draw.text_conditions import TextConditions
from library.draw.tiles import Tile, strips, tiles_over
from library.files import checkpoint_layout as layout
from library.files.control_net import ControlNetFile, control_net_names
from library.machine.devices import sent
from library.models.models import Source, build, fill
from library.models.weight_reading import CastWeights
from library.plan.job import Job
from library.settings.control_net import ControlNetSettings, ControlNetSpec, kinds_of
from library.settings.masks import NO_MASKS, MaskSettings
from library.settings.tiling import WHOLE, Tiling
from library.values import PIXELS_PER_CELL

# What ControlNets add inside the U-Net, as its keyword arguments
Residuals = dict[str, torch.Tensor | list[torch.Tensor]]

_REACH = 3  # latent cells: farther away, a guide's pixels have no part in what hint blocks make of it


class ControlNet:
    """One loaded ControlNet.

    Its hint block is taken off the model, so that a guide can be embedded once for all steps.

    Args:
        model: the ControlNet, or a ControlNet Union, which joins several guides.
        specs: of its guides, by their places among all that steers.
    """

    def __init__(self, model: ControlNetModel | ControlNetUnionModel, specs: Mapping[int, ControlNetSpec]) -> None:
        self.model = model
        self.specs = specs
        self._hint_block = model.controlnet_cond_embedding
        model.controlnet_cond_embedding = torch.nn.Identity()

    def embed(self, guide: np.ndarray) -> torch.Tensor:
        """Embed a guide that was prepared: (1, channels, height / 8, width / 8)."""
        pixels = sent(torch.tensor(guide), self.model.device).permute(2, 0, 1)[None]
        return self._hint_block((pixels.float() / 255).to(self.model.dtype))

    def embed_in_tiles(self, guide: np.ndarray, tiling: Tiling) -> torch.Tensor:
        """As `embed`, tile by tile where a guide is larger, each with as much around it as has a part in it."""
        size = guide.shape[0] // PIXELS_PER_CELL, guide.shape[1] // PIXELS_PER_CELL
        tiles = tiles_over(size, tiling.size, overlap=0)
        if len(tiles) == 1:
            return self.embed(guide)

        def embed(tile: Tile) -> torch.Tensor:
            seen = tile.widened(_REACH)
            left, top, right, bottom = (PIXELS_PER_CELL * border for border in seen.box)
            features, whole = self.embed(guide[top:bottom, left:right]), (seen.height, seen.width)
            return Tile(tile.top - seen.top, tile.left - seen.left, tile.height, tile.width, whole).cut(features)

        return torch.cat([strip.to(self.model.dtype) for strip in strips(tiles, map(embed, tiles))], dim=-2)

    def residuals(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        text: TextConditions,
        guides: Mapping[int, torch.Tensor],
        progress: float,
    ) -> tuple[list[torch.Tensor], torch.Tensor] | None:
        """What it adds to the U-Net's skip connections and to its middle block; None where it has no part in the step.

        Args:
            sample: the U-Net's input (R, C, h, w); R is a multiple of the number of pictures.
            timestep: the U-Net's.
            text: the U-Net's.
            guides: the embedded guides (pictures, channels, h', w'), by their places.
            progress: the share of the steps that were made, 0 to 1.
        """
        at_work = {place: spec for place, spec in self.specs.items() if spec.control.works_at(progress)}
        if not at_work:
            return None
        sample = sample[:, : self.model.config.in_channels]  # what stands beside the latents is for the U-Net
        features = [_to_rows(guides[place], sample) for place in at_work]
        weights = [spec.control.weight for spec in at_work.values()]
        told = text.unet_arguments()
        if not isinstance(self.model, ControlNetUnionModel):
            return self.model(
                *(sample, timestep),
                controlnet_cond=features[0],
                conditioning_scale=weights[0],
                return_dict=False,
                **told,
            )
        kinds = kinds_of(list(at_work.values()))
        types = torch.zeros(len(sample), self.model.config.num_control_type, device=sample.device)
        for kind in kinds:  # one by one: a list of them would be copied to the device at each step
            types[:, kind] = 1
        return self.model(
            *(sample, timestep),
            controlnet_cond=features,
            control_type=types,
            control_type_idx=kinds,
            conditioning_scale=weights,
            return_dict=False,
            **told,
        )


def _to_rows(features: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
    """Embedded guides at the size of the U-Net's input, for each of its rows."""
    features = _to_size(features, (sample.shape[-2], sample.shape[-1]))
    return features.repeat(len(sample) // len(features), 1, 1, 1)


def _to_size(features: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    if features.shape[-2:] == size:
        return features
    return F.interpolate(features.float(), size, mode="bicubic").to(features.dtype)


class ControlNets:
    """The ControlNets of a run: used in turn, one at each step, or all at every step.

    Args:
        nets: may be none.
        settings: how they work together.
        masks: how the masks of pictures are read, for guides that have a part in them.
    """

    def __init__(
        self, nets: Sequence[ControlNet], settings: ControlNetSettings, masks: MaskSettings = NO_MASKS
    ) -> None:
        self.nets = nets
        self.settings = settings
        self._masks = masks
        self._embedded: dict[Guide, torch.Tensor] = {}  # of the last batch

    @property
    def models(self) -> list[ControlNetModel | ControlNetUnionModel]:
        """The models themselves."""
        return [net.model for net in self.nets]

    def steer(self, jobs: Sequence[Job], steps: int, tiling: Tiling = WHOLE) -> "Steering":
        """Embed the guides of a batch's jobs, for so many steps, in the memory of a tile."""
        last, self._embedded = self._embedded, {}
        guides = {}
        for net in self.nets if jobs[0].control_net else ():
            for place, spec in net.specs.items():
                of_jobs = [Guide.of(place, job, spec.control.preprocess, self._masks) for job in jobs]
                guides[place] = torch.cat([self._embed(net, guide, last, tiling) for guide in of_jobs])
        return Steering(self.nets if guides else (), guides, steps, together=self.settings.together)

    def _embed(self, net: ControlNet, guide: Guide, last: Mapping[Guide, torch.Tensor], tiling: Tiling) -> torch.Tensor:
        if guide not in self._embedded:
            embedded = last.get(guide)
            if embedded is None:
                embedded = net.embed_in_tiles(guide.prepare(), tiling)
            self._embedded[guide] = embedded
        return self._embedded[guide]


class Steering:
    """ControlNets with the guides of a batch.

    Args:
        nets: the ControlNets; none to do without.
        guides: the embedded guides (B, channels, height / 8, width / 8), by their places.
        steps: how many steps are run.
        together: see `ControlNetSettings`.
    """

    def __init__(
        self, nets: Sequence[ControlNet], guides: Mapping[int, torch.Tensor], steps: int, *, together: bool
    ) -> None:
        self._nets, self._guides = nets, guides
        self.models = [net.model for net in nets]
        self._steps = steps
        self._together = together
        self._resized: dict[int, torch.Tensor] = {}  # the guides at the size of latents that tiles were last cut from

    def residuals(
        self, sample: torch.Tensor, timestep: torch.Tensor, text: TextConditions, index: int, tile: Tile
    ) -> Residuals:
        """What the ControlNets of a step add inside the U-Net; empty when none works at it.

        Args:
            sample: the U-Net's input (R, C, h, w); R is a multiple of B.
            timestep: the U-Net's.
            text: the U-Net's.
            index: the step's place, from 0.
            tile: the part of the latents that the U-Net's input is.
        """
        guides = self._guides if tile.is_whole else self._cut(tile)
        down, middle = [], None
        for place, net in enumerate(self._nets):
            if not self._together and index % len(self._nets) != place:
                continue
            added = net.residuals(sample, timestep, text, guides, index / self._steps)
            if added is not None:
                down = [a + b for a, b in zip(down, added[0])] if down else added[0]
                middle = added[1] if middle is None else middle + added[1]
        if middle is None:
            return {}
        return {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}

    def _cut(self, tile: Tile) -> dict[int, torch.Tensor]:
        """The guides of a tile, cut from the whole ones at the latents' size."""
        for place, features in self._guides.items():
            resized = self._resized.get(place)
            if resized is None or resized.shape[-2:] != tile.whole:
                self._resized[place] = _to_size(features, tile.whole)
        return {place: tile.cut(features) for place, features in self._resized.items()}


def load_control_nets(
    settings: ControlNetSettings, unet: UNet2DConditionModel, masks: MaskSettings = NO_MASKS
) -> ControlNets:
    """Load a run's ControlNets beside the U-Net that they steer; networks that are merged are in that, others not yet.

    A ControlNet Union that is given for several guides is one ControlNet.

    Raises:
        InputError: when tensors are missing, of a wrong shape, or hold NaN or infinite values.
    """
    nets: list[ControlNet] = []
    unions: dict[Path, dict[int, ControlNetSpec]] = {}
    for place, spec in enumerate(settings.specs):
        if not isinstance(spec.file, ControlNetFile):
            continue
        if spec.file.control_types and spec.path in unions:
            unions[spec.path][place] = spec
            continue
        specs = {place: spec}
        if spec.file.control_types:
            unions[spec.path] = specs
        nets.append(ControlNet(load_control_net(spec.file, unet), specs))
    return ControlNets(nets, settings, masks)


def load_control_net(file: ControlNetFile, unet: UNet2DConditionModel) -> ControlNetModel | ControlNetUnionModel:
    """Load one.

    Raises:
        InputError: as `load_control_nets`.
    """
    model_class = ControlNetUnionModel if file.control_types else ControlNetModel
    model = build(file, model_class.from_config)
    modules = layout.control_net_modules(unet.config, len(model.controlnet_cond_embedding.blocks))

    def sources(target: str) -> list[Source]:
        return [Source(name) for name in control_net_names(target, modules)]

    weights = CastWeights(file.weights, unet.device, unet.dtype)
    fill(model, weights, sources)
    weights.close()
    if file.is_difference:
        shared = dict(unet.named_parameters())
        for name, parameter in model.named_parameters():
            if name in shared:
                base = shared[name]
                if base.shape != parameter.shape:  # the first convolution of a U-Net that reads more than it
                    base = base[:, : parameter.shape[1]]
                parameter.copy_(parameter.float() + base.float())
    return model
