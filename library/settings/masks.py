"""What is redrawn of pictures: masks, how they are read and filled, the part that is drawn; maps of regions."""

import argparse
from dataclasses import dataclass
from typing import NamedTuple

from library.errors import InputError
from library.settings.options import Options
from library.values import MAX_SIZE_PX, whole_number

FILLS = ("original", "noise", "blur", "black")
AREAS = ("picture", "mask")
REGIONS = ("together", "each")
DEFAULT_PADDING_PX = 32


class Margins(NamedTuple):
    """Pixels by which a picture grows on each side."""

    left: int
    top: int
    right: int
    bottom: int


NO_MARGINS = Margins(0, 0, 0, 0)


@dataclass(frozen=True, kw_only=True)
class MaskSettings:
    """What the user said of masks and maps of regions.

    Args:
        keep_unmasked: outside a mask, the source's own pixels stay, not the VAE's copy of them.
        color_codes: so many regions are read from pure colours; None reads three from the channels.
        from_alpha: what is transparent in a source picture is its mask.
        invert: what a mask leaves is redrawn.
        blur_px: standard deviation of the Gaussian that softens masks.
        fill: what is under a mask before it is redrawn, one of `FILLS`.
        extend: how far the canvas grows; what is new is masked.
        masked_area: the masked area alone is drawn, as large as the job says, and put back.
        padding_px: what is drawn around it, of the source's pixels.
        each_region: separate regions of a mask are drawn one after another.
    """

    keep_unmasked: bool = False
    color_codes: int | None = None
    from_alpha: bool = False
    invert: bool = False
    blur_px: float = 0.0
    fill: str = FILLS[0]
    extend: Margins | None = None
    masked_area: bool = False
    padding_px: int = DEFAULT_PADDING_PX
    each_region: bool = False


NO_MASKS = MaskSettings()


def margins(text: str) -> Margins:
    """Convert `LEFT,TOP,RIGHT,BOTTOM` in pixels, not all of them 0."""
    parts = text.split(",")
    if len(parts) != len(Margins._fields):
        raise argparse.ArgumentTypeError("must be four numbers; write LEFT,TOP,RIGHT,BOTTOM, for instance 0,0,128,0")
    read = Margins(*map(whole_number(0, MAX_SIZE_PX), parts))
    if not any(read):
        raise argparse.ArgumentTypeError("adds nothing; give a side more than 0 pixels, or leave it out")
    return read


def from_options(options: Options) -> MaskSettings:
    """What the options say of them.

    Raises:
        InputError: for what does nothing beside the others.
    """
    masked_area = options.inpaint_area == "mask"
    if not masked_area:
        for name in ("inpaint_padding", "inpaint_regions"):
            if name in options.said:
                problem = "is for redrawing the masked area alone; give --inpaint_area mask too, or leave it out"
                raise InputError(f"--{name}", problem)
    return MaskSettings(
        keep_unmasked=options.keep_unmasked,
        color_codes=options.network_regional_mask_max_color_codes,
        from_alpha=options.mask_from_alpha,
        invert=options.mask_invert,
        blur_px=options.mask_blur,
        fill=options.fill,
        extend=options.extend,
        masked_area=masked_area,
        padding_px=options.inpaint_padding,
        each_region=options.inpaint_regions == "each",
    )
