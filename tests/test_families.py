"""What families' records answer, and what XL has besides: two text encoders, a pooled vector, sizes."""

from dataclasses import replace

import pytest
import torch
from diffusers import UNet2DConditionModel
from loading import load_one, prompt_encoder, prompt_tokens
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel

from library.draw.attention import keep_text, use_kernel
from library.draw.text_conditions import TextConditions
from library.draw.text_encoding import PromptEncoder, weigh
from library.errors import InputError
from library.files import checkpoint_layout as layout
from library.files import families
from library.files.families import SD1
from library.files.model_files import ModelFiles, find_model
from library.files.textual_inversion import Embedding, find_embeddings
from library.machine.attention import sdpa
from library.models.models import load_text_encoder, load_unet
from library.settings.sizes import ToldSizes
from networks.keys import UNET, LayerNames, layer_shapes
from networks.lora import LoraNetwork

WIDTHS = (64, 32)  # of the tiny XL model's text encoders


def small_clip(width: int, seed: int) -> CLIPTextModel:
    torch.manual_seed(seed)
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 3, "num_attention_heads": 2}
    return CLIPTextModel(CLIPTextConfig(**SD1.config("text_encoder") | sizes)).eval()


@pytest.fixture(scope="module")
def xl(sdxl) -> ModelFiles:
    return find_model(str(sdxl.folder))


@pytest.fixture(scope="module")
def encoder(xl) -> PromptEncoder:
    return prompt_encoder(xl, max_chunks=3, clip_skip=2)


# ---------------------------------------------------------------------------------------------------------------------
# Records


def test_published_widths_tell_the_family_and_other_ones_the_text_encoders(sd1, sd2, sdxl):
    assert [families.name_of_width(width) for width in (768, 1024, 2048, 1280, 640, None)] == [
        *("Stable Diffusion 1.x", "Stable Diffusion 2.x", "Stable Diffusion XL", "the SDXL refiner", None, None)
    ]
    for path, v2, family in (
        (sd1.folder, False, families.SD1),
        (sd2.folder, True, families.SD2),
        (sd2.safetensors, True, families.SD2),
        (sdxl.folder, False, families.SDXL),
        (sdxl.safetensors, False, families.SDXL),
    ):
        assert find_model(str(path), v2=v2, v_parameterization=v2).family is family


def test_a_family_of_two_is_found_with_all_its_parts(xl):
    assert list(xl.parts) == ["unet", "vae", "text_encoder", "text_encoder_2"]
    assert [text.kind for text in xl.texts] == list(families.SDXL.encoders)


# ---------------------------------------------------------------------------------------------------------------------
# Text


def test_features_stand_side_by_side_each_with_its_own_padding_and_mean_and_without_the_final_norm(encoder):
    tokens = encoder.tokens
    assert tokens.pads == (49407, 0)
    features = encoder.encode(["a (cat:1.5)"], 1).embeddings
    assert features.shape == (1, 77, sum(WIDTHS))
    words = tokens.tokenize("a (cat:1.5)")
    factors = torch.ones(1, 77, 1)
    factors[0, 2] = 1.5  # begin, "a", "cat"
    for text, pad, part in zip(encoder.texts, tokens.pads, features.split(WIDTHS, dim=-1)):
        ids = torch.tensor([[49406, *words.ids, 49407, *[pad] * 73]])
        with torch.inference_mode():
            hidden = text.model(ids, output_hidden_states=True).hidden_states[-2]
            normed = text.transformer.final_layer_norm(hidden)
        torch.testing.assert_close(part, weigh(hidden, factors))
        assert not torch.allclose(part, weigh(normed, factors))


def pooled_of(encoder, ids, place):
    """The projection of the second text encoder's last layer, normed, at one place: its own mathematics."""
    model = encoder.texts[1].model
    with torch.inference_mode():
        hidden = model.text_model(torch.tensor([ids]), output_hidden_states=True).hidden_states[-1]
        return model.text_model.final_layer_norm(hidden)[:, place] @ model.text_projection.weight.T


def test_the_pooled_vector_is_that_of_the_first_end_token_of_the_first_chunk(encoder):
    """Not weighted, not skipped, of one chunk or several."""
    words = encoder.tokens.tokenize("a cat").ids
    expected = pooled_of(encoder, [49406, *words, 49407, *[0] * 73], 1 + len(words))
    for text, chunks in (("a cat", 1), ("a cat", 3), ("a (cat:1.4)", 1)):
        torch.testing.assert_close(encoder.encode([text], chunks).pooled, expected)
    long = "cat " * 100
    words = encoder.tokens.tokenize(long).ids
    torch.testing.assert_close(encoder.encode([long], 2).pooled, pooled_of(encoder, [49406, *words[:75], 49407], 76))


def test_a_chunk_that_break_ends_has_its_end_token_where_its_words_end(encoder):
    """Else it would have none in the second text encoder, and the pooled vector would be the same for all texts."""
    words = encoder.tokens.tokenize("a cat").ids
    ids = [49406, *words, 49407, *[0] * 73]
    text = encoder.tokens.tokenize("a cat BREAK a dog")
    assert encoder._chunk_ids(text, 2, 0, pooled=True)[0] == ids
    assert encoder._chunk_ids(text, 2, 49407)[0] == [49406, *words, *[49407] * 74]
    expected = pooled_of(encoder, ids, 1 + len(words))
    torch.testing.assert_close(encoder.encode(["a cat BREAK a dog"], 2).pooled, expected)
    torch.testing.assert_close(encoder.encode(["a cat BREAK"], 1).pooled, expected)


def test_one_encoder_of_a_family_of_one_is_as_before(sd1):
    files = find_model(str(sd1.folder))
    encoder = PromptEncoder(prompt_tokens(files), [load_one(load_text_encoder, files.texts[0])])
    ids = encoder.tokens.tokenizer("a cat", padding="max_length", max_length=77, return_tensors="pt").input_ids
    with torch.inference_mode():
        expected = encoder.texts[0].model(ids).last_hidden_state
    assert torch.equal(encoder.encode(["a cat"], 1).embeddings, expected)


def test_weights_can_keep_the_mean_of_sizes_or_none():
    features, factors = torch.tensor([[[1.0, -3.0], [2.0, 4.0]]]), torch.tensor([[[2.0], [1.0]]])
    weighted = torch.tensor([[[2.0, -6.0], [2.0, 4.0]]])
    assert torch.equal(weigh(features, factors, "none"), weighted)
    torch.testing.assert_close(weigh(features, factors, "abs"), weighted * 10 / 14)
    torch.testing.assert_close(weigh(features, factors, "original"), weighted * 4 / 2)


@pytest.mark.parametrize(
    "written",
    [
        {"zzyzx.safetensors": {"clip_l": 0, "clip_g": 1}},  # sd-scripts, OneTrainer
        {"zzyzx.pti": {"text_encoders_0": 0, "text_encoders_1": 1}},  # cog-sdxl
        {"zzyzx.safetensors": {"<w>": 0}, "zzyzx_2.safetensors": {"<w>": 1}},  # Diffusers
    ],
)
def test_a_word_has_vectors_in_each_encoder(xl, tmp_path, written):
    vectors = [torch.randn(3, width) for width in WIDTHS]
    for name, tensors in written.items():
        save_file({key: vectors[place] for key, place in tensors.items()}, tmp_path / name)
    (embedding,) = find_embeddings([str(tmp_path / name) for name in written], [], xl)
    assert (embedding.word, embedding.tokens, embedding.layers) == ("zzyzx", 3, 1)
    encoder = prompt_encoder(xl, embeddings=(embedding,))
    ids = torch.tensor(encoder.tokens.tokenize("zzyzx").ids)
    for text, expected in zip(encoder.texts, vectors):
        torch.testing.assert_close(text.model.get_input_embeddings()(ids), expected)
    # the end token is found among ids that are larger than it
    words = encoder.tokens.tokenize("a zzyzx cat").ids
    pooled = pooled_of(encoder, [49406, *words, 49407, *[0] * (75 - len(words))], 1 + len(words))
    torch.testing.assert_close(encoder.encode(["a zzyzx cat"], 1).pooled, pooled)


def test_a_word_needs_equally_many_vectors_in_each_encoder(xl, tmp_path):
    vectors = {"clip_l": torch.ones(3, WIDTHS[0]), "clip_g": torch.ones(1, WIDTHS[1])}
    save_file(vectors, tmp_path / "zzyzx.safetensors")
    with pytest.raises(InputError, match="has 3 and 1 vectors for the text encoders, which need equally many"):
        find_embeddings([str(tmp_path / "zzyzx.safetensors")], [], xl)


@pytest.mark.parametrize("tensors", [{"emb_params": torch.ones(1, 768)}, {"clip_l": torch.ones(2, 768)}])
def test_an_embedding_for_one_encoder_is_refused(xl, tmp_path, tensors):
    save_file(tensors, tmp_path / "old.safetensors")
    with pytest.raises(InputError, match="its vectors are 768 wide, those of Stable Diffusion XL 64 and 32"):
        find_embeddings([str(tmp_path / "old.safetensors")], [], xl)
    with pytest.raises(InputError, match="there are no XTI embeddings for Stable Diffusion XL"):
        find_embeddings([], [str(tmp_path / "old.safetensors")], xl)


def test_tables_of_unequal_length_give_a_word_equal_numbers():
    """What the shorter table lacks is filled up, so that the vectors have the same places in both."""
    from library.draw.textual_inversion import extend_tokens

    small, large = small_clip(32, 0), small_clip(32, 1)
    small.set_input_embeddings(torch.nn.Embedding(100, 32))
    vectors = torch.randn(2, 32)
    for place, model in enumerate((small, large)):
        extend_tokens(model, [Embedding("w", ((vectors,), (vectors,)))], place, 49408)
        assert torch.equal(model.get_input_embeddings()(torch.tensor([49408, 49409])), vectors)


# ---------------------------------------------------------------------------------------------------------------------
# What travels beside the text


def small_sdxl() -> UNet2DConditionModel:
    """A U-Net laid out as SDXL's, with widths of 32 and 64."""
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64, 64),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 3),
        attention_head_dim=(1, 2, 2),
        cross_attention_dim=sum(WIDTHS),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=16 + 6 * 8,
    ).eval()


@torch.inference_mode()
def test_pooled_vectors_and_sizes_reach_the_unet_with_the_text():
    unet, sample, time = small_sdxl(), torch.randn(2, 4, 8, 8), torch.tensor(500)
    text = torch.randn(2, 77, sum(WIDTHS))
    pooled, sizes = torch.randn(2, 16), torch.tensor([[1023, 1024, 0, 0, 64, 64], [64, 64, 5, 7, 64, 64.0]])
    beside = {"text_embeds": pooled, "time_ids": sizes}
    expected = unet(sample, time, encoder_hidden_states=text, added_cond_kwargs=beside).sample
    use_kernel(unet, sdpa)
    conditions = keep_text(TextConditions(text, pooled=pooled, sizes=sizes), unet)
    # the kernel sums in another order
    torch.testing.assert_close(unet(sample, time, **conditions.unet_arguments()).sample, expected, rtol=1e-4, atol=1e-5)
    others = replace(conditions, sizes=sizes + 1)
    assert not torch.allclose(unet(sample, time, **others.unet_arguments()).sample, expected, atol=1e-3)


def test_rows_are_cut_and_sizes_stay_whole_numbers():
    """Of two pictures with two parts each the text has four rows for the prompt, all else two; bfloat16 has no 1023."""
    rows = 2 + 4
    conditions = TextConditions(
        torch.arange(rows).float().view(-1, 1, 1).expand(rows, 3, 5),
        pooled=torch.arange(4).float()[:, None],
        sizes=torch.tensor([[1023.0] * 6] * 4),
    )
    prompt = conditions.rows(slice(2, 6), slice(2, 4)).to(torch.bfloat16)
    assert prompt.embeddings[:, 0, 0].tolist() == [2, 3, 4, 5]
    assert prompt.pooled.tolist() == [[2], [3]]
    assert (prompt.pooled.dtype, prompt.sizes.dtype) == (torch.bfloat16, torch.float32)
    assert prompt.sizes.tolist() == [[1023.0] * 6] * 2


def test_sizes_become_cosines_then_sines(xl):
    """Numbers worked out by hand: cos(1024 f) for 128 frequencies, then sin(1024 f)."""
    unet = UNet2DConditionModel.from_config(xl.unet.config)
    (numbers,) = unet.add_time_proj(torch.tensor([1024.0]))
    expected = [0.9874, -0.5376, 0.6835, 0.9940, -0.1585, -0.8432, 0.7300, 0.1180, 0.1098]
    places = [0, 1, 2, 127, 128, 129, 130, 254, 255]
    torch.testing.assert_close(numbers[places], torch.tensor(expected), rtol=0, atol=1e-4)
    assert torch.tensor(1023.0).bfloat16() == 1024  # why sizes stay float32


def test_a_height_stands_before_its_width_and_the_top_before_the_left():
    sizes = ToldSizes(original_width=640, original_height=384, crop_top=32, crop_left=96, original_width_negative=80)
    assert sizes.numbers(1024, 768, negative=False) == (384, 640, 32, 96, 768, 1024)
    assert sizes.numbers(1024, 768, negative=True) == (384, 80, 32, 96, 768, 1024)
    assert ToldSizes().numbers(1024, 768, negative=True) == (768, 1024, 0, 0, 768, 1024)
    assert sizes.scaled(0.5) == ToldSizes(
        original_width=320, original_height=192, crop_top=16, crop_left=48, original_width_negative=40
    )


def test_families_without_them_call_the_unet_as_ever():
    assert list(TextConditions(torch.zeros(1, 77, 4)).unet_arguments()) == ["encoder_hidden_states"]


# ---------------------------------------------------------------------------------------------------------------------
# Layout and networks


@pytest.mark.parametrize("depths", [(1, 2, 3), (1, 1, 1)])
def test_depths_of_transformers_are_read_from_names(depths):
    unet = UNet2DConditionModel(**dict(small_sdxl().config) | {"transformer_layers_per_block": depths})
    modules = layout.unet_modules(unet.config)
    names = {name: layout.original_name(name, modules) for name in unet.state_dict()}
    shapes = {names[name]: tuple(value.shape) for name, value in unet.state_dict().items() if names[name]}
    sizes = layout.unet_sizes(shapes)
    for name in ("block_out_channels", "down_block_types", "up_block_types", "transformer_layers_per_block"):
        assert list(sizes[name]) == list(unet.config[name]), name
    assert sizes["cross_attention_dim"] == unet.config.cross_attention_dim


def test_networks_name_each_encoder(xl):
    names = LayerNames(layer_shapes(xl), xl.unet.config, xl.family.encoders)
    layer, path = "text_model_encoder_layers_1_mlp_fc1", "encoder.layers.1.mlp.fc1"
    for prefix, parts in (
        ("lora_te1_", ["text_encoder"]),
        ("text_encoder_", ["text_encoder"]),
        ("text_encoders_clip_l_transformer_", ["text_encoder"]),
        ("lora_te2_", ["text_encoder_2"]),
        ("text_encoder_2_", ["text_encoder_2"]),  # of which the first one's prefix is a beginning
        ("text_encoders_clip_g_transformer_", ["text_encoder_2"]),
        ("lora_te_", ["text_encoder", "text_encoder_2"]),  # its width tells
    ):
        assert names.find(prefix + layer).targets == tuple((part, path) for part in parts)
    assert names.find("lora_unet_mid_block_resnets_0_conv1").targets == ((UNET, "mid_block.resnets.0.conv1"),)
    assert names.find("lora_te2_text_projection").targets == (("text_encoder_2", "text_projection"),)


def test_a_network_of_one_encoder_changes_no_other(xl):
    texts = [load_one(load_text_encoder, text) for text in xl.texts]
    network = LoraNetwork([text.model for text in texts], load_one(load_unet, xl.unet), 1.0)
    layer = "lora_te2_text_model_encoder_layers_1_mlp_fc1"
    down, up = torch.randn(2, 32), torch.randn(64, 2)
    network.load_state_dict({f"{layer}.lora_down.weight": down, f"{layer}.lora_up.weight": up}, strict=True)
    ids = torch.tensor([[49406, 320, 49407]])
    before = [text.transformer(ids).last_hidden_state for text in texts]
    network.apply_to([text.model for text in texts], torch.nn.Module())
    after = [text.transformer(ids).last_hidden_state for text in texts]
    assert torch.equal(before[0], after[0])
    assert not torch.allclose(before[1], after[1], atol=1e-3)
