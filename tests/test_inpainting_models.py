"""Models that read more than the noisy latents: inpainting and edit models, against diffusers' own pipelines."""

import json

import numpy as np
import pytest
import torch
from diffusers import (
    ControlNetModel,
    StableDiffusionControlNetInpaintPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLInstructPix2PixPipeline,
    UNet2DConditionModel,
)
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from PIL import Image
from safetensors.torch import save_file

from library.draw.denoiser import Denoiser
from library.draw.model_inputs import Beside
from library.draw.samplers import make_scheduler
from library.files.model_files import find_model
from library.files.model_inputs import EDITING, INPAINTING
from library.settings.noise_schedule import NoiseSchedule
from library.settings.samplers import SAMPLERS
from networks.keys import layer_shapes
from tools.random_network import random_lora

# at 64 pixels tiny models normalise groups of two numbers, which makes a rounding error a change of sign
SIDE = 128
SIZE = ("--W", SIDE, "--H", SIDE, "--steps", 3, "--scale", 5)
PROMPT = ("--prompt", "a cat --n fog --d 1")
INPAINT = {"sd1": StableDiffusionInpaintPipeline, "sdxl": StableDiffusionXLInpaintPipeline}
EDIT = {"sd1": StableDiffusionInstructPix2PixPipeline, "sdxl": StableDiffusionXLInstructPix2PixPipeline}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder of two pictures, and a mask whose border is soft and lies inside latent cells."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    (folder / "in").mkdir()
    for number in range(2):
        pixels = rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)
        picture = Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        picture.save(folder / "in" / f"{number}.png")
    columns = np.clip((np.arange(SIDE) - 51) * 8, 0, 255).astype(np.uint8)
    Image.fromarray(np.tile(columns, (SIDE, 1))).save(folder / "mask.png")
    return folder


@pytest.fixture
def mean_latents(monkeypatch):
    """Let diffusers' pipelines take the mean of what the VAE gives, as this program does, in place of a sample."""
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mean)


def theirs(pipeline_class, models, *, sampler="ddim", **settings):
    """What diffusers' pipeline draws of the same noise and scheduler."""
    parts = {name: settings.pop(name) for name in ("controlnet",) if name in settings}
    pipeline = pipeline_class.from_pretrained(models.folder, **parts)
    pipeline.scheduler = make_scheduler(SAMPLERS[sampler], NoiseSchedule())
    pipeline.set_progress_bar_config(disable=True)
    usual = {"prompt": "a cat", "negative_prompt": "fog", "num_inference_steps": 3, "guidance_scale": 5}
    picture = pipeline(**usual | settings, output_type="np").images[0]
    return (picture * 255).round()


def noise(place):
    """The picture's noise: at 0 the one that it starts from; img2img adds another, behind one for each step."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn((4, SIDE // 8, SIDE // 8), generator=generator) for _ in range(place + 1)][-1][None]


def largest(first, second) -> int:
    return max(int(np.abs(a - b).max()) for a, b in zip(first, second, strict=True))


def drawn(result):
    assert result.status == 0, result.stderr
    return result.pictures


# ---------------------------------------------------------------------------------------------------------------------
# Inpainting models


@pytest.mark.parametrize(
    ("family", "sampler", "strength"), [("sd1", "ddim", 1), ("sd1", "euler", 0.7), ("sdxl", "euler", 1)]
)
def test_inpainting_is_diffusers(with_inputs, generate, pictures, mean_latents, monkeypatch, family, sampler, strength):
    """Within a level: sums in another order."""
    models = with_inputs(family, INPAINTING)
    own_noise = noise(0) if strength == 1 else noise(4)
    monkeypatch.setattr(f"{INPAINT[family].__module__}.randn_tensor", lambda *arguments, **named: own_noise)
    image, mask = Image.open(pictures / "in" / "0.png"), Image.open(pictures / "mask.png")
    given = {"image": image, "mask_image": mask, "strength": strength, "width": SIDE, "height": SIDE}
    expected = theirs(INPAINT[family], models, sampler=sampler, **given)
    options = ("--image_path", pictures / "in" / "0.png", "--mask_path", pictures / "mask.png", "--strength", strength)
    ours = drawn(generate(models.folder, *SIZE, *PROMPT, *options, "--sampler", sampler))
    assert largest(ours, [expected]) <= 1


def test_layouts_mean_the_same_and_without_a_mask_all_is_repainted(with_inputs, generate, pictures, tmp_path):
    models = with_inputs("sd1", INPAINTING)
    Image.new("L", (SIDE, SIDE), 255).save(tmp_path / "white.png")
    plain = generate(models.folder, *SIZE, *PROMPT, "--json")
    facts = json.loads(plain.stdout)
    assert (facts["model_kind"], facts["image_guidance"]) == ("inpainting", None)
    assert "is an inpainting model (a U-Net with 9 input channels)" in plain.stderr
    assert largest(drawn(plain), drawn(generate(models.safetensors, *SIZE, *PROMPT))) == 0
    source = ("--image_path", pictures / "in" / "0.png", "--strength", 1)
    assert largest(plain.pictures, drawn(generate(models.folder, *SIZE, *PROMPT, *source))) == 0
    white = generate(models.folder, *SIZE, *PROMPT, *source, "--mask_path", tmp_path / "white.png")
    assert largest(plain.pictures, drawn(white)) == 0
    masked = generate(models.folder, *SIZE, *PROMPT, *source, "--mask_path", pictures / "mask.png")
    assert largest(plain.pictures, drawn(masked)) > 10


def test_a_batch_equals_pictures_alone(with_inputs, generate, pictures, tmp_path):
    """Each with its own picture and mask; within a level: sums in another order."""
    models = with_inputs("sd1", INPAINTING)
    (tmp_path / "masks").mkdir()
    for number in range(2):
        Image.open(pictures / "mask.png").rotate(90 * number).save(tmp_path / "masks" / f"{number}.png")
    options = ("--image_path", pictures / "in", "--mask_path", tmp_path / "masks", "--sequential_file_name", *SIZE)
    options += ("--images_per_prompt", 2, "--prompt", "a cat --n fog --d 1,2 --t 0.7")
    together = drawn(generate(models.folder, *options, "--batch_size", 2))
    alone = drawn(generate(models.folder, *options, outdir=tmp_path / "alone"))
    assert largest(together, alone) <= 1
    assert np.abs(alone[0] - alone[1]).max() > 10


def test_growing_latents_find_their_mask(with_inputs, generate, pictures):
    models = with_inputs("sd1", INPAINTING)
    options = ("--image_path", pictures / "in" / "0.png", "--mask_path", pictures / "mask.png", "--strength", 1)
    options += ("--sampler", "euler_a", "--gradual_latent_timesteps", 999, "--gradual_latent_every_n_steps", 1)
    options += ("--gradual_latent_ratio_step", 0.25)
    drawn(generate(models.folder, *SIZE, *PROMPT, *options))
    masks = torch.zeros(1, 1, 16, 16)
    masks[..., 7:] = 1
    small = Beside(masks, torch.rand(1, 4, 16, 16)).at((9, 8))
    assert small.shape == (1, 5, 9, 8)
    assert small[:, 0].unique().tolist() == [0, 1]


def test_tiles_see_their_part_of_the_mask(with_inputs, generate, pictures, monkeypatch):
    seen = []
    real = Denoiser._predict_tile

    def predict(self, tile, rows, *arguments):
        seen.append((tile.left, rows[0, 4].mean(dim=0)))
        return real(self, tile, rows, *arguments)

    monkeypatch.setattr(Denoiser, "_predict_tile", predict)
    options = ("--image_path", pictures / "in" / "0.png", "--mask_path", pictures / "mask.png", "--tile", 64)
    drawn(generate(with_inputs("sd1", INPAINTING).folder, *SIZE, *PROMPT, *options, "--steps", 1, "--strength", 1))
    whole = torch.zeros(SIDE // 8)
    whole[9:] = 1  # the mask is half bright at pixel 67, and a cell is what its first pixel is
    assert len(seen) > 4
    assert all(torch.equal(mask, whole[left : left + 8]) for left, mask in seen)


# ---------------------------------------------------------------------------------------------------------------------
# Edit models


@pytest.mark.parametrize(("family", "scales"), [("sd1", [(1.5, 5), (1.5, 1)]), ("sdxl", [(2.5, 5)])])
def test_editing_is_diffusers(with_inputs, generate, pictures, family, scales):
    """Within a level: sums in another order."""
    models = with_inputs(family, EDITING)
    size = {"width": SIDE, "height": SIDE, "original_size": (SIDE, SIDE), "target_size": (SIDE, SIDE)}
    image = Image.open(pictures / "in" / "0.png")
    given = {"image": image, "latents": noise(0)} | (size if family == "sdxl" else {})
    options = (*SIZE, *PROMPT, "--image_path", pictures / "in" / "0.png", "--sampler", "euler")
    for guidance, scale in scales:
        settings = {"image_guidance_scale": guidance, "guidance_scale": scale}
        expected = theirs(EDIT[family], models, sampler="euler", **given, **settings)
        said = ("--image_guidance", guidance) if guidance != 1.5 else ()
        ours = generate(models.folder, *options, *said, "--scale", scale)
        assert largest(drawn(ours), [expected]) <= 1, (guidance, scale)


def test_a_batch_of_edits_equals_edits_alone(with_inputs, generate, pictures, tmp_path):
    """Each with its own scales and picture; within a level: sums in another order."""
    models = with_inputs("sd1", EDITING)
    (tmp_path / "lines.txt").write_text("make it snow --d 1 --ig 2 --n fog\na (red:1.3) hat --d 2 --l 3\n")
    options = ("--image_path", pictures / "in", "--from_file", tmp_path / "lines.txt", "--sequential_file_name", *SIZE)
    together = generate(models.safetensors, *options, "--batch_size", 2, "--json")
    alone = drawn(generate(models.folder, *options, outdir=tmp_path / "alone"))
    assert largest(drawn(together), alone) <= 1
    told = map(json.loads, together.stdout.splitlines())  # pictures of a batch are told as they are saved
    told = sorted(told, key=lambda each: each["file"])
    assert [(each["model_kind"], each["image_guidance"], each["strength"]) for each in told] == [
        ("editing", 2, 1), ("editing", 1.5, 1),
    ]  # fmt: skip
    texts = Image.open(together.files[0]).text
    assert texts["image-guidance"] == "2.0"
    assert "Image CFG scale: 2," in texts["parameters"]


def test_an_edit_keeps_to_its_mask(with_inputs, generate, pictures):
    models = with_inputs("sd1", EDITING)
    options = ("--image_path", pictures / "in" / "0.png", "--mask_path", pictures / "mask.png", "--keep_unmasked")
    (picture,) = drawn(generate(models.folder, *SIZE, *PROMPT, *options))
    source = np.asarray(Image.open(pictures / "in" / "0.png")).astype(int)
    assert np.array_equal(picture[:, :51], source[:, :51])
    assert np.abs(picture - source)[:, 90:].max() > 10


# ---------------------------------------------------------------------------------------------------------------------
# With what steers and changes them


def test_control_nets_see_the_latents_alone(with_inputs, generate, pictures, mean_latents, monkeypatch, tmp_path):
    """Within a level: sums in another order; a difference is rounded when it is taken and when it is added."""
    models = with_inputs("sd1", INPAINTING)
    unet = UNet2DConditionModel.from_pretrained(models.folder / "unet")
    torch.manual_seed(1)
    net = ControlNetModel.from_config(dict(ControlNetModel.from_unet(unet).config) | {"in_channels": 4})
    for parameter in net.parameters():
        parameter.data += torch.randn_like(parameter) * 0.1
    shared = dict(unet.state_dict())
    state = {name: value - shared[name][:, :4] if name == "conv_in.weight" else value - shared[name]
             if name in shared else value for name, value in net.state_dict().items()}  # fmt: skip
    save_file(state | {"difference": torch.tensor([])}, tmp_path / "difference.safetensors")
    net.save_pretrained(tmp_path / "net")
    own_noise = noise(0)
    monkeypatch.setattr(
        f"{StableDiffusionControlNetInpaintPipeline.__module__}.randn_tensor", lambda *arguments, **named: own_noise
    )
    image, mask = Image.open(pictures / "in" / "0.png"), Image.open(pictures / "mask.png")
    guide = Image.open(pictures / "in" / "1.png")
    given = {"image": image, "mask_image": mask, "control_image": guide, "strength": 1.0, "controlnet": net}
    given["controlnet_conditioning_scale"] = 1.0
    expected = theirs(StableDiffusionControlNetInpaintPipeline, models, **given)
    options = ("--image_path", pictures / "in" / "0.png", "--mask_path", pictures / "mask.png", "--strength", 1)
    options += (*SIZE, *PROMPT, "--guide_image_path", pictures / "in" / "1.png", "--control_net_models")
    for file in ("net", "net/diffusion_pytorch_model.safetensors", "difference.safetensors"):
        assert largest(drawn(generate(models.folder, *options, tmp_path / file)), [expected]) <= 1, file


def test_loras_of_plain_models_act(with_inputs, sd1, generate, tmp_path):
    models = with_inputs("sd1", INPAINTING)
    layers = layer_shapes(find_model(str(sd1.folder)))
    save_file(random_lora(layers, 4, alpha=2, convolutions=False, seed=1), tmp_path / "lora.safetensors")
    options = ("--network_module", "networks.lora", "--network_weights", tmp_path / "lora.safetensors")
    plain, changed, merged = (
        drawn(generate(models.folder, *SIZE, *PROMPT, *more)) for more in ((), options, (*options, "--network_merge"))
    )
    assert largest(plain, changed) > 5
    assert largest(changed, merged) <= 1  # merged weights are rounded


# ---------------------------------------------------------------------------------------------------------------------
# Refusals


@pytest.mark.parametrize(
    ("inputs", "options", "message"),
    [
        (EDITING, ("--prompt", "a"), "is an edit model (InstructPix2Pix), which changes a picture; give --image_path"),
        (EDITING, ("--prompt", "a --nl 2", "--image_path"), "negative scale 2: an edit model has its own third branch"),
        (EDITING, ("--prompt", "a", "--strength", 0.5, "--image_path"), "strength 0.5: an edit model begins at noise"),
        (EDITING, ("--prompt", "a AND b", "--image_path"), "AND: an edit model follows one instruction"),
        (EDITING, ("--prompt", "a --ig 0.5", "--image_path"), "--ig 0.5 (column 3): out of range"),
        (INPAINTING, ("--prompt", "a", "--image_guidance", 2), "--image_guidance 2: is for edit models"),
        (INPAINTING, ("--prompt", "a --ig 2"), "--ig 2: is for edit models"),
        (INPAINTING, ("--prompt", "a", "--vgg16_guidance_scale", 1), "which CLIP and VGG16 cannot guide"),
    ],
)
def test_what_has_no_meaning_is_refused(with_inputs, generate, pictures, inputs, options, message):
    more = (pictures / "in",) if options[-1] == "--image_path" else ()
    result = generate(with_inputs("sd1", inputs).folder, *options, *more)
    assert result.status == 2
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and message in errors[0], result.stderr


def test_a_control_net_of_more_channels_is_refused(with_inputs, sd1, generate, pictures, tmp_path):
    unet = UNet2DConditionModel.from_pretrained(with_inputs("sd1", INPAINTING).folder / "unet")
    ControlNetModel.from_unet(unet).save_pretrained(tmp_path / "net")
    options = ("--prompt", "a", "--control_net_models", tmp_path / "net", "--guide_image_path", pictures / "in")
    assert "reads 9 channels, which the model does not have" in generate(sd1.folder, *options).stderr
