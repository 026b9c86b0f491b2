"""Vectors of textual inversion in the token tables of text encoders."""

from collections.abc import Sequence

import torch
from torch import nn

from library.files.textual_inversion import Embedding
from library.models.models import TextModel


def extend_tokens(text_encoder: TextModel, embeddings: Sequence[Embedding], encoder: int, first: int) -> None:
    """Put the embeddings' vectors for one of the text encoders behind its token table, in their order.

    Args:
        text_encoder: whose table grows.
        embeddings: see `plan.textual_inversion.EmbeddedWords`, which numbers the vectors in the same way.
        encoder: its place among the model's.
        first: the number of the first vector; what a smaller table lacks up to it no text names.
    """
    if not embeddings:
        return
    table = text_encoder.get_input_embeddings()
    assert isinstance(table, nn.Embedding)  # as all text encoders of CLIP have
    gap = table.weight.new_zeros(first - table.num_embeddings, table.embedding_dim)
    vectors = [layer.to(table.weight) for embedding in embeddings for layer in embedding.vectors[encoder]]
    table.weight = nn.Parameter(torch.cat([table.weight, gap, *vectors]), requires_grad=False)
    table.num_embeddings = len(table.weight)
