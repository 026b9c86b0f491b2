"""The layers of a U-Net that is not loaded yet, and how the original names them."""

from collections.abc import Iterable, Iterator, Mapping

from library.files import checkpoint_layout as layout
from library.files.model_files import Component
from library.files.weight_files import Shape

_SIDES = {"input": "IN", "output": "OUT"}


def unet_layers(unet: Component) -> Iterator[tuple[str, Shape]]:
    """Each layer's module path in diffusers' naming, and its weight's shape, from the U-Net's file."""
    diffusers_names = {original: path for path, original in layout.unet_modules(unet.config).items()}
    for key, shape in unet.weights.shapes.items():
        if not key.endswith(".weight"):
            continue
        name = key.removesuffix(".weight")
        if name.startswith(layout.UNET_PREFIX):
            name = layout.original_name(name.removeprefix(layout.UNET_PREFIX), diffusers_names)
        if name is not None:
            yield name, shape


def unet_blocks(paths: Iterable[str], config: Mapping) -> dict[str, str]:
    """The block that each of a U-Net's modules is in: `IN04`, `M00` or `OUT11`, as the original counts them.

    Modules that are in none, such as the embedding of time and the last convolution, are left out.
    """
    blocks = {}
    for original, path in original_paths(paths, config).items():
        side, _, rest = original.partition("_block")
        if rest.startswith("s_"):
            blocks[path] = f"{_SIDES[side]}{int(rest.split('_')[1]):02}"
        elif rest:
            blocks[path] = "M00"
    return blocks


def blocks_a_side(config: Mapping) -> int:
    """How many input blocks a U-Net has, and as many output blocks."""
    return len(config["block_out_channels"]) * (config["layers_per_block"] + 1)


def original_paths(paths: Iterable[str], config: Mapping) -> dict[str, str]:
    """Module paths of a U-Net by the original's names of them, `_` for `.`, as network files have them.

    These count blocks as the published models do, whatever the checkpoint does.
    """
    modules = layout.unet_modules({name: value for name, value in config.items() if name != layout.BLOCKS_PER_LEVEL})
    originals = ((layout.original_name(path, modules), path) for path in paths)
    return {original.replace(".", "_"): path for original, path in originals if original}
