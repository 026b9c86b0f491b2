"""Textual inversion: files of learnt vectors that stand for a word, in every format found in the wild.

Files are read and checked here without loading a model; `plan.textual_inversion` finds the words in prompts, and
`draw.textual_inversion` gives their vectors to the text encoders.
Sources: textual inversion https://arxiv.org/abs/2208.01618, Extended Textual Inversion https://arxiv.org/abs/2303.09522.
"""

import base64
import binascii
import json
import logging
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from library.errors import InputError
from library.files.families import FAMILIES, Family
from library.files.globs import advice_on
from library.files.model_files import ModelFiles, name_kind
from library.files.pictures import opened
from library.files.safetensors_file import FLOATING
from library.files.tokenizers import read_vocabulary
from library.files.weight_files import PickleFile, WeightFile, open_weights, parameter_dict_tensors
from library.texts import readable

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

# The cross-attention layers with a text of their own in XTI, under the names of its files
XTI_LAYERS = (
    *("IN01", "IN02", "IN04", "IN05", "IN07", "IN08", "MID"),
    *(f"OUT{block:02d}" for block in range(3, 12)),
)
_SECOND = "_2"  # how Diffusers ends the name of the file with a word's vectors for the second text encoder
_STEPS = "-steps-"  # before its count of a training's steps, which stands behind that
_BUNDLED = re.compile(r"bundle_emb\.(?P<word>[^.]+)\.(?:string_to_param\.)?(?P<name>.+)")
_OUTPUT = "_out"  # how OneTrainer ends the names of vectors that are added to a text encoder's output
_NAMES = {  # of vectors; whole numbers under other names tell something else
    *("emb_params", *XTI_LAYERS),
    *(key for family in FAMILIES for kind in family.encoders for key in kind.embedding_keys),
}
_PNG_HEAD = b"\x89PNG\r\n\x1a\n"
_PNG_TEXT = "sd-ti-embedding"  # where AUTOMATIC1111's web UI keeps the embedding that a picture carries


@dataclass(frozen=True)
class Embedding:
    """The vectors of one word, for each of the model's text encoders: (n, width), or with XTI one tensor for each of
    `XTI_LAYERS` in their order.
    """

    word: str
    vectors: "tuple[tuple[torch.Tensor, ...], ...]"  # by encoder, then by layer

    @property
    def tokens(self) -> int:
        """How many tokens the word takes."""
        return self.vectors[0][0].shape[0]

    @property
    def layers(self) -> int:
        """How many sets of vectors it has."""
        return len(self.vectors[0])


def plain_word(name: str) -> str:
    """A word as CLIP's tokenizers normalise it: composed, in lower case, with single spaces.

    Characters are taken one by one, as theirs are: of a text Python has a sigma at a word's end in another form.
    """
    return " ".join("".join(character.lower() for character in unicodedata.normalize("NFC", name)).split())


def find_embeddings(
    files: Sequence[str], xti_files: Sequence[str], model: ModelFiles, networks: Sequence[WeightFile] = ()
) -> tuple[Embedding, ...]:
    """Read and check the embeddings of `--textual_inversion_embeddings` and `--XTI_embeddings`, and those that come
    along in network files.

    Raises:
        InputError: for a file that is none, or is made for another model, and for a word that two files have or that
            the model's vocabulary has.
    """
    embeddings: dict[str, Embedding] = {}
    bundles = {weights.path: bundled for weights in networks if (bundled := _bundled_tensors(weights))}
    vocabulary = read_vocabulary(model.tokenizer) if files or xti_files or bundles else frozenset()
    for option, names, extended in (
        ("--textual_inversion_embeddings", files, False),
        ("--XTI_embeddings", xti_files, True),
    ):
        for name in names:
            subject, path = f"{option} {name}", Path(name).expanduser()
            if _is_second(path, names, model.family):
                continue
            word = readable(path.stem)
            embedding = _make_embedding(word, _read_pair(path, model.family), model, subject, extended=extended)
            plain = plain_word(word)
            if not plain:
                raise InputError(subject, "its name is no word; rename the file")
            if f"{plain}</w>" in vocabulary:
                problem = f"{word!r} is a word of the model's vocabulary; rename the file"
                raise InputError(subject, problem)
            if plain in embeddings:
                raise InputError(subject, f"another file gives the word {word!r} too; rename one of them")
            embeddings[plain] = embedding
    for path, words in bundles.items():
        for word, tensors in words.items():
            subject, plain = f"--network_weights {path}", plain_word(word)
            if plain in embeddings or f"{plain}</w>" in vocabulary:
                other = "another file's" if plain in embeddings else "one of the model's vocabulary"
                logger.warning("%s: its embedding %r is left aside, the word is %s", subject, word, other)
            else:
                embeddings[plain] = _make_embedding(word, tensors, model, subject, extended=False)
    return tuple(embeddings.values())


def _make_embedding(
    word: str, tensors: "Mapping[str, torch.Tensor]", model: ModelFiles, subject: str, *, extended: bool
) -> Embedding:
    """The embedding of a file's tensors, checked against the model."""
    vectors = _choose_vectors(tensors, model, subject, extended=extended)
    for text, of_encoder in zip(model.texts, vectors):
        _check_vectors(of_encoder, text.config["hidden_size"], subject)
    if len({len(of_encoder[0]) for of_encoder in vectors}) > 1:
        numbers = " and ".join(str(len(of_encoder[0])) for of_encoder in vectors)
        problem = f"has {numbers} vectors for the text encoders, which need equally many; use another file"
        raise InputError(subject, problem)
    return Embedding(word, vectors)


def _bundled_tensors(weights: WeightFile) -> "dict[str, dict[str, torch.Tensor]]":
    """The tensors of each word whose embedding a network file holds, as OneTrainer and the web UI bundle them."""
    words: dict[str, dict[str, torch.Tensor]] = {}
    for key in weights.shapes:
        if match := _BUNDLED.fullmatch(key):
            words.setdefault(match["word"], {})[match["name"]] = weights.tensor(key).clone()
    return words


def read_tensors(path: Path) -> "dict[str, torch.Tensor]":
    """Read the named tensors of an embedding file.

    Raises:
        InputError: when it cannot be read or holds no embedding.
    """
    try:
        with path.open("rb") as file:
            head = file.read(len(_PNG_HEAD))
    except (OSError, ValueError) as problem:
        reason = getattr(problem, "strerror", None) or problem
        raise InputError(str(path), f"cannot be read: {reason}; {advice_on(path)}") from None
    if head == _PNG_HEAD:
        return _read_png(path)
    weights = open_weights(path)
    if isinstance(weights, PickleFile) and (tensors := parameter_dict_tensors(path, "string_to_param")):
        return tensors
    if (kind := name_kind(weights)) and "embedding" not in kind:
        remedy = "give it with --network_weights" if "LoRA" in kind and "Control" not in kind else "give an embedding"
        raise InputError(str(path), f"is {kind}, not a textual inversion embedding; {remedy}")
    vectors = [name for name, kind in weights.types.items() if kind in FLOATING or name in _NAMES]
    tensors = {name: weights.tensor(name).clone() for name in vectors or weights.shapes}
    weights.close()
    return tensors


def _read_png(path: Path) -> "dict[str, torch.Tensor]":
    """The embedding in a picture's text: base64 of JSON in which tensors stand as nested lists under TORCHTENSOR."""
    import torch

    with opened(path, str(path)) as picture:
        text = picture.info.get(_PNG_TEXT)
    if text is None:
        raise InputError(str(path), f"is a picture without an embedding in its text {_PNG_TEXT}; give an embedding")
    try:
        content = json.loads(base64.b64decode(text))
        lists = {name: value["TORCHTENSOR"] for name, value in content["string_to_param"].items()}
        return {name: torch.tensor(rows, dtype=torch.float32) for name, rows in lists.items()}
    except (ValueError, binascii.Error, KeyError, TypeError, AttributeError) as problem:
        raise InputError(str(path), f"holds a damaged embedding ({problem}); download it again") from None


def _is_second(path: Path, names: Sequence[str], family: Family) -> bool:
    """Whether a file is the second one of a pair whose first one is given too."""
    return len(family.encoders) > 1 and any(path in _seconds(Path(name).expanduser()) for name in names)


def _seconds(first: Path) -> tuple[Path, ...]:
    """What the second file of a pair may be called: `word_2`; of a training's step `word_2-steps-500`."""
    word, mark, step = first.stem.partition(_STEPS)
    return tuple(first.with_stem(stem) for stem in (first.stem + _SECOND, word + _SECOND + mark + step))


def _read_pair(path: Path, family: Family) -> "dict[str, torch.Tensor]":
    """The tensors of a file; of a pair of files with one each, as Diffusers writes them, both by the encoders' keys."""
    tensors, second = read_tensors(path), next((each for each in _seconds(path) if each.is_file()), None)
    if len(family.encoders) != 2 or len(tensors) != 1 or second is None:
        return tensors
    others = read_tensors(second)
    if len(others) != 1:
        return tensors
    return {
        kind.embedding_keys[0]: next(iter(found.values())) for kind, found in zip(family.encoders, (tensors, others))
    }


def _choose_vectors(
    tensors: "Mapping[str, torch.Tensor]", model: ModelFiles, subject: str, *, extended: bool
) -> "tuple[tuple[torch.Tensor, ...], ...]":
    """Find the vectors among a file's tensors, whatever format it has; see `Embedding`."""
    if added := sorted(name for name in tensors if name.endswith(_OUTPUT) and name.removesuffix(_OUTPUT) in tensors):
        logger.warning("%s: left aside: %s", subject, ", ".join(added))
        tensors = {name: tensor for name, tensor in tensors.items() if name not in added}
    for keys in zip(*(kind.embedding_keys for kind in model.family.encoders)):
        if set(keys) <= set(tensors):
            if left := sorted(set(tensors) - set(keys)):
                logger.warning("%s: left aside: %s", subject, ", ".join(left))
            return tuple((_as_rows(tensors[key]),) for key in keys)
    if extended:
        if not model.family.extended_inversion:
            raise InputError(subject, f"there are no XTI embeddings for {model.family.name}; leave it out")
        if set(tensors) != set(XTI_LAYERS):
            problem = f"is no XTI embedding, which has the {len(XTI_LAYERS)} tensors {', '.join(XTI_LAYERS)}"
            raise InputError(subject, f"{problem}; use --textual_inversion_embeddings for others")
        return (tuple(_as_rows(tensors[name]) for name in XTI_LAYERS),)
    if set(tensors) == set(XTI_LAYERS):
        raise InputError(subject, "is an XTI embedding; use --XTI_embeddings")
    _check_encoders(tensors, model, subject)
    candidates = [tensors["emb_params"]] if "emb_params" in tensors else list(tensors.values())
    if len(candidates) != 1:
        problem = f"holds {len(candidates)} tensors, a textual inversion embedding holds one; give an embedding"
        raise InputError(subject, problem)
    return ((_as_rows(candidates[0]),),)


def _check_encoders(tensors: "Mapping[str, torch.Tensor]", model: ModelFiles, subject: str) -> None:
    """Refuse an embedding for more or fewer text encoders than the model has, naming the widths of both."""
    formats = [keys for family in FAMILIES for keys in zip(*(kind.embedding_keys for kind in family.encoders))]
    several = next((keys for keys in formats if len(keys) > 1 and set(keys) <= set(tensors)), ())
    if several or len(model.texts) > 1:
        found = _in_words([tensors[key].shape[-1] for key in several or tensors if tensors[key].dim()])
        wanted = _in_words([text.config["hidden_size"] for text in model.texts])
        problem = f"its vectors are {found} wide, those of {model.family.name} {wanted}"
        raise InputError(subject, f"{problem}; use an embedding made for this model")


def _in_words(widths: Sequence[int]) -> str:
    return " and ".join(map(str, dict.fromkeys(widths)))


def _as_rows(vectors: "torch.Tensor") -> "torch.Tensor":
    """Vectors as (n, width); Diffusers writes a single one as (width)."""
    return vectors[None] if vectors.dim() == 1 else vectors


def _check_vectors(layers: "Sequence[torch.Tensor]", width: int, subject: str) -> None:
    for vectors in layers:
        if not vectors.is_floating_point():
            raise InputError(subject, f"holds a tensor of type {vectors.dtype}, not vectors; give an embedding")
        if vectors.dim() != 2 or not len(vectors):
            raise InputError(subject, f"holds a tensor of shape {list(vectors.shape)}, not vectors; give an embedding")
        if vectors.shape[1] != width:
            problem = f"its vectors are {vectors.shape[1]} wide, the model's text encoder is {width} wide"
            raise InputError(subject, f"{problem}; use an embedding made for this model")
        if not vectors.isfinite().all():
            raise InputError(subject, "holds NaN or infinite values; the training went wrong, use another file")
        if len(vectors) != len(layers[0]):
            raise InputError(subject, "its layers have different numbers of vectors; use another file")
