"""Guidance by CLIP and VGG16 together with networks, embeddings for each layer, ControlNets and long prompts."""

import copy

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import save_file
from test_control_net import write_control_net
from test_guidance import CPU, exact_models, guide_steps, vgg16_tensors

from library.draw.loss_guidance import load_vgg16
from library.draw.text_conditions import TextConditions
from library.files.loss_guidance import find_vgg16
from library.files.model_files import find_model
from library.files.textual_inversion import XTI_LAYERS
from library.settings.loss_guidance import GUIDED_SAMPLERS
from networks.keys import UNET, layer_shapes
from networks.kinds import low_rank_pair
from networks.lora import LoraNetwork
from tools.random_network import random_lora

__all__ = ["exact_models"]  # a fixture

SIZE = ("--W", 128, "--H", 128)  # at 64 the tiny model normalises groups of two numbers, which blows rounding up
PROMPT = ("--prompt", "a cat --n fog --d 1")


def largest(first, second) -> int:
    assert len(first) == len(second) > 0
    return max(int(np.abs(a - b).max()) for a, b in zip(first, second))


@pytest.fixture(scope="module")
def assets(sd1, tmp_path_factory):
    """A folder with a narrow VGG16, two guide pictures, two LoRAs and an embedding, plain and by layer."""
    folder = tmp_path_factory.mktemp("assets")
    torch.save(vgg16_tensors(), folder / "vgg16.pth")
    rng = np.random.default_rng(1)
    (folder / "guides").mkdir()
    for number in range(2):
        pixels = rng.integers(0, 255, (5, 7, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((128, 128), Image.Resampling.BICUBIC).save(folder / "guides" / f"{number}.png")
    layers = layer_shapes(find_model(str(sd1.folder), v2=False, v_parameterization=False))
    for seed in (1, 2):
        state = random_lora(layers, 4, alpha=4, convolutions=True, seed=seed)
        save_file(state, folder / f"lora{seed}.safetensors")
    vectors = torch.randn(2, 64, generator=torch.Generator().manual_seed(0)) * 0.5
    (folder / "xti").mkdir()
    save_file({"emb_params": vectors}, folder / "zzyzx.safetensors")
    save_file({layer: vectors.clone() for layer in XTI_LAYERS}, folder / "xti" / "zzyzx.safetensors")
    return folder


@pytest.fixture(scope="module")
def control_net(sd1, tmp_path_factory):
    return write_control_net(tmp_path_factory.mktemp("net"), sd1, 1) / "bare.safetensors"


@pytest.fixture
def draw(sd1, generate, assets, tmp_path):
    """Draw with these options in a folder of their own; `scale` 0 is without guidance."""
    runs = []

    def run(*options, scale=0.0003):  # the random VGG16's features are large
        runs.append(options)
        vgg16 = ("--vgg16_model", assets / "vgg16.pth", "--vgg16_guidance_scale", scale) if scale else ()
        if "--guide_image_path" not in options and scale:
            vgg16 += ("--guide_image_path", assets / "guides" / "0.png")
        result = generate(
            sd1.folder, *SIZE, "--steps", 2, "--seed", 1, *options, *vgg16, outdir=tmp_path / str(len(runs))
        )
        assert result.status == 0, result.stderr
        return result.pictures

    return run


def distance(assets, picture) -> float:
    """How far VGG16 finds a picture from the first guide."""
    vgg16 = load_vgg16(find_vgg16(str(assets / "vgg16.pth")), 20, CPU)
    loss = vgg16.loss(Image.open(assets / "guides" / "0.png"), 1.0, picture.shape[:2])
    with torch.no_grad():
        return float(loss(torch.from_numpy(picture / 255).float().permute(2, 0, 1)[None]))


def network(assets, *numbers):
    files = [assets / f"lora{number}.safetensors" for number in numbers]
    return ("--network_module", *["networks.lora"] * len(files), "--network_weights", *files)


# ---------------------------------------------------------------------------------------------------------------------
# Gradients


@pytest.fixture
def attached(exact_models):
    """The tiny U-Net in float64 with a LoRA beside its layers, and a copy that has it in its weights."""
    unet, vae = exact_models
    layers = {
        (UNET, path): tuple(module.weight.shape)
        for path, module in unet.named_modules()
        if isinstance(getattr(module, "weight", None), torch.Tensor)
    }
    lora = LoraNetwork(torch.nn.Identity(), unet, 1.0)
    lora.load_state_dict(random_lora(layers, 4, alpha=None, convolutions=True, seed=1), strict=True)
    merged = copy.deepcopy(unet)
    for (_, path), change in lora.changes.items():
        layer, (down, up) = merged.get_submodule(path), low_rank_pair(change.wide_parts(CPU))
        layer.weight += (up.double() @ down.double().flatten(1)).reshape(layer.weight.shape)
    lora.apply_to(torch.nn.Identity(), unet)
    yield unet, merged, vae
    lora.detach()


def square(picture):
    return (picture**2).sum()


@pytest.mark.parametrize("sampler", GUIDED_SAMPLERS)
def test_gradients_go_through_networks(attached, sampler):
    """They are those of finite differences, and those of the same network in the weights."""
    unet, merged, vae = attached
    generator = torch.Generator().manual_seed(1)
    text = [TextConditions(torch.randn(1, 77, 64, generator=generator, dtype=torch.float64))]
    scheduler, steps = guide_steps(sampler, "epsilon", unet, vae, text, [[square]])
    _, in_weights = guide_steps(sampler, "epsilon", merged, vae, text, [[square]])
    noise = torch.randn(2, 1, 4, 8, 8, generator=generator, dtype=torch.float64)
    latents, direction = noise[0] * scheduler.init_noise_sigma, noise[1]
    gradient = steps.gradient(latents, 4, 0, [square])
    reach = 1e-7
    with torch.no_grad():
        ends = [square(steps.promised_picture(latents + sign * reach * direction, 4, 0)) for sign in (1, -1)]
    assert float((gradient * direction).sum()) == pytest.approx(float(ends[0] - ends[1]) / (2 * reach), rel=1e-4)
    assert torch.allclose(gradient, in_weights.gradient(latents, 4, 0, [square]), rtol=1e-6)


def test_gradients_see_each_layers_own_text(exact_models):
    """With Extended Textual Inversion every layer's text is the one that its gradient is taken with."""
    generator = torch.Generator().manual_seed(2)

    def text():
        return torch.randn(1, 77, 64, generator=generator, dtype=torch.float64)

    per_layer = {layer: text() for layer in XTI_LAYERS}
    conditions = TextConditions(text(), per_layer)
    _scheduler, steps = guide_steps("ddim", "epsilon", *exact_models, [conditions], [[square]])
    latents, direction = torch.randn(2, 1, 4, 8, 8, generator=generator, dtype=torch.float64)
    gradient, reach = steps.gradient(latents, 4, 0, [square]), 1e-7
    with torch.no_grad():
        ends = [square(steps.promised_picture(latents + sign * reach * direction, 4, 0)) for sign in (1, -1)]
    assert float((gradient * direction).sum()) == pytest.approx(float(ends[0] - ends[1]) / (2 * reach), rel=1e-4)
    for layer in XTI_LAYERS:
        other = TextConditions(conditions.embeddings, per_layer | {layer: per_layer[layer] + 0.5})
        _, changed = guide_steps("ddim", "epsilon", *exact_models, [other], [[square]])
        assert not torch.allclose(gradient, changed.gradient(latents, 4, 0, [square])), layer


# ---------------------------------------------------------------------------------------------------------------------
# The program


def test_with_networks_in_every_mode(draw, assets):
    """Guidance looks through the networks, wherever they are: all modes draw alike, nearer to the guide."""
    options = (*PROMPT, *network(assets, 1, 2), "--network_mul", 0.8, -0.5)
    free, beside = draw(*options, scale=0), draw(*options)
    assert distance(assets, beside[0]) < distance(assets, free[0])
    assert largest(draw(*PROMPT), beside) > 8
    for mode in (["--network_pre_calc"], ["--network_merge"]):
        assert largest(beside, draw(*options, *mode)) <= 2, mode  # gradients steepen what rounding does


def test_each_picture_is_guided_with_its_own_multipliers(draw, assets, tmp_path):
    lines = ["a cat --d 1 --am 0.5,1", "a cat --d 1 --am 0"]
    (tmp_path / "lines.txt").write_text("\n".join(lines))
    options = (*network(assets, 1, 2), "--sequential_file_name", "--batch_size", 2)
    together = draw(*options, "--from_file", tmp_path / "lines.txt")
    for number, line in enumerate(lines):
        assert largest(draw(*options, "--prompt", line), together[number : number + 1]) <= 1, line
    assert largest(draw("--prompt", "a cat --d 1"), together[1:2]) <= 1


def test_with_lycoris_own_modules(draw, assets):
    pytest.importorskip("lycoris")
    file = ("--network_weights", assets / "lora1.safetensors")
    theirs = draw(*PROMPT, "--network_module", "lycoris.kohya", *file)
    assert largest(theirs, draw(*PROMPT, "--network_module", "networks.lora", *file)) <= 2


def test_with_extended_textual_inversion(draw, assets):
    prompt = ("--prompt", "a zzyzx cat --n fog --d 1")
    extended = draw(*prompt, "--XTI_embeddings", assets / "xti" / "zzyzx.safetensors")
    plain = draw(*prompt, "--textual_inversion_embeddings", assets / "zzyzx.safetensors")
    assert largest(extended, plain) <= 1
    assert largest(extended, draw(*prompt)) > 8


@pytest.mark.parametrize(("sampler", "steps"), [("ddim", 2), ("lms", 3)])  # the noise or the latents are changed
def test_with_control_nets(draw, assets, control_net, sampler, steps):
    steered = ("--sampler", sampler, "--steps", steps, "--control_net_models", control_net)
    steered += ("--guide_image_path", assets / "guides" / "0.png", *PROMPT)
    free, guided = draw(*steered, scale=0), draw(*steered)
    assert distance(assets, guided[0]) < distance(assets, free[0])
    unsteered = draw("--sampler", sampler, "--steps", steps, *PROMPT)
    assert largest(guided, unsteered) > 8
    assert largest(draw(*steered, "--control_net_weights", 0), unsteered) == 0


def test_everything_at_once_is_the_same_at_any_batch_size(draw, assets, control_net, tmp_path):
    long = "word " * 90
    lines = [f"a zzyzx {long} --n fog --d 2 --am 0.3,1", f"{long} BREAK a (dog:1.3) --d 3"]
    (tmp_path / "lines.txt").write_text("\n".join(lines))
    options = ("--from_file", tmp_path / "lines.txt", "--sequential_file_name", "--max_embeddings_multiples", 3)
    options += (*network(assets, 1, 2), "--XTI_embeddings", assets / "xti" / "zzyzx.safetensors")
    options += ("--control_net_models", control_net, "--guide_image_path", assets / "guides")
    options += ("--highres_fix_scale", 0.5, "--highres_fix_steps", 2, "--strength", 0.7, "--negative_scale", 2)
    together, alone = draw(*options, "--batch_size", 2), draw(*options)
    assert len(together) == 2
    # the first stage, at 64, is where rounding is blown up
    assert np.mean([np.abs(a - b).mean() for a, b in zip(together, alone)]) < 0.5
    assert min(np.abs(a - b).mean() for a, b in zip(draw(*options, scale=0), alone)) > 2


def test_a_source_comes_nearer_to_its_guide_as_the_scale_grows(generate, assets, tmp_path):
    """With the demo model, VGG16 guidance and a guide that is the source: its features come back step by step."""
    guide = Image.new("RGB", (128, 128), "white")
    ImageDraw.Draw(guide).ellipse((24, 24, 104, 104), fill="red")
    guide.save(tmp_path / "guide.png")
    loss = load_vgg16(find_vgg16(str(assets / "vgg16.pth")), 20, CPU).loss(guide, 1.0, (128, 128))
    common = ("--image_path", tmp_path / "guide.png", "--strength", 0.7, "--steps", 8, "--scale", 3, "--seed", 1)
    common += ("--images_per_prompt", 2, "--prompt", "a large red circle on a white background")
    vgg16 = ("--vgg16_model", assets / "vgg16.pth", "--guide_image_path", tmp_path / "guide.png")
    distances = []
    for scale in (0, 0.001, 0.01):
        options = (*common, *(vgg16 if scale else ()), "--vgg16_guidance_scale", scale)
        pictures = generate("examples/shapes", *SIZE, *options, outdir=tmp_path / str(scale)).pictures
        with torch.no_grad():
            distances.append([float(loss(torch.from_numpy(p / 255).float().permute(2, 0, 1)[None])) for p in pictures])
    for free, little, more in zip(*distances):
        assert free > little > more
