"""Words of textual inversion in prompts: found in the text, and replaced by the tokens of their vectors."""

import logging
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence

from library.files.textual_inversion import Embedding, plain_word
from library.files.tokenizers import Tokenizer
from library.plan.emphasis import parse_emphasis
from library.plan.job import Job

logger = logging.getLogger(__name__)


class WordFinder:
    """Finds words in texts: in any case, by themselves, the longest first.

    A word stands by itself where no letter or digit of it has another one beside it, as people see it. CLIP's tokens do
    not tell that: they join the punctuation of a word with what comes after it, and take digits one by one.

    Args:
        words: as `plain_word` gives them.
    """

    def __init__(self, words: Iterable[str]) -> None:
        self._words = frozenset(words)
        longest_first = sorted(self._words, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        self._shorter = {word: [other for other in longest_first if word.startswith(other)] for word in longest_first}

    def pieces(self, text: str) -> Iterator[tuple[str, str | None]]:
        """Split a text, as CLIP's tokenizers normalise it first, into words, each beside its text, and what is between.

        Yields:
            The text of a piece, and the word that it is; None for what is between words.
        """
        text = unicodedata.normalize("NFC", text)
        folded, origins = _fold(text)
        done = place = 0
        while match := self._pattern.search(folded, place):
            start = match.start()
            word = next((w for w in self._shorter[match[0]] if _stands_alone(folded, start, start + len(w))), None)
            place = start + (len(word) if word else 1)
            if word is not None:
                if before := text[done : origins[start]]:
                    yield before, None
                done = origins[place]
                yield text[origins[start] : done], word
        if rest := text[done:]:
            yield rest, None

    def met(self, texts: Iterable[str]) -> set[str]:
        """The words that are in any of these prompts."""
        found: set[str] = set()
        for text in texts:
            for piece, _ in parse_emphasis(text):
                found.update(word for _, word in self.pieces(piece or "") if word is not None)
            if len(found) == len(self._words):
                break
        return found


def _fold(text: str) -> tuple[str, list[int]]:
    """A text in lower case with single spaces, and where each of its characters comes from; at last, the text's end."""
    folded: list[str] = []
    origins: list[int] = []
    for place, character in enumerate(text):
        lower = " " if character.isspace() else character.lower()
        if lower == " " and folded and folded[-1] == " ":
            continue
        folded += lower
        origins += [place] * len(lower)
    return "".join(folded), [*origins, len(text)]


def _stands_alone(text: str, start: int, end: int) -> bool:
    """Whether a part of a text neither begins nor ends within a run of letters and digits."""
    return not any(
        0 < place < len(text) and all(map(_is_of_word, text[place - 1 : place + 1])) for place in (start, end)
    )


def _is_of_word(character: str) -> bool:
    return unicodedata.category(character)[0] in "LMN"  # letters, the accents on them, numbers


def words_met(embeddings: Sequence[Embedding], texts: Iterable[str]) -> list[str]:
    """The words of embeddings, in their order, that are in any of these prompts."""
    words = {plain_word(embedding.word): embedding.word for embedding in embeddings}
    met = WordFinder(words).met(texts) if words else ()
    return [word for plain, word in words.items() if plain in met]


def warn_of_unused(embeddings: Sequence[Embedding], jobs: Iterable[Job]) -> None:
    """Warn of embeddings whose words are in no prompt of a run and in no negative one."""
    met = words_met(embeddings, dict.fromkeys(text for job in jobs for text in (job.prompt, job.negative_prompt)))
    for word in (embedding.word for embedding in embeddings if embedding.word not in met):
        logger.warning("the embedding %r is in no prompt; write its word there, or leave its file out", word)


class EmbeddedWords:
    """The words of all embeddings. Each vector is a token of its own, numbered after those of the vocabulary.

    Args:
        tokenizer: tells the tokens of what is between words; it is not changed.
        embeddings: the words and their vectors.
        first: the first vector's number; the others follow in order.
    """

    def __init__(self, tokenizer: Tokenizer, embeddings: Sequence[Embedding], first: int) -> None:
        self._tokenizer = tokenizer
        self._tokens: dict[str, tuple[int, ...]] = {}  # a word → tokens of its vectors
        self._in_layer: dict[int, tuple[int, ...]] = {}  # a token with XTI → its token in each layer
        for embedding in embeddings:
            tokens = tuple(range(first, first + embedding.tokens))
            self._tokens[plain_word(embedding.word)] = tokens
            layers = range(embedding.layers)
            if len(layers) > 1:
                for token in tokens:
                    self._in_layer[token] = tuple(token + layer * embedding.tokens for layer in layers)
            first += len(layers) * embedding.tokens
        self._finder = WordFinder(self._tokens)

    def units(self, text: str) -> Iterator[tuple[int, ...]]:
        """A text's tokens in units that belong together: the vectors of a word, or a single token."""
        if not self._tokens:
            yield from ((token,) for token in self._plain(text))
            return
        for piece, word in self._finder.pieces(text):
            if word is not None:
                yield self._tokens[word]
            else:
                yield from ((token,) for token in self._plain(piece))

    def in_layer(self, ids: Sequence[int], layer: int) -> tuple[int, ...]:
        """The tokens that a layer, by its place in `XTI_LAYERS`, has in place of these."""
        return tuple(self._in_layer[token][layer] if token in self._in_layer else token for token in ids)

    def differ_by_layer(self, ids: Sequence[int]) -> bool:
        """Whether layers see different tokens."""
        return not self._in_layer.keys().isdisjoint(ids)

    def text(self, ids: Sequence[int]) -> str:
        """Tokens as text again, vectors as their word."""
        names = {tokens[0]: word for word, tokens in self._tokens.items()}
        later = {token for tokens in self._tokens.values() for token in tokens[1:]}
        plain = [token for i in ids if i not in later for token in (self._plain(names[i]) if i in names else [i])]
        return self._tokenizer.decode(plain)

    def _plain(self, text: str) -> Sequence[int]:
        return self._tokenizer(text, add_special_tokens=False, verbose=False).input_ids
