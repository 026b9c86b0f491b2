"""The sizes that an XL model is told of a picture: that of its original, where it was cropped, and its own.

Podell et al. 2023 (https://arxiv.org/abs/2307.01952), section 2.2.
"""

from dataclasses import dataclass, fields, replace

from library import values
from library.settings.options import Options

GROUP = "sizes that XL models are told"


@dataclass(frozen=True, slots=True, kw_only=True)
class ToldSizes:
    """What the command line or a prompt line says of them, in pixels; None is not said.

    A picture's own width and height stand in for an original's that is not said, the prompt's original for the negative
    prompt's, and 0 for the crop's corner.
    """

    original_width: int | None = None
    original_height: int | None = None
    original_width_negative: int | None = None
    original_height_negative: int | None = None
    crop_top: int | None = None
    crop_left: int | None = None

    def scaled(self, factor: float) -> "ToldSizes":
        """The same for a picture of so many times the size."""
        said = {each.name: getattr(self, each.name) for each in fields(self)}
        return replace(self, **{name: int(v * factor + 0.5) for name, v in said.items() if v is not None})

    def numbers(self, width: int, height: int, *, negative: bool) -> tuple[int, int, int, int, int, int]:
        """What the model is told in the branch of the prompt or in the others: height and width of the original, top
        and left of the crop, height and width of the picture.
        """
        original = _first(self.original_height, height), _first(self.original_width, width)
        if negative:
            said = self.original_height_negative, self.original_width_negative
            original = _first(said[0], original[0]), _first(said[1], original[1])
        return *original, self.crop_top or 0, self.crop_left or 0, height, width


NOT_SAID = ToldSizes()


def _first(said: int | None, otherwise: int) -> int:
    return otherwise if said is None else said


pixels = values.whole_number(0, values.MAX_SIZE_PX)


def from_options(options: Options) -> ToldSizes:
    """What the options say of it; a line's options may say otherwise."""
    return ToldSizes(**{each.name: getattr(options, each.name) for each in fields(ToldSizes)})
