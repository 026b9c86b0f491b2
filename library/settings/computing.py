"""How pictures are computed: precision, memory and speed."""

from argparse import ArgumentTypeError
from dataclasses import dataclass

from library import values
from library.settings.options import Options

CUDA_GRAPHS = ("auto", "on", "off")
TORCH, OPENVINO = ENGINES = ("torch", "openvino")  # what computes the U-Net and the VAE


@dataclass(frozen=True, kw_only=True)
class Computing:
    """What the user said of it."""

    fp16: bool = False
    bf16: bool = False
    xformers: bool = False
    channels_last: bool = False
    compile: bool = False  # the U-Net
    cuda_graphs: str = "auto"  # one of `CUDA_GRAPHS`
    no_half_vae: bool = False  # the VAE runs in float32
    low_vram: bool = False  # text encoders and VAE leave the device while they are not used
    vae_slices: int | None = None
    batch_size: int = 1
    vae_batch_size: int = 1  # pictures that the VAE decodes at a time


def vae_batch_size(text: str) -> float:
    """Convert a number of pictures, or a share of the batch below 1."""
    value = values.number(0, above=True)(text)
    if value >= 1 and value != int(value):
        raise ArgumentTypeError("out of range; write a whole number, or a share of the batch below 1")
    return value


def from_options(options: Options, *, one_at_a_time: bool = False) -> Computing:
    """What the options say of it.

    Args:
        options: of the command line.
        one_at_a_time: each picture needs the one before it, whatever the batch size that is asked for.
    """
    batch_size = 1 if one_at_a_time else options.batch_size
    return Computing(
        fp16=options.fp16,
        bf16=options.bf16,
        xformers=options.xformers or options.diffusers_xformers,
        channels_last=options.opt_channels_last,
        compile=options.compile,
        cuda_graphs=options.cuda_graphs,
        no_half_vae=options.no_half_vae,
        low_vram=options.lowvram,
        vae_slices=options.vae_slices,
        batch_size=batch_size,
        vae_batch_size=_pictures_at_a_time(options.vae_batch_size, batch_size),
    )


def _pictures_at_a_time(size: float | None, batch_size: int) -> int:
    """All of a batch, a number of them, or (below 1) a share of it."""
    if size is None:
        return batch_size
    return max(1, int(batch_size * size)) if size < 1 else int(size)
