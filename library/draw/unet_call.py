"""How the U-Net is called with a text and what ControlNets add: directly, in halves, by CUDA graphs, or by OpenVINO."""

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from diffusers import UNet2DConditionModel

from library.draw.control_net import Residuals
from library.draw.text_conditions import TextConditions
from library.machine.at_once import at_once, can_halve_cores
from library.machine.cuda_graphs import CudaGraphs, make_cuda_graphs
from library.machine.packed_layers import can_pack
from library.settings.computing import Computing

if TYPE_CHECKING:
    from library.machine.openvino_engine import OpenVinoUnet

# the input (R, C, h, w), the timestep (), the text, what ControlNets add → what the U-Net predicts, (R, C, h, w), which
# the next call may write over
UnetCall = Callable[[torch.Tensor, torch.Tensor, TextConditions, Residuals], torch.Tensor]


# Weights times cells of the latents from which on halves gain: below it operations are so short that two Python threads
# wait for each other. Stable Diffusion 1.5 gains nothing at 512 × 512 (3.5e12), XL a tenth (1.1e13)
_WORTH_HALVING = 5e12


def timestep_on(device: torch.device, timestep: torch.Tensor) -> torch.Tensor:
    """A timestep as the U-Net reads it, sent to the device without waiting for that; some have no double precision."""
    dtype = torch.float32 if timestep.dtype is torch.float64 else timestep.dtype
    return timestep.to(device, dtype, non_blocking=True)


def direct(unet: UNet2DConditionModel) -> UnetCall:
    """Call it directly."""
    return lambda rows, timestep, text, residuals: unet(rows, timestep, **text.unet_arguments(), **residuals).sample


def steady_call(
    unet: UNet2DConditionModel, computing: Computing, version: Callable[[], Hashable], *, in_threads: bool
) -> UnetCall:
    """Call it as is fast where nothing hangs on it that does otherwise from step to step.

    Args:
        unet: as for `graphed`.
        computing: what is asked for.
        version: likewise.
        in_threads: what hangs on it is ready for more than one thread.
    """
    graphs = make_cuda_graphs(computing, unet.device)
    if graphs is not None:
        return graphed(unet, graphs, version)
    if in_threads and not computing.compile and can_pack(unet.device, unet.dtype):
        return in_halves(unet)
    return direct(unet)


def in_halves(unet: UNet2DConditionModel) -> UnetCall:
    """Call it for two halves of the rows at once, each on half of the cores, where that is worth while.

    Args:
        unet: as for `graphed`, on a CPU.
    """
    call = direct(unet)
    weights = sum(parameter.numel() for parameter in unet.parameters())

    def call_in_halves(
        rows: torch.Tensor, timestep: torch.Tensor, text: TextConditions, residuals: Residuals
    ) -> torch.Tensor:
        worth_it = weights * rows.shape[-2] * rows.shape[-1] >= _WORTH_HALVING
        if len(rows) % 2 or not worth_it or not can_halve_cores():
            return call(rows, timestep, text, residuals)
        halves = zip(*(x.chunk(2) if x.dim() else (x, x) for x in _inputs(rows, timestep, text, residuals)))
        return torch.cat(at_once(*(partial(_call_with, call, text, residuals, half) for half in halves)))

    return call_in_halves


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
        run = partial(_call_with, call, text, residuals)
        kind = (text.pooled is None, *sorted(residuals))
        return graphs.call(run, _inputs(rows, timestep, text, residuals), kind=kind, version=version())

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


def _inputs(
    rows: torch.Tensor, timestep: torch.Tensor, text: TextConditions, residuals: Residuals
) -> list[torch.Tensor]:
    """All tensors that a call of the U-Net reads."""
    return [rows, timestep, *_tensors_of(text), *_added(residuals)]


def _call_with(
    call: UnetCall, text: TextConditions, residuals: Residuals, tensors: Sequence[torch.Tensor]
) -> torch.Tensor:
    """Call it with other tensors, in the order of `_inputs`."""
    of_each = iter(tensors)
    return call(next(of_each), next(of_each), _text_of(text, of_each), _residuals_of(residuals, of_each))


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
