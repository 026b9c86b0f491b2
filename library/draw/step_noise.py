"""The noise that samplers' steps add, drawn without waiting for the device."""

import sys

import torch
from diffusers import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor

from library.machine.devices import sent


def step_noise(
    shape: tuple[int, ...],
    generator: list[torch.Generator] | torch.Generator | None = None,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
    layout: torch.layout | None = None,
) -> torch.Tensor:
    """As diffusers' `randn_tensor` with generators of the CPU, but for the way to the device.

    Diffusers' copy waits until the device has done all it was asked for, at each step: a GPU then stands still while
    the program asks for the next one.
    """
    noise = randn_tensor(shape, generator, torch.device("cpu"), dtype, layout)
    return noise if device is None else sent(noise, device)


def never_wait(scheduler: SchedulerMixin) -> None:
    """Let the steps of a scheduler of diffusers draw by `step_noise`: what draws cannot be handed to them."""
    for each in type(scheduler).__mro__:
        if each.__module__.startswith("diffusers.") and hasattr(sys.modules[each.__module__], "randn_tensor"):
            vars(sys.modules[each.__module__])["randn_tensor"] = step_noise
