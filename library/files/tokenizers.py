"""The tokenizers of text encoders: a folder of CLIP's vocabulary, the model's own or the one that ships here."""

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from library.errors import InputError
from library.files.families import Family
from library.files.json_files import read_json
from library.texts import is_text

SHIPPED_TOKENIZER = Path(__file__).resolve().parent.parent / "clip_tokenizer"


class Tokenizer(Protocol):
    """What is asked of a tokenizer; transformers' `CLIPTokenizer` is one."""

    bos_token_id: int
    eos_token_id: int
    pad_token_id: int

    def __call__(self, text: str, *, add_special_tokens: bool, verbose: bool) -> Any:
        """Tokenize a text: `input_ids` are its tokens."""

    def decode(self, ids: Sequence[int]) -> str:
        """Tokens as text again."""

    def convert_tokens_to_ids(self, spelled: str) -> int:
        """The token of a spelling."""

    def save_pretrained(self, folder: Path) -> object:
        """Write it to a folder."""


def check_tokenizer(folder: Path) -> None:
    """Refuse a folder that holds no tokenizer; transformers would make an empty one.

    Raises:
        InputError: naming the file that is missing or damaged.
    """
    if (folder / "tokenizer.json").is_file():
        read_json(folder / "tokenizer.json")
        return
    for name in ("vocab.json", "merges.txt"):
        if not (folder / name).is_file():
            raise InputError(str(folder), f"is no tokenizer: {name} is missing; download it again or remove the folder")
    read_json(folder / "vocab.json")


def read_vocabulary(folder: Path) -> frozenset[str]:
    """The words of a tokenizer's vocabulary as CLIP spells them, an end of word marked `</w>`."""
    if (file := folder / "vocab.json").is_file():
        return frozenset(read_json(file))
    content = read_json(folder / "tokenizer.json")
    return frozenset(content["model"]["vocab"])


def open_tokenizer(folder: Path) -> Any:
    """Open transformers' tokenizer of a folder; one whose name is no text, which it does not take, is copied."""
    from transformers import CLIPTokenizer  # which loads no torch

    if is_text(folder):
        return CLIPTokenizer.from_pretrained(folder)
    with tempfile.TemporaryDirectory() as temporary:
        copy = shutil.copytree(folder, Path(temporary) / "tokenizer", ignore=lambda _, names: _beside(folder, names))
        return CLIPTokenizer.from_pretrained(copy)


def _beside(folder: Path, names: list[str]) -> list[str]:
    """What lies in a tokenizer's folder and is not its own: a model's weights."""
    return [name for name in names if not name.endswith((".json", ".txt")) or (folder / name).is_dir()]


def load_tokenizer(folder: Path, family: Family, cache_dir: Path | None = None) -> Tokenizer:
    """Load a model's tokenizer: its own, else the one in `cache_dir`, else the one that ships here.

    Args:
        folder: the model's own, or `SHIPPED_TOKENIZER`.
        family: of the model.
        cache_dir: a folder of tokenizers by family; the shipped one is written there when it is not there yet, so that
            another vocabulary can be put in its place.
    """
    from transformers import CLIPTokenizer  # which loads no torch

    if folder != SHIPPED_TOKENIZER:
        return open_tokenizer(folder)
    cached = cache_dir / family.tokenizer_name if cache_dir else None
    if cached and cached.is_dir():
        check_tokenizer(cached)
        return open_tokenizer(cached)
    tokenizer = CLIPTokenizer.from_pretrained(SHIPPED_TOKENIZER, pad_token=family.encoders[0].pad_token)
    if cached:
        _keep(tokenizer, cached)
    return tokenizer


def _keep(tokenizer: Tokenizer, folder: Path) -> None:
    """Write a tokenizer to a folder that is not there yet, whole or not at all."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as temporary, tempfile.TemporaryDirectory() as plain:
            tokenizer.save_pretrained(Path(plain))  # the library writes to no folder whose name is no text
            written = shutil.copytree(plain, Path(temporary) / folder.name)
            written.rename(folder)
    except OSError as problem:
        subject = f"--tokenizer_cache_dir {folder.parent}"
        raise InputError(subject, f"cannot be written to ({problem.strerror}); give another folder") from None
