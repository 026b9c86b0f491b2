"""A model's components loaded one by one, as tests need them."""

from collections.abc import Callable
from typing import TypeVar

import torch

from library.draw.text_encoding import PromptEncoder
from library.files.model_files import Component, ModelFiles
from library.files.tokenizers import load_tokenizer
from library.models.models import Models, load_models, load_text_encoder
from library.models.weight_reading import CastWeights, read_ahead
from library.plan.tokens import PromptTokens

CPU = torch.device("cpu")
Part = TypeVar("Part", bound=Component)
Loaded = TypeVar("Loaded")


def load_one(
    load: Callable[[Part, CastWeights], Loaded], component: Part, dtype: torch.dtype = torch.float32
) -> Loaded:
    """One component, on the CPU, in a type."""
    return load(component, CastWeights(component.weights, CPU, dtype))


def load_all(files: ModelFiles, dtype: torch.dtype = torch.float32) -> Models:
    """All of them."""
    return load_models(files, read_ahead(files, CPU, dtype, channels_last=False))


def prompt_tokens(files: ModelFiles, max_chunks: int = 1, embeddings: tuple = ()) -> PromptTokens:
    """What tells the tokens of a model's prompts."""
    tokenizer = load_tokenizer(files.tokenizer, files.family)
    vocabulary = files.texts[0].config["vocab_size"]
    return PromptTokens(tokenizer, files.family.encoders, vocabulary, max_chunks, embeddings)


def prompt_encoder(files: ModelFiles, max_chunks: int = 1, embeddings: tuple = (), **settings: object) -> PromptEncoder:
    """What encodes a model's prompts."""
    texts = [load_one(load_text_encoder, text) for text in files.texts]
    return PromptEncoder(prompt_tokens(files, max_chunks, embeddings), texts, embeddings=embeddings, **settings)
