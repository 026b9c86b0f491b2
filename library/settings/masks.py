"""Masks of inpainting, and maps of regions: how they are read."""

from dataclasses import dataclass

from library.settings.options import Options


@dataclass(frozen=True, kw_only=True)
class MaskSettings:
    """What the user said of them."""

    keep_unmasked: bool = False  # outside a mask, the source's own pixels stay, not the VAE's copy of them
    color_codes: int | None = None  # so many regions are read from pure colours; None reads three from the channels


def from_options(options: Options) -> MaskSettings:
    """What the options say of them."""
    codes = options.network_regional_mask_max_color_codes
    return MaskSettings(keep_unmasked=options.keep_unmasked, color_codes=codes)
