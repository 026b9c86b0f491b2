"""Highres. fix: two stages that are pictures of their own, three ways of enlarging, names, metadata, refusals."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file

from library.errors import InputError
from library.plan.job import Job
from library.plan.stages import first_stage_name, stages
from library.settings.highres import HighresFix
from library.settings.upscaler import UpscalerSpec, check_upscaler, upscaler_arguments
from tools.latent_upscaler import LatentUpscaler, create_upscaler

HIGHRES = ["--W", 128, "--H", 64, "--steps", 4, "--strength", 0.5]
HIGHRES += ["--highres_fix_scale", 0.5, "--highres_fix_steps", 3, "--sequential_file_name"]
# float32 sums in another order move a value by a fraction of a level, which rounding can turn into one
ONE_LEVEL = 1


@pytest.fixture(scope="session")
def upscaler_file(tmp_path_factory) -> Path:
    """A small upscaler with statistics in its normalisations, in the published layout."""
    torch.manual_seed(0)
    upscaler = LatentUpscaler(width=8, narrow_width=6, blocks=8)
    state = {name: value.clone() for name, value in upscaler.state_dict().items()}
    for name, value in state.items():
        if name.endswith(("running_mean", "bias")):
            value.normal_(std=0.1)
        elif name.endswith("running_var"):
            value.uniform_(0.5, 2)
    path = tmp_path_factory.mktemp("upscaler") / "upscaler.safetensors"
    save_file(state, path)
    return path


@pytest.mark.parametrize(
    ("size", "scale", "first"),
    [((192, 144), 0.5, (96, 64)), ((192, 144), 0.7, (128, 96)), ((64, 48), 0.5, (32, 24)), ((16, 8), 0.5, (8, 8))],
)
def test_the_first_stages_sides_are_rounded_down(size, scale, first):
    """To multiples of 32 pixels, as sd-scripts does it; below that to latent cells."""
    highres = HighresFix(scale=scale, steps=3, save_first=False, enlarge_latents=False)
    job = Job(prompt="", seed=1, raw_prompt="", where="", file=Path("im_1.png"), width=size[0], height=size[1])
    small, large = stages(job, highres)
    assert ((small.width, small.height), (large.width, large.height)) == (first, size)


def test_the_stages_are_a_small_picture_and_img2img_on_its_enlargement(sd1, generate, tmp_path):
    options = ["--prompt", "a cat --n dog --d 7"]
    both = generate(sd1.folder, *HIGHRES, "--highres_fix_save_1st", *options)
    first, final = both.files
    assert [file.name for file in both.files] == ["im_0000001.png", "im_1000001.png"]
    alone = generate(sd1.folder, "--W", 64, "--H", 32, "--steps", 3, *options, outdir=tmp_path / "small")
    assert np.array_equal(both.pictures[0], alone.pictures[0])

    enlarged = tmp_path / "enlarged.png"
    Image.open(first).resize((128, 64), Image.Resampling.LANCZOS).save(enlarged)
    redrawn = generate(
        sd1.folder, *HIGHRES[:8], "--image_path", enlarged, "--prompt", "a cat --n dog --d 8", outdir=tmp_path / "large"
    )
    assert np.abs(both.pictures[1] - redrawn.pictures[0]).max() <= ONE_LEVEL
    texts = Image.open(final).text
    assert (texts["seed"], texts["steps"]) == ("7", "4")
    assert "Denoising strength: 0.5, First stage: 64x32, First stage steps: 3, Upscaler: Lanczos" in texts["parameters"]
    assert "Size: 128x64" in texts["parameters"]
    texts = Image.open(first).text
    assert "Steps: 3" in texts["parameters"] and "Size: 64x32" in texts["parameters"]
    assert "Denoising" not in texts["parameters"]


@pytest.mark.parametrize("method", ["lanczos", "latents", "module"])
def test_a_picture_does_not_depend_on_its_neighbours(sd1, generate, tmp_path, upscaler_file, method):
    how = {
        "lanczos": [],
        "latents": ["--highres_fix_latents_upscaling"],
        "module": ["--highres_fix_upscaler", "tools.latent_upscaler"],
    }[method]
    if method == "module":
        how += ["--highres_fix_upscaler_args", f"weights={upscaler_file}"]
    lines = tmp_path / "lines.txt"
    lines.write_text("a cat --d 1\nlong hair, a dog --n cat --d 2\n")
    options = [*HIGHRES, *how, "--sampler", "euler_a", "--from_file", lines]
    together = generate(sd1.folder, *options, "--batch_size", 2, "--vae_batch_size", 1).pictures
    alone = generate(sd1.folder, *options, outdir=tmp_path / "alone").pictures
    assert len(together) == 2
    assert np.abs(np.stack(together) - np.stack(alone)).max() <= ONE_LEVEL


def test_an_upscaler_that_changes_nothing_is_lanczos(sd1, generate, tmp_path, upscaler_file):
    idle = create_upscaler(str(upscaler_file)).state_dict()
    idle["conv_final.weight"] = torch.zeros_like(idle["conv_final.weight"])
    idle["conv_final.bias"] = torch.zeros_like(idle["conv_final.bias"])
    path = tmp_path / "idle.safetensors"
    save_file({name: value.contiguous() for name, value in idle.items()}, path)
    how = ["--highres_fix_upscaler", "tools.latent_upscaler", "--highres_fix_upscaler_args", f"weights={path}"]
    prompt = ["--prompt", "a cat --d 3"]
    refined = generate(sd1.folder, *HIGHRES, *how, *prompt)
    plain = generate(sd1.folder, *HIGHRES, *prompt, outdir=tmp_path / "plain")
    assert np.abs(refined.pictures[0] - plain.pictures[0]).max() <= ONE_LEVEL
    assert "Upscaler: tools.latent_upscaler" in Image.open(refined.files[0]).text["parameters"]


def test_the_upscaler_computes_what_its_format_says(upscaler_file):
    upscaler = create_upscaler(str(upscaler_file))
    state = upscaler.state_dict()

    def conv(name: str, x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(x, state[f"{name}.weight"], padding=1)

    def norm(name: str, x: torch.Tensor) -> torch.Tensor:
        mean, variance, weight, bias = (
            state[f"{name}.{part}"][:, None, None] for part in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / (variance + 1e-5).sqrt() * weight + bias

    latents = torch.randn(2, 4, 6, 5, generator=torch.Generator().manual_seed(1))
    x = norm("bn1", conv("conv1", latents)).relu()
    for group in ((1, 2, 3, 4), (5, 6, 7, 8)):
        before = x
        for block in (f"resblock{number}" for number in group):
            inner = norm(f"{block}.bn1", conv(f"{block}.conv1", x)).relu()
            x = (norm(f"{block}.bn2", conv(f"{block}.conv2", inner)) + x).relu()
        x = x + before
    x = norm("bn2", conv("conv2", x)).relu()
    x = norm("bn3", conv("conv3", x))
    x = F.conv2d(x, state["conv_final.weight"], state["conv_final.bias"]) + latents
    assert torch.allclose(upscaler(latents), x, atol=1e-5)  # float32, sums in another order


def test_the_published_upscaler_fits():
    shapes = {name: tuple(value.shape) for name, value in LatentUpscaler().state_dict().items()}
    assert shapes["conv1.weight"] == (128, 4, 3, 3) and "conv1.bias" not in shapes
    assert shapes["resblock20.conv2.weight"] == (128, 128, 3, 3) and "resblock21.conv1.weight" not in shapes
    assert shapes["conv2.weight"] == (64, 128, 3, 3) and shapes["conv3.weight"] == (64, 64, 3, 3)
    assert shapes["conv_final.weight"] == (4, 64, 1, 1) and shapes["conv_final.bias"] == (4,)


def test_numbers_go_on_after_both_stages(sd1, generate, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "im_0000004.png").write_bytes(b"")
    assert [f.name for f in generate(sd1.folder, *HIGHRES, "--prompt", "a").files] == ["im_1000005.png"]
    names = [f.name for f in generate(sd1.folder, *HIGHRES[:-1], "--highres_fix_save_1st", "--prompt", "a --d 9").files]
    assert [name[17:] for name in names] == ["_0000_9.png", "_1000_9.png"]


@pytest.mark.parametrize("name", ["im_{}000001.png", "im_20260101010101_{}000_1.png", "im_20260101010101_{}1234_1.png"])
def test_the_first_stage_has_a_zero_in_its_name(name):
    assert first_stage_name(name.format(1)) == name.format(0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--highres_fix_save_1st"], "--highres_fix_save_1st: is for Highres. fix; give --highres_fix_scale too"),
        (["--highres_fix_steps", 9], "--highres_fix_steps: is for Highres. fix"),
        (["--highres_fix_scale", 2], "--highres_fix_scale 2: out of range"),
        (["--highres_fix_scale", 0], "--highres_fix_scale 0: out of range"),
        ([*HIGHRES, "--strength", 0.1], "strength 0.1 of 4 steps: leaves no step to run; use a strength of 0.25"),
        ([*HIGHRES, "--highres_fix_steps", 3, "--sampler", "pndm"], "3 steps: the sampler pndm does 4 to 999 steps"),
        ([*HIGHRES, "--image_path", "x.png"], "--highres_fix_scale and --image_path: do not go together"),
        ([*HIGHRES, "--highres_fix_upscaler_args", "a=b"], "--highres_fix_upscaler_args: has no upscaler"),
        ([*HIGHRES, "--highres_fix_upscaler", "no.such"], "--highres_fix_upscaler no.such: no such Python module"),
        ([*HIGHRES, "--highres_fix_upscaler", "json"], "--highres_fix_upscaler json: is no upscaler"),
        ([*HIGHRES, "--highres_fix_upscaler", "tools.latent_upscaler"], "missing a required argument: 'weights'"),
    ],
)
def test_what_cannot_work_is_refused(sd1, generate, tmp_path, options, message):
    (tmp_path / "x.png").touch()
    options = [tmp_path / "x.png" if option == "x.png" else option for option in options]
    result = generate(sd1.folder, *options, "--prompt", "a cat")
    assert (result.status, result.files) == (2, [])
    assert message in result.stderr and result.stderr.count("\n") == 1


def test_an_upscaler_that_cannot_be_imported(sd1, generate, tmp_path, monkeypatch):
    (tmp_path / "broken_upscaler.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(tmp_path)
    result = generate(sd1.folder, *HIGHRES, "--highres_fix_upscaler", "broken_upscaler", "--prompt", "a cat")
    assert result.status == 2
    assert "error: --highres_fix_upscaler broken_upscaler: is no upscaler (division by zero)" in result.stderr


def test_weights_of_another_kind_are_refused(sd1, upscaler_file, tmp_path):
    with pytest.raises(InputError, match=r"no such file: weights=/no/where"):
        check_upscaler(UpscalerSpec("tools.latent_upscaler", (("weights", "/no/where"),)))
    with pytest.raises(InputError, match="is no latent upscaler"):
        create_upscaler(str(sd1.safetensors))
    state = {
        name: value for name, value in create_upscaler(str(upscaler_file)).state_dict().items() if "bn3" not in name
    }
    save_file({name: value.contiguous() for name, value in state.items()}, tmp_path / "part.safetensors")
    with pytest.raises(InputError, match=r"bn3"):
        create_upscaler(str(tmp_path / "part.safetensors"))


def test_upscaler_arguments_may_hold_equals_signs():
    assert upscaler_arguments("weights=a=b.pt; mode=1") == (("weights", "a=b.pt"), ("mode", "1"))
