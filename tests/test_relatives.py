"""Models that are not as published: distilled U-Nets, other names of single files, parts left out.

Each draws one picture from its folder and from its single file.
"""

import json
import shutil

import numpy as np
import pytest
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file

from library.files.model_files import find_model
from tools import random_model

# What differs in the U-Nets of published relatives, in small
RELATIVES = {
    "small-sd": ("sd1", {"layers_per_block": 1, "mid_block_type": None}),
    "BK-SDM base": ("sd1", {"layers_per_block": 1}),
    "tiny-sd": (
        "sd1",
        {
            "layers_per_block": 1,
            "mid_block_type": None,
            "block_out_channels": [32, 64, 64],
            "down_block_types": ["CrossAttnDownBlock2D"] * 3,
            "up_block_types": ["CrossAttnUpBlock2D"] * 3,
        },
    ),
    "BK-SDM v2": ("sd2", {"layers_per_block": 1, "mid_block_type": None}),
    "SSD-1B": (
        "sdxl",
        {
            "mid_block_type": "UNetMidBlock2D",
            "transformer_layers_per_block": [1, [2, 2], [4, 4]],
            "reverse_transformer_layers_per_block": [[4, 4, 5], [2, 1, 1], 1],
        },
    ),
    "Segmind-Vega": ("sdxl", {"mid_block_type": "UNetMidBlock2D", "transformer_layers_per_block": [1, 1, 2]}),
    "KOALA-700M": (
        "sdxl",
        {"layers_per_block": 1, "mid_block_type": None, "transformer_layers_per_block": [1, 2, 5]},
    ),
    "KOALA-1B": ("sdxl", {"layers_per_block": 1, "transformer_layers_per_block": [1, 2, 6]}),
}
OPTIONS = {"sd1": [], "sd2": ["--v2"], "sdxl": []}


def make_relative(name):
    """A relative's components, and the options that its family needs."""
    family, changes = RELATIVES[name]
    networks = random_model.random_networks(family, tiny=True, seed=3)
    config = {name: value for name, value in networks["unet"].config.items() if not name.startswith("_")} | changes
    heads = config["attention_head_dim"]
    config["attention_head_dim"] = heads if isinstance(heads, int) else heads[: len(config["block_out_channels"])]
    unet = UNet2DConditionModel.from_config(config)
    assert all(unet.config[change] == value for change, value in changes.items())
    return networks | {"unet": unet}, OPTIONS[family]


def renumbered(state, levels):
    """A single file's tensors with the blocks of a level counted by three, as Diffusers' script writes them."""
    renamed = {}
    for name, tensor in state.items():
        parts = name.split(".")
        if len(parts) > 3 and parts[2] == "input_blocks" and parts[3] != "0":
            block = int(parts[3]) - 1
            parts[3] = str(1 + block // 2 * 3 + (2 if ".op." in name else block % 2))
        elif len(parts) > 3 and parts[2] == "output_blocks":
            block, sampler = int(parts[3]), ".conv." in name
            parts[3] = str(block // 2 * 3 + (2 if sampler else block % 2))
        renamed[".".join(parts)] = tensor
    return renamed


@pytest.mark.parametrize("name", RELATIVES)
def test_relatives_draw_the_same_from_folder_and_file(generate, tmp_path, name):
    networks, options = make_relative(name)
    random_model.write_folder(networks, tmp_path / "folder", "epsilon", variant=None)
    state = random_model.original_state_dict(networks, ema=False)
    files = {"dense": state}
    if RELATIVES[name][1].get("layers_per_block") == 1:
        files["by three"] = renumbered(state, len(networks["unet"].config.block_out_channels))
    common = (*options, "--prompt", "a cat --d 1")
    expected = generate(tmp_path / "folder", *common)
    for numbering, tensors in files.items():
        random_model.write_file(tensors, tmp_path / f"{numbering}.safetensors")
        result = generate(tmp_path / f"{numbering}.safetensors", *common)
        assert result.status == 0, result.stderr
        assert np.array_equal(expected.pictures, result.pictures), numbering


def sgm_names(state, family):
    """A single file's tensors as Stability AI's later training code names them."""
    old, new = {
        "sd1": ("cond_stage_model.transformer.", "conditioner.embedders.0.transformer."),
        "sd2": ("cond_stage_model.model.", "conditioner.embedders.0.model."),
    }[family]
    return {name.replace(old, new): tensor for name, tensor in state.items()}


@pytest.mark.parametrize("family", ["sd1", "sd2"])
def test_older_families_in_the_names_of_later_training_code(request, generate, tmp_path, family):
    """As SD-Turbo: not XL, which has a second text encoder."""
    models = request.getfixturevalue(family)
    save_file(sgm_names(load_file(models.safetensors), family), tmp_path / "sgm.safetensors")
    options = ("--prompt", "a cat --d 1", *models.options)
    result = generate(tmp_path / "sgm.safetensors", *options)
    assert result.status == 0, result.stderr
    assert np.array_equal(generate(models.folder, *options).pictures, result.pictures)
    assert find_model(str(tmp_path / "sgm.safetensors"), v2=family == "sd2").family.configs == family


@pytest.mark.parametrize("sgm", [False, True])
def test_text_encoders_of_2_without_their_unused_layer(generate, tmp_path, monkeypatch, sgm):
    """Diffusers' own conversion leaves out the last of 24 layers, which the family does not run."""
    monkeypatch.setitem(random_model.TINY["text_encoder"], "num_hidden_layers", 23)
    networks = random_model.random_networks("sd2", tiny=True, seed=5)
    random_model.write_folder(networks, tmp_path / "folder", "epsilon", None)
    state = random_model.original_state_dict(networks, ema=False)
    if sgm:
        state = sgm_names(state, "sd2")
    converted = {name: tensor for name, tensor in state.items() if "resblocks.23." not in name}
    assert len(converted) < len(state)
    options = ("--v2", "--prompt", "a cat --d 1")
    expected = generate(tmp_path / "folder", *options).pictures
    for tensors in (state, converted):
        save_file(tensors, tmp_path / "file.safetensors")
        assert np.array_equal(expected, generate(tmp_path / "file.safetensors", *options).pictures)


# ---------------------------------------------------------------------------------------------------------------------
# Parts that something else stands in for


def without(models, tmp_path, part):
    """A model without a part: as a folder and as a single file."""
    folder, file = tmp_path / "folder", tmp_path / "file.safetensors"
    shutil.copytree(models.folder, folder)
    shutil.rmtree(folder / part, ignore_errors=True)  # not every family has a second tokenizer
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({name: value for name, value in index.items() if name != part}))
    state = load_file(models.safetensors)
    save_file({n: t for n, t in state.items() if part != "vae" or not n.startswith("first_stage_model.")}, file)
    return folder, file


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_a_model_without_a_vae_beside_one(request, generate, tmp_path, family):
    models = request.getfixturevalue(family)
    options = ("--prompt", "a cat --d 1", *models.options)
    expected = generate(models.folder, *options).pictures
    for model in without(models, tmp_path, "vae"):
        for vae in (models.folder / "vae", models.folder, models.safetensors):
            result = generate(model, *options, "--vae", vae)
            assert result.status == 0, result.stderr
            assert np.array_equal(expected, result.pictures)
        refused = generate(model, *options)
        assert refused.status == 2
        assert len(refused.stderr.splitlines()) == 1
        assert "vae" in refused.stderr.lower()
        assert "--vae" in refused.stderr


def test_a_vae_that_another_one_stands_in_for_may_be_damaged(sd1, generate, tmp_path):
    shutil.copytree(sd1.folder, tmp_path / "folder")
    (tmp_path / "folder/vae/diffusion_pytorch_model.safetensors").write_bytes(b"")
    state = load_file(sd1.safetensors)
    kept = {name: tensor for name, tensor in state.items() if not name.startswith("first_stage_model.decoder")}
    save_file(kept, tmp_path / "file.safetensors")
    options = ("--prompt", "a cat --d 1", "--vae", sd1.folder)
    expected = generate(sd1.folder, *options).pictures
    for model in (tmp_path / "folder", tmp_path / "file.safetensors"):
        assert np.array_equal(expected, generate(model, *options).pictures)
        assert generate(model, *options[:-2]).status == 2


@pytest.mark.parametrize("part", ["tokenizer", "tokenizer_2", "scheduler"])
@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_a_folder_without_what_ships_with_the_program(request, generate, tmp_path, family, part):
    """CLIP's vocabulary ships here, and the noise schedule is the family's."""
    models = request.getfixturevalue(family)
    folder, _ = without(models, tmp_path, part)
    options = ("--prompt", "a cat --d 1", *models.options)
    result = generate(folder, *options)
    assert result.status == 0, result.stderr
    assert np.array_equal(generate(models.folder, *options).pictures, result.pictures)
