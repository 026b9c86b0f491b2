"""Gradual Latent: when latents grow and to what size, the step that grows them, and what is refused."""

import re

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from library.draw.gradual_latent import gaussian_blur, sharpen, shrink_start
from library.draw.samplers import make_scheduler
from library.settings.gradual_latent import GradualLatent, Unsharp, ancestral_timesteps
from library.settings.noise_schedule import NoiseSchedule
from library.settings.samplers import SAMPLERS

GROW = ["--sampler", "euler_a", "--gradual_latent_timesteps", 750, "--gradual_latent_every_n_steps", 1]
ONE_LEVEL = 1  # float32 sums in another order, rounded


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 20, 50, 999])
def test_the_planned_timesteps_are_the_schedulers(steps):
    scheduler = make_scheduler(SAMPLERS["euler_a"], NoiseSchedule("epsilon"))
    scheduler.set_timesteps(steps)
    assert ancestral_timesteps(steps) == pytest.approx(scheduler.timesteps.tolist(), abs=1e-3)  # those are float32


def test_latents_grow_every_few_steps_below_the_timestep():
    settings = GradualLatent(timesteps=750)
    sizes = settings.growth(ancestral_timesteps(20), 96, 64)
    assert settings.first_size(96, 64) == (48, 32)
    # 999 * 14 / 19 = 736 is the first timestep below 750, at place 5
    assert sizes == {5: (56, 40), 8: (72, 48), 11: (80, 56), 14: (96, 64)}


def test_tenths_add_up_to_the_full_size():
    settings = GradualLatent(timesteps=999, ratio=0.6, ratio_step=0.1, every_n_steps=1)
    assert settings.growth(ancestral_timesteps(10), 64, 64)[4] == (64, 64)


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        (GradualLatent(timesteps=100), 20),
        (GradualLatent(timesteps=400, ratio_step=0.05, every_n_steps=4), 20),
        (GradualLatent(timesteps=10), 20),
        (GradualLatent(timesteps=1, ratio_step=0.25), 3),
    ],
)
def test_the_remedy_for_latents_that_stay_small_is_one(settings, steps):
    timesteps = ancestral_timesteps(steps)
    problem = settings.check(timesteps, 64, 64)
    assert problem.startswith("never reaches the full size")
    changed = {"step": "ratio_step", "use": "timesteps"}
    word, value = re.search(r"(step|use)(?: of)? ([\d.]+) or more", problem).groups()
    remedied = GradualLatent(
        **{name: getattr(settings, name) for name in GradualLatent.__slots__}
        | {changed[word]: type(getattr(settings, changed[word]))(float(value))}
    )
    again = remedied.check(timesteps, 64, 64)
    assert again is None or (changed[word] == "timesteps" and "it grows" in again)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_a_step_that_grows_by_nothing_is_an_ordinary_step(prediction_type):
    sample, output = torch.randn(2, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0)).unbind()

    def step(sizes: dict[int, tuple[int, int]]) -> torch.Tensor:
        scheduler = make_scheduler(SAMPLERS["euler_a"], NoiseSchedule(prediction_type), growing=True)
        scheduler.set_timesteps(10)
        scheduler.set_begin_index(4)
        scheduler.plan(GradualLatent(timesteps=999), sizes)
        timestep = scheduler.timesteps[4]
        latents = scheduler.scale_model_input(sample, timestep) * 0 + sample * 5
        generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
        return scheduler.step(output, timestep, latents, generator=generators).prev_sample

    assert torch.allclose(step({4: (8, 8)}), step({}), atol=1e-4)  # bicubic weights sum to 1 within float32


@pytest.mark.parametrize("on_sample", [True, False])
def test_sharpening_the_input_or_the_result_differs_by_the_direction_alone(on_sample):
    unsharp = Unsharp(3, 0.5, 0.8, on_sample)
    sample, output = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0)).unbind()
    scheduler = make_scheduler(SAMPLERS["euler_a"], NoiseSchedule("epsilon"), growing=True)
    scheduler.set_timesteps(10)
    scheduler.set_begin_index(4)
    scheduler.plan(GradualLatent(timesteps=999, s_noise=0, unsharp=unsharp), {4: (12, 10)})
    sigma, following = scheduler.sigmas[4:6]
    grown = scheduler.step(output, scheduler.timesteps[4], sample, torch.Generator()).prev_sample
    down = following**2 / sigma  # sqrt(next² - up²) with up² = next² (sigma² - next²) / sigma²

    def resize(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.interpolate(x, size=(12, 10), mode="bicubic", align_corners=False)

    if on_sample:
        expected = sharpen(resize(sample + output * (down - sigma)), unsharp)
    else:
        expected = sharpen(resize(sample), unsharp) + resize(output) * (down - sigma)
    assert torch.allclose(grown, expected, atol=1e-4)


def test_blur_is_a_gaussian_with_mirrored_borders():
    x = torch.randn(1, 2, 9, 7, generator=torch.Generator().manual_seed(0))
    expected = np.stack([cv2.GaussianBlur(c, (5, 5), 0.8, borderType=cv2.BORDER_REFLECT_101) for c in x[0].numpy()])
    assert np.allclose(gaussian_blur(x, 5, 0.8)[0], expected, atol=1e-5)


def test_the_start_is_shrunk_and_sharpened():
    latents = torch.randn(1, 4, 16, 24, generator=torch.Generator().manual_seed(0))
    assert shrink_start(latents, GradualLatent(timesteps=750, ratio=0.75)).shape == (1, 4, 12, 18)
    sharp = shrink_start(latents, GradualLatent(timesteps=750, unsharp=Unsharp(3, 0.5, 1.0)))
    plain = shrink_start(latents, GradualLatent(timesteps=750))
    assert torch.allclose(sharp, 2 * plain - gaussian_blur(plain, 3, 0.5), atol=1e-5)


@pytest.mark.parametrize(("width", "height"), [(72, 104), (64, 128), (200, 88)])
def test_pictures_have_exactly_the_size_asked_for(sd1, generate, width, height):
    result = generate(sd1.folder, *GROW, "--steps", 8, "--W", width, "--H", height, "--prompt", "a --d 1")
    assert result.pictures[0].shape == (height, width, 3)
    assert 'Gradual Latent: "timesteps 750, ratio 0.5' in Image.open(result.files[0]).text["parameters"]


def test_prompt_options_hold_for_their_line_and_pictures_for_themselves(sd1, generate, tmp_path):
    lines = tmp_path / "lines.txt"
    lines.write_text("a --d 1 --glt 750 --gle 1\nb --d 2\nc --d 3 --glr 0.75 --gle 1\nd --d 4 --glt 750 --gle 1\n")
    options = ["--sampler", "euler_a", "--steps", 8, "--W", 128, "--H", 128, "--sequential_file_name"]
    together = generate(sd1.folder, *options, "--batch_size", 4, "--from_file", lines).pictures
    for number, line in enumerate(lines.read_text().splitlines()):
        out = tmp_path / str(number)
        alone = generate(sd1.folder, *options, "--prompt", line, outdir=out).pictures[0]
        assert np.abs(together[number] - alone).max() <= ONE_LEVEL
    plain = generate(sd1.folder, *options, "--prompt", "a --d 1", outdir=tmp_path / "plain").pictures[0]
    assert np.abs(together[0] - plain).max() > 10


def test_it_works_with_inpainting_and_highres_fix(sd1, generate, tmp_path):
    Image.new("RGB", (64, 64), "teal").save(tmp_path / "source.png")
    mask = Image.new("L", (64, 64))
    mask.paste(255, (0, 0, 32, 64))
    mask.save(tmp_path / "mask.png")
    masked = ["--image_path", tmp_path / "source.png", "--mask_path", tmp_path / "mask.png", "--strength", 1]
    options = [*GROW, "--steps", 8, "--prompt", "a --d 1"]
    assert generate(sd1.folder, *options, *masked).pictures[0].shape == (64, 64, 3)
    highres = generate(sd1.folder, *options, "--highres_fix_scale", 0.5, "--W", 128, "--strength", 0.9)
    assert highres.pictures[0].shape == (64, 128, 3)


@pytest.mark.parametrize(
    ("options", "line", "message"),
    [
        (["--gradual_latent_timesteps", 750], "a", "Gradual Latent: works with the sampler euler_a only"),
        ([], "a --glr 0.5", "Gradual Latent: works with the sampler euler_a only"),
        (
            [*GROW[:4], "--W", 128, "--H", 128],
            "a",
            "never reaches the full size; it grows 1 times in these steps",
        ),
        (
            ["--gradual_latent_ratio", 0.5],
            "a",
            "--gradual_latent_ratio: does nothing by itself; give",
        ),
        (["--gradual_latent_unsharp_params", "2,1,1"], "a", "a kernel's size is odd; use 1 or 3"),
        (["--gradual_latent_unsharp_params", "3,1"], "a", "has 2 values; write SIZE,SIGMA,STRENGTH"),
        ([*GROW, "--gradual_latent_unsharp_params", "9,1,1"], "a", "unsharp kernel is too large for this picture"),
        (GROW, "a --glr 1.5", "--glr 1.5 (column 3): out of range"),
        (GROW, "a --w 8 --h 8 --glr 0.5", "leaves no latent of a picture this small; use a ratio of 1 or more"),
    ],
)
def test_what_cannot_work_is_refused(sd1, generate, options, line, message):
    result = generate(sd1.folder, *options, "--prompt", line)
    assert (result.status, result.files) == (2, [])
    assert message in result.stderr and result.stderr.count("\n") == 1
