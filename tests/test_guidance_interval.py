"""Guidance in a part of the steps: which ones, what is evaluated in the others, and what it goes together with."""

import html
import re
import shlex

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image
from safetensors.torch import save_file
from test_control_net import write_control_net
from test_regional_networks import write_network

from library.files.textual_inversion import XTI_LAYERS
from library.settings.cfg_interval import WHOLE_RUN, CfgInterval

# at 64 pixels the tiny model normalises groups of two numbers, which makes a rounding error a change of sign
SIZE = ("--W", 128, "--H", 128)
PARTIAL = ("--guidance_start", 0.25, "--guidance_end", 0.75)


def largest(first, second) -> int:
    assert len(first) == len(second) > 0
    return max(int(np.abs(a - b).max()) for a, b in zip(first, second))


@pytest.mark.parametrize(
    ("interval", "evaluations", "order", "guided"),
    [
        (WHOLE_RUN, 4, 1, [True] * 4),
        (CfgInterval(0.0, 0.0), 4, 1, [False] * 4),
        (CfgInterval(0.25, 0.75), 4, 1, [False, True, True, False]),
        (CfgInterval(0.2, 1.0), 10, 1, [False] * 2 + [True] * 8),
        (CfgInterval(0.0, 0.3), 10, 1, [True] * 3 + [False] * 7),
        # samplers of order 2 evaluate twice a step, but for the last
        (CfgInterval(0.25, 0.75), 7, 2, [False] * 2 + [True] * 4 + [False]),
    ],
)
def test_which_steps_are_guided(interval, evaluations, order, guided):
    assert interval.guided(evaluations, order) == guided


@pytest.fixture
def rows(monkeypatch):
    """How many rows the U-Net is given, call by call."""
    seen = []
    real = UNet2DConditionModel.forward

    def counting(self, sample, *rest, **named):
        seen.append(len(sample))
        return real(self, sample, *rest, **named)

    monkeypatch.setattr(UNet2DConditionModel, "forward", counting)
    return seen


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--steps", 4], [2, 4, 4, 2]),
        (["--steps", 4, "--negative_scale", 2], [2, 6, 6, 2]),
        (["--steps", 4, "--sampler", "heun"], [2, 2, 4, 4, 4, 4, 2]),
        (["--steps", 2, "--highres_fix_scale", 0.5, "--highres_fix_steps", 4, "--strength", 1], [2, 4, 4, 2, 2, 4]),
    ],
)
def test_other_steps_evaluate_the_prompt_alone(sd1, generate, rows, options, expected):
    batch = ("--images_per_prompt", 2, "--batch_size", 2)
    result = generate(sd1.folder, "--prompt", "a cat --n fog", *batch, *PARTIAL, *options)
    assert result.status == 0, result.stderr
    assert rows == expected


def test_the_whole_interval_is_exact(sd1, generate, rows):
    common = ("--prompt", "a cat --n fog --d 1", "--steps", 4)
    exact, whole = (generate(sd1.folder, *common, *o) for o in ([], ["--guidance_start", 0, "--guidance_end", 1]))
    assert largest(exact.pictures, whole.pictures) == 0
    assert rows == [2] * 8
    assert Image.open(exact.files[0]).info == Image.open(whole.files[0]).info


def test_a_part_of_the_guidance_is_something_of_its_own(sd1, generate):
    common = (*SIZE, "--steps", 4, "--prompt")
    part = generate(sd1.folder, *common, "a cat --n fog --d 1", *PARTIAL).pictures
    for line in ("a cat --n fog --d 1", "a cat --d 1 --l 1"):
        # a rounding error is one level
        assert largest(part, generate(sd1.folder, *common, line).pictures) > 3


def test_the_batch_does_not_matter(sd1, generate, tmp_path):
    """Each picture has its own scale; one without guidance, or with three branches, has a batch of its own."""
    lines = ["a cat --d 1 --n x", "a dog --d 2 --l 3", "a bird --d 3 --l 1", "a fish --d 4 --nl 2", "a cow --d 5 --l 9"]
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(lines))
    common = (*SIZE, "--steps", 4, "--sampler", "euler_a", *PARTIAL, "--from_file", file)
    together = generate(sd1.folder, *common, "--batch_size", 3, outdir=tmp_path / "3").pictures
    alone = generate(sd1.folder, *common, outdir=tmp_path / "1").pictures
    assert largest(together, alone) <= 1


@pytest.fixture(scope="module")
def files(sd1, tmp_path_factory):
    """What other features need, by a name for each file."""
    folder = tmp_path_factory.mktemp("files")
    halves = Image.new("RGB", (128, 128), (255, 0, 0))
    halves.paste((0, 255, 0), (64, 0, 128, 128))
    halves.save(folder / "halves.png")
    rng = torch.Generator().manual_seed(0)
    save_file({layer: torch.randn(2, 64, generator=rng) for layer in XTI_LAYERS}, folder / "exty.safetensors")
    (folder / "net").mkdir()
    return {
        "{halves}": folder / "halves.png",
        "{xti}": folder / "exty.safetensors",
        "{net}": write_control_net(folder / "net", sd1, 1) / "bare.safetensors",
        "{lora}": write_network(folder / "a.safetensors", sd1, "lora", 1),
        "{lora2}": write_network(folder / "b.safetensors", sd1, "lora", 2),
    }


CONTROL_NET = "--control_net_models {net} --guide_image_path {halves}"
LORAS = "--network_module networks.lora networks.lora --network_weights {lora} {lora2}"


@pytest.mark.parametrize(
    ("prompt", "options"),
    [
        ("a cat", ""),
        ("a cat", "--negative_scale 3 --sampler pndm --steps 4"),
        ("a cat AND a dog", "--mask_path {halves}"),
        ("a cat AND a dog", "--mask_path {halves} --negative_scale 3"),
        ("a cat AND a dog", f"--mask_path {{halves}} {LORAS}"),
        ("a cat", CONTROL_NET),
        ("a cat AND a dog", f"{CONTROL_NET} --negative_scale 2"),
        ("an exty cat", "--XTI_embeddings {xti}"),
        ("a cat", "--image_path {halves} --strength 0.5 --sampler dpm_2_a --steps 4"),
        ("a cat", "--image_path {halves} --mask_path {halves} --sampler heun"),
        ("a cat", "--highres_fix_scale 0.5 --highres_fix_steps 2 --sampler euler_a --steps 3"),
        ("a cat", "--ds_depth_1 2 --sampler dpmsolver++"),
        ("a cat", "--sampler euler_a --gradual_latent_timesteps 999 --gradual_latent_ratio_step 0.5 --steps 3"),
    ],
)
def test_no_step_guided_is_a_scale_of_1(sd1, generate, files, tmp_path, prompt, options):
    """With every feature, what is evaluated without guidance is the prompt's branch, its text and what goes with it."""
    words = [files.get(word, word) for word in options.split()]
    common = (*SIZE, *words, "--images_per_prompt", 2, "--batch_size", 2)
    lines = [f"{prompt} --n fog --d 1,2 {end}".strip() for end in ("--l 1", "")]
    plain = generate(sd1.folder, *common, "--prompt", lines[0], outdir=tmp_path / "1")
    unguided = generate(sd1.folder, *common, "--guidance_end", 0, "--prompt", lines[1], outdir=tmp_path / "0")
    assert (plain.status, unguided.status) == (0, 0), plain.stderr + unguided.stderr
    assert largest(plain.pictures, unguided.pictures) <= 1


def test_with_everything_at_once(sd1, generate, files, tmp_path):
    """Steps with and without guidance, regions, networks, XTI and a ControlNet: in a batch as alone."""
    options = f"--mask_path {{halves}} --XTI_embeddings {{xti}} {LORAS} {CONTROL_NET} --negative_scale 2"
    common = (*SIZE, *(files.get(word, word) for word in options.split()), *PARTIAL, "--steps", 4)
    line = ("--images_per_prompt", 2, "--prompt", "an exty cat AND a dog --n fog --d 1,2")
    together = generate(sd1.folder, *common, *line, "--batch_size", 2, outdir=tmp_path / "2")
    assert together.status == 0, together.stderr
    assert largest(together.pictures, generate(sd1.folder, *common, *line, outdir=tmp_path / "1").pictures) <= 1


def test_pictures_say_it_and_can_be_made_again(sd1, generate, tmp_path):
    file = tmp_path / "p.txt"
    file.write_text("a cat --d 1\na dog --d 2 --l 1\n")
    command = (sd1.folder, "--from_file", file, "--guidance_start", 0.2, "--guidance_end", 0.75, "--steps", 4)
    result = generate(*command, "--html")
    guided, plain = (Image.open(path).info["parameters"] for path in result.files)
    assert "Guidance start: 0.2, Guidance end: 0.75" in guided
    assert "Guidance" not in plain
    page = (tmp_path / "out" / "index.html").read_text()
    first = shlex.split(html.unescape(re.findall(r"<pre>(.*?)</pre>", page, re.DOTALL)[0]))[2:]
    again = generate(*first[1:], outdir=tmp_path / "again")
    assert largest(result.pictures[:1], again.pictures) == 0
    # a run that is gone on with is the same one
    other = generate(*command[:-4], "--guidance_end", 0.5, "--steps", 4, "--resume")
    assert other.status == 2
    assert "--guidance_end 0.5: the run to resume has 0.75" in other.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--guidance_start", "0.8", "--guidance_end", "0.3"],
            "--guidance_start 0.8: guidance ends before that, at",
        ),
        (["--guidance_end", "1.5"], "--guidance_end 1.5: out of range; write a number not below 0, up to 1"),
        (["--guidance_start", "nan"], "--guidance_start nan: not a finite number"),
        (["--guidance_end", "0.5", "--scale", "1"], "--guidance_end 0.5: there is no guidance at a scale of 1 or less"),
        (["--guidance_start", "0.5", "--scale", "1"], "--guidance_start 0.5: there is no guidance at a scale of 1"),
    ],
)
def test_bad_options(sd1, generate, options, message):
    result = generate(sd1.folder, "--prompt", "a cat", *options)
    assert result.status == 2
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1
