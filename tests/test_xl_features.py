"""XL beside everything else: ControlNet-LLLite, Deep Shrink, guidance, precision, and what it refuses."""

from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file, save_file

from library.draw.deep_shrink import Shrinker
from library.files import checkpoint_layout as layout
from library.files.families import SDXL
from library.files.model_files import find_model
from library.machine import devices
from library.machine.devices import Machine, choose_vae_dtype
from library.settings.deep_shrink import DeepShrink

SIZE = ("--W", 128, "--H", 128)
PROMPT = ("--prompt", "a cat --n fog --d 1")


# ---------------------------------------------------------------------------------------------------------------------
# ControlNet-LLLite


@pytest.fixture(scope="module")
def lllite(sdxl, tmp_path_factory):
    """A ControlNet-LLLite of random weights for all the layers that published ones have."""
    unet = UNet2DConditionModel.from_pretrained(sdxl.folder / "unet")
    modules = layout.unet_modules(unet.config)
    generator = torch.Generator().manual_seed(0)
    state = {}

    def pair(name, *shape):
        state[f"{name}.weight"] = torch.randn(shape, generator=generator) / np.prod(shape[1:]) ** 0.5
        state[f"{name}.bias"] = torch.randn(shape[0], generator=generator) * 0.1

    for path, layer in unet.named_modules():
        aimed = path.endswith(("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn2.to_q"))
        if not aimed or path.startswith("up_blocks"):
            continue
        original = layout.original_name(path, modules)
        name = f"lllite_unet_{original.replace('.', '_')}"
        deep = not original.startswith(("input_blocks.4.", "input_blocks.5."))
        pair(f"{name}.conditioning1.0", 4, 3, 4, 4)
        pair(f"{name}.conditioning1.2", *((4, 4, 4, 4) if deep else (8, 4, 4, 4)))
        if deep:
            pair(f"{name}.conditioning1.4", 8, 4, 2, 2)
        pair(f"{name}.down.0", 6, layer.in_features)
        pair(f"{name}.mid.0", 6, 8 + 6)
        pair(f"{name}.up.0", layer.in_features, 6)
        state[f"{name}.up.0.weight"] *= 20  # a tiny model's attention has little to say
    file = tmp_path_factory.mktemp("lllite") / "net.safetensors"
    save_file(state, file)
    return file, state


@pytest.fixture(scope="module")
def guide(tmp_path_factory):
    file = tmp_path_factory.mktemp("guides") / "0.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8)).save(file)
    return file


def steered(generate, sdxl, lllite, guide, *options):
    result = generate(
        *(sdxl.folder, *SIZE, "--control_net_lllite_models", lllite, "--guide_image_path", guide, *options, *PROMPT)
    )
    assert result.status == 0, result.stderr
    return result


@pytest.mark.parametrize("weights", [(0.7,), (2, 3)])
def test_lllites_change_the_inputs_of_their_layers(weights, sdxl, lllite, guide, generate, monkeypatch, tmp_path):
    """Against the formula, put into the layers by hand; within a level: sums in another order."""
    import gen_img_diffusers

    file, state = lllite
    turned = tmp_path / "turned.png"
    Image.open(guide).rotate(90).save(turned)
    guides = (guide, turned)[: len(weights)]
    options = ("--control_net_lllite_models", *[file] * len(weights), "--guide_image_path", *guides)
    result = generate(sdxl.folder, *SIZE, *options, "--control_net_weights", *weights, *PROMPT)
    assert result.status == 0, result.stderr
    ours = result.pictures[0]
    plain = generate(sdxl.folder, *SIZE, *PROMPT).pictures[0]
    load = gen_img_diffusers.load_pipeline

    def with_formula(controls, *args):
        pipeline = load(*args)
        modules = layout.unet_modules(pipeline.unet.config)
        layers = {
            f"lllite_unet_{(layout.original_name(path, modules) or '').replace('.', '_')}": layer
            for path, layer in pipeline.unet.named_modules()
        }
        for weight, picture in controls:
            pixels = torch.from_numpy(np.array(Image.open(picture))).permute(2, 0, 1)[None] / 127.5 - 1
            for name in filter(lambda name: f"{name}.down.0.weight" in state, layers):
                layers[name].register_forward_pre_hook(partial(change, name, weight, read(name, pixels)))
        return pipeline

    def read(name, pixels):
        found = F.conv2d(pixels, state[f"{name}.conditioning1.0.weight"], state[f"{name}.conditioning1.0.bias"], 4)
        for place, stride in ((2, 4), (4, 2)):
            if (weight := state.get(f"{name}.conditioning1.{place}.weight")) is not None:
                found = F.conv2d(found.relu(), weight, state[f"{name}.conditioning1.{place}.bias"], stride)
        return found.flatten(2).transpose(1, 2)

    def change(name, weight, read, _layer, inputs):
        (x,) = inputs
        down = F.linear(x, state[f"{name}.down.0.weight"], state[f"{name}.down.0.bias"]).relu()
        joined = torch.cat([read.expand(len(x), -1, -1), down], dim=-1)
        mid = F.linear(joined, state[f"{name}.mid.0.weight"], state[f"{name}.mid.0.bias"]).relu()
        return (x + weight * F.linear(mid, state[f"{name}.up.0.weight"], state[f"{name}.up.0.bias"]),)

    def by_hand(controls):
        with monkeypatch.context() as patch:
            patch.setattr(gen_img_diffusers, "load_pipeline", partial(with_formula, controls))
            return generate(sdxl.folder, *SIZE, *PROMPT).pictures[0]

    controls = list(zip(weights, guides))
    assert np.abs(ours - by_hand(controls[::-1])).max() <= 1  # the last one works first
    assert np.abs(ours - plain).max() > 10
    if len(controls) > 1:
        assert np.abs(ours - by_hand(controls)).max() > 5


def test_lllites_keep_to_their_steps_weights_and_guides(sdxl, lllite, guide, generate, tmp_path):
    file, _ = lllite
    plain = generate(sdxl.folder, *SIZE, *PROMPT).pictures[0]
    for off in (("--control_net_weights", 0), ("--control_net_ratios", 0), ("--control_net_starts", 0.9)):
        assert np.array_equal(steered(generate, sdxl, file, guide, *off).pictures[0], plain), off
    other = tmp_path / "other.png"
    Image.open(guide).rotate(90).save(other)
    both = generate(
        *(sdxl.folder, *SIZE, "--control_net_lllite_models", file, file, "--guide_image_path", guide, other),
        *("--control_net_weights", 1, 0, *PROMPT),
    )
    alone = steered(generate, sdxl, file, guide)
    assert np.array_equal(both.pictures[0], alone.pictures[0])
    swapped = generate(
        *(sdxl.folder, *SIZE, "--control_net_lllite_models", file, file, "--guide_image_path", guide, other),
        *("--control_net_weights", 0, 1, *PROMPT),
    )
    assert np.abs(swapped.pictures[0] - alone.pictures[0]).max() > 10
    texts = Image.open(alone.files[0]).text["parameters"]
    assert 'ControlNet: "net, weight 1, steps 0 to 1, guide 0.png"' in texts


def test_lllites_follow_features_of_other_sizes(sdxl, lllite, guide, generate):
    """Sides that are no multiples of 32, Deep Shrink, Gradual Latent, batches, and three branches."""
    file, _ = lllite
    growing = ("--sampler", "euler_a", "--gradual_latent_timesteps", 900, "--gradual_latent_ratio_step", 0.5)
    for options in (
        ("--W", 136, "--H", 120),
        ("--ds_depth_1", 4, "--ds_timesteps_1", 0),
        (*growing, "--gradual_latent_every_n_steps", 1, "--steps", 4),
        ("--images_per_prompt", 2, "--batch_size", 2, "--negative_scale", 2),
    ):
        unsteered = generate(sdxl.folder, *SIZE, *options, *PROMPT)
        ours = steered(generate, sdxl, file, guide, *options)
        assert np.abs(ours.pictures[0] - unsteered.pictures[0]).max() > 10, options


def test_lllites_read_their_guide_up_to_its_border(sdxl, lllite, guide, generate, tmp_path):
    """Of sides that are no multiples of 32, and of smaller ones."""
    file, _ = lllite
    pixels = np.array(Image.open(guide).resize((88, 88)))
    Image.fromarray(pixels).save(tmp_path / "a.png")
    pixels[:, 80:] = 255 - pixels[:, 80:]
    Image.fromarray(pixels).save(tmp_path / "b.png")
    size = ("--W", 88, "--H", 88)
    a, b = (steered(generate, sdxl, file, tmp_path / f"{name}.png", *size).pictures[0] for name in "ab")
    assert np.abs(a - b).max() > 5
    assert steered(generate, sdxl, file, guide, "--W", 24, "--H", 40).pictures[0].shape == (40, 24, 3)


def test_zero_terminal_snr_leaves_nothing_to_look_at(sdxl, generate):
    options = ("--v_parameterization", "--zero_terminal_snr", "--clip_guidance_scale", 100)
    result = generate(sdxl.folder, *options, *PROMPT)
    assert (result.status, result.files) == (2, [])
    assert "guidance by CLIP or VGG16: finds nothing to look at in the pure noise of zero terminal SNR" in result.stderr
    assert "; leave --zero_terminal_snr out" in result.stderr  # lms and pndm, which it is for, are refused beside it


def test_of_a_model_that_begins_at_pure_noise_other_samplers_are_guided(sdxl, generate, tmp_path):
    file = tmp_path / "noob.safetensors"
    save_file(load_file(sdxl.safetensors) | {"v_pred": torch.empty(0), "ztsnr": torch.empty(0)}, file)
    result = generate(file, "--clip_guidance_scale", 100, *PROMPT)
    assert result.status == 2
    assert "pure noise of zero terminal SNR; use --sampler lms or pndm" in result.stderr


def test_files_that_are_no_lllite_for_the_model(sd1, sdxl, lllite, guide, generate, tmp_path):
    file, state = lllite
    save_file({"lora_unet_x.lora_down.weight": torch.ones(1, 1)}, tmp_path / "lora.safetensors")
    name = "lllite_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_k.up.0.weight"
    save_file(state | {name: torch.ones(3, 6)}, tmp_path / "narrow.safetensors")
    save_file(state | {"lllite_unet_x.other": torch.ones(1)}, tmp_path / "more.safetensors")
    key = name.replace("up.0.weight", "")
    short = {k: v for k, v in state.items() if k != f"{key}mid.0.bias"}
    save_file(short, tmp_path / "short.safetensors")
    save_file(state | {f"{key}conditioning1.2.weight": torch.ones(8, 5, 4, 4)}, tmp_path / "chain.safetensors")
    save_file({k: v.int() for k, v in state.items()}, tmp_path / "whole.safetensors")
    given = ("--guide_image_path", guide, *PROMPT, "--control_net_lllite_models")
    for family, path, message in (
        (sdxl, tmp_path / "short.safetensors", "(mid.0.bias is missing or of another size)"),
        (sdxl, tmp_path / "chain.safetensors", "(its convolutions do not go together)"),
        (sdxl, tmp_path / "whole.safetensors", "is of type I32, in which no weights are read"),
        (sdxl, tmp_path / "nothere.safetensors", "--control_net_lllite_models"),
        (sdxl, tmp_path, "is a folder; give the file in it"),
        (sdxl, tmp_path / "lora.safetensors", "is a LoRA or one of its relatives; give a ControlNet-LLLite"),
        (sdxl, tmp_path / "narrow.safetensors", "does not fit the model at 'input_blocks_4_1_"),
        (sdxl, tmp_path / "more.safetensors", "holds 'lllite_unet_x.other', which no ControlNet-LLLite has"),
        (sd1, file, "use one made for the model, which is Stable Diffusion 1.x; published ones are for SDXL"),
    ):
        result = generate(family.folder, *given, path)
        assert (result.status, result.stderr.count("\n")) == (2, 1)
        assert message in result.stderr
    guided = generate(sdxl.folder, *given, file, "--clip_guidance_scale", 100)
    assert "--control_net_lllite_models and --clip_guidance_scale: do not go together" in guided.stderr
    beside = generate(sdxl.folder, *given, file, "--control_net_models", file)
    assert "are two kinds of ControlNets; give one" in beside.stderr
    masked = ("--image_path", guide, "--mask_path", guide, "--control_net_preps", "inpaint")
    unread = generate(sdxl.folder, *given, file, *masked)
    assert f"makes -1 of masked pixels, and {file} is a ControlNet-LLLite; use" in unread.stderr
    mistaken = generate(sdxl.folder, "--guide_image_path", guide, *PROMPT, "--control_net_models", file)
    assert "is a ControlNet-LLLite; give it with --control_net_lllite_models" in mistaken.stderr


# ---------------------------------------------------------------------------------------------------------------------
# Deep Shrink


@pytest.mark.parametrize("depth", range(9))
@torch.inference_mode()
def test_deep_shrinks_depths_are_the_originals_input_blocks(sdxl, depth):
    """What enters that block is half as large, all before it whole; what the U-Net gives is whole."""
    unet = UNet2DConditionModel.from_pretrained(sdxl.folder / "unet")
    places = SDXL.shrink_points(unet.config)
    levels = [0, 0, 0, 0, 1, 1, 1, 2, 2]
    seen = {}
    shrinker = Shrinker(DeepShrink(depth_1=depth, timesteps_1=500), places, [800, 100])
    told = {"text_embeds": torch.zeros(1, 32), "time_ids": torch.zeros(1, 6)}
    sample, text = torch.randn(1, 4, 16, 24), torch.randn(1, 77, unet.config.cross_attention_dim)
    with shrinker.attached(unet):
        for number, place in enumerate(places):  # hooks of later registration see what earlier ones changed
            note = lambda _m, args, n=number: seen.__setitem__(n, tuple(args[0].shape[-2:]))  # noqa: E731
            unet.get_submodule(place).register_forward_pre_hook(note)
        sizes = []
        for step, time in enumerate((800, 100)):
            shrinker.begin_step(step)
            output = unet(sample, torch.tensor(time), encoder_hidden_states=text, added_cond_kwargs=told).sample
            assert output.shape == sample.shape
            sizes.append(dict(seen))
    whole = {number: (16 >> level, 24 >> level) for number, level in enumerate(levels)}
    assert sizes[1] == whole
    for number, (height, width) in whole.items():
        assert sizes[0][number] == ((height, width) if number < depth else (height // 2, width // 2)), number


# ---------------------------------------------------------------------------------------------------------------------
# Precision


def test_the_vae_of_xl_does_without_float16(sd1, sdxl, monkeypatch):
    """Its features are too large for it, unless its configuration says that they are not."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)
    xl, one = find_model(str(sdxl.safetensors)), find_model(str(sd1.folder))
    folder = find_model(str(sdxl.folder))
    assert folder.vae.config["force_upcast"]
    fixed = find_model(str(sdxl.folder))
    fixed.vae.config["force_upcast"] = False
    gpu, old_gpu = (Machine(torch.device(kind), torch.float16, False) for kind in ("xpu", "cuda"))
    wide = Machine(torch.device("cpu"), torch.bfloat16, True)
    for machine, model, expected in (
        (gpu, xl, torch.bfloat16),
        (gpu, folder, torch.bfloat16),
        (old_gpu, xl, torch.float32),
        (gpu, fixed, torch.float16),
        (gpu, one, torch.float16),
        (wide, xl, torch.bfloat16),
    ):
        assert choose_vae_dtype(machine, model, no_half=False) == expected
        assert choose_vae_dtype(machine, model, no_half=True) == torch.float32


def test_no_half_vae_keeps_the_vae_in_float32(sdxl, generate, monkeypatch):
    import gen_img_diffusers

    pipelines = []
    load = gen_img_diffusers.load_pipeline
    monkeypatch.setattr(
        gen_img_diffusers, "load_pipeline", lambda *args: pipelines.append(load(*args)) or pipelines[-1]
    )
    for option in ((), ("--no_half_vae",)):
        assert generate(sdxl.folder, "--bf16", *option, *PROMPT).status == 0
    assert [pipeline.vae.dtype for pipeline in pipelines] == [torch.bfloat16, torch.float32]
    assert devices.choose_dtype(torch.device("cpu"), fp16=False, bf16=True) == pipelines[1].unet.dtype


# ---------------------------------------------------------------------------------------------------------------------
# What is refused


def test_what_xl_has_not_is_refused(sdxl, generate, tmp_path):
    save_file({"x": torch.ones(1, 64)}, tmp_path / "old.safetensors")
    highres = ("--highres_fix_scale", 0.5, "--highres_fix_upscaler", "tools.latent_upscaler")
    for options, message in (
        (("--XTI_embeddings", tmp_path / "old.safetensors"), "there are no XTI embeddings for Stable Diffusion XL"),
        (highres, "enlarges other latents than those of Stable Diffusion XL"),
        (("--ds_depth_1", 9), "--ds_depth_1 9: out of range; write a whole number from 0 to 8"),
        (("--v2",), "is a Stable Diffusion XL model; leave out --v2"),
        (("--clip_skip", 4), "--clip_skip 4: this model's text encoder has 3 layers"),
    ):
        result = generate(sdxl.folder, *options, *PROMPT)
        assert (result.status, result.stderr.count("\n")) == (2, 1)
        assert message in result.stderr


def test_what_only_xl_has_is_refused_with_others(sd1, generate):
    for options, line, message in (
        (("--original_width", 512), "a", "original sizes and crops: Stable Diffusion 1.x models are told none"),
        ((), "a --ct 8", "original sizes and crops: Stable Diffusion 1.x models are told none"),
        (("--zero_empty_negative",), "a", "--zero_empty_negative: is for models that were trained so"),
        (("--ds_depth_1", 4), "a", "Deep Shrink: has depths 0 to 3 with this model"),
    ):
        result = generate(sd1.folder, *options, "--prompt", line)
        assert (result.status, result.stderr.count("\n")) == (2, 1)
        assert message in result.stderr


def test_sizes_are_1024_where_nothing_says_otherwise(sdxl, tmp_path, capfd):
    import gen_img_diffusers

    argv = ["--ckpt", sdxl.folder, "--outdir", tmp_path / "out", "--prompt", "a --h 512", "--dry_run"]
    assert gen_img_diffusers.main([str(argument) for argument in argv]) == 0
    assert "1024x512" in capfd.readouterr().out
