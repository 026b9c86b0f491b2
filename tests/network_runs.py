"""What tests of networks have in common: options, comparing pictures, refusals."""

import numpy as np

from library.files.model_files import find_model


def find(models):
    return find_model(str(models.folder), v2=bool(models.options), v_parameterization=bool(models.options))


def networks(*files, mul=()):
    """The options for networks of this program."""
    weights = ["--network_weights", *files, *(["--network_mul", *mul] if mul else [])]
    return ["--network_module", *["networks.lora"] * len(files), *weights]


def same(first, second) -> bool:
    """Equal to one level: float32 sums in another order."""
    return len(first) == len(second) > 0 and max(np.abs(a - b).max() for a, b in zip(first, second)) <= 1


def refused(generate, ckpt, *options) -> str:
    result = generate(ckpt, "--prompt", "a", *options)
    assert result.status == 2
    (line,) = result.stderr.splitlines()
    return line
