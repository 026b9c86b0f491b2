"""Prompts to embeddings: tokens with weights, chunks of 75, the text encoder, and the weights applied."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from transformers import CLIPTextModel, CLIPTokenizer

from library.draw.embedded_words import EmbeddedWords
from library.draw.text_conditions import TextConditions
from library.files.textual_inversion import XTI_LAYERS, Embedding
from library.plan.prompts import BREAK, MAX_WEIGHT, parse_emphasis

logger = logging.getLogger(__name__)

CHUNK_TOKENS = 75  # what CLIP's 77 positions leave between the begin and the end token
_KEPT_CHUNKS = 256  # of texts whose embeddings are kept for later batches; 0.2 to 0.3 MB each
_SHOWN_CHARACTERS = 200  # of a text that was cut off
Multipliers = tuple[float, ...]  # the networks'
_Wanted = tuple[tuple[int, ...], tuple[float, ...], int, Multipliers]  # token ids, weights, chunks, multipliers


@dataclass(frozen=True)
class WeightedTokens:
    """A text's token ids without begin and end, and the weight of each."""

    ids: tuple[int, ...]
    weights: tuple[float, ...]

    @property
    def chunks(self) -> int:
        """How many chunks the tokens fill, at least one."""
        return max(1, -(-len(self.ids) // CHUNK_TOKENS))


class PromptEncoder:
    """Encodes prompts of any length with CLIP's text encoder.

    Args:
        tokenizer: the model's.
        text_encoder: the model's.
        clip_skip: take the n-th last layer's output; 1 is the last layer.
        max_chunks: a prompt is cut after this many chunks.
        embeddings: textual inversion's words.
        use_multipliers: sets the multipliers of the networks on the text encoder.
    """

    def __init__(
        self,
        tokenizer: CLIPTokenizer,
        text_encoder: CLIPTextModel,
        clip_skip: int = 1,
        max_chunks: int = 1,
        embeddings: Sequence[Embedding] = (),
        use_multipliers: Callable[[Multipliers], None] = lambda multipliers: None,
    ) -> None:
        self.tokenizer = tokenizer
        self.text_encoder = text_encoder
        self.clip_skip = clip_skip
        self.use_multipliers = use_multipliers
        self.max_tokens = max_chunks * CHUNK_TOKENS
        self.words = EmbeddedWords(tokenizer, text_encoder, embeddings)
        self.tokenize = lru_cache(maxsize=4 * _KEPT_CHUNKS)(self._tokenize)
        self._kept: dict[_Wanted, torch.Tensor] = {}  # oldest first

    def chunks(self, *texts: str) -> int:
        """The number of chunks that the longest of the texts fills."""
        return max(self.tokenize(text).chunks for text in texts)

    def encode(
        self, texts: Sequence[str], chunks: int, multipliers: Sequence[Multipliers] | None = None
    ) -> TextConditions:
        """Encode texts, each padded to `chunks` chunks.

        Args:
            texts: the prompts.
            chunks: see `chunks`.
            multipliers: for each text those of the networks; without networks they can be left out.

        Returns:
            (len(texts), 77 * chunks, width) in float32, on the text encoder's device, for all layers, and for each one
            that sees other vectors of a word than the rest.
        """
        multipliers = multipliers or [()] * len(texts)
        per_layer = {}
        if any(self.words.differ_by_layer(self.tokenize(text).ids) for text in texts):
            per_layer = {layer: self._encode_kept(texts, chunks, multipliers, layer) for layer in XTI_LAYERS}
        return TextConditions(self._encode_kept(texts, chunks, multipliers, XTI_LAYERS[0]), per_layer)

    def _encode_kept(
        self, texts: Sequence[str], chunks: int, multipliers: Sequence[Multipliers], layer: str
    ) -> torch.Tensor:
        """Encode texts as one layer sees them, (len(texts), 77 * chunks, width); what was encoded lately is kept."""
        place = XTI_LAYERS.index(layer)
        wanted: list[_Wanted] = []
        for text, its_multipliers in zip(texts, multipliers):
            tokens = self.tokenize(text)
            wanted.append((self.words.in_layer(tokens.ids, place), tokens.weights, chunks, its_multipliers))
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

    def _tokenize(self, text: str) -> WeightedTokens:
        """Tokenize a prompt piece by piece; warns of what is cut off and of weights out of bounds."""
        ids: list[int] = []
        weights: list[float] = []
        for piece, weight in parse_emphasis(text):
            if piece is BREAK:
                self._fill_chunk(ids, weights)
                continue
            piece_ids = self.tokenizer(piece, add_special_tokens=False, verbose=False).input_ids
            for unit in self.words.units(piece_ids):
                if len(ids) % CHUNK_TOKENS + len(unit) > CHUNK_TOKENS >= len(unit):
                    self._fill_chunk(ids, weights)  # a word's vectors stay together where they can
                ids += unit
                weights += [weight] * len(unit)
        if max(map(abs, weights), default=0) >= MAX_WEIGHT:
            logger.warning("a weight in %r is beyond %g and was set to that", _shorten(text), MAX_WEIGHT)
        if len(ids) > self.max_tokens:
            logger.warning(
                "the prompt has %d tokens, %d of them are cut off: %r; raise --max_embeddings_multiples to keep them",
                len(ids),
                len(ids) - self.max_tokens,
                _shorten(self.words.text(ids[self.max_tokens :])),
            )
        return WeightedTokens(tuple(ids[: self.max_tokens]), tuple(weights[: self.max_tokens]))

    def _fill_chunk(self, ids: list[int], weights: list[float]) -> None:
        """Pad to the end of the last chunk that is begun."""
        padding = -len(ids) % CHUNK_TOKENS
        ids += [self.tokenizer.pad_token_id] * padding
        weights += [1.0] * padding

    @torch.inference_mode()
    def _encode(self, texts: Sequence[WeightedTokens], chunks: int) -> torch.Tensor:
        device = self.text_encoder.device
        ids = torch.tensor([row for text in texts for row in self._chunk_ids(text, chunks)], device=device)
        output = self.text_encoder(ids, output_hidden_states=True)  # ids: (texts * chunks, 77)
        if self.clip_skip == 1:
            hidden = output.last_hidden_state
        else:
            hidden = self._final_layer_norm(output.hidden_states[-self.clip_skip])
        embeddings = hidden.float().reshape(len(texts), chunks * (CHUNK_TOKENS + 2), -1)
        weights = torch.tensor([_chunk_weights(text, chunks) for text in texts], device=device)
        return weigh(embeddings, weights[:, :, None])

    def _final_layer_norm(self, hidden: torch.Tensor) -> torch.Tensor:
        return getattr(self.text_encoder, "text_model", self.text_encoder).final_layer_norm(hidden)

    def _chunk_ids(self, text: WeightedTokens, chunks: int) -> list[list[int]]:
        """The ids of each chunk, 77 with begin and end.

        The chunks of a text are cut from one long sequence; a chunk that is not the last runs on into the next one, so
        its end gets an end token. OpenCLIP, which pads with 0, is given one only where it would see none.
        """
        begin, end, pad = (getattr(self.tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "pad"))
        length = chunks * CHUNK_TOKENS + 2
        ids = [begin, *text.ids, end]
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
    return torch.where(after == 0, weighted, weighted * (before / after))


def _shorten(text: str) -> str:
    return text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + "…"
