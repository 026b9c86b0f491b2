"""Prompts to embeddings, against transformers' own CLIP and the rules for chunks."""

import logging

import pytest
import torch
from loading import prompt_encoder

from library.draw.text_encoding import PromptEncoder
from library.files.model_files import find_model
from library.plan.tokens import PADDING, WeightedTokens

BOS, EOS = 49406, 49407
LONG = ", ".join(f"word{n} of a long prompt" for n in range(40))  # some 280 tokens


def make_encoder(models, **settings) -> PromptEncoder:
    v2 = "--v2" in models.options
    files = find_model(str(models.folder), v2=v2, v_parameterization=v2)
    return prompt_encoder(files, **settings)


@pytest.fixture(scope="module")
def encoder(sd1):
    return make_encoder(sd1, max_chunks=4)


def test_an_unweighted_prompt_is_what_transformers_gives(sd1, encoder):
    ids = encoder.tokens.tokenizer("a red cat", padding="max_length", max_length=77, return_tensors="pt").input_ids
    with torch.inference_mode():
        expected = encoder.texts[0].model(ids).last_hidden_state
    assert torch.equal(encoder.encode(["a red cat"], 1).embeddings, expected)


def test_clip_skip_takes_an_earlier_layer_and_normalises_it(sd1):
    encoder = make_encoder(sd1, clip_skip=2)
    ids = encoder.tokens.tokenizer("a cat", padding="max_length", max_length=77, return_tensors="pt").input_ids
    with torch.inference_mode():
        hidden = encoder.texts[0].model(ids, output_hidden_states=True).hidden_states[-2]
        expected = encoder.texts[0].model.final_layer_norm(hidden)
    assert torch.equal(encoder.encode(["a cat"], 1).embeddings, expected)


def test_weights_multiply_tokens_and_keep_the_mean(encoder):
    plain, weighted = encoder.encode(["a cat"], 1).embeddings[0], encoder.encode(["a (cat:1.5)"], 1).embeddings[0]
    factors = torch.ones(77, 1)
    factors[2] = 1.5  # begin, "a", "cat"
    expected = plain * factors
    expected *= plain.mean() / expected.mean()
    # float32 sums in another order
    torch.testing.assert_close(weighted, expected, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(weighted, plain)


def test_chunks_are_encoded_one_by_one(encoder):
    chunks = encoder.tokens.chunks(LONG, "short")
    assert chunks == 4
    tokens = encoder.tokens.tokenize(LONG)
    embedding = encoder.encode([LONG], chunks).embeddings
    assert embedding.shape == (1, 77 * 4, 64)
    with torch.inference_mode():
        ids = torch.tensor([[BOS, *tokens.ids[75:150], EOS]])
        second = encoder.texts[0].model(ids).last_hidden_state[0]
    # a batch of four chunks sums in another order than one
    torch.testing.assert_close(embedding[0, 77:154], second, rtol=1e-4, atol=1e-5)


def test_an_embedding_does_not_depend_on_the_rest_of_the_batch(sd1):
    texts = ["a cat", "(dog:1.2), field", "", "tree"]
    together = make_encoder(sd1).encode(texts, 1).embeddings
    for text, embedding in zip(texts, together):
        torch.testing.assert_close(make_encoder(sd1).encode([text], 1).embeddings[0], embedding, rtol=1e-4, atol=1e-5)


def test_chunk_ids_of_sd1(encoder):
    rows = encoder._chunk_ids(WeightedTokens(tuple(range(1, 81)), (1.0,) * 80), 3, encoder.tokens.pads[0])
    assert [len(row) for row in rows] == [77] * 3
    assert rows[0] == [BOS, *range(1, 76), EOS]
    assert rows[1] == [BOS, *range(76, 81), *[EOS] * 71]
    assert rows[2] == [BOS, *[EOS] * 76]


def test_chunk_ids_of_sd2(sd2):
    encoder = make_encoder(sd2, max_chunks=3)
    rows = encoder._chunk_ids(WeightedTokens(tuple(range(1, 81)), (1.0,) * 80), 3, encoder.tokens.pads[0])
    assert rows[0] == [BOS, *range(1, 76), EOS]  # the last one is a word of the next chunk
    assert rows[1] == [BOS, *range(76, 81), EOS, *[0] * 70]
    assert rows[2] == [BOS, EOS, *[0] * 75]  # nothing but padding
    assert encoder._chunk_ids(WeightedTokens((5,), (1.0,)), 1, 0) == [[BOS, 5, EOS, *[0] * 74]]


def test_break_fills_a_chunk(encoder):
    a, b = (
        encoder.tokens.tokenizer("a", add_special_tokens=False).input_ids,
        encoder.tokens.tokenizer("b", add_special_tokens=False).input_ids,
    )
    tokens = encoder.tokens.tokenize("BREAK a BREAK BREAK (b:1.3)")
    assert tokens.ids == (*a, *[PADDING] * 74, *b)
    assert tokens.weights == (*[1.0] * 75, 1.3)
    assert encoder.tokens.tokenize("a BREAK").chunks == 1


def test_what_is_cut_off_is_shown(sd1, caplog):
    encoder = make_encoder(sd1)
    with caplog.at_level(logging.WARNING):
        tokens = encoder.tokens.tokenize("cat " * 75 + "the unheard end")
    assert len(tokens.ids) == 75
    assert "79 tokens, 4 of them are cut off: 'the unheard end'" in caplog.text
    with caplog.at_level(logging.WARNING):
        encoder.tokens.tokenize("dog " * 10_000)
    assert len(caplog.records[-1].getMessage()) < 500


def test_weights_out_of_bounds_are_warned_of(encoder, caplog):
    with caplog.at_level(logging.WARNING):
        encoding = encoder.encode(["(" * 200 + "a"], 1).embeddings
    assert "was set to that" in caplog.text
    assert encoding.isfinite().all()


def test_kept_texts_are_bounded(sd1):
    encoder = make_encoder(sd1)
    for number in range(300):
        encoder.encode([f"text {number}", "the same"], 1)
    assert len(encoder._kept) == 256
