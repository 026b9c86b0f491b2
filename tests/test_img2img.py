"""img2img and inpainting, as a user runs them."""

import numpy as np
import pytest
import torch
from PIL import Image

import gen_img_diffusers
from library.draw.sources import Start, encode, pixels_to_tensor
from library.files.pictures import read_picture
from library.plan.planning import make_plan

WHOLE = ("--W", 64, "--H", 64)


@pytest.fixture
def folder(tmp_path):
    """Five different pictures of 64 × 64."""
    folder = tmp_path / "in"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(5):
        pixels = rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((64, 64), Image.Resampling.BICUBIC).save(folder / f"p{number}.png")
    return folder


def largest(first, second) -> int:
    assert len(first) == len(second) > 0
    return max(int(np.abs(a - b).max()) for a, b in zip(first, second))


@pytest.mark.parametrize("sampler", ["ddim", "euler_a", "dpm_2_a", "pndm"])
def test_a_batch_equals_pictures_alone(sd1, generate, folder, tmp_path, sampler):
    # at 64 pixels the tiny model normalises groups of two numbers, which makes a rounding error a change of sign
    common = ("--sampler", sampler, "--steps", 4, "--strength", 0.5, "--W", 128, "--H", 128)
    options = (*common, "--images_per_prompt", 3, "--batch_size", 3, "--prompt", "a --d 1,2,3")
    together = generate(sd1.folder, "--image_path", folder, *options).pictures
    for number in (0, 2):
        options = ("--image_path", folder / f"p{number}.png", *common, "--prompt", f"a --d {number + 1}")
        alone = generate(sd1.folder, *options, outdir=tmp_path / f"o{number}")
        assert largest(alone.pictures, [together[number]]) <= 1


def test_weak_strength_is_nearly_the_vaes_round_trip(sd1, generate, folder):
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(sd1.folder / "vae")
    source = pixels_to_tensor(Image.open(folder / "p0.png"))
    trip = vae.decode(vae.encode(source * 2 - 1).latent_dist.mean).sample[0].detach()
    trip = ((trip / 2 + 0.5).clamp(0, 1) * 255).permute(1, 2, 0).numpy()
    distances = []
    for strength in (0.02, 0.3, 1):
        options = ("--prompt", "a --d 1", "--steps", 100, "--strength", strength)
        picture = generate(sd1.folder, "--image_path", folder / "p0.png", *options).pictures[0]
        distances.append(np.abs(picture - trip).mean())
    assert distances[0] < distances[1] < distances[2]


def test_a_picture_used_again_is_encoded_once(sd1, generate, folder, monkeypatch):
    from diffusers import AutoencoderKL

    calls = []
    real = AutoencoderKL.encode
    monkeypatch.setattr(AutoencoderKL, "encode", lambda self, *rest: calls.append(1) or real(self, *rest))
    generate(sd1.folder, "--image_path", folder / "p0.png", "--prompt", "a", "--images_per_prompt", 4)
    assert len(calls) == 1


def test_sizes(sd1, generate, tmp_path, capfd):
    Image.effect_noise((93, 70), 50).save(tmp_path / "x.png")
    base = ["--ckpt", sd1.folder, "--image_path", tmp_path / "x.png", "--steps", 2, "--prompt", "a"]
    assert gen_img_diffusers.main([str(a) for a in (*base, "--outdir", tmp_path / "own")]) == 0
    assert capfd.readouterr().err.count("warning: source pictures whose sides are no multiples of 8") == 1
    assert [Image.open(p).size for p in (tmp_path / "own").glob("*.png")] == [(88, 64)]
    assert gen_img_diffusers.main([str(a) for a in (*base, "--W", 64, "--outdir", tmp_path / "half")]) == 2
    assert "give both or neither" in capfd.readouterr().err
    result = generate(sd1.folder, "--image_path", tmp_path / "x.png", "--prompt", "a --w 72 --h 48")
    assert result.pictures[0].shape == (48, 72, 3)


def test_pictures_go_round_in_turn(sd1, generate, folder):
    result = generate(
        sd1.folder, "--image_path", folder, "--prompt", "a", "--images_per_prompt", 7, "--use_original_file_name"
    )
    assert [path.name for path in result.files] == sorted(
        ["p0.png", "p1.png", "p2.png", "p3.png", "p4.png", "p0-1.png", "p1-1.png"]
    )


def test_prompts_from_the_pictures_themselves(sd1, generate, folder, tmp_path):
    first = generate(sd1.folder, "--prompt", "a {e$$cat|dog} --n fog", outdir=tmp_path / "first")
    result = generate(
        sd1.folder, "--image_path", tmp_path / "first", "--images_per_prompt", 2, "--sequential_file_name"
    )
    infos = [Image.open(path).info for path in result.files]
    assert [info["prompt"] for info in infos] == ["a cat", "a cat", "a dog", "a dog"]
    assert {info["negative-prompt"] for info in infos} == {"fog"}
    assert "Denoising strength: 0.8" in infos[0]["parameters"]
    assert len({info["seed"] for info in infos}) == 4
    refused = generate(sd1.folder, "--image_path", folder)
    assert refused.status == 2
    assert f"--image_path {folder / 'p0.png'}: has no prompt in its metadata" in refused.stderr
    assert len(first.files) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--strength", "0"], "--strength 0: out of range; write a number above 0, up to 1"),
        (["--strength", "1.5"], "--strength 1.5: out of range"),
        (["--strength", "0.3", "--steps", "3"], "leaves no step to run; use a strength of 0.334 or more"),
        (["--prompt", "a --t 0.1"], "leaves no step to run; use a strength of 0.5 or more"),
        (["--image_path", "nowhere"], "--image_path nowhere: no such file or folder"),
        (["--mask_path", "nowhere"], "--mask_path nowhere: no such file or folder"),
        (["--sequential_file_name", "--use_original_file_name"], "two ways to name files"),
    ],
)
def test_bad_options(sd1, generate, folder, options, message):
    result = generate(sd1.folder, "--image_path", folder, "--prompt", "a", *options)
    assert result.status == 2
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize("option", ["--keep_unmasked", "--use_original_file_name"])
def test_options_that_need_a_picture(sd1, generate, option):
    result = generate(sd1.folder, "--prompt", "a", option)
    assert result.status == 2
    assert f"{option}: is for img2img" in result.stderr


def test_a_mask_that_nothing_uses(sd1, generate, folder):
    result = generate(sd1.folder, "--prompt", "a", "--mask_path", folder / "p0.png")
    assert result.status == 2
    assert "p0.png: is for inpainting or for prompts with AND" in result.stderr


# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def half_mask(tmp_path):
    """White on the right."""
    mask = Image.new("L", (64, 64))
    mask.paste(255, (32, 0, 64, 64))
    mask.save(tmp_path / "mask.png")
    return tmp_path / "mask.png"


@pytest.mark.parametrize("sampler", ["ddim", "pndm", "euler_a", "heun", "dpmsolver++"])
def test_outside_the_mask_the_latent_is_the_sources(sd1, folder, half_mask, sampler):
    argv = ["--ckpt", sd1.folder, "--image_path", folder / "p0.png", "--mask_path", half_mask, "--prompt", "a --d 1"]
    argv += ["--steps", 5, "--strength", 0.9, "--sampler", sampler]
    plan = make_plan(gen_img_diffusers.make_parser().parse([str(argument) for argument in argv]))
    pipeline = gen_img_diffusers.load_pipeline(plan)
    starts = [Start(job.view(plan.masks)) for job in plan.jobs]
    latents = pipeline._denoise(plan.jobs, None, iter, starts)[0]
    source = encode(pipeline.vae, read_picture(folder / "p0.png", ""))
    # the mask is soft where its border, resized, reaches across cells
    assert torch.equal(latents[:, :, :3], source[:, :, :3])
    assert (latents[:, :, 5:] - source[:, :, 5:]).abs().mean() > 0.1


def test_a_black_mask_is_warned_of(sd1, generate, folder, tmp_path):
    Image.new("L", (8, 8)).save(tmp_path / "black.png")
    options = ("--image_path", folder / "p0.png", "--mask_path", tmp_path / "black.png", "--prompt", "a")
    assert "is black all over" in generate(sd1.folder, *options).stderr


def test_white_on_clear_repaints_the_white_alone(sd1, generate, folder, half_mask, tmp_path):
    """Also where the clear pixels are white, too, as some programs save them."""
    clear = Image.new("RGBA", (64, 64), (255, 255, 255, 0))
    clear.putalpha(Image.open(half_mask))
    clear.save(tmp_path / "clear.png")
    options = ("--image_path", folder / "p1.png", "--prompt", "a --d 1", "--mask_path")
    opaque = generate(sd1.folder, *options, half_mask).pictures
    assert largest(opaque, generate(sd1.folder, *options, tmp_path / "clear.png").pictures) == 0
    Image.new("RGBA", (8, 8), (255, 255, 255, 0)).save(tmp_path / "clear.png")
    assert "is clear all over" in generate(sd1.folder, *options, tmp_path / "clear.png", "--dry_run").stderr


def test_the_sources_own_pixels_can_be_kept(sd1, generate, folder, half_mask):
    options = ("--mask_path", half_mask, "--prompt", "a", "--keep_unmasked")
    picture = generate(sd1.folder, "--image_path", folder / "p1.png", *options).pictures[0]
    source = np.asarray(Image.open(folder / "p1.png")).astype(int)
    assert np.array_equal(picture[:, :32], source[:, :32])
    assert not np.array_equal(picture[:, 32:], source[:, 32:])


def test_one_mask_for_each_picture(sd1, generate, folder, tmp_path):
    masks = tmp_path / "masks"
    masks.mkdir()
    for number, colour in enumerate((0, 255)):
        Image.new("L", (64, 64), colour).save(masks / f"{number}.png")
    options = ("--prompt", "a --d 1", "--images_per_prompt", 2, "--batch_size", 2, "--keep_unmasked")
    out_of_step = generate(sd1.folder, "--image_path", folder, "--mask_path", masks, *options)
    assert (out_of_step.status, out_of_step.stderr) == (
        2, f"error: --mask_path {masks}: 2 masks for 5 pictures; give one for all, or one for each\n",
    )  # fmt: skip
    for number in (2, 3, 4):
        (folder / f"p{number}.png").unlink()
    result = generate(sd1.folder, "--image_path", folder, "--mask_path", masks, *options, "--sequential_file_name")
    sources = [np.asarray(Image.open(folder / f"p{number}.png")).astype(int) for number in (0, 1)]
    assert np.array_equal(result.pictures[0], sources[0])
    assert not np.array_equal(result.pictures[1], sources[1])


def test_soft_masks_blend(sd1, generate, folder, tmp_path):
    soft = tmp_path / "soft.png"
    Image.linear_gradient("L").rotate(90).save(soft)
    assert generate(sd1.folder, "--image_path", folder / "p0.png", "--mask_path", soft, "--prompt", "a").status == 0


def test_v_prediction(sd2, generate, folder, half_mask):
    options = ("--image_path", folder / "p0.png", "--mask_path", half_mask, "--prompt", "a", "--bf16")
    result = generate(sd2.folder, *sd2.options, *options)
    assert result.status == 0, result.stderr
