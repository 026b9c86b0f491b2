"""Tokens to what the U-Net attends to: the text encoders' features, with the weights applied."""

from collections.abc import Callable, Sequence

import torch

from library.draw.text_conditions import TextConditions
from library.draw.textual_inversion import extend_tokens
from library.files.textual_inversion import XTI_LAYERS, Embedding
from library.models.models import TextEncoder
from library.plan.tokens import CHUNK_TOKENS, PADDING, PromptTokens, WeightedTokens

_KEPT_CHUNKS = 256  # of texts whose embeddings are kept for later batches; 0.2 to 0.3 MB each
Multipliers = tuple[float, ...]  # the networks'
_Wanted = tuple[tuple[int, ...], tuple[float, ...], int, Multipliers]  # token ids, weights, chunks, multipliers


class PromptEncoder:
    """Encodes prompts of any length with a model's CLIP text encoders.

    Args:
        tokens: tells the prompts' tokens.
        texts: the text encoders; their token tables grow by the embeddings' vectors.
        clip_skip: take the n-th last layer's output; 1 is the last layer.
        embeddings: textual inversion's words.
        use_multipliers: sets the multipliers of the networks on the text encoders.
    """

    def __init__(
        self,
        tokens: PromptTokens,
        texts: Sequence[TextEncoder],
        clip_skip: int = 1,
        embeddings: Sequence[Embedding] = (),
        use_multipliers: Callable[[Multipliers], None] = lambda multipliers: None,
    ) -> None:
        self.tokens = tokens
        self.texts = texts
        self.clip_skip = clip_skip
        self.use_multipliers = use_multipliers
        for place, text in enumerate(texts):
            extend_tokens(text.model, embeddings, place, tokens.vocabulary)
        self._kept: dict[_Wanted, torch.Tensor] = {}  # oldest first

    def encode(
        self, texts: Sequence[str], chunks: int, multipliers: Sequence[Multipliers] | None = None
    ) -> TextConditions:
        """Encode texts, each padded to `chunks` chunks.

        Args:
            texts: the prompts.
            chunks: see `PromptTokens.chunks`.
            multipliers: for each text those of the networks; without networks they can be left out.

        Returns:
            (len(texts), 77 * chunks, width) in float32, on the text encoders' device, for all layers, and for each one
            that sees other vectors of a word than the rest. The encoders' features stand side by side.
        """
        multipliers = multipliers or [()] * len(texts)
        per_layer = {}
        if any(self.tokens.words.differ_by_layer(self.tokens.tokenize(text).ids) for text in texts):
            per_layer = {layer: self._encode_kept(texts, chunks, multipliers, layer) for layer in XTI_LAYERS}
        return TextConditions(self._encode_kept(texts, chunks, multipliers, XTI_LAYERS[0]), per_layer)

    def _encode_kept(
        self, texts: Sequence[str], chunks: int, multipliers: Sequence[Multipliers], layer: str
    ) -> torch.Tensor:
        """Encode texts as one layer sees them, (len(texts), 77 * chunks, width); what was encoded lately is kept."""
        place = XTI_LAYERS.index(layer)
        wanted: list[_Wanted] = []
        for text, its_multipliers in zip(texts, multipliers):
            tokens = self.tokens.tokenize(text)
            wanted.append((self.tokens.words.in_layer(tokens.ids, place), tokens.weights, chunks, its_multipliers))
        missing = [key for key in dict.fromkeys(wanted) if key not in self._kept]
        for its_multipliers in dict.fromkeys(key[3] for key in missing):
            self.use_multipliers(its_multipliers)
            alike = [key for key in missing if key[3] == its_multipliers]
            encoded = self._encode([WeightedTokens(ids, weights) for ids, weights, *_ in alike], chunks)
            self._kept.update(zip(alike, encoded))
        embeddings = torch.stack([self._kept[key] for key in wanted])
        surplus = sum(chunks for _, _, chunks, _ in self._kept) - _KEPT_CHUNKS
        while surplus > 0:
            oldest = next(iter(self._kept))
            surplus -= oldest[2]
            del self._kept[oldest]
        return embeddings

    @torch.inference_mode()
    def _encode(self, texts: Sequence[WeightedTokens], chunks: int) -> torch.Tensor:
        """(texts, 77 * chunks, width): each encoder's features with their weights and their own mean, side by side."""
        weights = torch.tensor([_chunk_weights(text, chunks) for text in texts])[:, :, None]
        features = [self._features(encoder, pad, texts, chunks) for encoder, pad in zip(self.texts, self.tokens.pads)]
        return torch.cat([weigh(each, weights.to(each.device)) for each in features], dim=-1)

    def _features(self, encoder: TextEncoder, pad: int, texts: Sequence[WeightedTokens], chunks: int) -> torch.Tensor:
        """One encoder's hidden states, (texts, 77 * chunks, width) float32."""
        rows = [row for text in texts for row in self._chunk_ids(text, chunks, pad)]
        output = encoder.model(torch.tensor(rows, device=encoder.model.device), output_hidden_states=True)
        if encoder.kind.final_norm and self.clip_skip == 1:
            hidden = output.last_hidden_state
        else:
            hidden = output.hidden_states[-self.clip_skip]
            if encoder.kind.final_norm:
                hidden = getattr(encoder.model, "text_model", encoder.model).final_layer_norm(hidden)
        return hidden.float().reshape(len(texts), chunks * (CHUNK_TOKENS + 2), -1)

    def _chunk_ids(self, text: WeightedTokens, chunks: int, pad: int) -> list[list[int]]:
        """The ids of each chunk, 77 with begin and end, as an encoder that pads with `pad` has them.

        The chunks of a text are cut from one long sequence; a chunk that is not the last runs on into the next one, so
        its end gets an end token. OpenCLIP, which pads with 0, is given one only where it would see none.
        """
        begin, end = self.tokens.begin, self.tokens.end
        length = chunks * CHUNK_TOKENS + 2
        ids = [begin, *(pad if token == PADDING else token for token in text.ids), end]
        ids += [pad] * (length - len(ids))
        rows = [ids[i * CHUNK_TOKENS : (i + 1) * CHUNK_TOKENS + 2] for i in range(chunks)]
        for row in rows if chunks > 1 else ():
            row[0] = begin
            if pad == end or row[-1] not in (end, pad):
                row[-1] = end
            if pad != end and row[1] == pad:
                row[1] = end
        return rows


def _chunk_weights(text: WeightedTokens, chunks: int) -> list[float]:
    """The weights of all chunks' tokens; begin, end and padding have weight 1."""
    weights: list[float] = []
    for chunk in range(chunks):
        part = text.weights[chunk * CHUNK_TOKENS : (chunk + 1) * CHUNK_TOKENS]
        weights += [1.0, *part, *[1.0] * (CHUNK_TOKENS + 1 - len(part))]
    return weights


def weigh(embeddings: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Multiply token vectors (N, T, width) by weights (N, T, 1), then scale each text to the mean it had before."""
    before = embeddings.mean(dim=(1, 2), keepdim=True)
    weighted = embeddings * weights
    after = weighted.mean(dim=(1, 2), keepdim=True)
    scaled = weighted * (before / torch.where(after == 0, 1, after))  # without a 0 / 0, whose gradient is NaN
    return torch.where(after == 0, weighted, scaled)
