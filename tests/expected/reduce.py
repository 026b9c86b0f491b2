#!/usr/bin/env python3
"""Reduce a full pack of expected images to what a clone can carry, and rebuild a full pack from that.

    python tests/expected/reduce.py ../full-pack sdxl    # writes tests/expected/sdxl

README.md beside this file describes the format. The tests rebuild what they need by themselves.
"""

import argparse
import filecmp
import gzip
import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load, save
from transformers import CLIPTokenizer

PACKS = Path(__file__).resolve().parent
TOKENIZER = PACKS.parents[1] / "library" / "clip_tokenizer"
VOCABULARY = ("vocab.json", "merges.txt")  # of every model's tokenizer the same, so that packs go without them
PLACES = {"{A}": "assets", "{M}": "models"}  # what stands in a case's arguments for which of the pack's folders
BYTES = 512  # the vocabulary begins with every byte, inside a word and at a word's end
TABLE, ROWS = "token_embedding.weight", "token_embedding.rows"
# What stands in rows that a pack has not kept: +UNUSED and -UNUSED by turns. Zeros, or any number that is the same
# along a row, would vanish in the first layer norm and leave a token without a meaning. This drowns the whole text.
UNUSED = 1000.0


def reduce_pack(source: Path, target: Path) -> None:
    """Write what the cases of a full pack use to a folder that is not there yet.

    Raises:
        ValueError: for a model with a vocabulary that is not the shipped one.
    """
    cases = json.loads((source / "cases.json").read_text(encoding="utf-8"))
    files = used_files(source, cases)
    prompt_files = [file for file in files if file.suffix == ".txt" and file.is_relative_to(source / "assets")]
    arguments = [argument for case in cases for argument in case["argv"]]
    rows = used_rows([*arguments, *(file.read_text(encoding="utf-8") for file in prompt_files)])
    for file in files:
        place = target / file.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        if file.suffix == ".safetensors":
            content = keep_rows(file.read_bytes(), rows)
            place.with_name(f"{place.name}.gz").write_bytes(gzip.compress(content, mtime=0))
        elif file.name not in VOCABULARY:
            shutil.copyfile(file, place)
        elif not filecmp.cmp(file, TOKENIZER / file.name, shallow=False):
            raise ValueError(f"{file} is not the vocabulary of {TOKENIZER}; its table cannot be reduced")


def used_files(source: Path, cases: Sequence[dict]) -> list[Path]:
    """All files of a full pack that its cases name, or that lie in a folder they name or name a file of."""
    used = {source / "cases.json"}
    for case in cases:
        used |= {source / "expected" / case["name"], source / "models" / case["model"]}
        for mark, folder in PLACES.items():
            names = re.findall(re.escape(mark) + r"/([\w.-]+)", " ".join(case["argv"]))
            used |= {source / folder / name for name in names}
    within = {file for path in used for file in path.rglob("*")}
    return sorted(file for file in used | within if file.is_file())


def used_rows(texts: Sequence[str]) -> list[int]:
    """The tokens that prompts out of these texts can have, and more, in ascending order.

    The syntax of prompts (weights, variants, options) parts texts at marks and white space. So a word of letters stays
    whole, a digit is a token of its own, and of marks that stand together any part can be left.
    """
    pieces = set(texts)  # whole for the endings that are a token with their mark, as in "cat's"
    for text in texts:
        pieces.update(re.findall(r"[^\W\d_]+", text))
        for marks in re.findall(r"(?:[^\w\s]|_)+", text):
            pieces.update(marks[i:j] for i in range(len(marks)) for j in range(i + 1, len(marks) + 1))
    tokenizer = CLIPTokenizer.from_pretrained(TOKENIZER)
    tokens = {*range(BYTES), tokenizer.bos_token_id, tokenizer.eos_token_id}
    for piece in pieces:
        tokens.update(tokenizer(piece, add_special_tokens=False, verbose=False).input_ids)
    return sorted(tokens)


def keep_rows(content: bytes, rows: Sequence[int]) -> bytes:
    """The same safetensors file with nothing but these rows of its token tables; it stays as it is without a table.

    Raises:
        ValueError: when a table has not as many rows as the shipped vocabulary has words.
    """
    tensors = load(content)
    tables = [name for name in tensors if name.endswith(TABLE)]
    for name in tables:
        if len(tensors[name]) != vocabulary_size():
            raise ValueError(f"{name} has {len(tensors[name])} rows, the vocabulary has {vocabulary_size()} words")
        tensors[name] = tensors[name][list(rows)]
        tensors[name.replace(TABLE, ROWS)] = torch.tensor(rows, dtype=torch.int32)
    return save(tensors, {"format": "pt"}) if tables else content


def rebuild_pack(pack: Path, target: Path) -> Path:
    """Write the models and assets of a reduced pack in full to `target`, which is returned."""
    files = (file for folder in PLACES.values() for file in (pack / folder).rglob("*") if file.is_file())
    for file in files:
        place = target / file.relative_to(pack)
        place.parent.mkdir(parents=True, exist_ok=True)
        if file.suffix == ".gz":
            place.with_suffix("").write_bytes(fill_rows(gzip.decompress(file.read_bytes())))
        else:
            shutil.copyfile(file, place)
        if file.name == "tokenizer_config.json":
            for name in VOCABULARY:
                shutil.copyfile(TOKENIZER / name, place.with_name(name))
    return target


def fill_rows(content: bytes) -> bytes:
    """The same safetensors file with full token tables: the rows that were kept, and `UNUSED` in all others."""
    tensors = load(content)
    kept = [name for name in tensors if name.endswith(ROWS)]
    for name in kept:
        rows, values = tensors.pop(name), tensors[name.replace(ROWS, TABLE)]
        table = torch.full((vocabulary_size(), values.shape[1]), UNUSED, dtype=values.dtype)
        table[:, 1::2] = -UNUSED
        table[rows] = values
        tensors[name.replace(ROWS, TABLE)] = table
    return save(tensors, {"format": "pt"}) if kept else content


def vocabulary_size() -> int:
    """How many words the shipped vocabulary has, and a full token table rows."""
    return len(json.loads((TOKENIZER / VOCABULARY[0]).read_text(encoding="utf-8")))


def main() -> None:
    """Reduce the pack that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="full pack: cases.json, models/, assets/, expected/")
    parser.add_argument("name", help="name of the reduced pack: a folder beside this file that is not there yet")
    options = parser.parse_args()
    target = PACKS / options.name
    if target.exists():
        parser.error(f"{target} is there already; remove it first")
    reduce_pack(options.source, target)


if __name__ == "__main__":
    main()
