"""Guidance by CLIP and VGG16: its gradients, its arithmetic for each sampler, and its options as a user runs them."""

import hashlib
import json
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPConfig, CLIPModel

import gen_img_diffusers
from library.draw.attention import use_kernel
from library.draw.loss_guidance import (
    Clip,
    LossGuidance,
    clip_text,
    load_clip,
    load_vgg16,
    noise_levels,
    spherical_distance,
)
from library.draw.samplers import make_scheduler
from library.draw.sources import pixels_to_tensor
from library.draw.text_conditions import TextConditions
from library.errors import InputError
from library.files import loss_guidance as guidance_files
from library.files.loss_guidance import VGG16_LAYERS, find_clip, find_vgg16
from library.machine.attention import sdpa
from library.plan.job import Job
from library.plan.planning import make_plan
from library.settings.loss_guidance import GUIDED_SAMPLERS
from library.settings.noise_schedule import NoiseSchedule
from library.settings.samplers import SAMPLERS
from tools import random_model

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """A tiny CLIP model of random weights, with OpenAI's vocabulary."""
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = CLIPConfig(text_config=tower, vision_config=tower | {"patch_size": 32}, projection_dim=16)
    folder = tmp_path_factory.mktemp("clip")
    CLIPModel(config).save_pretrained(folder)
    return folder


def vgg16_tensors(width: int = 8) -> dict[str, torch.Tensor]:
    """Weights in torchvision's layout, all layers `width` wide, with a classifier that is not needed."""
    generator = torch.Generator().manual_seed(16)
    tensors, channels = {"classifier.0.weight": torch.zeros(1)}, 3
    for place, layer in enumerate(VGG16_LAYERS):
        if layer == "convolution":
            tensors[f"features.{place}.weight"] = torch.randn(width, channels, 3, 3, generator=generator) / 3
            tensors[f"features.{place}.bias"] = torch.randn(width, generator=generator) / 10
            channels = width
    return tensors


@pytest.fixture(scope="module")
def vgg16_file(tmp_path_factory):
    """A narrow VGG16 of random weights."""
    file = tmp_path_factory.mktemp("vgg16") / "vgg16.pth"
    torch.save(vgg16_tensors(), file)
    return file


@pytest.fixture(scope="module")
def guides(tmp_path_factory):
    """A folder of three guide pictures of different sizes."""
    folder = tmp_path_factory.mktemp("guides")
    rng = np.random.default_rng(1)
    for number in range(3):
        pixels = rng.integers(0, 255, (5, 7, 3), dtype=np.uint8)
        size = (60 + 20 * number, 90)
        Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).save(folder / f"g{number}.png")
    return folder


def largest(first, second) -> int:
    assert len(first) == len(second) > 0
    return max(int(np.abs(a - b).max()) for a, b in zip(first, second))


# ---------------------------------------------------------------------------------------------------------------------
# Arithmetic


@pytest.fixture(scope="module")
def exact_models():
    """A tiny U-Net and VAE in float64."""
    networks = random_model.random_networks("sd1", tiny=True, seed=3)
    use_kernel(networks["unet"], sdpa)
    return [networks[part].double().eval().requires_grad_(False) for part in ("unet", "vae")]


def guide_steps(sampler, prediction_type, unet, vae, text, losses, steps=8):
    scheduler = make_scheduler(SAMPLERS[sampler], NoiseSchedule(prediction_type))
    scheduler.set_timesteps(steps)
    return scheduler, LossGuidance(unet, vae, scheduler, scheduler.timesteps, [text] * len(scheduler.timesteps), losses)


# what a judge says of a picture depends on neither of the others: each judges each sampler and each prediction
JUDGED = [
    (sampler, prediction_type, ("clip", "vgg16")[(first + second) % 2])
    for first, sampler in enumerate(GUIDED_SAMPLERS)
    for second, prediction_type in enumerate(("epsilon", "v_prediction"))
]


@pytest.mark.parametrize(("sampler", "prediction_type", "judge"), JUDGED)
def test_gradients_are_those_of_finite_differences(
    exact_models, clip_folder, vgg16_file, sampler, prediction_type, judge
):
    generator = torch.Generator().manual_seed(1)
    if judge == "clip":
        clip = load_clip(*find_clip(str(clip_folder)), CPU)
        clip.model.double()
        loss = clip.loss(clip.embed_text(["a cat"]).detach(), 100.0)
    else:
        vgg16 = load_vgg16(find_vgg16(str(vgg16_file)), 20, CPU)
        vgg16.features.double()
        loss = vgg16.loss(Image.radial_gradient("L").convert("RGB"), 100.0, (64, 64))
    text = [TextConditions(torch.randn(1, 77, 64, generator=generator, dtype=torch.float64))]
    scheduler, steps = guide_steps(sampler, prediction_type, *exact_models, text, [[loss]])
    for index in (0, 4, 7):
        noise = torch.randn(2, 1, 4, 8, 8, generator=generator, dtype=torch.float64)
        latents, direction = noise[0] * scheduler.init_noise_sigma, noise[1]
        gradient = steps.gradient(latents, index, 0, [loss])
        reach = 1e-8  # the tiny model's normalisations bend sharply; float64 leaves seven digits of the difference
        with torch.no_grad():
            ends = [loss(steps.promised_picture(latents + sign * reach * direction, index, 0)) for sign in (1, -1)]
        expected = float(ends[0] - ends[1]) / (2 * reach)
        assert float((gradient * direction).sum()) == pytest.approx(expected, rel=1e-4, abs=1e-4)
        assert gradient.abs().max() > 0


@dataclass
class FixedNoise:
    """Stands for a U-Net that predicts the noise `scale * sample + shift`, or the v that means the same."""

    scheduler: object
    scale: float = 0.7
    shift: float = 0.2
    dtype: torch.dtype = torch.float64
    seen: list = field(default_factory=list)

    def __call__(self, sample, timestep, encoder_hidden_states):
        self.seen.append(encoder_hidden_states)
        noise = self.scale * sample + self.shift
        if self.scheduler.config.prediction_type == "v_prediction":
            place = self.scheduler.timesteps.tolist().index(float(timestep))
            level = noise_levels(self.scheduler, self.scheduler.timesteps)[place]
            noise = (noise - level.sigma * sample) / level.alpha
        return SimpleNamespace(sample=noise)


class PlainVae:
    """Stands for a VAE whose pictures are the latents' first channels."""

    config = SimpleNamespace(scaling_factor=0.5)
    dtype = torch.float64

    def decode(self, latents):
        return SimpleNamespace(sample=torch.tanh(latents[:, :3]))


def squared(picture):
    return (picture**2).sum()


@pytest.mark.parametrize("sampler", GUIDED_SAMPLERS)
def test_a_v_model_is_guided_like_the_noise_model_it_stands_for(sampler):
    results = []
    for prediction_type in ("epsilon", "v_prediction"):
        scheduler = make_scheduler(SAMPLERS[sampler], NoiseSchedule(prediction_type))
        scheduler.set_timesteps(12)
        unet = FixedNoise(scheduler)
        text = [TextConditions(torch.zeros(1, 77, 8))]
        steps = LossGuidance(
            unet, PlainVae(), scheduler, scheduler.timesteps, [text] * len(scheduler.timesteps), [[squared]]
        )
        latents = torch.randn(1, 4, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        latents *= scheduler.init_noise_sigma
        for index, timestep in enumerate(scheduler.timesteps):
            prediction = unet(scheduler.scale_model_input(latents, timestep), timestep, text).sample
            prediction, latents = steps(prediction, latents, index)
            latents = scheduler.step(prediction, timestep, latents).prev_sample
        results.append(latents)
    if sampler == "pndm":  # diffusers' PNDM turns an average of earlier v into noise at the present sample
        assert results[0].isfinite().all() and results[1].isfinite().all()
    else:
        assert torch.allclose(*results, rtol=1e-5)  # the schedulers' own tables are float32


@pytest.mark.parametrize("sampler", GUIDED_SAMPLERS)
def test_steps_change_as_documented(sampler):
    scheduler = make_scheduler(SAMPLERS[sampler], NoiseSchedule("epsilon"))
    scheduler.set_timesteps(10)
    steps = LossGuidance(
        FixedNoise(scheduler),
        PlainVae(),
        scheduler,
        scheduler.timesteps,
        [[TextConditions(torch.zeros(1, 77, 8))]] * 10,
        [[squared]],
    )
    latents = torch.randn(1, 4, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    prediction = torch.ones_like(latents)
    index = 6
    gradient = steps.gradient(latents, index, 0, [squared])
    changed, moved = steps(prediction, latents, index)
    if sampler == "lms":
        sigma = float(scheduler.sigmas[index])
        assert torch.equal(changed, prediction)
        assert torch.allclose(moved, latents - gradient * sigma**2, rtol=1e-6)  # sigma is float32
    else:
        left = 1 - float(scheduler.alphas_cumprod[scheduler.timesteps[index]])
        assert torch.allclose(changed, prediction + left**0.5 * gradient, rtol=1e-6)  # likewise
        assert torch.equal(moved, latents)


def test_lms_takes_the_noise_levels_of_the_steps_that_are_run():
    scheduler = make_scheduler(SAMPLERS["lms"], NoiseSchedule("epsilon"))
    scheduler.set_timesteps(10)
    levels = noise_levels(scheduler, scheduler.timesteps[4:])  # img2img runs the last steps only
    assert [level.sigma / level.alpha for level in levels] == pytest.approx(scheduler.sigmas[4:-1].tolist(), rel=1e-5)


def test_two_losses_count_together():
    scheduler = make_scheduler(SAMPLERS["ddim"], NoiseSchedule("epsilon"))
    scheduler.set_timesteps(10)
    text, latents = [TextConditions(torch.zeros(1, 77, 8))], torch.full((1, 4, 2, 2), 0.3, dtype=torch.float64)
    changes = []
    for losses in ([squared], [squared, squared]):
        unet = FixedNoise(scheduler)
        steps = LossGuidance(unet, PlainVae(), scheduler, scheduler.timesteps, [text] * 10, [losses])
        changes.append(steps(torch.zeros_like(latents), latents, 5)[0])
        assert len(unet.seen) == 1  # one pass for all losses
    assert torch.allclose(changes[0] * 2, changes[1])


def test_checkpointing_changes_no_gradient(exact_models, clip_folder):
    clip = load_clip(*find_clip(str(clip_folder)), CPU)
    clip.model.double()
    loss = clip.loss(clip.embed_text(["a cat"]).detach(), 100.0)
    text = [TextConditions(torch.randn(1, 77, 64, generator=torch.Generator().manual_seed(2), dtype=torch.float64))]
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    _, steps = guide_steps("ddim", "epsilon", *exact_models, text, [[loss]])
    plain = steps.gradient(latents, 3, 0, [loss])
    try:
        for model in exact_models:
            model.enable_gradient_checkpointing()
        saved = steps.gradient(latents, 3, 0, [loss])
    finally:
        for model in exact_models:
            model.disable_gradient_checkpointing()
    assert torch.allclose(plain, saved, rtol=1e-9)


def test_spherical_distance_is_half_the_angles_square():
    angle = torch.tensor([0.0, 0.3, 1.5, 3.0], dtype=torch.float64)
    first = torch.stack([torch.ones(4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)], dim=1)
    second = torch.stack([angle.cos(), angle.sin()], dim=1)
    assert torch.allclose(spherical_distance(first, second), angle**2 / 2)


# ---------------------------------------------------------------------------------------------------------------------
# Judges


def test_guides_are_resized_to_the_nearest_pixels(clip_folder):
    clip = load_clip(*find_clip(str(clip_folder)), CPU)
    large = Image.effect_noise((448, 300), 80).convert("RGB")
    nearest = large.resize((224, 224), Image.Resampling.NEAREST)
    picture = pixels_to_tensor(nearest)
    with torch.no_grad():
        # the arcsine of a rounding error in float32
        assert float(clip.loss(clip.embed_goal(large), 1.0)(picture)) < 1e-6
        assert float(clip.loss(clip.embed_goal(Image.new("RGB", (9, 9), "red")), 1.0)(picture)) > 1e-3


def test_vgg16_looks_at_a_quarter_of_the_size(vgg16_file):
    vgg16 = load_vgg16(find_vgg16(str(vgg16_file)), 3, CPU)
    plain = torch.full((1, 3, 64, 96), 64 / 255)
    guide = Image.new("RGB", (10, 10), (64, 64, 64))
    with torch.no_grad():
        shapes = []
        vgg16.features.register_forward_hook(lambda module, inputs, output: shapes.append(inputs[0].shape[-2:]))
        loss = vgg16.loss(guide, 100.0, (64, 96))(plain)
    assert shapes == [(16, 24)] * 2
    assert float(loss) < 1e-6  # equal pictures but for rounding


@pytest.mark.parametrize("layer", [1, 5, 20, 30])
def test_vgg16_layers_are_torchvisions(vgg16_file, layer):
    """The features of layer N are those after `features.N`, worked out here by hand."""
    tensors = vgg16_tensors()
    picture = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    mean, deviation = (torch.tensor(c)[:, None, None] for c in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    x = (picture - mean) / deviation
    for place in range(layer + 1):
        if f"features.{place}.weight" in tensors:
            weight, bias = tensors[f"features.{place}.weight"], tensors[f"features.{place}.bias"]
            x = torch.nn.functional.conv2d(x, weight, bias, padding=1)
        elif place in (4, 9, 16, 23, 30):
            x = torch.nn.functional.max_pool2d(x, 2)
        else:
            x = x.relu()
    with torch.no_grad():
        assert torch.allclose(load_vgg16(find_vgg16(str(vgg16_file)), layer, CPU).embed(picture), x, atol=1e-5)


def make_job(prompt, **settings):
    return Job(prompt=prompt, seed=1, raw_prompt=prompt, where="", file=None, width=512, height=512, **settings)


def test_the_text_for_clip(clip_folder):
    assert clip_text(make_job("(a:1.3) [cat] BREAK \\(x\\)")) == ["a", " ", "cat", " ", " (x)"]
    assert clip_text(make_job("a dog", clip_prompt="(a:1.3) cat")) == ["(a:1.3) cat"]
    clip = load_clip(*find_clip(str(clip_folder)), CPU)
    assert torch.equal(clip.embed_text(["a ", "cat"]), clip.embed_text(["a cat"]))
    long = "word " * 75
    assert torch.equal(clip.embed_text([long]), clip.embed_text([long + "cat"]))
    assert not torch.equal(clip.embed_text([long[5:]]), clip.embed_text([long[5:] + "cat"]))
    assert clip.embed_text([""]).norm() == pytest.approx(1, rel=1e-6)


def test_clip_agrees_with_transformers(clip_folder):
    theirs = CLIPModel.from_pretrained(clip_folder)
    ours: Clip = load_clip(*find_clip(str(clip_folder)), CPU)
    ids = ours.tokenizer("a cat", padding="max_length", max_length=77, return_tensors="pt").input_ids
    with torch.no_grad():
        expected = theirs.get_text_features(ids).pooler_output
        assert torch.allclose(ours.embed_text(["a cat"]), expected / expected.norm(), atol=1e-6)
        picture = torch.rand(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
        mean, deviation = (
            torch.tensor(colours)[:, None, None]
            for colours in ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711])
        )
        expected = theirs.get_image_features((picture - mean) / deviation).pooler_output
        assert torch.allclose(ours.embed_picture(picture), expected / expected.norm(), atol=1e-6)
    assert not any(parameter.requires_grad for parameter in ours.model.parameters())


# ---------------------------------------------------------------------------------------------------------------------
# The program

SIZE = ("--W", 128, "--H", 128)  # at 64 the tiny model normalises groups of two numbers, which blows rounding up


@pytest.fixture
def by_clip(clip_folder):
    return ("--clip_model", clip_folder, "--clip_guidance_scale", 60)


@pytest.mark.parametrize(("sampler", "steps"), [("ddim", 2), ("k_lms", 3)])
def test_the_batch_does_not_matter(sd1, generate, guides, vgg16_file, by_clip, tmp_path, sampler, steps):
    by_vgg16 = ("--vgg16_model", vgg16_file, "--vgg16_guidance_scale", 30, "--guide_image_path", guides)
    common = (*SIZE, *by_clip, *by_vgg16, "--sampler", sampler, "--steps", steps)
    prompt = ("--prompt", "a cat --d 1,2", "--images_per_prompt", 2)
    together = generate(sd1.folder, *common, *prompt, "--batch_size", 2, outdir=tmp_path / "2").pictures
    alone = generate(sd1.folder, *common, *prompt, outdir=tmp_path / "1").pictures
    assert largest(together, alone) <= 1
    free = (*SIZE, *prompt, "--sampler", sampler, "--steps", steps)
    unguided = generate(sd1.folder, *free, outdir=tmp_path / "0").pictures
    assert all(largest([a], [b]) > 8 for a, b in zip(unguided, alone))


@pytest.mark.parametrize("sampler", ["ddim", "lms"])
def test_without_the_negative_prompt_it_goes_on(sd1, generate, by_clip, tmp_path, sampler):
    """Steps outside --guidance_start and --guidance_end are guided by CLIP as those of a scale of 1 are."""
    common = (*SIZE, *by_clip, "--sampler", sampler, "--steps", 2, "--prompt")
    plain = generate(sd1.folder, *common, "a cat --d 1 --l 1", outdir=tmp_path / "1").pictures
    unguided = generate(sd1.folder, *common, "a cat --d 1", "--guidance_end", 0, outdir=tmp_path / "0").pictures
    assert largest(plain, unguided) <= 1


def test_guidance_brings_pictures_nearer(sd1, generate, clip_folder, vgg16_file, guides, tmp_path):
    """Each kind of guidance makes its own loss smaller, for each of these seeds; a single step may overshoot."""
    clip = load_clip(*find_clip(str(clip_folder)), CPU)
    vgg16 = load_vgg16(find_vgg16(str(vgg16_file)), 20, CPU)
    guide = Image.open(guides / "g0.png")
    kinds = {
        "clip": (clip.loss(clip.embed_text(["a cat"]), 1.0), ("--clip_guidance_scale", 100)),
        "clip_image": (clip.loss(clip.embed_goal(guide), 1.0), ("--clip_image_guidance_scale", 100)),
        "vgg16": (vgg16.loss(guide, 1.0, (128, 128)), ("--vgg16_guidance_scale", 30)),
    }
    common = (*SIZE, "--prompt", "a cat", "--images_per_prompt", 2, "--seed", 4, "--steps", 5)
    plain = generate(sd1.folder, *common, outdir=tmp_path / "plain").pictures
    for name, (loss, options) in kinds.items():
        options += ("--vgg16_model", vgg16_file) if name == "vgg16" else ("--clip_model", clip_folder)
        options += () if name == "clip" else ("--guide_image_path", guides / "g0.png")
        guided = generate(sd1.folder, *common, *options, outdir=tmp_path / name).pictures
        with torch.no_grad():
            before, after = (
                [float(loss(torch.from_numpy(p / 255).float().permute(2, 0, 1)[None])) for p in pictures]
                for pictures in (plain, guided)
            )
        assert sum(a < b for a, b in zip(after, before)) == 2, (name, before, after)


def test_objects_for_scripts_tell_of_guidance(sd1, generate, clip_folder, vgg16_file):
    options = ("--clip_guidance_scale", 100, "--vgg16_guidance_scale", 30, "--clip_model", clip_folder,
               "--vgg16_model", vgg16_file, "--n_iter", 2, "--W", 128, "--H", 128)  # fmt: skip
    result = generate(sd1.folder, "--prompt", "a --c b", "--dry_run", "--json", *options)
    first, second = map(json.loads, result.stdout.splitlines())
    expected = {
        "clip_scale": 100, "clip_image_scale": 0, "vgg16_scale": 30, "vgg16_layer": 20, "clip_prompt": "b",
        "clip_model": str(clip_folder), "vgg16_model": str(vgg16_file),
    }  # fmt: skip
    assert first["loss_guidance"] == expected | {"guide": None}
    assert second["loss_guidance"] == expected | {"guide": first["file"]}


def test_without_a_guide_each_picture_guides_the_next(sd1, generate, clip_folder, tmp_path):
    common = (*SIZE, "--steps", 3)
    by_clip = ("--clip_model", clip_folder, "--clip_image_guidance_scale", 100)
    prompts = ("--prompt", "a cat --d 1,2", "--images_per_prompt", 2, "--batch_size", 2)
    chain = generate(sd1.folder, *common, *by_clip, *prompts, outdir=tmp_path / "chain")
    assert "each picture is guided by the one before it" in chain.stderr
    free = generate(sd1.folder, *common, "--prompt", "a cat --d 1")
    # nothing guides the first; layers that take gradients sum in another order
    assert largest(chain.pictures[:1], free.pictures) <= 1
    options = (*common, *by_clip, "--guide_image_path", chain.files[0], "--prompt", "a cat --d 2")
    second = generate(sd1.folder, *options, outdir=tmp_path / "second")
    assert largest(chain.pictures[1:], second.pictures) == 0
    parameters = [Image.open(file).info["parameters"] for file in chain.files]
    assert "Guide image" not in parameters[0] and "CLIP image guidance scale" not in parameters[0]
    assert f"Guide image: {chain.files[0].name}" in parameters[1]


def test_guides_go_round_in_step_with_the_source_pictures(sd1, guides, vgg16_file, tmp_path):
    options = ["--ckpt", sd1.folder, "--outdir", tmp_path / "x", "--prompt", "a", "--images_per_prompt", 4,
               "--vgg16_guidance_scale", 100, "--vgg16_model", vgg16_file,
               "--image_path", guides, "--guide_image_path", guides]  # fmt: skip
    jobs = make_plan(gen_img_diffusers.make_parser().parse([str(option) for option in options])).jobs
    assert [job.guides for job in jobs] == [(job.source,) for job in jobs]
    assert [job.source.name for job in jobs] == ["g0.png", "g1.png", "g2.png", "g0.png"]


def test_text_for_clip_of_a_prompt_line(sd1, generate, by_clip, tmp_path):
    pictures = {}
    for name, prompt in {"own": "a cat", "same": "a cat --c a cat", "other": "a cat --c a dog, snow"}.items():
        result = generate(
            sd1.folder, *SIZE, *by_clip, "--sampler", "lms", "--prompt", f"{prompt} --d 1", outdir=tmp_path / name
        )
        pictures[name] = result.pictures
    assert largest(pictures["own"], pictures["same"]) == 0
    assert largest(pictures["own"], pictures["other"]) > 2
    info = Image.open(result.files[0]).info
    assert info["clip-prompt"] == "a dog, snow"
    assert "CLIP guidance scale: 60" in info["parameters"]


def test_a_text_for_clip_that_nothing_reads_is_warned_of(sd1, generate):
    result = generate(sd1.folder, "--prompt", "a cat --c a dog")
    assert result.status == 0
    assert "--c does nothing without --clip_guidance_scale" in result.stderr
    assert "clip-prompt" not in Image.open(result.files[0]).info


@pytest.mark.parametrize(
    "options",
    [
        ("--bf16",),
        ("--scale", 1),
        ("--negative_scale", 2),
        ("--image_path", "G/g0.png", "--strength", 0.5, "--sampler", "lms", "--steps", 4),
        ("--image_path", "G/g0.png", "--mask_path", "G/g1.png", "--sampler", "pndm", "--steps", 8),
        ("--highres_fix_scale", 0.5, "--highres_fix_steps", 2, "--strength", 0.5, "--steps", 4),
        ("--ds_depth_1", 1),
        ("--vae_slices", 2),
        ("--max_embeddings_multiples", 3, "--prompt", "word " * 160),
    ],
    ids=lambda options: options[0].strip("-"),
)
def test_guidance_goes_with_other_options(sd1, generate, guides, vgg16_file, by_clip, tmp_path, options):
    options = [str(option).replace("G/", f"{guides}/") for option in options]
    options += [] if "--prompt" in options else ["--prompt", "a cat --n x"]
    by_vgg16 = ("--vgg16_model", vgg16_file, "--vgg16_guidance_scale", 30, "--guide_image_path", guides)
    common = (*SIZE, "--seed", 1, *options)
    plain = generate(sd1.folder, *common, outdir=tmp_path / "plain")
    guided = generate(sd1.folder, *common, *by_clip, *by_vgg16, outdir=tmp_path / "guided")
    assert guided.status == 0, guided.stderr
    assert largest(plain.pictures, guided.pictures) > 4


@pytest.mark.parametrize("sampler", GUIDED_SAMPLERS)
def test_v_prediction(sd2, generate, by_clip, sampler, tmp_path):
    options = (*sd2.options, "--prompt", "a cat --d 1", "--sampler", sampler, "--steps", 4)
    plain = generate(sd2.folder, *options, outdir=tmp_path / "plain")
    guided = generate(sd2.folder, *options, *by_clip, outdir=tmp_path / "guided")
    assert guided.status == 0, guided.stderr
    assert largest(plain.pictures, guided.pictures) > 4


def test_weights_get_no_gradients(sd1, by_clip, tmp_path):
    options = [
        "--ckpt",
        sd1.folder,
        "--outdir",
        tmp_path,
        "--prompt",
        "a",
        "--W",
        64,
        "--H",
        64,
        "--steps",
        1,
        *by_clip,
    ]
    plan = make_plan(gen_img_diffusers.make_parser().parse([str(option) for option in options]))
    pipeline = gen_img_diffusers.load_pipeline(plan)
    text_encoder = pipeline.texts[0].model
    pipeline.draw(plan.jobs, iter)
    for model in (pipeline.unet, pipeline.vae, text_encoder):
        assert all(not p.requires_grad and p.grad is None for p in model.parameters())


# ---------------------------------------------------------------------------------------------------------------------
# Refusals


CLIP, CLIP_IMAGE, VGG16 = "--clip_guidance_scale", "--clip_image_guidance_scale", "--vgg16_guidance_scale"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((CLIP, 9, "--sampler", "euler"), "--sampler euler: cannot be guided by CLIP or VGG16; use one of ddim, pndm"),
        ((VGG16, 9, "--sampler", "k_euler_a"), "use one of ddim, pndm, lms"),
        ((CLIP, -1), "--clip_guidance_scale -1: out of range"),
        ((CLIP, "nan"), "--clip_guidance_scale nan: not a finite number"),
        ((VGG16, 1, "--vgg16_guidance_layer", 31), "31: out of range; write a whole number from 1 to 30"),
        (("--vgg16_guidance_layer", 20), "--vgg16_guidance_layer 20: nothing uses it"),
        (("--vgg16_model", "x.pth"), "--vgg16_model x.pth: nothing uses it"),
        (("--clip_model", "x"), "--clip_model x: nothing uses it"),
        (("--clip_model", "x", VGG16, 1), "--clip_model x: nothing uses it"),
        (("--guide_image_path", "x.png"), "--guide_image_path: nothing uses it; give --control_net_models"),
        ((CLIP_IMAGE, 1, "--guide_image_path", "no.png"), "--guide_image_path no.png: no such file"),
        ((CLIP, 1, "--clip_model", "no/such/folder"), "--clip_model no/such/folder: no such file or folder"),
        ((VGG16, 1, "--vgg16_model", "no.pth"), "error: --vgg16_model no.pth: no such file"),
    ],
)
def test_refusals(sd1, generate, options, message):
    result = generate(sd1.folder, "--prompt", "a", *options)
    assert result.status == 2
    assert result.stderr.splitlines()[-1].startswith("error: ") and message in result.stderr


def test_pictures_too_small_for_vgg16(sd1, generate, guides, vgg16_file):
    options = ("--vgg16_guidance_scale", 1, "--vgg16_model", vgg16_file, "--guide_image_path", guides)
    result = generate(sd1.folder, *options, "--vgg16_guidance_layer", 30, "--prompt", "a --w 64 --h 256")
    assert result.status == 2
    assert "VGG16's layer 30 sees nothing of it; use sides of 128 pixels or more" in result.stderr
    assert generate(sd1.folder, *options, "--vgg16_guidance_layer", 30, "--prompt", "a --w 128 --h 128").status == 0
    assert generate(sd1.folder, *options, "--prompt", "a --w 32 --h 32").status == 0


def test_other_models_are_no_clip(sd1, clip_folder, tmp_path):
    with pytest.raises(InputError, match="its config.json says clip_text_model"):
        find_clip(str(sd1.folder / "text_encoder"))
    with pytest.raises(InputError, match="is a file; give the folder"):
        find_clip(str(clip_folder / "model.safetensors"))
    (tmp_path / "config.json").write_text((clip_folder / "config.json").read_text())
    with pytest.raises(InputError, match="holds no weights"):
        find_clip(str(tmp_path))
    small = CLIPModel(CLIPConfig(text_config={"vocab_size": 100, "hidden_size": 8, "num_hidden_layers": 1}))
    small.save_pretrained(tmp_path / "small")
    with pytest.raises(InputError, match="out of 100; give a CLIP model with OpenAI's vocabulary"):
        find_clip(str(tmp_path / "small"))


def test_a_clip_whose_weights_do_not_fit_its_configuration(sd1, generate, clip_folder, tmp_path):
    config = json.loads((clip_folder / "config.json").read_text())
    config["vision_config"]["image_size"] = 336
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").symlink_to(clip_folder / "model.safetensors")
    result = generate(sd1.folder, "--prompt", "a", "--clip_guidance_scale", 1, "--clip_model", tmp_path)
    assert result.status == 2
    assert "has the shape [50, 32], the model needs [101, 32]" in result.stderr


@pytest.mark.parametrize("change", ["missing", "vgg19", "shape", "other"])
def test_other_files_are_no_vgg16(tmp_path, change):
    tensors = vgg16_tensors()
    if change == "missing":
        del tensors["features.28.bias"]
    elif change == "vgg19":
        tensors["features.16.weight"] = torch.zeros(8, 8, 3, 3)
    elif change == "shape":
        tensors["features.2.weight"] = torch.zeros(8, 9, 3, 3)
    else:
        tensors = {"conv1.weight": torch.zeros(1)}
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(InputError, match=r"is not VGG16 in torchvision's layout \('features\.\d+\.(weight|bias)'\)"):
        find_vgg16(str(tmp_path / "x.safetensors"))


def test_vgg16_in_torchvisions_cache(sd1, generate, guides, vgg16_file, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    place = tmp_path / "torch" / "hub" / "checkpoints" / "vgg16-397923af.pth"
    options = ("--prompt", "a", "--vgg16_guidance_scale", 9, "--guide_image_path", guides)

    def offline(url, timeout):
        raise OSError("no network")

    monkeypatch.setattr("urllib.request.urlopen", offline)
    result = generate(sd1.folder, *options)
    assert result.status == 2
    assert len(result.stderr.splitlines()) == 1
    assert f"get {guidance_files.VGG16_URL} elsewhere and put it at {place}" in result.stderr
    place.symlink_to(vgg16_file)
    assert generate(sd1.folder, *options).status == 0


def test_vgg16_is_fetched_whole_or_not_at_all(vgg16_file, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(guidance_files, "VGG16_URL", vgg16_file.as_uri())
    with pytest.raises(InputError, match="what came is another file"):
        find_vgg16(None)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    digits = hashlib.sha256(vgg16_file.read_bytes()).hexdigest()
    monkeypatch.setattr(guidance_files, "_VGG16_SHA256", digits[:8])
    assert find_vgg16(None).shapes["features.0.weight"] == (8, 3, 3, 3)
    assert (tmp_path / "hub" / "checkpoints" / "vgg16.pth").read_bytes() == vgg16_file.read_bytes()


def test_a_broken_guide_is_refused_at_the_start(sd1, generate, guides, clip_folder, tmp_path):
    whole = (guides / "g0.png").read_bytes()
    (tmp_path / "half.png").write_bytes(whole[: len(whole) // 2])
    options = ("--clip_image_guidance_scale", 1, "--clip_model", clip_folder, "--guide_image_path", guides)
    result = generate(sd1.folder, "--prompt", "a", *options, tmp_path / "half.png")
    assert result.status == 2
    assert "half.png: is damaged" in result.stderr
