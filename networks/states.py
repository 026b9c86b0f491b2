"""The tensors of network files."""

from collections.abc import Mapping

import torch

from library.errors import InputError
from library.files.safetensors_file import READ
from library.files.weight_files import WeightFile
from networks.keys import is_aside
from networks.peft import stated_parts

State = Mapping[str, torch.Tensor]


def read_state(weights: WeightFile) -> dict[str, torch.Tensor]:
    """Read a file's tensors, those that can be read, with what PEFT keeps beside them; no network's stay out.

    Raises:
        InputError: naming a tensor that holds NaN or infinite values.
    """
    state = {}
    for key in weights.shapes:
        if is_aside(key) or weights.types[key] not in READ:
            continue  # what a layer needs and cannot be read the plan has refused
        tensor = weights.tensor(key).clone()
        if tensor.is_floating_point() and not tensor.float().isfinite().all():
            problem = f"{key!r} holds NaN or infinite values; the training went wrong, use another file"
            raise InputError(str(weights.path), problem)
        state[key] = tensor
    weights.close()
    return state | {key: torch.tensor(value) for key, value in stated_parts(weights).items()}
