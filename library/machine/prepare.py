"""Setting loaded models up for the machine: memory layout, slices, compiling, weights in the order of its kernels."""

from collections.abc import Collection, Sequence

import torch
from diffusers import AutoencoderKL, ControlNetModel, ControlNetUnionModel
from torch import nn

from library.machine.compiling import compile_unet
from library.machine.devices import Machine
from library.machine.enlarging import enlarge_at_once
from library.machine.features import give_back_around_growing, overwrite_activations
from library.machine.fused_blocks import feed_forward_parts, fuse_blocks
from library.machine.packed_layers import can_pack, pack_layers
from library.machine.vae_slices import slice_resnets
from library.settings.computing import Computing


def set_layout(
    vae: AutoencoderKL,
    control_nets: Sequence[ControlNetModel | ControlNetUnionModel],
    machine: Machine,
    computing: Computing,
) -> None:
    """Set how models lie in memory and how much of it the VAE takes; U-Net and VAE were read in their layout."""
    if machine.channels_last:
        for model in control_nets:
            model.to(memory_format=torch.channels_last)
    if computing.vae_slices:
        slice_resnets(vae, computing.vae_slices)
    overwrite_activations(vae)
    if machine.device.type == "cpu":
        give_back_around_growing(vae)


def make_fast(
    unet: nn.Module,
    control_nets: Sequence[nn.Module],
    vae: AutoencoderKL,
    machine: Machine,
    computing: Computing,
    *,
    rewritten: Collection[nn.Module],
    may_pack: bool,
    constant: bool,
) -> None:
    """Compile the U-Net if that is asked for, and let all others do what is faster on CPUs.

    Args:
        unet: finished but for what forward hooks do, as the others.
        control_nets: the other models that run at each step.
        vae: of which the decoder counts.
        machine: where they run.
        computing: what is asked for.
        rewritten: layers whose weights are exchanged for others during the run.
        may_pack: weights are not written into, and no gradients are taken.
        constant: the U-Net's weights do not change.
    """
    eager = [unet, *control_nets]
    if computing.compile:
        compile_unet(eager.pop(0), machine.device, constant=constant)
    if may_pack and can_pack(machine.device, machine.dtype):
        for model in eager:
            # oneDNN's GELU is a millionth from PyTorch's, which is nothing in bfloat16; float32 would gain little
            parts = feed_forward_parts(model) if machine.dtype is torch.bfloat16 else {}
            pack_layers(model, keep={*rewritten, *enlarge_at_once(model)}, parts=parts)
            fuse_blocks(model)
        enlarge_at_once(vae)
        fuse_blocks(vae.decoder)
