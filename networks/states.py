"""The tensors of network files."""

from collections.abc import Mapping

import torch

from library.errors import InputError
from library.files.safetensors_file import READ
from library.files.weight_files import WeightFile
from networks.files import peft_alphas

State = Mapping[str, torch.Tensor]


def read_state(weights: WeightFile) -> dict[str, torch.Tensor]:
    """Read a file's tensors, those that can be read, with the alphas that PEFT keeps beside them.

    Raises:
        InputError: naming a tensor that holds NaN or infinite values.
    """
    state = {}
    for key in weights.shapes:
        if weights.types[key] not in READ:
            continue  # something of another program: the plan has refused it where a layer needs it
        tensor = weights.tensor(key).clone()
        if tensor.is_floating_point() and not tensor.float().isfinite().all():
            problem = f"{key!r} holds NaN or infinite values; the training went wrong, use another file"
            raise InputError(str(weights.path), problem)
        state[key] = tensor
    weights.close()
    return state | {key: torch.tensor(alpha) for key, alpha in peft_alphas(weights).items()}
