"""Pictures: against diffusers' own pipeline, in batches and alone, in every precision and with every sampler."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from PIL import Image

import gen_img_diffusers
from library.draw import samplers
from library.draw.attention import keep_text, use_kernel
from library.draw.denoiser import Cfg
from library.draw.samplers import draw_noise, make_scheduler
from library.draw.sources import encode
from library.draw.text_conditions import TextConditions
from library.files.pictures import read_picture
from library.machine.attention import sdpa
from library.machine.vae_slices import slice_resnets
from library.plan.job import Job
from library.plan.planning import make_plan
from library.settings.noise_schedule import NoiseSchedule
from library.settings.samplers import NOISE_LEVELS, SAMPLERS, SECOND_NAMES

PROMPTS = """a cat --d 1
a (dog:1.3) --d 2 --n fog
a house --d 3 --l 9
two --d 4 --n grey, dull
a tree --d 5
[a] lake --d 6 --l 3
seven --d 7
a very small bird --d 8 --n x
"""


def largest_difference(first, second) -> int:
    assert len(first) == len(second) > 0
    return max(int(np.abs(a - b).max()) for a, b in zip(first, second))


def load(*options):
    return gen_img_diffusers.load_pipeline(make_plan(gen_img_diffusers.make_parser().parse([str(o) for o in options])))


def test_the_same_picture_as_diffusers(sd1, generate):
    options = ("--prompt", "a red cat --n a dog", "--seed", 3, "--steps", 4, "--W", 96, "--H", 128)
    ours = generate(sd1.folder, *options).pictures[0]
    theirs = StableDiffusionPipeline.from_pretrained(
        sd1.folder, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    theirs.scheduler = DDIMScheduler(1000, 0.00085, 0.012, "scaled_linear", clip_sample=False, steps_offset=1)
    latents = torch.randn((1, 4, 16, 12), generator=torch.Generator().manual_seed(3))
    picture = theirs("a red cat", negative_prompt="a dog", width=96, height=128, num_inference_steps=4, latents=latents)
    assert largest_difference([ours], [np.asarray(picture.images[0]).astype(int)]) <= 1


@pytest.mark.parametrize("sampler", ["ddim", "euler_a", "lcm"])  # all are in the next test
def test_a_batch_of_eight_equals_eight_alone(sd1, generate, tmp_path, sampler):
    file = tmp_path / "prompts.txt"
    file.write_text(PROMPTS)
    options = ("--from_file", file, "--sampler", sampler, "--steps", 4, "--sequential_file_name")
    together = generate(sd1.folder, *options, "--batch_size", 8, outdir=tmp_path / "8").pictures
    alone = generate(sd1.folder, *options, outdir=tmp_path / "1").pictures
    assert len(together) == len(alone) == 8
    assert largest_difference(alone, together) <= 1


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_two_in_a_batch_are_what_they_are_alone(sd1, generate, tmp_path, sampler):
    options = ("--sampler", sampler, "--steps", 4, "--scale", 2)
    together = generate(sd1.folder, "--prompt", "a --d 1,2", "--images_per_prompt", 2, "--batch_size", 2, *options)
    alone = generate(sd1.folder, "--prompt", "a --d 2", *options, outdir=tmp_path / "alone")
    assert largest_difference(alone.pictures, together.pictures[1:]) <= 1


def test_the_place_in_a_batch_does_not_matter(sd2, generate, tmp_path):
    lines = PROMPTS.splitlines()
    orders = {"a": lines[:4], "b": [lines[2], lines[0], lines[3], lines[1]]}
    pictures = {}
    for name, order in orders.items():
        (tmp_path / f"{name}.txt").write_text("\n".join(order))
        options = ("--from_file", tmp_path / f"{name}.txt", "--batch_size", 3, "--sampler", "k_euler_a")
        result = generate(sd2.folder, *options, *sd2.options, outdir=tmp_path / name)
        pictures[name] = {Image.open(file).info["seed"]: p for file, p in zip(result.files, result.pictures)}
    for seed, picture in pictures["a"].items():
        assert largest_difference([picture], [pictures["b"][seed]]) <= 1


@pytest.mark.parametrize("name", [*SAMPLERS, *SECOND_NAMES])
@pytest.mark.parametrize("family", ["sd1", "sd2"])
def test_every_sampler_draws(request, generate, name, family):
    models = request.getfixturevalue(family)
    result = generate(models.folder, *models.options, "--prompt", "a cat --d 1", "--sampler", name, "--steps", 5)
    assert result.status == 0, result.stderr
    assert result.pictures[0].std() > 1
    info = Image.open(result.files[0]).info
    assert info["sampler"] == SECOND_NAMES.get(name, name)


SCHEDULES = [
    (name, schedule, zero)
    for name, sampler in SAMPLERS.items()
    for schedule in sampler.schedules
    for zero in (False, True)
    if not zero or (sampler.zero_snr and schedule not in NOISE_LEVELS)
]


@pytest.mark.parametrize(("name", "schedule", "zero"), SCHEDULES)
def test_samplers_reach_the_clean_picture(name, schedule, zero):
    """With a model that knows the noise exactly, every sampler ends at the clean latents, however it gets there."""
    clean, noise = torch.full((1, 4, 8, 8), 0.5), torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    predicts = "v_prediction" if zero else "epsilon"
    scheduler = make_scheduler(SAMPLERS[name], NoiseSchedule(predicts, zero_snr=zero), schedule)
    scheduler.set_timesteps(30)
    generators = {"generator": [torch.Generator().manual_seed(0)]} if SAMPLERS[name].draws_noise else {}
    latents = noise * scheduler.init_noise_sigma
    has_levels = hasattr(scheduler, "sigmas") and scheduler.order == 1
    for place, timestep in enumerate(scheduler.timesteps):
        sample = scheduler.scale_model_input(latents, timestep)
        level = (1 - scheduler.alphas_cumprod).sqrt()[timestep.round().long()]
        if has_levels:  # exactly those of its steps, not of the nearest timesteps
            level = scheduler.sigmas[place] / (scheduler.sigmas[place] ** 2 + 1).sqrt()
        epsilon = (sample - clean * (1 - level**2).sqrt()) / level
        prediction = (1 - level**2).sqrt() * epsilon - level * clean if zero else epsilon
        latents = scheduler.step(prediction, timestep, latents, **generators).prev_sample
    # what the last, smallest noise level leaves: 0.03 times a number from the normal distribution
    assert (latents - clean).abs().max() < 0.15


@pytest.mark.parametrize("steps", [20, 50])
@pytest.mark.parametrize("name", ["pndm", "lms"])
def test_methods_of_higher_order_are_nearer_the_solution_than_ddim_wherever_they_begin(name, steps):
    """With data spread around 0 as a Gaussian, the best prediction and what a latent ends as are known."""
    for left_out in range(0, steps - 1, steps // 10):
        error, ddim_error = (_gaussian_error(which, steps, left_out) for which in (name, "ddim"))
        assert error < 1.15 * ddim_error, left_out  # LMS is about as far as DDIM while its order is still 1


def _gaussian_error(name: str, steps: int, left_out: int, spread: float = 0.5) -> float:
    """How far from the solution, as a part of it, a sampler ends which leaves out the first steps."""
    scheduler = make_scheduler(SAMPLERS[name], NoiseSchedule("epsilon"))
    scheduler.set_timesteps(steps)
    timesteps = samplers.run_from(scheduler, left_out)
    kept = scheduler.alphas_cumprod.double()  # of the picture's variance
    first = kept[int(timesteps[0])]
    one = torch.ones((), dtype=torch.float64)
    start = scheduler.add_noise(0 * one, one, timesteps[:1])
    latent = start
    for timestep in timesteps:
        seen, now = scheduler.scale_model_input(latent, timestep), kept[int(timestep)]
        predicted = seen * (1 - now).sqrt() / (now * spread**2 + 1 - now)
        latent = scheduler.step(predicted, timestep, latent).prev_sample
    if name == "lms":  # its latents are the picture's with noise added; and its last one holds none
        start, last = start * first.sqrt(), one
    else:
        last = kept[0]
    solution = start * ((last * spread**2 + 1 - last) / (first * spread**2 + 1 - first)).sqrt()
    return float((latent / solution - 1).abs())


def test_lcm_draws_as_its_paper_says(sd1, generate, tmp_path):
    """Multistep consistency sampling (Luo et al. 2023, algorithm 3), written out, reserved noises left aside."""
    pipeline = load("--ckpt", sd1.folder, "--prompt", "a cat --l 1", "--sampler", "lcm")
    text = pipeline.encoder.encode(["a cat"], 1)
    shares = make_scheduler(SAMPLERS["lcm"], NoiseSchedule("epsilon")).alphas_cumprod
    for strength, timesteps in ((None, [999, 759, 499, 259]), (0.5, [499, 259])):
        generator = torch.Generator().manual_seed(3)
        latents, *_ = (torch.randn((1, 4, 16, 16), generator=generator) for _ in range(5))
        options = ["--prompt", "a cat --l 1 --d 3", "--sampler", "lcm", "--steps", 4, "--W", 128, "--H", 128]
        if strength is not None:
            Image.effect_noise((128, 128), 90).convert("RGB").save(tmp_path / "source.png")
            options += ["--image_path", tmp_path / "source.png", "--strength", strength]
            source = encode(pipeline.vae, read_picture(tmp_path / "source.png", ""))
            noise = torch.randn((1, 4, 16, 16), generator=generator)
            latents = shares[499].sqrt() * source + (1 - shares[499]).sqrt() * noise
        with torch.inference_mode():
            for place, timestep in enumerate(timesteps):
                alpha, sigma = shares[timestep].sqrt(), (1 - shares[timestep]).sqrt()
                epsilon = pipeline.unet(latents, timestep, encoder_hidden_states=text).sample
                skip, out = 0.25 / ((10 * timestep) ** 2 + 0.25), 10 * timestep / ((10 * timestep) ** 2 + 0.25) ** 0.5
                latents = skip * latents + out * (latents - sigma * epsilon) / alpha
                if place + 1 < len(timesteps):
                    share = shares[timesteps[place + 1]]
                    noise = torch.randn((1, 4, 16, 16), generator=generator)
                    latents = share.sqrt() * latents + (1 - share).sqrt() * noise
            expected = pipeline._decode(latents)[0].pictures()[0].astype(int)
        assert largest_difference(generate(sd1.folder, *options).pictures, [expected]) <= 1


def test_lcm_refuses_more_steps_than_it_was_made_of(sd1, generate):
    result = generate(sd1.folder, "--prompt", "a cat --s 51 --l 1", "--sampler", "lcm")
    assert result.status == 2
    assert result.stderr == "error: 51 steps: the sampler lcm does 1 to 50 steps; use as many or another sampler\n"
    result = generate(sd1.folder, "--prompt", "a cat", "--sampler", "lcm")
    assert "guidance scale 7.5: the sampler lcm is made for a scale of 1 to 2" in result.stderr
    assert "Sampler: LCM" in Image.open(result.files[0]).info["parameters"]


def test_noise_is_the_same_in_every_precision(sd1, monkeypatch):
    drawn = []

    def remember(*arguments):
        noise = draw_noise(*arguments)
        drawn.append(noise.start.clone())
        return noise

    monkeypatch.setattr(samplers, "draw_noise", remember)
    options = ("--ckpt", sd1.folder, "--prompt", "a", "--W", 64, "--H", 64, "--steps", 1, "--seed", 5, "--outdir", "x")
    for precision in ([], ["--bf16"]):
        pipeline = load(*options, *precision)
        pipeline.draw(make_plan(gen_img_diffusers.make_parser().parse([str(o) for o in options])).jobs, iter)
    assert torch.equal(*drawn)
    assert drawn[0].dtype == torch.float32


def test_bfloat16_draws_nearly_the_same_picture(sd1, generate):
    options = ("--prompt", "a cat --d 1", "--steps", 4)
    exact, rounded = (generate(sd1.folder, *options, *p).pictures[0] for p in ([], ["--bf16"]))
    # bfloat16 has 8 bits: some levels over a few steps, against 40 between two seeds
    assert 0 < np.abs(exact - rounded).mean() < 6


def test_without_guidance_there_is_one_branch(sd1, generate):
    first = generate(sd1.folder, "--prompt", "a cat --d 1 --l 1 --n dog").pictures
    other = generate(sd1.folder, "--prompt", "a cat --d 1 --l 1 --n frog").pictures
    assert largest_difference(first, other) == 0
    assert largest_difference(first, generate(sd1.folder, "--prompt", "a cat --d 1 --l 1.5 --n dog").pictures) > 0


def test_negative_scale_joins_three_branches():

    job = Job(
        prompt="p",
        negative_prompt="n",
        seed=1,
        raw_prompt="p",
        where="",
        file=None,
        width=512,
        height=512,
        guidance_scale=7,
        negative_scale=3,
    )
    guidance = Cfg([job, job], torch.device("cpu"))
    assert guidance.said(0).texts == ("n", "n", "p", "p", "", "")
    negative, prompt, empty = torch.randn(3, 2, 4, 8, 8)
    expected = empty + 7 * (prompt - empty) - 3 * (negative - empty)
    assert torch.equal(guidance.join(torch.cat([negative, prompt, empty])), expected)


def test_odd_sizes_are_exact(sd1, generate):
    result = generate(sd1.folder, "--prompt", "a cat", "--W", 72, "--H", 8)
    assert result.pictures[0].shape == (8, 72, 3)


@pytest.mark.parametrize("options", [["--vae_slices", 3], ["--vae_batch_size", 1], ["--vae_batch_size", 0.5]])
def test_memory_options_change_no_picture(sd1, generate, options):
    common = ("--prompt", "a cat", "--images_per_prompt", 4, "--batch_size", 4, "--seed", 2)
    assert (
        largest_difference(generate(sd1.folder, *common).pictures, generate(sd1.folder, *common, *options).pictures)
        <= 1
    )


@pytest.mark.parametrize("slices", [1, 2, 3, 7, 100])
def test_sliced_vaes_are_exact(sd1, slices):
    from diffusers import AutoencoderKL

    whole, sliced = (AutoencoderKL.from_pretrained(sd1.folder / "vae").double().requires_grad_(False) for _ in range(2))
    slice_resnets(sliced, slices)
    latents = torch.randn(2, 4, 9, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    # the statistics are taken in float32
    torch.testing.assert_close(sliced.decode(latents).sample, whole.decode(latents).sample, rtol=1e-4, atol=1e-5)
    picture = torch.randn(1, 3, 72, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ours, theirs = (vae.encode(picture).latent_dist.mean for vae in (sliced, whole))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_kept_keys_follow_the_text(sd1):
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(sd1.folder / "unet")
    texts = torch.randn(2, 1, 77, 64, generator=torch.Generator().manual_seed(0))
    sample = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = [unet(sample, 10, encoder_hidden_states=text).sample for text in texts]
        use_kernel(unet, sdpa)
        for _ in range(2):
            for text, output in zip(texts, expected):
                for conditions in (TextConditions(text), keep_text(TextConditions(text), unet)):
                    ours = unet(sample, 10, encoder_hidden_states=conditions).sample
                    # the same sums in another memory layout
                    torch.testing.assert_close(ours, output, rtol=1e-4, atol=1e-5)


def test_nan_is_no_black_picture(sd1, generate, monkeypatch):
    from diffusers import UNet2DConditionModel

    real = UNet2DConditionModel.forward

    def broken(self, sample, *rest, **named):
        output = real(self, sample, *rest, **named)
        output.sample[-1] = float("nan")  # the last picture's prompt branch
        return output

    monkeypatch.setattr(UNet2DConditionModel, "forward", broken)
    result = generate(sd1.folder, "--prompt", "a cat --d 1,2", "--images_per_prompt", 2, "--batch_size", 2)
    assert result.status == 3
    assert len(result.files) == 1
    assert "seed 2" in result.stderr


def test_a_vae_that_overflows_decodes_in_float32(sd1, generate, monkeypatch):
    from diffusers import AutoencoderKL

    real = AutoencoderKL.decode

    def overflowing(self, latents, *rest, **named):
        output = real(self, latents, *rest, **named)
        if latents.dtype != torch.float32:
            output.sample[0] = float("inf")
        return output

    options = ("--prompt", "a cat --d 1", "--bf16")
    expected = generate(sd1.folder, *options).pictures
    monkeypatch.setattr(AutoencoderKL, "decode", overflowing)
    result = generate(sd1.folder, *options)
    assert result.status == 0
    # bfloat16's rounding of the decoder alone
    assert np.abs(result.pictures[0] - expected[0]).mean() < 3


@pytest.mark.parametrize("size", [(5, 5), (65, 65), (1, 3), (8, 8)])
def test_noises_are_drawn_one_by_one(size):
    """torch's generator uses up another amount for one large draw than for many small ones, unless they are round."""
    job = Job(prompt="", seed=3, raw_prompt="", where="", file=None, width=512, height=512, steps=4)
    for sampler in ("euler_a", "dpm_2_a"):
        noise = draw_noise([3, 4], (4, *size), replace(job, sampler=sampler))
        generator = torch.Generator().manual_seed(3)
        one_by_one = [
            torch.randn((4, *size), generator=generator) for _ in range(1 + 4 * SAMPLERS[sampler].reserved_noises)
        ]
        assert torch.equal(noise.start[0], one_by_one[0])
        following = (torch.randn((4, *size), generator=g) for g in (noise.step_arguments["generator"][0], generator))
        assert torch.equal(*following)
