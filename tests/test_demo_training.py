"""The demo model's training: it goes on from the shipped weights, and what it writes is read back."""

import json
from pathlib import Path

import pytest
from diffusers import UNet2DConditionModel
from transformers import CLIPTokenizer

from tools.demo import export, latents, train_unet
from tools.demo.model_files import cldm_key
from tools.demo.scenes import vocabulary
from tools.demo.train_control_net import new_control_net

MODEL = Path(__file__).parents[1] / "examples" / "shapes"


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which two steps were trained from the shipped weights."""
    work = tmp_path_factory.mktemp("work")
    latents.main(["--work", str(work), "--model", str(MODEL), "--scenes", "24"])
    steps = ["--steps", "2", "--batch", "8", "--threads", "1"]
    train_unet.main(["--work", str(work), "--resume_from", str(MODEL), *steps])
    return work


def test_training_goes_on_from_the_shipped_weights(work: Path) -> None:
    """The loss of an untrained model is about 3, the mean weight of times."""
    losses = [json.loads(line) for line in (work / "unet.jsonl").read_text().splitlines()]
    assert all(line["loss"] < 0.5 for line in losses if "loss" in line)


def test_export_writes_a_model_that_draws(work: Path, tmp_path: Path, generate) -> None:
    export.main(["--work", str(work), "--vae", str(MODEL / "vae"), "--out", str(tmp_path / "model")])
    result = generate(tmp_path / "model", "--W", 128, "--H", 128, "--prompt", "a red circle")
    assert result.status == 0, result.stderr
    assert len(result.files) == 1


def test_every_word_of_a_caption_is_one_token_and_any_other_is_spelled() -> None:
    tokenizer = CLIPTokenizer.from_pretrained(MODEL / "tokenizer")
    assert all(len(tokenizer.tokenize(word)) == 1 for word in vocabulary())
    for text in ("zebra", "straße", "赤い円"):
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids).strip() == text


def test_a_control_nets_keys_are_those_of_the_original_layout() -> None:
    unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(MODEL / "unet"))
    keys = [cldm_key(key, unet.config) for key in new_control_net(unet).state_dict()]
    assert len(set(keys)) == len(keys)
    assert {
        "control_model.input_hint_block.14.weight",
        "control_model.zero_convs.7.0.bias",
        "control_model.middle_block_out.0.weight",
        "control_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight",
        "control_model.input_blocks.2.0.op.weight",
    } <= set(keys)
