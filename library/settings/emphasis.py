"""What becomes of a text's features once the weights of its tokens have been applied."""

from typing import Literal, get_args

from library import values

Normalization = Literal["original", "abs", "none"]  # scaled to the mean they had, to that of their sizes, or left
ORIGINAL: Normalization = "original"
NORMALIZATIONS: tuple[Normalization, ...] = get_args(Normalization)

normalization = values.one_of(NORMALIZATIONS)
