"""The text of a batch on its way to the U-Net's cross-attention."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from library.draw.regions import Regions
from library.files.textual_inversion import XTI_LAYERS
from library.machine.devices import sent


@dataclass(frozen=True, eq=False)
class TextConditions:
    """What the U-Net is told: what cross-attention attends to, and what travels beside that.

    Args:
        embeddings: the texts of a batch's rows, (rows, tokens, width).
        per_layer: texts encoded for one layer alone, by its name in `XTI_LAYERS`, as Extended Textual Inversion has
            them; layers without one see `embeddings`.
        regions: where the parts of prompts hold that have more than one; the parts then have rows of their own.
        kept: keys and values, by the number of the attention processor that they are for.
        pooled: for families that have it, a vector for each of the U-Net's rows, (U-Net's rows, width); before
            `for_unet` one for each text.
        sizes: likewise, for families that are told them, in pixels: (U-Net's rows, 6) float32, whatever type the
            rest has, since narrower ones do not hold all whole numbers.
    """

    embeddings: torch.Tensor
    per_layer: Mapping[str, torch.Tensor] = field(default_factory=dict)
    regions: Regions | None = None
    kept: Mapping[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    pooled: torch.Tensor | None = None
    sizes: torch.Tensor | None = None

    def for_layer(self, layer: str | None) -> torch.Tensor:
        """The text that a layer attends to."""
        return self.embeddings if layer is None else self.per_layer.get(layer, self.embeddings)

    def to(self, dtype: torch.dtype) -> "TextConditions":
        """The same in another type."""
        pooled = None if self.pooled is None else self.pooled.to(dtype)
        return replace(self._of_each(lambda text: text.to(dtype)), pooled=pooled)

    def rows(self, rows: slice, unet_rows: slice) -> "TextConditions":
        """Some of the rows: of the texts, and of the U-Net, which has one for all parts of a prompt."""
        pooled, sizes = (None if each is None else each[unet_rows] for each in (self.pooled, self.sizes))
        return replace(self._of_each(lambda text: text[rows]), pooled=pooled, sizes=sizes)

    def for_unet(self, text_of_row: Sequence[int], sizes: Sequence[Sequence[int]] | None) -> "TextConditions":
        """With what the U-Net's rows are told beside the text.

        Args:
            text_of_row: for each row the place of the text whose pooled vector it is told.
            sizes: what each row is told (see `settings.sizes`); None for families that are not told any.
        """
        if sizes is None or self.pooled is None:
            return replace(self, pooled=None)
        numbers = sent(torch.tensor(sizes, dtype=torch.float32), self.embeddings.device)
        pooled = torch.stack([self.pooled[text] for text in text_of_row])  # a list would be copied to the device
        return replace(self, pooled=pooled, sizes=numbers)

    def without(self, texts: Sequence[int]) -> "TextConditions":
        """With zeros in place of some texts, by their places."""
        if not texts:
            return self
        told = [text not in texts for text in range(len(self.embeddings))]
        kept = sent(torch.tensor(told, dtype=self.embeddings.dtype), self.embeddings.device)
        pooled = None if self.pooled is None else self.pooled * kept[:, None]
        return replace(self._of_each(lambda text: text * kept[:, None, None]), pooled=pooled)

    def unet_arguments(self) -> dict[str, Any]:
        """What a U-Net, or a ControlNet, is called with."""
        # Diffusers hands the text to the attention processors as it is, and these take this class
        arguments: dict[str, Any] = {"encoder_hidden_states": self}
        if self.pooled is not None:
            arguments["added_cond_kwargs"] = {"text_embeds": self.pooled, "time_ids": self.sizes}
        return arguments

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
