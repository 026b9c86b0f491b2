"""Tokens to what the U-Net is told: the text encoders' features, with the weights applied, and a pooled vector."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from transformers import CLIPTextModelWithProjection

from library.draw.text_conditions import TextConditions
from library.draw.textual_inversion import extend_tokens
from library.files.textual_inversion import XTI_LAYERS, Embedding
from library.machine.devices import sent
from library.models.models import TextEncoder
from library.plan.run_plan import TextPlan, Wording
from library.plan.tokens import CHUNK_TOKENS, PADDING, PromptTokens, WeightedTokens
from library.settings.emphasis import ORIGINAL, Normalization
from networks.strengths import Strength

KEPT_CHUNKS = 256  # of texts whose embeddings are kept for later batches; 0.2 to 0.6 MB each
Multipliers = tuple[Strength, ...]  # the networks'
_Wanted = tuple[tuple[int, ...], tuple[float, ...], int, Multipliers]  # token ids, weights, chunks, multipliers


@dataclass(frozen=True, eq=False)
class _Encoded:
    """One text: its features (77 * chunks, width), and its pooled vector where the family has one."""

    features: torch.Tensor
    pooled: torch.Tensor | None


class PromptEncoder:
    """Encodes prompts of any length with a model's CLIP text encoders.

    Args:
        tokens: tells the prompts' tokens.
        texts: the text encoders; their token tables grow by the embeddings' vectors.
        clip_skip: take the n-th last layer's output; 1 is the last layer.
        embeddings: textual inversion's words.
        use_multipliers: sets the multipliers of the networks on the text encoders.
        normalization: of features after their weights were applied.
    """

    def __init__(
        self,
        tokens: PromptTokens,
        texts: Sequence[TextEncoder],
        clip_skip: int = 1,
        embeddings: Sequence[Embedding] = (),
        use_multipliers: Callable[[Multipliers], None] = lambda multipliers: None,
        normalization: Normalization = ORIGINAL,
    ) -> None:
        self.tokens = tokens
        self.texts = texts
        self.clip_skip = clip_skip
        self.use_multipliers = use_multipliers
        self.normalization = normalization
        for place, text in enumerate(texts):
            extend_tokens(text.model, embeddings, place, tokens.vocabulary)
        self._kept: dict[_Wanted, _Encoded] = {}  # oldest first

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
            that sees other vectors of a word than the rest. The encoders' features stand side by side. Where the family
            has them, each text's pooled vector beside these.
        """
        multipliers = multipliers or [()] * len(texts)
        per_layer = {}
        if self._differ_by_layer(texts):
            per_layer = {layer: self._encode_kept(texts, chunks, multipliers, layer)[0] for layer in XTI_LAYERS}
        features, pooled = self._encode_kept(texts, chunks, multipliers, XTI_LAYERS[0])
        return TextConditions(features, per_layer, pooled=pooled)

    def _encode_kept(
        self, texts: Sequence[str], chunks: int, multipliers: Sequence[Multipliers], layer: str
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Encode texts as one layer sees them: features (len(texts), 77 * chunks, width) and pooled vectors
        (len(texts), width); what was encoded lately is kept.
        """
        wanted = self._wanted(texts, chunks, multipliers, layer)
        missing = [key for key in dict.fromkeys(wanted) if key not in self._kept]
        for its_multipliers in dict.fromkeys(key[3] for key in missing):
            self.use_multipliers(its_multipliers)
            alike = [key for key in missing if key[3] == its_multipliers]
            encoded = self._encode([WeightedTokens(ids, weights) for ids, weights, *_ in alike], chunks)
            self._kept.update(zip(alike, encoded))
        features = torch.stack([self._kept[key].features for key in wanted])
        pooled = [vector for key in wanted if (vector := self._kept[key].pooled) is not None]
        surplus = sum(chunks for _, _, chunks, _ in self._kept) - KEPT_CHUNKS
        while surplus > 0:
            oldest = next(iter(self._kept))
            surplus -= oldest[2]
            del self._kept[oldest]
        return features, torch.stack(pooled) if pooled else None

    def keeps(self, texts: Sequence[str], chunks: int, multipliers: Sequence[Multipliers]) -> bool:
        """Whether all texts were encoded so lately that `encode` needs no text encoder for them."""
        layers = XTI_LAYERS if self._differ_by_layer(texts) else XTI_LAYERS[:1]
        return all(key in self._kept for layer in layers for key in self._wanted(texts, chunks, multipliers, layer))

    def keeps_all(self, wordings: Iterable[Wording] | None) -> bool:
        """Whether it `keeps` all that a run asks for; None for what nobody knows."""
        return wordings is not None and all(self.keeps([text], chunks, [of]) for text, of, chunks in wordings)

    def let_go(self) -> None:
        """Free the text encoders' memory. From then on `encode` is for texts that it `keeps`; it does so for good."""
        for text in self.texts:
            text.model.to("meta")  # whoever else holds the model holds no weights by it
        self.texts = ()

    def _differ_by_layer(self, texts: Sequence[str]) -> bool:
        return any(self.tokens.words.differ_by_layer(self.tokens.tokenize(text).ids) for text in texts)

    def _wanted(
        self, texts: Sequence[str], chunks: int, multipliers: Sequence[Multipliers], layer: str
    ) -> list[_Wanted]:
        """What the encoding of each text depends on, as one layer sees it."""
        place = XTI_LAYERS.index(layer)
        wanted: list[_Wanted] = []
        for text, its_multipliers in zip(texts, multipliers):
            tokens = self.tokens.tokenize(text)
            wanted.append((self.tokens.words.in_layer(tokens.ids, place), tokens.weights, chunks, its_multipliers))
        return wanted

    @torch.inference_mode()
    def _encode(self, texts: Sequence[WeightedTokens], chunks: int) -> list[_Encoded]:
        """Each text with its weights, each encoder's features with a mean of their own, side by side."""
        weights = torch.tensor([_chunk_weights(text, chunks) for text in texts])[:, :, None]
        features, pooled = [], None
        for encoder, pad in zip(self.texts, self.tokens.pads):
            hidden, its_pooled = self._run(encoder, pad, texts, chunks)
            features.append(weigh(hidden, sent(weights, hidden.device), self.normalization))
            pooled = pooled if its_pooled is None else its_pooled
        joined = torch.cat(features, dim=-1)
        return [_Encoded(row, None if pooled is None else pooled[place]) for place, row in enumerate(joined)]

    def _run(
        self, encoder: TextEncoder, pad: int, texts: Sequence[WeightedTokens], chunks: int
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """One encoder's hidden states (texts, 77 * chunks, width) and pooled vectors (texts, width), float32."""
        rows = [row for text in texts for row in self._chunk_ids(text, chunks, pad, pooled=encoder.kind.pooled)]
        output = encoder.transformer(sent(torch.tensor(rows), encoder.model.device), output_hidden_states=True)
        if encoder.kind.final_norm and self.clip_skip == 1:
            hidden = output.last_hidden_state
        else:
            hidden = output.hidden_states[-self.clip_skip]
            if encoder.kind.final_norm:
                hidden = encoder.transformer.final_layer_norm(hidden)
        hidden = hidden.float().reshape(len(texts), chunks * (CHUNK_TOKENS + 2), -1)
        if not isinstance(encoder.model, CLIPTextModelWithProjection):
            return hidden, None
        # of each text's first chunk, at its first end token: transformers' own pooling takes the largest id where the
        # configuration names a wrong one, and words of textual inversion have larger ids
        first = output.last_hidden_state[::chunks]
        ends = [row.index(self.tokens.end) for row in rows[::chunks]]
        at_ends = torch.stack([states[end] for states, end in zip(first, ends)])  # a list would be copied to the device
        pooled = encoder.model.text_projection(at_ends)
        return hidden, pooled.float()

    def _chunk_ids(self, text: WeightedTokens, chunks: int, pad: int, *, pooled: bool = False) -> list[list[int]]:
        """The ids of each chunk, 77 with begin and end, as an encoder that pads with `pad` has them.

        The chunks of a text are cut from one long sequence; a chunk that is not the last runs on into the next one, so
        its end gets an end token. OpenCLIP, which pads with 0, is given one only where it would see none, and for a
        `pooled` vector where the words end.
        """
        begin, end = self.tokens.begin, self.tokens.end
        length = chunks * CHUNK_TOKENS + 2
        ids = [begin, *text.ids, end]
        ids += [pad] * (length - len(ids))
        rows = [ids[i * CHUNK_TOKENS : (i + 1) * CHUNK_TOKENS + 2] for i in range(chunks)]
        if pooled:
            rows = [_ended(row, end) for row in rows]
        rows = [[pad if token == PADDING else token for token in row] for row in rows]
        for row in rows if chunks > 1 else ():
            row[0] = begin
            if pad == end or row[-1] not in (end, pad):
                row[-1] = end
            if pad != end and row[1] == pad:
                row[1] = end
            if pooled and end not in row:
                row[-1] = end
        return rows


def _ended(row: list[int], end: int) -> list[int]:
    """The ids of a chunk; one that was filled up has its end token after its last word, and padding after that."""
    words = row[1 : CHUNK_TOKENS + 1]
    if words[-1] != PADDING:
        return row
    count = words.index(PADDING)
    return [row[0], *words[:count], end, *[PADDING] * (CHUNK_TOKENS - count)]


def _chunk_weights(text: WeightedTokens, chunks: int) -> list[float]:
    """The weights of all chunks' tokens; begin, end and padding have weight 1."""
    weights: list[float] = []
    for chunk in range(chunks):
        part = text.weights[chunk * CHUNK_TOKENS : (chunk + 1) * CHUNK_TOKENS]
        weights += [1.0, *part, *[1.0] * (CHUNK_TOKENS + 1 - len(part))]
    return weights


def weigh(embeddings: torch.Tensor, weights: torch.Tensor, normalization: Normalization = ORIGINAL) -> torch.Tensor:
    """Multiply token vectors (N, T, width) by weights (N, T, 1), then scale each text to the mean it had before.

    Args:
        embeddings: of the texts.
        weights: of their tokens.
        normalization: what mean is kept: the values', their sizes', or none.
    """
    weighted = embeddings * weights
    if normalization == "none":
        return weighted
    before, after = (
        (each.abs() if normalization == "abs" else each).mean(dim=(1, 2), keepdim=True)
        for each in (embeddings, weighted)
    )
    scaled = weighted * (before / torch.where(after == 0, 1, after))  # without a 0 / 0, whose gradient is NaN
    return torch.where(after == 0, weighted, scaled)


def make_encoder(
    plan: TextPlan, texts: Sequence[TextEncoder], use_multipliers: Callable[[Multipliers], None] = lambda _: None
) -> PromptEncoder:
    """What encodes a run's prompts with these text encoders; see `PromptEncoder`."""
    embeddings, skip = plan.embeddings, plan.clip_skip
    return PromptEncoder(plan.tokens, texts, skip, embeddings, use_multipliers, plan.normalization)
