"""Samplers and schedules: every pair of them, as diffusers has them, by each picture's own words."""

import json
import logging
import warnings
from copy import deepcopy
from itertools import pairwise

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from library.draw.samplers import begin_schedule, draw_noise, make_scheduler, run_from, steps_of
from library.files.prediction import TRAINING_SCHEDULE
from library.plan.job import Job
from library.settings.noise_schedule import NoiseSchedule
from library.settings.sampler_names import NamedSampler, a1111_name, sampler_name
from library.settings.samplers import NOISE_LEVELS, SAMPLERS

PAIRS = [(name, schedule) for name, sampler in SAMPLERS.items() for schedule in sampler.schedules]
PAIRS += [(name, "timesteps") for name, sampler in SAMPLERS.items() if sampler.timesteps]
EXPLICIT = (999, 850, 700, 549, 400, 249, 120, 30)


def objects(result) -> list[dict]:
    assert result.status == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


def make_job(name="ddim", schedule="own", *, steps=8, source=None, **changes) -> Job:
    fixed = {"prompt": "", "raw_prompt": "", "where": "", "file": None, "seed": 0, "width": 64, "height": 64}
    if schedule == "timesteps":
        schedule, changes = "own", changes | {"timesteps": EXPLICIT[:steps]}
    return Job(**fixed, sampler=name, schedule=schedule, steps=steps, source=source, **changes)


def draw(job: Job, seeds, scheduler=None) -> tuple[torch.Tensor, int]:
    """Latents drawn as the pipeline does with something smooth for a model, and how often that was asked."""
    noise = draw_noise(seeds, (2, 4, 4), job)
    scheduler = scheduler or begin_schedule(job, NoiseSchedule())
    timesteps = run_from(scheduler, job.steps - job.steps_run)
    latents = noise.start * scheduler.init_noise_sigma
    if job.is_img2img:
        latents = scheduler.add_noise(torch.ones(latents.shape), noise.source, timesteps[:1].expand(len(seeds)))
    for timestep in timesteps:
        sample = scheduler.scale_model_input(latents, timestep)
        latents = scheduler.step(0.9 * torch.tanh(sample), timestep, latents, **noise.step_arguments).prev_sample
    assert steps_of(scheduler, timesteps)[-1] == job.steps_run - 1
    return latents, len(timesteps)


def evaluations(name: str, steps: int) -> int:
    if name == "pndm":  # four for each step of its Runge-Kutta start
        return steps + 3 * min(3, steps - 1)
    return 2 * steps - 1 if name in ("heun", "dpm_2", "dpm_2_a") else steps


@pytest.mark.parametrize(("name", "schedule"), PAIRS)
def test_every_pair(name, schedule, caplog):
    """Finite, without a warning, as often evaluated as it should be, and alone what it is in a batch."""
    sampler, seeds = SAMPLERS[name], (3, 4)
    begun_late = {"source": "x.png", "strength": 0.5}
    kinds = [("epsilon", False, {}), ("v_prediction", False, begun_late), ("v_prediction", True, {})]
    with warnings.catch_warnings(), caplog.at_level(logging.WARNING, "diffusers"):
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "__array", DeprecationWarning)  # diffusers with NumPy 2, as in pyproject.toml
        if schedule == "timesteps" and name in ("lcm", "tcd"):  # diffusers doubts timesteps of others than the training
            caplog.set_level(logging.ERROR, "diffusers")
        for prediction, zero_snr, changes in kinds[: 2 + sampler.zero_snr]:
            job = make_job(name, schedule, **changes)
            scheduler = begin_schedule(job, NoiseSchedule(prediction, zero_snr))
            together, count = draw(job, seeds, deepcopy(scheduler))  # to make dpm_2's takes longer than to draw with it
            assert together.isfinite().all()
            assert count == evaluations(name, job.steps_run)
            alone, _ = draw(job, seeds[1:], scheduler)
            # sums over a batch may be ordered otherwise, latents are about as large as 1
            torch.testing.assert_close(alone[0], together[1], rtol=1e-4, atol=1e-4)
    assert not [record for record in caplog.records if record.name.startswith("diffusers")]


def test_noise_of_steps_is_each_pictures_own():
    """The same start and another noise in the steps: pictures of samplers that draw none stay as they are."""
    for name, sampler in SAMPLERS.items():
        job = make_job(name, steps=4)
        scheduler = begin_schedule(job, NoiseSchedule())
        noise = draw_noise([1, 1], (2, 4, 4), job)
        if sampler.draws_noise:
            noise.step_arguments["generator"][1].manual_seed(2)
        latents = noise.start * scheduler.init_noise_sigma
        for timestep in scheduler.timesteps:
            sample = scheduler.scale_model_input(latents, timestep)
            latents = scheduler.step(0.9 * torch.tanh(sample), timestep, latents, **noise.step_arguments).prev_sample
        assert (not torch.equal(*latents)) == sampler.draws_noise, name


# ---------------------------------------------------------------------------------------------------------------------
# Schedules

THEIRS = {
    "unipc": ("UniPCMultistepScheduler", {}),
    "deis": ("DEISMultistepScheduler", {}),
    "sa_solver": ("SASolverScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "lms": ("LMSDiscreteScheduler", {}),
    "dpm_2": ("KDPM2DiscreteScheduler", {}),
    "dpm_2_a": ("KDPM2AncestralDiscreteScheduler", {}),
    "dpmsolver++": ("DPMSolverMultistepScheduler", {}),
    "dpmsolver++_sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "dpmsolver++_3m": ("DPMSolverMultistepScheduler", {"solver_order": 3}),
    "dpmsingle": ("DPMSolverSinglestepScheduler", {}),
    "ddpm": ("DDPMScheduler", {"timestep_spacing": "leading"}),
    "ddim": ("DDIMScheduler", {"timestep_spacing": "leading"}),
}


@pytest.mark.parametrize("name", THEIRS)
def test_schedules_are_diffusers_own(name):
    kind, arguments = THEIRS[name]
    offset = {} if name == "dpmsingle" else {"steps_offset": 1}
    schedules = SAMPLERS[name].schedules
    for schedule in schedules if not name.startswith("dpm_2") else schedules[-2:]:  # slow to make
        said = {f"use_{schedule}_sigmas": True} if schedule in NOISE_LEVELS else {"timestep_spacing": schedule}
        said = arguments | ({} if schedule == "own" else said)
        theirs = getattr(diffusers, kind)(**TRAINING_SCHEDULE, **offset, **said)
        theirs.set_timesteps(13)
        ours = begin_schedule(make_job(name, schedule, steps=13), NoiseSchedule())
        assert torch.equal(ours.timesteps, theirs.timesteps), schedule
        if hasattr(theirs, "sigmas"):
            assert torch.equal(ours.sigmas, theirs.sigmas), schedule


def test_schedules_have_the_levels_of_their_papers():
    levels = begin_schedule(make_job("euler", "karras", steps=10), NoiseSchedule()).sigmas
    low, high = 0.02916753850877285, 14.614643096923828  # the training's
    ramp = torch.linspace(0, 1, 10, dtype=torch.float64)
    karras = (high ** (1 / 7) + ramp * (low ** (1 / 7) - high ** (1 / 7))) ** 7
    torch.testing.assert_close(levels[:-1].double(), karras, rtol=1e-4, atol=0)
    levels = begin_schedule(make_job("euler", "exponential", steps=10), NoiseSchedule()).sigmas
    torch.testing.assert_close(levels[:-1].double(), high * (low / high) ** ramp, rtol=1e-4, atol=0)


@pytest.mark.parametrize("name", [name for name, sampler in SAMPLERS.items() if sampler.timesteps])
def test_timesteps_reach_the_scheduler_as_given(name):
    given = (999, 749, 499, 249)
    scheduler = begin_schedule(make_job(name, steps=4, timesteps=given), NoiseSchedule())
    seen = dict.fromkeys(scheduler.timesteps.tolist())  # a method of two evaluations a step has each but one twice
    assert tuple(seen) == given
    job = make_job(name, steps=4, timesteps=given, source="x.png", strength=0.5)
    assert run_from(begin_schedule(job, NoiseSchedule()), job.steps - job.steps_run)[0] == 499


def test_steps_of_evaluations():
    def steps(name, steps, left_out=0):
        scheduler = begin_schedule(make_job(name, steps=steps), NoiseSchedule())
        return steps_of(scheduler, run_from(scheduler, left_out))

    assert steps("euler", 3) == [0, 1, 2]
    assert steps("heun", 3) == steps("dpm_2_a", 3) == [0, 0, 1, 1, 2]
    assert steps("heun", 4, 2) == [0, 0, 1]
    assert steps("pndm", 5) == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 4]
    assert steps("pndm", 5, 3) == [0, 0, 0, 0, 1]


# ---------------------------------------------------------------------------------------------------------------------
# Noise that is asked for


def test_churned_noise_is_seen_by_the_model():
    """Karras et al. 2022, algorithm 2 with steps of Euler, written out; the first level is the highest there is."""
    job = make_job("euler", "karras", s_churn=4.0)
    drawn, _ = draw(job, [1])
    levels = begin_schedule(make_job("euler", "karras"), NoiseSchedule()).sigmas
    noise = draw_noise([1], (2, 4, 4), job)
    latents, [generator] = noise.start * levels[0], noise.step_arguments["generator"]
    for place, (level, following) in enumerate(pairwise(levels)):
        raised = level * (1 + min(4.0 / 8, 2**0.5 - 1)) if place else level
        raised = min(raised, levels[0])
        if raised > level:
            latents = latents + (raised**2 - level**2) ** 0.5 * torch.randn(latents.shape, generator=generator)
        prediction = 0.9 * torch.tanh(latents / (raised**2 + 1) ** 0.5)
        latents = latents + prediction * (following - raised)
    torch.testing.assert_close(drawn, latents, rtol=1e-4, atol=1e-4)  # float32 in another order
    assert not torch.equal(drawn, draw(make_job("euler", "karras"), [1])[0])
    together, _ = draw(job, [5, 1])
    torch.testing.assert_close(together[1], drawn[0])


def test_churned_levels_are_what_the_model_is_told():
    plain = begin_schedule(make_job("euler"), NoiseSchedule())
    churned = begin_schedule(make_job("euler", s_churn=0.8), NoiseSchedule())
    torch.testing.assert_close(churned.sigmas[1:-1], plain.sigmas[1:-1] * 1.1)  # 0.8 over 8 steps
    assert churned.sigmas[0] == plain.sigmas[0]  # the highest that the model knows
    trained = ((1 - plain.alphas_cumprod) / plain.alphas_cumprod).sqrt()
    for timestep, level in zip(churned.timesteps, churned.sigmas):
        assert trained[int(timestep)] * 0.999 <= level <= trained[min(999, int(timestep) + 1)] * 1.001
    assert begin_schedule(make_job("euler", s_churn=1e-9), NoiseSchedule()).timesteps.tolist() == pytest.approx(
        plain.timesteps.tolist(), abs=0.01
    )


def test_eta_is_a_share_of_noise():
    for name, usual in (("ddim", 0.0), ("tcd", 0.3)):
        without, own, same, other = (draw(make_job(name, eta=eta), [1])[0] for eta in (0.0, None, usual, 0.8))
        assert torch.equal(own, same)
        assert not torch.equal(own, other)
        assert torch.equal(own, without) == (usual == 0)
    # DDIM with all of the noise is DDPM (Song et al. 2021, https://arxiv.org/abs/2010.02502, section 4.1)
    ddim, ddpm = (draw(make_job(name, **how), [1])[0] for name, how in (("ddim", {"eta": 1.0}), ("ddpm", {})))
    torch.testing.assert_close(ddim, ddpm, rtol=1e-3, atol=1e-3)


# ---------------------------------------------------------------------------------------------------------------------
# Names


@pytest.mark.parametrize(
    ("text", "name", "schedule"),
    [
        ("DPM++ 2M Karras", "dpmsolver++", "karras"),
        ("dpm++ 2m  karras", "dpmsolver++", "karras"),
        ("DPM++ 2M", "dpmsolver++", None),
        ("Euler a", "euler_a", None),
        ("Euler", "euler", None),
        ("DPM++ 2M SDE Exponential", "dpmsolver++_sde", "exponential"),
        ("DPM++ 2M SDE Karras", "dpmsolver++_sde", "karras"),
        ("DPM++ 2M SDE Heun Karras", "dpmsolver++_sde_heun", "karras"),
        ("DPM++ 3M SDE", "dpmsolver++_3m_sde", None),
        ("Heun", "heun", None),
        ("LMS Karras", "lms", "karras"),
        ("DPM2 a Karras", "dpm_2_a", "karras"),
        ("DPM2", "dpm_2", None),
        ("DDIM", "ddim", None),
        ("PLMS", "pndm", None),
        ("UniPC", "unipc", None),
        ("LCM", "lcm", None),
        ("TCD", "tcd", None),
        ("DPM++ 2M SGM Uniform", "dpmsolver++", "trailing"),
        ("k_dpm_2_a", "dpm_2_a", None),
        ("dpmsolver+++", "dpmsolver++", None),
    ],
)
def test_names(text, name, schedule):
    assert sampler_name(text) == NamedSampler(name, schedule)


def test_names_are_read_as_they_are_written():
    for name, schedule in PAIRS:
        written = a1111_name(name, schedule) if schedule != "timesteps" else SAMPLERS[name].a1111_name
        named = sampler_name(written)
        assert named.name == name
        assert named.schedule in (None, schedule)


def refusal(generate, models, *options) -> str:
    result = generate(models.folder, *options)
    assert (result.status, result.stderr.count("\n"), result.files) == (2, 1, []), result.stderr
    return result.stderr.removeprefix("error: ").rstrip()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--sampler", "Restart"), "Restart: the web UI's sampler of that name is not here; the nearest is heun"),
        (("--sampler", "DPM++ SDE Karras"), "the nearest is dpmsingle_sde"),
        (("--sampler", "DPM fast"), "the nearest is dpmsolver"),
        (("--sampler", "DPM adaptive"), "the nearest is dpmsolver++_3m"),
        (("--sampler", "DPM++ 2M Karass"), "no such sampler; did you mean DPM++ 2M Karras?"),
        (("--schedule", "karas"), "--schedule karas: no such schedule; did you mean karras?"),
        (("--sampler", "DPM++ 2M Karras", "--schedule", "beta"),
         "--schedule beta: the sampler's name says karras; leave one of them out"),
        (("--sampler", "ddim", "--schedule", "karras"),
         "--schedule karras: ddim has only own, linspace, leading, trailing; use such a one, or one of lms,"),
        (("--sampler", "Euler a Karras"), "--schedule karras: euler_a has only own, linspace, leading, trailing; use"),
        (("--sampler", "lcm", "--schedule", "trailing"), "--schedule trailing: lcm has a schedule of its own; use"),
        (("--sampler", "lms", "--timesteps", "9,1"),
         "--timesteps 9,1: lms does not take any; use one of euler, heun, dpmsolver,"),
        (("--sampler", "euler", "--timesteps", "9,1", "--schedule", "karras"),
         "--timesteps 9,1: are a schedule, and so is karras; leave one of them out"),
        (("--sampler", "euler", "--timesteps", "9,5,1"), "--steps 2: --timesteps are 3; leave the steps out"),
        (("--sampler", "euler", "--timesteps", "9,9"), "--timesteps 9,9: do not fall; write each smaller than the one"),
        (("--sampler", "euler", "--timesteps", "1000,9"), "1000,9: out of range; write a whole number from 0"),
        (("--sampler", "euler", "--eta", "0.5"), "--eta 0.5: euler has no share of noise to choose; use one of ddim"),
        (("--s_churn", "5"), "--s_churn 5: ddim has no noise stirred in; use one of euler, or leave it out"),
        (("--schedule", "trailing", "--steps", "122"),
         "122 steps: diffusers spaces one too many; use 120 steps, or another schedule than trailing"),
        (("--sampler", "euler", "--timesteps", "9,1", "--highres_fix_scale", "0.5", "--highres_fix_steps", "7"),
         "--highres_fix_steps 7: both stages go through the 2 --timesteps; leave it out"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused(sd1, generate, options, message):
    assert message in refusal(generate, sd1, "--prompt", "a", *options)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("a --sampler ddim --schedule karras", "--schedule karras (FILE:1): ddim has only own"),
        ("a --sampler DPM++ 2M Karras --schedule beta", "--schedule beta (FILE:1): the sampler's name says karras"),
        ("a --sampler lms --s 3 --timesteps none --eta 0.5", "--eta 0.5 (FILE:1): lms has no share"),
        (
            "a --timesteps 999,5 --s 3",
            "--s 3 (FILE:1): --timesteps are 2; leave the steps out, or write --timesteps none",
        ),
        ("a --sampler tcd --s 51", "51 steps (FILE:1): the sampler tcd does 1 to 50 steps"),
        ("a --sampler heun --glt 700", "Gradual Latent (FILE:1): works with the sampler euler_a only"),
        ("a --sampler nothing --l 3", "--sampler nothing (FILE:1, column 3): no such sampler"),
    ],
)
def test_lines_are_refused_with_their_place(sd1, generate, tmp_path, line, message):
    file = tmp_path / "p.txt"
    file.write_text(line)
    assert message.replace("FILE", str(file)) in refusal(generate, sd1, "--from_file", file, "--sampler", "euler")


def test_guidance_and_zero_snr_are_checked_for_each_line(sd2, generate, tmp_path):
    file = tmp_path / "p.txt"
    file.write_text("a\nb --sampler heun")
    zero = generate(sd2.folder, *sd2.options, "--zero_terminal_snr", "--from_file", file)
    assert f"error: --zero_terminal_snr ({file}:2): heun cannot begin at pure noise; use one of ddim" in zero.stderr
    guided = generate(sd2.folder, *sd2.options, "--clip_guidance_scale", 100, "--from_file", file)
    assert f"error: --sampler heun ({file}:2): cannot be guided by CLIP or VGG16; use one of ddim" in guided.stderr


# ---------------------------------------------------------------------------------------------------------------------
# A file that compares samplers

LINES = """a --d 1
b --d 2 --sampler DPM++ 2M SDE Karras
c --d 3
d --d 4 --sampler dpmsolver++_sde --schedule karras
e --d 5 --sampler lcm --timesteps 999,499,99 --l 1
f --d 6 --sampler ddim --eta 0.5
g --d 7 --schedule trailing
"""


def test_a_file_compares_samplers(sd1, generate, tmp_path):
    """Batches fill with pictures of equal samplers, and each picture is what it is alone and by options."""
    file = tmp_path / "p.txt"
    file.write_text(LINES)
    common = ("--from_file", file, "--batch_size", 2, "--sequential_file_name", "--sampler", "Euler a", "--steps", 4)
    planned = objects(generate(sd1.folder, *common, "--dry_run", "--json"))
    assert [each["batch"] for each in planned] == [1, 2, 1, 2, 3, 4, 5]
    assert [each["sampler"] for each in planned[3:]] == ["dpmsolver++_sde", "lcm", "ddim", "euler_a"]
    assert [each["schedule"] for each in planned] == ["own", "karras", "own", "karras", "own", "own", "trailing"]
    assert (planned[4]["timesteps"], planned[4]["steps"], planned[5]["eta"]) == ([999, 499, 99], 3, 0.5)
    together = generate(sd1.folder, *common)
    assert together.status == 0, together.stderr
    options = {
        1: ("--prompt", "b", "--seed", 2, "--sampler", "dpm++ 2m sde karras", "--steps", 4),
        4: ("--prompt", "e", "--seed", 5, "--sampler", "lcm", "--timesteps", "999,499,99", "--steps", 3, "--scale", 1),
        5: ("--prompt", "f", "--seed", 6, "--eta", 0.5, "--steps", 4),
        6: ("--prompt", "g", "--seed", 7, "--sampler", "euler_a", "--schedule", "SGM Uniform", "--steps", 4),
    }
    for place, given in options.items():
        alone = generate(sd1.folder, *given, outdir=tmp_path / str(place))
        # a level: sums over a batch are ordered otherwise
        assert np.abs(alone.pictures[0] - together.pictures[place]).max() <= 1, place
    told = [Image.open(picture).info["parameters"] for picture in together.files]
    assert "Sampler: Euler a, CFG scale" in told[0]
    assert "Sampler: DPM++ 2M SDE Karras, Schedule type: Karras, CFG scale" in told[1] and "Karras" in told[3]
    assert "Steps: 3, Sampler: LCM" in told[4] and 'Timesteps: "999, 499, 99"' in told[4]
    assert "Eta: 0.5" in told[5] and "Timestep spacing: trailing" in told[6]
    assert Image.open(together.files[1]).info["sampler"] == "dpmsolver++_sde"
    resumed = generate(sd1.folder, *common, "--resume", "--dry_run", "--json")
    assert all(each["done"] for each in objects(resumed))


def test_a_name_in_a_config_file(sd1, generate, tmp_path):
    (tmp_path / "c.toml").write_text('sampler = "DPM++ 2M Karras"\n')
    (told,) = objects(generate(sd1.folder, "--config", tmp_path / "c.toml", "--prompt", "a", "--dry_run", "--json"))
    assert (told["sampler"], told["schedule"]) == ("dpmsolver++", "karras")
    other = generate(
        sd1.folder, "--config", tmp_path / "c.toml", "--prompt", "a --sampler euler_a", "--dry_run", "--json"
    )
    assert (objects(other)[0]["sampler"], objects(other)[0]["schedule"]) == ("euler_a", "own")


def test_both_stages_go_through_the_timesteps(sd1, generate):
    options = ("--sampler", "euler", "--timesteps", "999,600,300", "--steps", 3, "--highres_fix_scale", 0.5, "--W", 128)
    result = generate(sd1.folder, "--prompt", "a", *options, "--H", 128, "--json")
    assert objects(result)[0]["highres"]["steps"] == 3
    assert "First stage steps: 3" in Image.open(result.files[0]).info["parameters"]


def test_a_scheduler_is_fresh():
    first, second = (make_scheduler(SAMPLERS["euler"], NoiseSchedule()) for _ in range(2))
    assert first is not second
