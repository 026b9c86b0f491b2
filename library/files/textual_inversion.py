"""Textual inversion: files of learnt vectors that stand for a word, in every format found in the wild.

Files are read and checked here without loading a model; `plan.textual_inversion` finds the words in prompts, and
`draw.textual_inversion` gives their vectors to the text encoders.
Sources: textual inversion https://arxiv.org/abs/2208.01618, Extended Textual Inversion https://arxiv.org/abs/2303.09522.
"""

import base64
import binascii
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from library.errors import InputError
from library.files.families import ANY_FAMILY, Family
from library.files.model_files import ModelFiles, name_kind
from library.files.pictures import opened
from library.files.tokenizers import read_vocabulary
from library.files.weight_files import PickleFile, open_weights, parameter_dict_tensors
from library.texts import readable

if TYPE_CHECKING:
    import torch

# The cross-attention layers with a text of their own in XTI, under the names of its files
XTI_LAYERS = (
    *("IN01", "IN02", "IN04", "IN05", "IN07", "IN08", "MID"),
    *(f"OUT{block:02d}" for block in range(3, 12)),
)
_SDXL_KEYS = {"clip_l", "clip_g"}  # its embeddings' vectors for its two text encoders
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


def find_embeddings(files: Sequence[str], xti_files: Sequence[str], model: ModelFiles) -> tuple[Embedding, ...]:
    """Read and check the embeddings of `--textual_inversion_embeddings` and `--XTI_embeddings`.

    Raises:
        InputError: for a file that is none, or is made for another model, and for a word that two files have or that
            the model's vocabulary has.
    """
    embeddings: dict[str, Embedding] = {}
    vocabulary = read_vocabulary(model.tokenizer) if files or xti_files else frozenset()
    for option, names, extended in (
        ("--textual_inversion_embeddings", files, False),
        ("--XTI_embeddings", xti_files, True),
    ):
        for name in names:
            subject, path = f"{option} {name}", Path(name).expanduser()
            word = readable(path.stem)
            vectors = _choose_vectors(read_tensors(path), model.family, subject, extended=extended)
            embedding = Embedding(word, vectors)
            for text, of_encoder in zip(model.texts, vectors):
                _check_vectors(of_encoder, text.config["hidden_size"], subject)
            plain = " ".join(word.lower().split())  # as CLIP's tokenizer reads it
            if f"{plain}</w>" in vocabulary:
                problem = f"{word!r} is a word of the model's vocabulary; rename the file"
                raise InputError(subject, problem)
            if plain in embeddings:
                raise InputError(subject, f"another file gives the word {word!r} too; rename one of them")
            embeddings[plain] = embedding
    return tuple(embeddings.values())


def read_tensors(path: Path) -> "dict[str, torch.Tensor]":
    """Read the named tensors of an embedding file.

    Raises:
        InputError: when it cannot be read or holds no embedding.
    """
    try:
        with path.open("rb") as file:
            head = file.read(len(_PNG_HEAD))
    except (OSError, ValueError) as problem:
        raise InputError(str(path), f"cannot be read: {getattr(problem, 'strerror', None) or problem}") from None
    if head == _PNG_HEAD:
        return _read_png(path)
    weights = open_weights(path)
    if isinstance(weights, PickleFile) and (tensors := parameter_dict_tensors(path, "string_to_param")):
        return tensors
    if (kind := name_kind(weights)) and "embedding" not in kind:
        raise InputError(str(path), f"is {kind}, not a textual inversion embedding; give an embedding")
    tensors = {name: weights.tensor(name).clone() for name in weights.shapes}
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


def _choose_vectors(
    tensors: "Mapping[str, torch.Tensor]", family: Family, subject: str, *, extended: bool
) -> "tuple[tuple[torch.Tensor, ...], ...]":
    """Find the vectors among a file's tensors, whatever format it has; see `Embedding`."""
    keys = [kind.embedding_key for kind in family.encoders if kind.embedding_key]
    if keys and set(keys) == set(tensors):
        return tuple((_as_rows(tensors[key]),) for key in keys)
    if _SDXL_KEYS & set(tensors):
        raise InputError(subject, f"is an embedding for SDXL; use one for {ANY_FAMILY}")
    if extended:
        if set(tensors) != set(XTI_LAYERS):
            problem = f"is no XTI embedding, which has the {len(XTI_LAYERS)} tensors {', '.join(XTI_LAYERS)}"
            raise InputError(subject, f"{problem}; use --textual_inversion_embeddings for others")
        return (tuple(_as_rows(tensors[name]) for name in XTI_LAYERS),)
    if set(tensors) == set(XTI_LAYERS):
        raise InputError(subject, "is an XTI embedding; use --XTI_embeddings")
    candidates = [tensors["emb_params"]] if "emb_params" in tensors else list(tensors.values())
    if len(candidates) != 1:
        problem = f"holds {len(candidates)} tensors, a textual inversion embedding holds one; give an embedding"
        raise InputError(subject, problem)
    return ((_as_rows(candidates[0]),),)


def _as_rows(vectors: "torch.Tensor") -> "torch.Tensor":
    """Vectors as (n, width); Diffusers writes a single one as (width)."""
    return vectors[None] if vectors.dim() == 1 else vectors


def _check_vectors(layers: "Sequence[torch.Tensor]", width: int, subject: str) -> None:
    for vectors in layers:
        if vectors.dim() != 2 or not len(vectors) or not vectors.is_floating_point():
            raise InputError(subject, f"holds a tensor of shape {list(vectors.shape)}, not vectors; give an embedding")
        if vectors.shape[1] != width:
            problem = f"its vectors are {vectors.shape[1]} wide, the model's text encoder is {width} wide"
            raise InputError(subject, f"{problem}; use an embedding made for this model")
        if not vectors.isfinite().all():
            raise InputError(subject, "holds NaN or infinite values; the training went wrong, use another file")
        if len(vectors) != len(layers[0]):
            raise InputError(subject, "its layers have different numbers of vectors; use another file")
