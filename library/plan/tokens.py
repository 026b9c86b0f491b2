"""Prompts to tokens: their ids and weights, in chunks of 75, with the words of textual inversion among them."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from library.files.families import TextEncoderKind
from library.files.textual_inversion import Embedding
from library.files.tokenizers import Tokenizer
from library.plan.emphasis import BREAK, MAX_WEIGHT, parse_emphasis
from library.plan.textual_inversion import EmbeddedWords

logger = logging.getLogger(__name__)

CHUNK_TOKENS = 75  # what CLIP's 77 positions leave between the begin and the end token
MOST_CHUNKS = 100  # of a prompt
WEB_UI_MOVED_TOKENS = 20
PADDING = -1  # in place of an id: what fills a chunk before its end, which text encoders pad each in their own way
_KEPT_TEXTS = 1024
_SHOWN_CHARACTERS = 200  # of a text that was cut off


@dataclass(frozen=True)
class WeightedTokens:
    """A text's token ids without begin and end, and the weight of each."""

    ids: tuple[int, ...]
    weights: tuple[float, ...]

    @property
    def chunks(self) -> int:
        """How many chunks the tokens fill, at least one."""
        return max(1, -(-len(self.ids) // CHUNK_TOKENS))


class PromptTokens:
    """Tokenizes prompts of any length.

    Args:
        tokenizer: the model's.
        encoders: the kinds of its text encoders.
        vocabulary: how many tokens they know; the vectors of words are numbered from there on.
        max_chunks: a prompt is cut after this many chunks.
        embeddings: textual inversion's words.
        moved_tokens: what follows the last comma among so many last tokens of a chunk that overflows goes on to the
            next one; the web UI has 20.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        encoders: Sequence[TextEncoderKind],
        vocabulary: int,
        max_chunks: int = 1,
        embeddings: Sequence[Embedding] = (),
        moved_tokens: int = 0,
    ) -> None:
        self.tokenizer = tokenizer
        self._max_tokens = max_chunks * CHUNK_TOKENS
        self.begin, self.end = tokenizer.bos_token_id, tokenizer.eos_token_id
        # what each encoder pads with; for the first one the tokenizer's own word counts
        further = [tokenizer.convert_tokens_to_ids(kind.pad_token) for kind in encoders[1:]]
        self.pads = (tokenizer.pad_token_id, *further)
        self.vocabulary = vocabulary
        self._moved_tokens = moved_tokens
        self._comma = tokenizer.convert_tokens_to_ids(",</w>")
        self.words = EmbeddedWords(tokenizer, embeddings, vocabulary)
        self.tokenize = lru_cache(maxsize=_KEPT_TEXTS)(self._tokenize)

    def chunks(self, *texts: str) -> int:
        """The number of chunks that the longest of the texts fills."""
        return max(self.tokenize(text).chunks for text in texts)

    def _tokenize(self, text: str) -> WeightedTokens:
        """Tokenize a prompt piece by piece; warns of what is cut off and of weights out of bounds."""
        ids: list[int] = []
        weights: list[float] = []
        ended = 0  # where the last chunk is that BREAK has ended
        for piece, weight in parse_emphasis(text):
            if piece is BREAK:
                self._fill_chunk(ids, weights)
                ended = len(ids)
                continue
            for unit in self.words.units(piece):
                if len(ids) % CHUNK_TOKENS == 0 and len(ids) > ended and unit != (self._comma,):
                    self._move_on(ids, weights)
                if len(ids) % CHUNK_TOKENS + len(unit) > CHUNK_TOKENS >= len(unit):
                    self._fill_chunk(ids, weights)  # a word's vectors stay together where they can
                ids += unit
                weights += [weight] * len(unit)
        if max(map(abs, weights), default=0) >= MAX_WEIGHT:
            logger.warning("a weight in %r is beyond %g and was set to that", _shorten(text), MAX_WEIGHT)
        if len(ids) > self._max_tokens:
            logger.warning(
                "the prompt has %d tokens, %d of them are cut off: %r; raise --max_embeddings_multiples to keep them",
                len(ids),
                len(ids) - self._max_tokens,
                _shorten(self.words.text([self.pads[0] if i == PADDING else i for i in ids[self._max_tokens :]])),
            )
        return WeightedTokens(tuple(ids[: self._max_tokens]), tuple(weights[: self._max_tokens]))

    def _move_on(self, ids: list[int], weights: list[float]) -> None:
        """Put what follows the last comma of a full chunk into the next one, if there is little of it."""
        places = [place for place in range(len(ids) - self._moved_tokens, len(ids)) if ids[place] == self._comma]
        if not places or places[-1] == len(ids) - 1:
            return
        cut = places[-1] + 1
        moved, their_weights = ids[cut:], weights[cut:]
        del ids[cut:], weights[cut:]
        self._fill_chunk(ids, weights)
        ids += moved
        weights += their_weights

    def _fill_chunk(self, ids: list[int], weights: list[float]) -> None:
        """Pad to the end of the last chunk that is begun."""
        padding = -len(ids) % CHUNK_TOKENS
        ids += [PADDING] * padding
        weights += [1.0] * padding


def _shorten(text: str) -> str:
    return text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + "…"
