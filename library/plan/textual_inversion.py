"""Words of textual inversion in prompts: found among a text's tokens, and replaced by those of their vectors."""

from collections.abc import Sequence

from library.errors import InputError
from library.files.textual_inversion import Embedding
from library.files.tokenizers import Tokenizer


class EmbeddedWords:
    """The words of all embeddings. Each vector is a token of its own, numbered after those of the vocabulary.

    A word is found by its tokens, as AUTOMATIC1111's web UI does it: in any case, whole words only, the longest first.

    Args:
        tokenizer: tells the tokens of the words; it is not changed.
        embeddings: the words and their vectors.
        first: the first vector's number; the others follow in order.

    Raises:
        InputError: when a word has no token.
    """

    def __init__(self, tokenizer: Tokenizer, embeddings: Sequence[Embedding], first: int) -> None:
        self._tokenizer = tokenizer
        self._tokens: dict[tuple[int, ...], tuple[int, ...]] = {}  # tokens of a word → tokens of its vectors
        self._in_layer: dict[int, tuple[int, ...]] = {}  # a token with XTI → its token in each layer
        for embedding in embeddings:
            word = tuple(tokenizer(embedding.word, add_special_tokens=False, verbose=False).input_ids)
            if not word:
                raise InputError(f"the embedding {embedding.word!r}", "its name is no word; rename the file")
            self._tokens[word] = tuple(range(first, first + embedding.tokens))
            layers = range(embedding.layers)
            if len(layers) > 1:
                for token in self._tokens[word]:
                    self._in_layer[token] = tuple(token + layer * embedding.tokens for layer in layers)
            first += len(layers) * embedding.tokens
        self._longest_first = sorted(self._tokens, key=len, reverse=True)

    def units(self, ids: Sequence[int]) -> list[tuple[int, ...]]:
        """Split a text's tokens into units that belong together: the vectors of a word, or a single token."""
        units: list[tuple[int, ...]] = []
        place = 0
        while place < len(ids):
            word = next((w for w in self._longest_first if tuple(ids[place : place + len(w)]) == w), None)
            if word is not None and (place == 0 or self._ends_word(ids[place - 1])):
                units.append(self._tokens[word])
                place += len(word)
            else:
                units.append((ids[place],))
                place += 1
        return units

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
        plain = [token for i in ids if i not in later for token in names.get(i, (i,))]
        return self._tokenizer.decode(plain)

    def _ends_word(self, token: int) -> bool:
        return self._tokenizer.convert_ids_to_tokens(token).endswith("</w>")
