"""What families' records answer, with a family of two text encoders made up for it: what XL will ask everywhere."""

from dataclasses import replace

import pytest
import torch
from diffusers import UNet2DConditionModel
from loading import CPU, load_one, prompt_tokens
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel

from library.draw.attention import keep_text, use_kernel
from library.draw.text_conditions import TextConditions
from library.draw.text_encoding import PromptEncoder, weigh
from library.files import checkpoint_layout as layout
from library.files import families, model_files
from library.files.families import FAMILIES, SD1, Family, TextEncoderKind, TextNames
from library.files.model_files import find_model
from library.files.textual_inversion import Embedding, find_embeddings
from library.files.tokenizers import load_tokenizer
from library.machine.attention import sdpa
from library.models.models import TextEncoder, load_text_encoder
from library.plan.tokens import PromptTokens
from networks.keys import UNET, LayerNames, layer_shapes
from networks.lora import LoraNetwork
from tools import random_model

TWO = replace(
    SD1,
    version="of two",
    encoders=(
        TextEncoderKind(
            part="text_encoder",
            names=(TextNames("conditioner.embedders.0.transformer.", openclip=False),),
            pad_token="<|endoftext|>",
            final_norm=False,
            lora_prefixes=("lora_te1_", "text_encoder_"),
            embedding_key="clip_l",
        ),
        TextEncoderKind(
            part="text_encoder_2",
            names=(TextNames("conditioner.embedders.1.model.", openclip=True),),
            pad_token="!",
            final_norm=False,
            lora_prefixes=("lora_te2_", "text_encoder_2_"),
            embedding_key="clip_g",
        ),
    ),
)
WIDTHS = (64, 32)


def small_clip(width: int, seed: int) -> CLIPTextModel:
    torch.manual_seed(seed)
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 3, "num_attention_heads": 2}
    return CLIPTextModel(CLIPTextConfig(**SD1.config("text_encoder") | sizes)).eval()


class Two(Family):
    """Its second text encoder's configuration is the first one's, as its U-Net's and VAE's are those of SD 1.x."""

    def config(self, part: str) -> dict:
        return super().config("text_encoder" if part == "text_encoder_2" else part)


@pytest.fixture(scope="module")
def two() -> Family:
    return Two(**{name: getattr(TWO, name) for name in TWO.__dataclass_fields__})


@pytest.fixture(scope="module")
def encoders(two) -> list[TextEncoder]:
    return [TextEncoder(kind, small_clip(width, n)) for n, (kind, width) in enumerate(zip(two.encoders, WIDTHS))]


@pytest.fixture
def folder_of_two(two, sd1, tmp_path, monkeypatch):
    """A Diffusers folder of that family, which the program then knows."""
    monkeypatch.setattr(model_files, "FAMILIES", (two, *FAMILIES))
    monkeypatch.setitem(random_model.BY_NAME, "two", two)
    networks = random_model.random_networks("two", tiny=True, seed=0)
    random_model.write_folder(networks, tmp_path / "two", "epsilon", variant=None)
    return tmp_path / "two"


# ---------------------------------------------------------------------------------------------------------------------
# Records


def test_published_widths_tell_the_family_and_other_ones_the_text_encoders(sd1, sd2, folder_of_two, two):
    assert [families.name_of_width(width) for width in (768, 1024, 2048, 640, None)] == [
        "Stable Diffusion 1.x",
        "Stable Diffusion 2.x",
        "SDXL",
        None,
        None,
    ]
    for path, v2, family in (
        (sd1.folder, False, families.SD1),
        (sd2.folder, True, families.SD2),
        (sd2.safetensors, True, families.SD2),
        (folder_of_two, False, two),
    ):
        assert find_model(str(path), v2=v2, v_parameterization=v2).family is family


def test_a_family_of_two_is_found_with_all_its_parts(folder_of_two, two):
    model = find_model(str(folder_of_two), v2=False, v_parameterization=False)
    assert list(model.parts) == ["unet", "vae", "text_encoder", "text_encoder_2"]
    assert [text.kind for text in model.texts] == list(two.encoders)
    loaded = [load_one(load_text_encoder, text) for text in model.texts]
    for text in loaded:
        published = CLIPTextModel.from_pretrained(folder_of_two / text.kind.part).state_dict()
        assert all(torch.equal(value, published[name]) for name, value in text.model.state_dict().items())


# ---------------------------------------------------------------------------------------------------------------------
# Text


def test_features_stand_side_by_side_each_with_its_own_padding_norm_and_mean(sd1, two, encoders):
    files = find_model(str(sd1.folder), v2=False, v_parameterization=False)
    tokens = PromptTokens(load_tokenizer(files.tokenizer, two), two.encoders, 49408)
    assert tokens.pads == (49407, 0)
    features = PromptEncoder(tokens, encoders, clip_skip=2).encode(["a (cat:1.5)"], 1).embeddings
    assert features.shape == (1, 77, sum(WIDTHS))
    words = tokens.tokenize("a (cat:1.5)")
    factors = torch.ones(1, 77, 1)
    factors[0, 2] = 1.5  # begin, "a", "cat"
    for encoder, pad, part in zip(encoders, tokens.pads, features.split(WIDTHS, dim=-1)):
        ids = torch.tensor([[49406, *words.ids, 49407, *[pad] * 73]])
        with torch.inference_mode():
            hidden = encoder.model(ids, output_hidden_states=True).hidden_states[-2]
            normed = encoder.model.final_layer_norm(hidden)
        torch.testing.assert_close(part, weigh(hidden, factors))
        assert not torch.allclose(part, weigh(normed, factors))


def test_one_encoder_of_a_family_of_one_is_as_before(sd1):
    files = find_model(str(sd1.folder), v2=False, v_parameterization=False)
    encoder = PromptEncoder(prompt_tokens(files), [load_one(load_text_encoder, files.texts[0])])
    ids = encoder.tokens.tokenizer("a cat", padding="max_length", max_length=77, return_tensors="pt").input_ids
    with torch.inference_mode():
        expected = encoder.texts[0].model(ids).last_hidden_state
    assert torch.equal(encoder.encode(["a cat"], 1).embeddings, expected)


def test_a_word_has_vectors_in_each_encoder(folder_of_two, tmp_path):
    model = find_model(str(folder_of_two), v2=False, v_parameterization=False)
    vectors = {"clip_l": torch.randn(3, 64), "clip_g": torch.randn(3, 64)}
    save_file(vectors, tmp_path / "zzyzx.safetensors")
    (embedding,) = find_embeddings([str(tmp_path / "zzyzx.safetensors")], [], model)
    assert (embedding.tokens, embedding.layers) == (3, 1)
    tokens = PromptTokens(load_tokenizer(model.tokenizer, model.family), model.family.encoders, 49408, 1, [embedding])
    texts = [load_one(load_text_encoder, text) for text in model.texts]
    PromptEncoder(tokens, texts, embeddings=[embedding])
    ids = torch.tensor(tokens.tokenize("zzyzx").ids)
    for text, expected in zip(texts, vectors.values()):
        torch.testing.assert_close(text.model.get_input_embeddings()(ids), expected)


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


def test_networks_name_each_encoder(folder_of_two, two, monkeypatch):
    model = find_model(str(folder_of_two), v2=False, v_parameterization=False)
    names = LayerNames(layer_shapes(model), model.unet.config, two.encoders)
    layer = "text_model_encoder_layers_1_mlp_fc1"
    for prefix, part in (
        ("lora_te1_", "text_encoder"),
        ("text_encoder_", "text_encoder"),
        ("lora_te2_", "text_encoder_2"),
        ("text_encoder_2_", "text_encoder_2"),  # of which the first one's prefix is a beginning
    ):
        assert names.find(prefix + layer) == (part, "encoder.layers.1.mlp.fc1")
    assert names.find("lora_unet_mid_block_resnets_0_conv1") == (UNET, "mid_block.resnets.0.conv1")
    monkeypatch.setattr(families, "FAMILIES", (two, *FAMILIES))
    texts = [load_one(load_text_encoder, text).model for text in model.texts]
    unet = UNet2DConditionModel.from_pretrained(folder_of_two / "unet")
    network = LoraNetwork(texts, unet, 1.0)
    down, up = torch.randn(2, 64), torch.randn(128, 2)
    network.load_state_dict(
        {f"lora_te2_{layer}.lora_down.weight": down, f"lora_te2_{layer}.lora_up.weight": up}, strict=True
    )
    ids = torch.tensor([[49406, 320, 49407]])
    before = [text(ids).last_hidden_state for text in texts]
    network.apply_to(texts, unet)
    after = [text(ids).last_hidden_state for text in texts]
    assert torch.equal(before[0], after[0])
    assert not torch.allclose(before[1], after[1], atol=1e-3)
    assert unet.device == CPU
