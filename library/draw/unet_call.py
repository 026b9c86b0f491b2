"""How the U-Net is called with a text and what ControlNets add: directly, by CUDA graphs, or by OpenVINO."""

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from diffusers import UNet2DConditionModel

from library.draw.control_net import Residuals
from library.draw.text_conditions import TextConditions
from library.machine.cuda_graphs import CudaGraphs

if TYPE_CHECKING:
    from library.machine.openvino_engine import OpenVinoUnet

# the input (R, C, h, w), the timestep (), the text, what ControlNets add → what the U-Net predicts, (R, C, h, w), which
# the next call may write over
UnetCall = Callable[[torch.Tensor, torch.Tensor, TextConditions, Residuals], torch.Tensor]


def timestep_on(device: torch.device, timestep: torch.Tensor) -> torch.Tensor:
    """A timestep as the U-Net reads it, sent to the device without waiting for that; some have no double precision."""
    dtype = torch.float32 if timestep.dtype is torch.float64 else timestep.dtype
    return timestep.to(device, dtype, non_blocking=True)


def direct(unet: UNet2DConditionModel) -> UnetCall:
    """Call it directly."""
    return lambda rows, timestep, text, residuals: unet(rows, timestep, **text.unet_arguments(), **residuals).sample


def graphed(unet: UNet2DConditionModel, graphs: CudaGraphs, version: Callable[[], Hashable]) -> UnetCall:
    """Call it by way of CUDA graphs.

    Args:
        unet: with nothing hooked to it that does otherwise from step to step.
        graphs: keeps them.
        version: tells, when it is asked, of the networks on the U-Net.
    """
    call = direct(unet)

    def call_graphed(
        rows: torch.Tensor, timestep: torch.Tensor, text: TextConditions, residuals: Residuals
    ) -> torch.Tensor:
        def run(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
            of_each = iter(tensors)
            return call(next(of_each), next(of_each), _text_of(text, of_each), _residuals_of(residuals, of_each))

        tensors = [rows, timestep, *_tensors_of(text), *_added(residuals)]
        kind = (text.pooled is None, *sorted(residuals))
        return graphs.call(run, tensors, kind=kind, version=version())

    return call_graphed


def by_openvino(engine: "OpenVinoUnet", version: Callable[[], Hashable]) -> UnetCall:
    """Let OpenVINO compute it; `version` as for `graphed`."""
    numbers = [layer.processor.number for layer in engine.layers]

    def call(rows: torch.Tensor, timestep: torch.Tensor, text: TextConditions, residuals: Residuals) -> torch.Tensor:
        engine.use(version())
        kept = [text.kept[number] for number in numbers]
        told = text.unet_arguments().get("added_cond_kwargs")
        return engine(rows, timestep, kept, told, _added(residuals))

    return call


def _tensors_of(text: TextConditions) -> list[torch.Tensor]:
    """What the U-Net reads of a text: what its cross-attention has made of it already, and what it is told besides."""
    told = [] if text.pooled is None or text.sizes is None else [text.pooled, text.sizes]
    return [*(tensor for kept in text.kept.values() for tensor in kept), *told]


def _text_of(text: TextConditions, tensors: Iterator[torch.Tensor]) -> TextConditions:
    """The text with other tensors, in the order of `_tensors_of`."""
    kept = {number: (next(tensors), next(tensors)) for number in text.kept}
    if text.pooled is None:
        return replace(text, kept=kept)
    return replace(text, kept=kept, pooled=next(tensors), sizes=next(tensors))


def _added(residuals: Residuals) -> list[torch.Tensor]:
    return [each for added in residuals.values() for each in (added if isinstance(added, list) else [added])]


def _residuals_of(residuals: Residuals, tensors: Iterator[torch.Tensor]) -> Residuals:
    """The residuals with other tensors, in the order of `_added`."""
    return {
        name: [next(tensors) for _ in added] if isinstance(added, list) else next(tensors)
        for name, added in residuals.items()
    }
