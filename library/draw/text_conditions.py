"""The text of a batch on its way to the U-Net's cross-attention."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch

from library.files.textual_inversion import XTI_LAYERS

if TYPE_CHECKING:
    from library.draw.regions import Regions


@dataclass(frozen=True, eq=False)
class TextConditions:
    """What cross-attention attends to; diffusers hands it through the U-Net as `encoder_hidden_states`.

    Args:
        embeddings: the texts of a batch's rows, (rows, tokens, width).
        per_layer: texts encoded for one layer alone, by its name in `XTI_LAYERS`, as Extended Textual Inversion has
            them; layers without one see `embeddings`.
        regions: where the parts of prompts hold that have more than one; the parts then have rows of their own.
        kept: keys and values, by the number of the attention processor that they are for.
    """

    embeddings: torch.Tensor
    per_layer: Mapping[str, torch.Tensor] = field(default_factory=dict)
    regions: "Regions | None" = None
    kept: Mapping[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    def for_layer(self, layer: str | None) -> torch.Tensor:
        """The text that a layer attends to."""
        return self.per_layer.get(layer, self.embeddings)

    def to(self, dtype: torch.dtype) -> "TextConditions":
        """The same in another type."""
        return self._of_each(lambda text: text.to(dtype))

    def rows(self, rows: slice) -> "TextConditions":
        """Some of the rows."""
        return self._of_each(lambda text: text[rows])

    def _of_each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "TextConditions":
        per_layer = {layer: change(text) for layer, text in self.per_layer.items()}
        return replace(self, embeddings=change(self.embeddings), per_layer=per_layer)


def xti_layer(path: str) -> str | None:
    """The name in `XTI_LAYERS` of the cross-attention at a module path of the U-Net; None for self-attention.

    Paths are diffusers'; the names count the original's blocks, of which each level has three.
    """
    match = re.match(r"(?:(down|up)_blocks\.(\d+)|mid_block)\.attentions\.(\d+)\..*\.attn2\b", path)
    if match is None:
        return None
    side, level, block = match.groups()
    if side is None:
        return "MID"
    place = 3 * int(level) + int(block)
    name = f"IN{place + 1:02d}" if side == "down" else f"OUT{place:02d}"
    return name if name in XTI_LAYERS else None
