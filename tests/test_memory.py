"""Less memory, the same pictures: text encoders let go, activations in place of inputs, unused memory returned."""

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from network_runs import find, networks
from safetensors.torch import save_file
from test_networks import random_loha

import gen_img_diffusers
from library.draw import decoding, vae_memory
from library.machine import features, malloc
from library.machine.vae_slices import slice_resnets
from library.models import models
from library.plan.planning import make_plan
from library.plan.run_plan import RunPlan
from networks.keys import layer_shapes


@pytest.fixture
def run(sd1, tmp_path):
    """Plan and load a small run: `run(*options)` gives its plan and its pipeline."""

    def load(*options):
        argv = ["--ckpt", sd1.folder, "--outdir", tmp_path, "--W", 64, "--H", 64, "--steps", 2, *options]
        plan = make_plan(gen_img_diffusers.make_parser().parse([str(option) for option in argv]))
        return plan, gen_img_diffusers.load_pipeline(plan)

    return load


def draw(plan, pipeline):
    """The pictures of a run by batches, and after how many of these its text encoder's weights were gone."""
    text_encoder, gone_after, pictures = pipeline.texts[0].model, None, []
    for number, batch in enumerate(plan.batches(plan.to_do), 1):
        pictures += [picture for _, picture in pipeline.draw(batch, iter)]
        if gone_after is None and all(weight.is_meta for weight in text_encoder.parameters()):
            gone_after = number
    return pictures, gone_after


@pytest.mark.parametrize(
    ("options", "gone_after"),
    [
        (["--prompt", "a cat", "--images_per_prompt", 3], 1),
        (
            [
                "--prompt",
                "a cat --n dull",
                "--images_per_prompt",
                2,
                "--highres_fix_scale",
                0.5,
                "--highres_fix_steps",
                2,
            ],
            1,
        ),
        (["--prompt", "[a:the:0.5] cat", "--prompt_syntax", "webui", "--images_per_prompt", 2], 1),
        (["--from_file", "a cat\na dog\na cat\na dog"], 2),
        (["--from_file", "a cat\na dog\na bird"], 3),
    ],
)
def test_text_encoders_go_when_all_is_encoded(run, tmp_path, options, gone_after):
    if options[0] == "--from_file":
        file = tmp_path / "prompts.txt"
        file.write_text(options[1])
        options = [options[0], file]
    plan, pipeline = run(*options, "--seed", 1)
    ours, found = draw(plan, pipeline)
    assert found == gone_after
    plan, pipeline = run(*options, "--seed", 1)
    pipeline.wordings = None  # as where nobody knows what comes
    expected, found = draw(plan, pipeline)
    assert found is None
    assert len(ours) == len(plan.to_do)
    assert all(map(np.array_equal, ours, expected))


@pytest.mark.parametrize(
    ("lines", "options", "first"),
    [
        ("a cat\na cat", [], True),
        ("a cat --n dull\na cat --n dull", ["--highres_fix_scale", 0.5, "--highres_fix_steps", 2], True),
        ("[a:the:0.5] cat", ["--prompt_syntax", "webui"], True),
        ("a cat\na dog", [], False),  # the second picture's text would keep the first one waiting
    ],
)
def test_large_text_encoders_go_before_the_unet_is_there(sdxl, generate, tmp_path, monkeypatch, lines, options, first):
    load, kept, file = models.load_models, [], tmp_path / "lines.txt"
    file.write_text(lines)

    def watched(files, weights, texts):
        kept.append(len(texts))
        return load(files, weights, texts)

    monkeypatch.setattr(models, "load_models", watched)
    ours = generate(sdxl.safetensors, "--from_file", file, *options, "--seed", 1)
    assert ours.status == 0, ours.stderr
    assert kept == [0 if first else 2]
    monkeypatch.setattr(RunPlan, "texts_first", False)
    expected = generate(sdxl.safetensors, "--from_file", file, *options, "--seed", 1)
    assert kept[1] == 2
    assert len(ours.pictures) == len(expected.pictures)
    assert all(map(np.array_equal, ours.pictures, expected.pictures))


def test_text_encoders_stay_where_more_prompts_may_come(run):
    _, pipeline = run("--interactive")
    assert pipeline.wordings is None
    _, pipeline = run("--prompt", "a")
    assert pipeline.wordings


def test_networks_change_their_multipliers_without_text_encoders(sd1, generate, tmp_path):
    """LoHa is folded into weights, and those of text encoders are gone by then: at the second line all is encoded."""
    state = random_loha(layer_shapes(find(sd1)))
    alphas = {f"{key.removesuffix('.hada_w1_a')}.alpha": torch.tensor(2.0) for key in state if key.endswith("w1_a")}
    save_file(state | alphas, tmp_path / "loha.safetensors")
    lines = tmp_path / "lines.txt"
    lines.write_text("a cat --d 1 --am 1\na cat --d 1 --am 0\na cat --d 1 --am 1\n")
    result = generate(sd1.folder, "--from_file", lines, *networks(tmp_path / "loha.safetensors"))
    assert result.status == 0, result.stderr
    first, without, last = result.pictures
    assert (first == last).all()
    assert (first != without).any()


def test_a_batch_is_halved_without_text_encoders(sd1, generate, monkeypatch):
    """Too little memory is found out after the texts were encoded; the halves are drawn of what is kept."""
    call = UNet2DConditionModel.forward

    def small_batches_only(self, sample, *args, **kwargs):
        if len(sample) > 2:
            raise torch.OutOfMemoryError("pretended")
        return call(self, sample, *args, **kwargs)

    monkeypatch.setattr(UNet2DConditionModel, "forward", small_batches_only)
    result = generate(sd1.folder, "--prompt", "a cat", "--images_per_prompt", 3, "--batch_size", 3)
    assert result.status == 0
    assert len(result.files) == 3


@pytest.fixture
def unets(monkeypatch):
    """How many U-Nets hold weights when a picture is decoded, by decodings, in runs of the program."""
    load, found = gen_img_diffusers.load_pipeline, []

    def watched(*arguments):
        pipeline = load(*arguments)
        decode = vae_memory.decode

        def counted(*arguments):
            packed = any("forward" in vars(layer) for layer in pipeline.unet.modules())
            found.append(packed or not all(weight.is_meta for weight in pipeline.unet.parameters()))
            return decode(*arguments)

        monkeypatch.setattr(decoding, "decode", counted)
        return pipeline

    monkeypatch.setattr(gen_img_diffusers, "load_pipeline", watched)
    return found


@pytest.mark.parametrize(
    ("options", "there"),
    [
        (["--images_per_prompt", 3], [True, True, False]),
        (["--highres_fix_scale", 0.5, "--highres_fix_steps", 2], [True, False]),
        (["--images_per_prompt", 3, "--batch_size", 2], [True, False]),
        (["--images_per_prompt", 2, "--batch_size", 2], [True]),  # too little memory may ask for them once more
    ],
)
def test_the_unet_goes_before_the_last_picture_is_decoded(sd1, generate, monkeypatch, unets, options, there):
    ours = generate(sd1.folder, "--prompt", "a cat", *options, "--seed", 1)
    assert ours.status == 0, ours.stderr
    assert unets == there
    monkeypatch.setattr(gen_img_diffusers.Pipeline, "_ends_with", lambda *arguments: False)
    expected = generate(sd1.folder, "--prompt", "a cat", *options, "--seed", 1)
    assert unets[len(there) :] == [True] * len(there)
    assert all(map(np.array_equal, ours.pictures, expected.pictures))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("slices", [None, 2])
def test_features_in_less_memory_are_the_same(sd1, monkeypatch, dtype, slices):
    returned = []
    monkeypatch.setattr(malloc, "give_back", lambda: returned.append(1))
    plain, sparing = (AutoencoderKL.from_pretrained(sd1.folder / "vae").to(dtype) for _ in range(2))
    for vae in (plain, sparing):
        if slices:
            slice_resnets(vae, slices)
    features.overwrite_activations(sparing)
    features.give_back_around_growing(sparing)
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    picture = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    with torch.no_grad():
        assert torch.equal(sparing.decode(latents).sample, plain.decode(latents).sample)
        assert not returned  # a small picture's features are not worth it
        monkeypatch.setattr(features, "_LARGE_BYTES", 1)
        assert torch.equal(sparing.decode(latents).sample, plain.decode(latents).sample)
        assert returned
        assert torch.equal(sparing.encode(picture).latent_dist.mean, plain.encode(picture).latent_dist.mean)
