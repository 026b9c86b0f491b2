"""ControlNet-LLLite at work: small networks that change what linear layers of the U-Net take, after a guide picture.

For a layer W and its input x, W(x + weight · up(ReLU(mid([c, ReLU(down(x))])))); c is what the network's convolutions
make of the guide (Kohya, https://github.com/kohya-ss/sd-scripts, ControlNet-LLLite).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from torch import nn

from library.draw.feature_sizes import followed
from library.draw.guides import Guide
from library.draw.tiles import Tile
from library.files.lllite import LLLiteFile, convolution_names
from library.machine.devices import sent
from library.models.weight_reading import CastWeights
from library.plan.job import Job
from library.settings.control_net import Control, ControlNetSettings
from library.settings.masks import NO_MASKS, MaskSettings
from library.settings.tiling import WHOLE, Tiling

_LARGEST_CELL_PX = 32  # of the U-Net's deepest features


class LayerNetwork:
    """The small network of one layer.

    Args:
        convolutions: read a guide (1, 3, height, width): weights and biases, each as far apart as it is large.
        down: weight and bias of a linear layer, as `mid` and `up`.
        mid: see `down`.
        up: see `down`.
    """

    def __init__(
        self,
        convolutions: Sequence[tuple[torch.Tensor, torch.Tensor]],
        down: tuple[torch.Tensor, torch.Tensor],
        mid: tuple[torch.Tensor, torch.Tensor],
        up: tuple[torch.Tensor, torch.Tensor],
    ) -> None:
        self._convolutions = convolutions
        self._down, self._mid, self._up = down, mid, up

    def read(self, guide: torch.Tensor) -> torch.Tensor:
        """What is made of a guide (1, 3, height, width) from -1 to 1: (1, channels, h, w), a cell for each of the
        U-Net's features here; one that the guide fills in part reads its border on.
        """
        height, width = guide.shape[-2:]
        read = F.pad(guide, (0, -width % _LARGEST_CELL_PX, 0, -height % _LARGEST_CELL_PX), mode="replicate")
        cell_px = 1
        for place, (weight, bias) in enumerate(self._convolutions):
            read = F.conv2d(F.relu(read) if place else read, weight, bias, stride=weight.shape[-1])
            cell_px *= weight.shape[-1]
        return read[..., : -(-height // cell_px), : -(-width // cell_px)]

    def share(self, read: torch.Tensor) -> torch.Tensor:
        """What was read (pictures, channels, h, w) in `mid`, the same at all steps: (pictures, tokens, m)"""
        weight, bias = self._mid
        return F.linear(read.flatten(2).transpose(1, 2), weight[:, : read.shape[1]], bias)

    def change(self, x: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
        """The change of a layer's input (branches * pictures, tokens, channels), given the guides' share."""
        down = F.relu(F.linear(x, *self._down))
        mid = F.linear(down, self._mid[0][:, -down.shape[-1] :]).unflatten(0, (-1, len(share)))
        return F.linear(F.relu(mid + share).flatten(0, 1), *self._up)


class LLLite:
    """One loaded ControlNet-LLLite: the small networks by the paths of the U-Net's layers, and how they are used."""

    def __init__(self, networks: Mapping[str, LayerNetwork], control: Control) -> None:
        self.networks = networks
        self.control = control


class LLLites:
    """The ControlNet-LLLites of a run, which all work at every step of their ranges; there may be none.

    At a layer the last one works first and hands on to the one before it, as sd-scripts nests them.
    """

    def __init__(self, nets: Sequence[LLLite], masks: MaskSettings = NO_MASKS) -> None:
        self._nets, self._masks = nets, masks
        self._read: dict[Guide, dict[str, torch.Tensor]] = {}  # of the last batch, where it was drawn whole
        self._guides: list[torch.Tensor] = []  # else for each the batch's guides (pictures, 3, height, width) uint8,
        self._in_tile: list[torch.Tensor] = []  # and what of them is in the tile that the U-Net is working on
        self._size = (0, 0)  # height and width of the feature map that the U-Net is working on
        self._progress = 0.0
        self._steps = 1

    def __bool__(self) -> bool:
        return bool(self._nets)

    def begin_step(self, index: int) -> None:
        """Say which step the U-Net's next evaluations belong to."""
        self._progress = index / self._steps

    def begin_tile(self, tile: Tile) -> None:
        """Say which tile of the latents the U-Net's next evaluation is for."""
        self._in_tile = [tile.at(*guides.shape[-2:]).cut(guides).float() / 127.5 - 1 for guides in self._guides]

    @contextmanager
    def attached(
        self, unet: UNet2DConditionModel, jobs: Sequence[Job], steps: int, tiling: Tiling = WHOLE
    ) -> Iterator[None]:
        """Steer a batch of jobs for so many steps, for the length of the block."""
        self._steps, self._guides = steps, []
        nets = self._nets if jobs[0].control_net else ()
        last, self._read = self._read, {}
        in_tiles = tiling.splits(jobs[0].width, jobs[0].height)
        with ExitStack() as stack:
            if nets:
                stack.enter_context(followed(self._note_size, unet))
            for place, net in enumerate(nets):
                of_jobs = [Guide.of(place, job, net.control.preprocess, self._masks) for job in jobs]
                if in_tiles:
                    self._guides.append(torch.cat([_load_guide(guide, unet) for guide in of_jobs]))
                    for path, network in net.networks.items():
                        hook = self._tile_hook(net.control, network, place)
                        stack.callback(unet.get_submodule(path).register_forward_pre_hook(hook, prepend=True).remove)
                    continue
                for guide in of_jobs:
                    self._read[guide] = last.get(guide) or self._read.get(guide) or _read_guide(net, guide, unet)
                for path, network in net.networks.items():
                    read = torch.cat([self._read[guide][path] for guide in of_jobs])  # (pictures, channels, h, w)
                    hook = self._hook(net.control, network, read)
                    stack.callback(unet.get_submodule(path).register_forward_pre_hook(hook, prepend=True).remove)
            yield

    def _note_size(self, size: tuple[int, int]) -> None:
        self._size = size

    def _hook(self, control: Control, network: LayerNetwork, read: torch.Tensor) -> Callable:
        at_size: dict[tuple[int, int], torch.Tensor] = {}  # the guides' shares

        def hook(_layer: nn.Module, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor] | None:
            if not control.works_at(self._progress):
                return None
            (x,) = inputs
            if self._size not in at_size:
                at_size[self._size] = network.share(_to_size(read, self._size))
            return (x + control.weight * network.change(x, at_size[self._size]),)

        return hook

    def _tile_hook(self, control: Control, network: LayerNetwork, place: int) -> Callable:
        """As `_hook`, but guides are read anew for each tile: what is read of all tiles would fill much memory."""

        def hook(_layer: nn.Module, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor] | None:
            if not control.works_at(self._progress):
                return None
            (x,) = inputs
            read = network.read(self._in_tile[place].to(x.dtype))
            return (x + control.weight * network.change(x, network.share(_to_size(read, self._size))),)

        return hook


def _to_size(read: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """What was read of guides, at a feature map's size: another than a guide's where that is shrunk."""
    if tuple(read.shape[-2:]) == size:
        return read
    return F.interpolate(read.float(), size, mode="bilinear", align_corners=False).to(read.dtype)


def _read_guide(net: LLLite, guide: Guide, unet: UNet2DConditionModel) -> dict[str, torch.Tensor]:
    """What each of the small networks makes of a guide."""
    pixels = (_load_guide(guide, unet).float() / 127.5 - 1).to(unet.dtype)
    return {path: network.read(pixels) for path, network in net.networks.items()}


def _load_guide(guide: Guide, unet: UNet2DConditionModel) -> torch.Tensor:
    """A prepared guide: (1, 3, height, width) uint8."""
    pixels = torch.from_numpy(np.array(guide.prepare())).permute(2, 0, 1)[None]
    return sent(pixels, unet.device)


def load_lllites(settings: ControlNetSettings, unet: UNet2DConditionModel, masks: MaskSettings = NO_MASKS) -> LLLites:
    """Load a run's ControlNet-LLLites beside the U-Net that they steer.

    Raises:
        InputError: when tensors hold NaN or infinite values.
    """
    files = ((spec.file, spec.control) for spec in settings.specs)
    return LLLites(
        [LLLite(_load(file, unet), control) for file, control in files if isinstance(file, LLLiteFile)], masks
    )


def _load(file: LLLiteFile, unet: UNet2DConditionModel) -> dict[str, LayerNetwork]:
    weights = CastWeights(file.weights, unet.device, unet.dtype)

    def pair(name: str, part: str) -> tuple[torch.Tensor, torch.Tensor]:
        return weights.tensor(f"lllite_unet_{name}.{part}.weight"), weights.tensor(f"lllite_unet_{name}.{part}.bias")

    networks = {
        path: LayerNetwork(
            [pair(name, part.removesuffix(".weight")) for part in convolution_names(name, weights.shapes)],
            *(pair(name, f"{part}.0") for part in ("down", "mid", "up")),
        )
        for path, name in file.modules.items()
    }
    weights.close()
    return networks
