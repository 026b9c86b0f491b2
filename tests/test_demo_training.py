"""The demo model's training: it goes on from the shipped weights, and what it writes is read back."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from transformers import CLIPTokenizer

from library.files.families import SD1
from library.plan.tokens import PromptTokens
from tools.demo import export, latents, train_unet
from tools.demo.drawing import Drawer
from tools.demo.emphasis import padded
from tools.demo.halves import HalvesAttention, halves_masks
from tools.demo.hints import ANSWERS, NOTHING, NOTHING_TOLD, UNTOLD, directions, token_errors, told, whole_errors
from tools.demo.model_files import cldm_key, load_frozen
from tools.demo.render import render
from tools.demo.scenes import GROUND_COLOURS, OBJECT_COLOURS, PLACES, SHAPES, Caption, draw_scene, vocabulary
from tools.demo.train_clip import unfinished
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


def lessons(work: Path, *options: str) -> train_unet.Batches:
    args = train_unet.options().parse_args(["--work", str(work), "--batch", "8", *options])
    tokenizer, *_ = load_frozen(MODEL)
    return train_unet.Batches(work / "latents.pt", PromptTokens(tokenizer, SD1.encoders, len(tokenizer)), args)


def test_a_lesson_in_guidance_compares_without_words_and_with_them(work: Path) -> None:
    batch = lessons(work, "--share_guided", "1", "--share_halves", "0").draw(0)
    assert batch.guided and batch.ids.shape[:2] == (4, 2)
    nothing = CLIPTokenizer.from_pretrained(MODEL / "tokenizer")("").input_ids
    assert (batch.ids[:, 0, : len(nothing)] == torch.tensor(nothing)).all()
    assert batch.times.max() < train_unet.GUIDED_TIMES

    def fake_model(noisy, times, ids, emphasis, halves):  # off by 1 without words, by 2 with them: by 6 when guided
        predicted = batch.noise.repeat_interleave(2, 0) + torch.tensor([1.0, 2.0]).repeat(4).view(-1, 1, 1, 1)
        return predicted, torch.zeros(len(ids), ids.shape[1], 1)

    errors, text = train_unet.noise_errors(fake_model, batch, slice(None))
    torch.testing.assert_close(errors, torch.full((4,), 1 + 4 + 6**2 / 5))
    assert text.shape[:2] == (4, 2)


@pytest.mark.parametrize(("share", "told_places"), [("0", True), ("1", False)])
def test_captions_leave_as_many_places_open_as_asked(work: Path, share: str, told_places: bool) -> None:
    batches, rng = lessons(work, "--open_places", share), random.Random(0)
    scenes = [draw_scene(rng) for _ in range(40)]
    said = [answers for text, answers in (batches.word(rng, scene, False) for scene in scenes) if text]
    assert said and all((answers != NOTHING_TOLD) == told_places for answers in said)


def test_a_lesson_in_weights_lightens_only_words_that_are_not_in_the_picture(work: Path) -> None:
    batches, rng = lessons(work), random.Random(0)
    tokenizer = batches.prompts.tokenizer
    rivals = 0
    for scene in [draw_scene(rng) for _ in range(40)]:
        text, answers = batches.word(rng, scene, True)
        if not text:
            continue
        assert answers == NOTHING_TOLD
        weighted = batches.prompts.tokenize(text)
        seen = {word for thing in scene.things for word in (thing.colour, thing.shape)}
        heavy = [i for i, weight in zip(weighted.ids, weighted.weights) if weight > 1]
        light = [i for i, weight in zip(weighted.ids, weighted.weights) if weight < 0.8]
        assert set(map(tokenizer.decode, heavy)) <= seen
        assert seen.isdisjoint(map(tokenizer.decode, light))
        rivals += len(light)
    assert rivals > 10


def test_padded_texts_keep_each_tokens_weight() -> None:
    tokenizer, *_ = load_frozen(MODEL)
    prompts = PromptTokens(tokenizer, SD1.encoders, len(tokenizer))
    text = prompts.tokenize("a (red:1.5) circle")
    ids, weights = padded(prompts, [text, text], 8)
    assert ids[0].tolist() == tokenizer("a red circle", padding="max_length", max_length=8).input_ids
    assert weights[1].tolist() == [1, 1, 1.5, 1, 1, 1, 1, 1]
    short, its_weights = padded(prompts, [text], 4)
    assert short[0].tolist() == [tokenizer.bos_token_id, *text.ids[:2], tokenizer.eos_token_id]
    assert its_weights[0].tolist() == [1, 1, 1.5, 1]


def test_pictures_for_clip_are_unfinished() -> None:
    """They show their scenes, less well than the autoencoder alone does; other scenes are about 100 of 255 apart."""
    drawer = Drawer.load(MODEL)
    scenes, pictures = zip(*unfinished(drawer, 50, seed=1), strict=True)
    rendered = np.stack([render(scene) for scene in scenes]).astype(float)
    whole = drawer.decode(latents.encode(drawer.vae, list(scenes)).float())
    assert np.abs(whole - rendered).mean() < np.abs(np.stack(pictures) - rendered).mean() < 20


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


def test_each_half_attends_to_its_own_text() -> None:
    scenes = [draw_scene(random.Random(seed), 2) for seed in range(12)]
    attn = Attention(8, cross_attention_dim=6, heads=2, dim_head=4, processor=HalvesAttention())
    picture, texts = torch.randn(12, 16, 8), torch.randn(12, 2, 5, 6)
    drawn = attn(picture, texts.flatten(0, 1), halves=halves_masks(scenes)).unflatten(1, (4, 4))
    halves = {
        "left": (slice(None), slice(2)),
        "right": (slice(None), slice(2, 4)),
        "top": (slice(2), slice(None)),
        "bottom": (slice(2, 4), slice(None)),
    }
    for number, scene in enumerate(scenes):
        for text, thing in zip(texts[number], scene.things):
            alone = attn(picture[number, None], text[None])[0].unflatten(0, (4, 4))
            where = halves[thing.place]
            torch.testing.assert_close(drawn[number][where], alone[where])


def test_hints_ask_for_what_a_caption_puts_where() -> None:
    scene = draw_scene(random.Random(1), 2)
    assert told(scene, Caption("", True, (False, False))) == NOTHING_TOLD
    answers = dict(zip(PLACES, told(scene, Caption("", True, (True, True))), strict=True))
    for thing in scene.things:
        assert answers.pop(thing.place) == (OBJECT_COLOURS.index(thing.colour), SHAPES.index(thing.shape))
    assert {colour for colour, _ in answers.values()} == {NOTHING}


def test_tokens_behind_a_text_answer_for_one_place_each() -> None:
    """Embeddings that say all that was told are right, and so is what stands before a text's end."""
    scene = draw_scene(random.Random(1), 2)
    answers = told(scene, Caption("", True, (True, True)))
    ways = 20 * directions(128, ANSWERS)
    text = torch.zeros(1, 32, 128)
    for token in range(6, 32):
        colour, shape = answers[token % len(PLACES)]
        text[0, token] = ways[colour] + (ways[NOTHING + 1 + shape] if colour != NOTHING else 0)
    behind = (torch.arange(32) >= 6)[None]
    assert token_errors(text, behind, torch.tensor([answers])).item() < 1e-3
    assert token_errors(text.roll(1, dims=1), behind, torch.tensor([answers])).item() > 1
    assert token_errors(text, behind, torch.tensor([NOTHING_TOLD])).item() == 0


def test_a_whole_embedding_answers_for_the_ground_and_every_place() -> None:
    scene, grounds = draw_scene(random.Random(1), 2), len(GROUND_COLOURS)
    answers = told(scene, Caption("", True, (True, True)))
    ways = 20 * directions(128, grounds + len(PLACES) * ANSWERS)
    ground = GROUND_COLOURS.index(scene.ground)
    embedding = ways[ground].clone()
    for way, (colour, shape) in zip(ways[grounds:].unflatten(0, (len(PLACES), ANSWERS)), answers, strict=True):
        embedding += way[colour] + (way[NOTHING + 1 + shape] if colour != NOTHING else 0)

    def error(grounds: int, answers: list[tuple[int, int]]) -> float:
        return whole_errors(embedding[None], torch.tensor([grounds]), torch.tensor([answers])).item()

    assert error(ground, answers) < 1e-3
    assert error((ground + 1) % grounds, answers) > 1
    assert error(ground, answers[::-1]) > 1
    assert error(UNTOLD, NOTHING_TOLD) == 0
