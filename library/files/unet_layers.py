"""The layers of a U-Net that is not loaded yet, and how the original names them."""

from collections.abc import Iterable, Iterator, Mapping

from library.files import checkpoint_layout as layout
from library.files.model_files import Component
from library.files.weight_files import Shape


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


def original_paths(paths: Iterable[str], config: Mapping) -> dict[str, str]:
    """Module paths of a U-Net by the original's names of them, `_` for `.`, as network files have them.

    These count blocks as the published models do, whatever the checkpoint does.
    """
    modules = layout.unet_modules({name: value for name, value in config.items() if name != layout.BLOCKS_PER_LEVEL})
    originals = ((layout.original_name(path, modules), path) for path in paths)
    return {original.replace(".", "_"): path for original, path in originals if original}
