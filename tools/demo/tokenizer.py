"""Make the demo's tokenizer: CLIP's byte-pair encoding with a small vocabulary of its own.

Every word a caption can hold is one token; any other word is spelled by bytes.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path

from transformers import CLIPTokenizer

from tools.demo.scenes import vocabulary

END = "</w>"
BOS, EOS = "<|startoftext|>", "<|endoftext|>"


def byte_symbols() -> list[str]:
    """GPT-2's 256 printable stand-ins for the bytes, in the order of CLIP's vocabulary."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [b for b in range(256) if b not in printable]
    return [chr(b) for b in printable] + [chr(256 + i) for i in range(len(others))]


def apply_merges(word: str, merges: dict[tuple[str, str], int]) -> list[str]:
    """Byte-pair encode one lower-case ASCII word."""
    symbols = [*word[:-1], word[-1] + END]
    while len(symbols) > 1:
        ranks = [merges.get(pair, len(merges)) for pair in itertools.pairwise(symbols)]
        best = min(range(len(ranks)), key=ranks.__getitem__)
        if ranks[best] == len(merges):
            break
        symbols[best : best + 2] = [symbols[best] + symbols[best + 1]]
    return symbols


def learn_merges(words: list[str]) -> list[tuple[str, str]]:
    """Merges that make each word one token; a later merge never gets in an earlier word's way."""
    merges: dict[tuple[str, str], int] = {}
    for word in words:
        while len(symbols := apply_merges(word, merges)) > 1:
            merges[symbols[0], symbols[1]] = len(merges)
    return list(merges)


def save_tokenizer(folder: Path) -> CLIPTokenizer:
    """Write vocab.json, merges.txt and the configuration into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    merges, symbols = learn_merges(vocabulary()), byte_symbols()
    tokens = [*symbols, *(s + END for s in symbols), *dict.fromkeys(a + b for a, b in merges), BOS, EOS]
    (folder / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(tokens)}, ensure_ascii=False))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *(f"{a} {b}" for a, b in merges)]) + "\n")
    configuration = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": 77,
        "do_lower_case": True,
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": EOS,
        "unk_token": EOS,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(configuration, indent=2) + "\n")
    special = {k: v for k, v in configuration.items() if k.endswith("_token")}
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n")
    return CLIPTokenizer.from_pretrained(folder)
