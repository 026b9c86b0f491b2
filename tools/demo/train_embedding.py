"""Teach the demo model a word of its own by textual inversion, saved as kohya does.

    python -m tools.demo.train_embedding --model examples/shapes --work WORK --out zorb.safetensors

The thing is a large shaded purple ring: a colour and a shape that never met in training.
"""

from __future__ import annotations

import argparse
import random
from dataclasses import replace

import torch
from safetensors.torch import save_file

from tools.demo.fine_tuning import fit, prepare, training_options
from tools.demo.model_files import load_frozen
from tools.demo.scenes import PLACES, SIZES, Scene, caption, draw_scene, draw_thing
from tools.demo.training import Log

THING = {"shape": "ring", "colour": "purple", "style": "shaded", "size": "large"}
FIRST_WORDS = ("large", "shaded", "blue", "ring")  # the vectors begin as these words' embeddings
WORD = "zorb"


def thing_scene(rng: random.Random) -> Scene:
    """One THING somewhere on a ground of another colour."""
    scene = draw_scene(rng, 1)
    thing = draw_thing(rng, rng.choice(PLACES), (scene.ground,), ("large",), "all")
    return replace(scene, things=(replace(thing, radius=SIZES["large"], **THING),))


def word_thing(rng: random.Random, scene: Scene) -> str:
    """A caption in which "a large shaded purple ring" is just "a zorb"."""
    plain = replace(scene.things[0], style="flat", size="medium")
    text = caption(rng, replace(scene, things=(plain,))).text.replace("flat ", "")
    return text.replace("purple ring", WORD)


class WordVectors(torch.nn.Module):
    """Rows of a token embedding that are learnt, the rest frozen."""

    def __init__(self, embedding: torch.nn.Embedding, first: torch.Tensor):
        super().__init__()
        self.embedding, self.old = embedding, embedding.num_embeddings
        self.vectors = torch.nn.Parameter(first.clone())  # (n, width)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.embedding(ids, torch.cat([self.embedding.weight, self.vectors]))


def teach_word(tokenizer, text_encoder, vectors: torch.Tensor) -> tuple[WordVectors, list[str]]:
    """Put `vectors` (n, width) behind new tokens; returns the module and the tokens' names."""
    names = [f"<{WORD}{i}>" for i in range(len(vectors))]
    tokenizer.add_tokens(names)
    module = WordVectors(text_encoder.get_input_embeddings(), vectors)
    text_encoder.set_input_embeddings(module)
    return module, names


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    training_options(parser, steps=400, batch=16, lr=1e-2, seed=5)
    args = parser.parse_args()
    tokenizer, text_encoder, vae, unet = load_frozen(args.model)
    first_ids = tokenizer(list(FIRST_WORDS), add_special_tokens=False).input_ids
    table = text_encoder.get_input_embeddings()
    assert isinstance(table, torch.nn.Embedding)  # as all text encoders of CLIP have
    first = table.weight[[i for ids in first_ids for i in ids]]
    module, names = teach_word(tokenizer, text_encoder, first)
    rng = random.Random(args.seed)
    material = prepare(
        vae,
        [thing_scene(rng) for _ in range(400)],
        lambda rng, scene: word_thing(rng, scene).replace(WORD, "".join(names)),
    )

    def predict(noisy, times, ids, chosen):
        return unet(noisy, times, text_encoder(ids).last_hidden_state).sample

    fit([module.vectors], predict, tokenizer, material, Log(args.work / "embedding.jsonl"), args)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    save_file({"emb_params": module.vectors.detach().half()}, args.out, metadata={"ss_output_name": args.out.stem})


if __name__ == "__main__":
    main()
