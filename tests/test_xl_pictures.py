"""XL drawn as a user draws it, against diffusers' own pipelines: plain, and steered by each kind of ControlNet."""

import json

import numpy as np
import pytest
import torch
from diffusers import (
    ControlNetModel,
    ControlNetUnionModel,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLControlNetUnionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from safetensors.torch import load_file, save_file

from library.draw.samplers import make_scheduler
from library.files import checkpoint_layout as layout
from library.settings.noise_schedule import NoiseSchedule
from library.settings.samplers import SAMPLERS

SIZE = ("--W", 128, "--H", 128, "--steps", 3, "--scale", 5)
PROMPT = ("--prompt", "a cat --n fog --d 1")
SIDE = 128


@pytest.fixture(scope="session")
def guide(tmp_path_factory):
    file = tmp_path_factory.mktemp("guides") / "0.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)).save(file)
    return file


def theirs(pipeline_class, sdxl, *, sampler="ddim", schedule=None, **settings):
    """What diffusers' pipeline draws of the same noise, scheduler and sizes."""
    parts = {name: settings.pop(name) for name in ("controlnet",) if name in settings}
    pipeline = pipeline_class.from_pretrained(sdxl.folder, add_watermarker=False, **parts)
    pipeline.scheduler = make_scheduler(SAMPLERS[sampler], schedule or NoiseSchedule())
    pipeline.set_progress_bar_config(disable=True)
    usual = {"prompt": "a cat", "negative_prompt": "fog", "num_inference_steps": 3, "guidance_scale": 5}
    usual |= {"original_size": (SIDE, SIDE), "target_size": (SIDE, SIDE), "width": SIDE, "height": SIDE}
    cells = SIDE // 8
    usual["latents"] = torch.randn((4, cells, cells), generator=torch.Generator().manual_seed(1))[None]
    picture = pipeline(**usual | settings, output_type="np").images[0]
    return (picture * 255).round()


def furthest(result, expected) -> int:
    assert result.status == 0, result.stderr
    return int(np.abs(result.pictures[0] - expected).max())


# ---------------------------------------------------------------------------------------------------------------------
# Plain


@pytest.mark.parametrize("sampler", ["ddim", "euler"])
def test_diffusers_pipeline_draws_the_same(sdxl, generate, sampler):
    """Within a level: sums in another order."""
    expected = theirs(StableDiffusionXLPipeline, sdxl, sampler=sampler)
    for ckpt in (sdxl.folder, sdxl.safetensors, sdxl.ckpt):
        assert furthest(generate(ckpt, *SIZE, *PROMPT, "--sampler", sampler), expected) <= 1


def test_sizes_and_crops_are_told_as_diffusers_tells_them(sdxl, generate):
    told = {"original_size": (384, 640), "crops_coords_top_left": (32, 96), "negative_original_size": (80, 96)}
    told |= {"negative_crops_coords_top_left": (32, 96), "negative_target_size": (SIDE, SIDE)}
    options = ("--original_height", 384, "--original_width", 640, "--crop_top", 32, "--crop_left", 96)
    negative = ("--original_height_negative", 80, "--original_width_negative", 96)
    expected = theirs(StableDiffusionXLPipeline, sdxl, **told)
    assert furthest(generate(sdxl.folder, *SIZE, *options, *negative, *PROMPT), expected) <= 1
    line = "a cat --n fog --d 1 --oh 384 --ow 640 --ct 32 --cl 96 --nh 80 --nw 96"
    result = generate(sdxl.folder, *SIZE, "--prompt", line)
    assert furthest(result, expected) <= 1
    texts = Image.open(result.files[0]).text
    names = ("original-height", "original-width", "original-height-negative", "original-width-negative")
    assert [texts[name] for name in (*names, "crop-top", "crop-left")] == ["384", "640", "80", "96", "32", "96"]
    assert furthest(generate(sdxl.folder, *SIZE, *PROMPT), expected) > 1


def test_an_empty_negative_prompt_can_be_zeros(sdxl, generate):
    expected = theirs(StableDiffusionXLPipeline, sdxl, negative_prompt=None)
    line = ("--prompt", "a cat --d 1")
    assert furthest(generate(sdxl.folder, *SIZE, "--zero_empty_negative", *line), expected) <= 1
    assert furthest(generate(sdxl.folder, *SIZE, *line), expected) > 1
    encoded = theirs(StableDiffusionXLPipeline, sdxl, negative_prompt="")
    assert furthest(generate(sdxl.folder, *SIZE, *line), encoded) <= 1


def test_guidance_is_rescaled_as_diffusers_does_it(sdxl, generate):
    expected = theirs(StableDiffusionXLPipeline, sdxl, guidance_rescale=0.7)
    assert furthest(generate(sdxl.folder, *SIZE, "--guidance_rescale", 0.7, *PROMPT), expected) <= 1


def test_pictures_of_a_batch_are_those_drawn_alone(sdxl, generate, tmp_path):
    """Each with its own text, seed and sizes, in all three branches; within a level: sums in another order."""
    lines = ["a cat --d 1 --ow 64", "a dog --n fog --d 2 --ct 9", "a (red:1.3) hat --d 3 --nh 700"]
    (tmp_path / "lines.txt").write_text("\n".join(lines))
    options = (*SIZE, "--negative_scale", 2, "--sequential_file_name", "--from_file", tmp_path / "lines.txt")
    together = generate(sdxl.folder, *options, "--batch_size", 3, outdir=tmp_path / "a").pictures
    alone = generate(sdxl.folder, *options, outdir=tmp_path / "b").pictures
    assert len(alone) == 3
    assert max(np.abs(a - b).max() for a, b in zip(together, alone)) <= 1


def test_sides_that_are_no_multiples_of_32_are_drawn_as_diffusers_draws_them(sdxl, generate):
    size = {"original_size": (120, 136), "target_size": (120, 136), "width": 136, "height": 120}
    size["latents"] = torch.randn((4, 15, 17), generator=torch.Generator().manual_seed(1))[None]
    expected = theirs(StableDiffusionXLPipeline, sdxl, **size)
    assert furthest(generate(sdxl.folder, *SIZE, "--W", 136, "--H", 120, *PROMPT), expected) <= 1


# ---------------------------------------------------------------------------------------------------------------------
# Schedules


def test_zero_terminal_snr_is_followed_from_the_file(sdxl, generate, tmp_path):
    state = load_file(sdxl.safetensors)
    file = tmp_path / "noob.safetensors"
    save_file(state | {"v_pred": torch.empty(0), "ztsnr": torch.empty(0)}, file)
    said = ("--v_parameterization", "--zero_terminal_snr")
    for sampler in ("ddim", "euler_a"):
        found = generate(file, *SIZE, "--sampler", sampler, *PROMPT, outdir=tmp_path / sampler)
        assert (
            found.stderr.count("predicts v, with zero terminal SNR, according to its tensors 'v_pred' and 'ztsnr'\n")
            == 1
        )
        asked = generate(sdxl.safetensors, *SIZE, *said, "--sampler", sampler, *PROMPT, outdir=tmp_path / f"{sampler}2")
        assert np.array_equal(found.pictures[0], asked.pictures[0])
        assert "Zero terminal SNR: True" in Image.open(found.files[0]).text["parameters"]
    schedule = NoiseSchedule("v_prediction", zero_snr=True)
    expected = theirs(StableDiffusionXLPipeline, sdxl, schedule=schedule)
    assert furthest(generate(sdxl.safetensors, *SIZE, *said, *PROMPT, outdir=tmp_path / "c"), expected) <= 1


def test_samplers_that_cannot_begin_at_pure_noise_are_refused_with_those_that_can(sdxl, generate, tmp_path):
    said = ("--v_parameterization", "--zero_terminal_snr", "--sampler", "heun")
    refused = generate(sdxl.folder, *said, *PROMPT)
    able = ", ".join(name for name, sampler in SAMPLERS.items() if sampler.zero_snr)
    message = f"error: --zero_terminal_snr: heun cannot begin at pure noise; use one of {able}\n"
    assert (refused.status, refused.stderr.splitlines(keepends=True)[-1]) == (2, message)
    noise = generate(sdxl.folder, "--zero_terminal_snr", *PROMPT)
    assert (noise.status, noise.stderr.count("\n")) == (2, 1)
    assert "a model that predicts noise cannot do without any signal" in noise.stderr


def test_schedulers_go_through_what_the_numbers_say():
    """Test vectors worked out with diffusers and by hand."""

    def made(sampler, steps, spacing="own", **noise):
        scheduler = make_scheduler(SAMPLERS[sampler], NoiseSchedule(**noise), spacing)
        scheduler.set_timesteps(steps)
        return scheduler

    def times(sampler, steps, **schedule):
        return made(sampler, steps, **schedule).timesteps.tolist()

    assert times("euler", 4, spacing="trailing") == [999, 749, 499, 249]
    assert times("euler", 4) == times("euler", 4, spacing="linspace") == [999, 666, 333, 0]
    assert times("euler", 4, spacing="leading") == [751, 501, 251, 1]
    assert times("ddim", 4, spacing="trailing") == [999, 749, 499, 249]
    assert times("lcm", 4) == [999, 759, 499, 259]
    kept = made("ddim", 30).alphas_cumprod
    torch.testing.assert_close(kept[[0, -1]], torch.tensor([0.99914998, 0.00466010]), rtol=1e-5, atol=0)
    euler = made("euler", 30)
    torch.testing.assert_close(euler.sigmas[:3], torch.tensor([14.6146, 11.9176, 9.8142]), rtol=0, atol=1e-4)
    leading = made("euler", 30, spacing="leading")
    assert leading.timesteps[:3].tolist() == [958, 925, 892]
    torch.testing.assert_close(float(leading.init_noise_sigma), 11.5203, rtol=0, atol=1e-4)
    zero = {"prediction_type": "v_prediction", "zero_snr": True}
    for sampler in ("euler", "euler_a", "dpmsolver++"):
        sigmas = made(sampler, 20, spacing="trailing", **zero).sigmas
        torch.testing.assert_close(sigmas[:3], torch.tensor([4096.0, 40.3923, 18.1301]), rtol=1e-5, atol=0)
    ddim = made("ddim", 20, **zero)
    assert ddim.timesteps[0] == 999  # spaced "trailing": it would never see the last timestep otherwise
    assert ddim.alphas_cumprod[-1] == 0


def test_a_scheduler_that_states_trailing_timesteps_is_told_of(sdxl, generate, tmp_path):
    folder = tmp_path / "turbo"
    folder.mkdir()
    for part in sdxl.folder.iterdir():
        if part.name != "scheduler":
            (folder / part.name).symlink_to(part)
    (folder / "scheduler").mkdir()
    config = {"_class_name": "EulerAncestralDiscreteScheduler", "timestep_spacing": "trailing"}
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(config | {"beta_start": 0.001}))
    told = generate(folder, "--sampler", "euler_a", "--dry_run", *PROMPT).stderr
    message = (
        "the model's scheduler states trailing timesteps, euler_a has linspace; add --schedule trailing to follow it"
    )
    assert f"warning: {message}" in told
    assert "another schedule of noise (beta_start 0.001), which is not followed" in told
    followed = generate(folder, "--sampler", "euler_a", "--schedule", "sgm_uniform", "--dry_run", *PROMPT).stderr
    assert "trailing timesteps" not in followed


# ---------------------------------------------------------------------------------------------------------------------
# ControlNets


def spread(model, seed: int):
    """Random weights that have a say: larger ones where they add to the U-Net or tell a Union's kinds apart."""
    told = ("control_add_embedding", "spatial_ch_projs", "task_embedding")
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        large = name.startswith(("controlnet_down_blocks", "controlnet_mid_block", *told)) or "time_emb_proj" in name
        parameter.data += torch.randn_like(parameter) * (0.2 if large else 0.02)
    return model


def original_names(model, unet):
    modules = layout.control_net_modules(unet.config, len(model.controlnet_cond_embedding.blocks))
    return {layout.original_name(name, modules) or name: value for name, value in model.state_dict().items()}


def thinned(unet, size: str):
    """A ControlNet as the small and middle-sized ones for XL are built: with fewer attentions, or without."""
    if size == "full":
        return ControlNetModel.from_unet(unet)
    config = {**ControlNetModel.from_unet(unet).config}
    if size == "small":
        config |= {"down_block_types": ["DownBlock2D"] * 3, "mid_block_type": "UNetMidBlock2D"}
    else:
        config |= {"transformer_layers_per_block": [0, 0, 1]}
    return ControlNetModel.from_config(config)


@pytest.mark.parametrize("size", ["full", "mid", "small"])
def test_control_nets_of_every_size_and_layout(sdxl, generate, guide, tmp_path, size):
    unet = UNet2DConditionModel.from_pretrained(sdxl.folder / "unet")
    model = spread(thinned(unet, size), seed=3)
    model.save_pretrained(tmp_path / "net")
    save_file(original_names(model, unet), tmp_path / "bare.safetensors")
    prefixed = {f"control_model.{name}": value for name, value in original_names(model, unet).items()}
    save_file(prefixed, tmp_path / "prefixed.safetensors")
    expected = theirs(
        *(StableDiffusionXLControlNetPipeline, sdxl),
        controlnet=ControlNetModel.from_pretrained(tmp_path / "net"),
        image=Image.open(guide),
        controlnet_conditioning_scale=0.7,
    )
    steered = ("--guide_image_path", guide, "--control_net_weights", 0.7, *SIZE, *PROMPT, "--control_net_models")
    names = ("net", "net/diffusion_pytorch_model.safetensors", "bare.safetensors", "prefixed.safetensors")
    for name in names:
        assert furthest(generate(sdxl.folder, *steered, tmp_path / name), expected) <= 1, name
    assert furthest(generate(sdxl.folder, *SIZE, *PROMPT), expected) > 10


@pytest.fixture(scope="module")
def union(sdxl, tmp_path_factory):
    """A ControlNet Union of six kinds of guides, as a folder."""
    unet = UNet2DConditionModel.from_pretrained(sdxl.folder / "unet")
    model = ControlNetUnionModel.from_unet(unet)
    sizes = {"num_trans_channel": 32, "num_proj_channel": 32, "num_trans_head": 8}
    config = {name: value for name, value in model.config.items() if name != "_use_default_values"}
    model = spread(ControlNetUnionModel.from_config(config | sizes), seed=4)
    folder = tmp_path_factory.mktemp("union") / "net"
    model.save_pretrained(folder)
    return folder


def test_a_union_is_told_the_kind_of_its_guide(sdxl, generate, guide, union):
    model = ControlNetUnionModel.from_pretrained(union)
    file = union / "diffusion_pytorch_model.safetensors"
    ours, expected = {}, {}
    for kind, number in (("depth", 1), ("canny", 3)):
        expected[kind] = theirs(
            *(StableDiffusionXLControlNetUnionPipeline, sdxl),
            controlnet=model,
            control_image=[Image.open(guide)],
            control_mode=[number],
            controlnet_conditioning_scale=0.7,
        )
        for given in (union, file):
            options = ("--control_net_models", given, "--control_net_types", kind, "--control_net_weights", 0.7)
            result = generate(sdxl.folder, *options, "--guide_image_path", guide, *SIZE, *PROMPT)
            assert furthest(result, expected[kind]) <= 1
            ours[kind] = result.pictures[0]
    assert np.abs(ours["depth"] - ours["canny"]).max() > 3


def test_a_union_joins_several_guides_and_is_loaded_once(sdxl, generate, guide, union, tmp_path, monkeypatch):
    from library.draw import control_net

    other = tmp_path / "other.png"
    Image.open(guide).rotate(90).save(other)
    expected = theirs(
        *(StableDiffusionXLControlNetUnionPipeline, sdxl),
        controlnet=ControlNetUnionModel.from_pretrained(union),
        control_image=[Image.open(guide), Image.open(other)],
        control_mode=[1, 0],
        controlnet_conditioning_scale=[0.7, 0.4],
    )
    loaded = []
    load = control_net.load_control_net
    monkeypatch.setattr(control_net, "load_control_net", lambda *args: loaded.append(args) or load(*args))
    common = ("--control_net_types", "depth", "openpose", "--control_net_weights", 0.7, 0.4)
    common = (*common, "--guide_image_path", guide, other, *SIZE, *PROMPT, "--control_net_models", union)
    for again in ((), (union,)):
        assert furthest(generate(sdxl.folder, *common, *again), expected) <= 1
    assert len(loaded) == 2  # once in each of the runs


def test_what_a_union_cannot_be_told_is_refused(sdxl, generate, guide, union, tmp_path):
    unet = UNet2DConditionModel.from_pretrained(sdxl.folder / "unet")
    ControlNetModel.from_unet(unet).save_pretrained(tmp_path / "plain")
    steered = ("--guide_image_path", guide, *PROMPT, "--control_net_models")
    known = "openpose, depth, hed, pidi, scribble, ted, softedge, canny, lineart, anime_lineart, mlsd, normal, segment"
    for options, message in (
        (
            (union,),
            f"is a ControlNet Union, which is told the kind of its guide; give --control_net_types, one of {known}",
        ),
        ((union, "--control_net_types", "tile"), f"--control_net_types tile: {union} knows {known}; use one of them"),
        ((tmp_path / "plain", "--control_net_types", "depth"), "is for one kind of guide; give it none"),
        (
            (union, "--control_net_types", "dept"),
            "--control_net_types dept: no such kind of guide; did you mean depth?",
        ),
    ):
        result = generate(sdxl.folder, *steered, *options)
        assert (result.status, result.stderr.count("\n")) == (2, 1)
        assert message in result.stderr
    canny = generate(sdxl.folder, *steered, union, "--control_net_preps", "canny")
    assert "canny, weight 1, steps 0 to 1, canny 63 191" in Image.open(canny.files[0]).text["parameters"]


def test_preprocessings_tell_a_union_its_kind(sdxl, generate, guide, union):
    steered = ("--guide_image_path", guide, *PROMPT, "--control_net_models", union, "--dry_run", "--json")
    for name in ("scribble", "softedge", "lineart", "mlsd"):
        facts = json.loads(generate(sdxl.folder, *steered, "--control_net_preps", name).stdout)
        assert [net["kind"] for net in facts["control_nets"]] == [name]
    said = generate(sdxl.folder, *steered, "--control_net_preps", "blur", "--control_net_types", "depth").stdout
    assert json.loads(said)["control_nets"][0]["kind"] == "depth"
    for name, message in (
        ("tile", f"--control_net_preps tile_8: {union} knows no tile; give --control_net_types, one of openpose,"),
        ("invert", "is told the kind of its guide; give --control_net_types, one of openpose,"),
        ("inpaint", f"makes -1 of masked pixels, and {union} is a ControlNet Union; give it a guide that is black"),
    ):
        masked = ("--image_path", guide, "--mask_path", guide) if name == "inpaint" else ()
        result = generate(sdxl.folder, *steered, "--control_net_preps", name, *masked)
        assert (result.status, result.stderr.count("\n")) == (2, 1)
        assert message in result.stderr


def test_a_union_that_is_not_whole_is_refused(sdxl, generate, guide, union, tmp_path):
    state = load_file(union / "diffusion_pytorch_model.safetensors")
    parts = {name: value for name, value in state.items() if not name.startswith("transformer_layes.")}
    for damaged in (parts, state | {"task_embedding": torch.ones(6)}, state | {"task_embedding": torch.ones(())}):
        save_file(damaged, tmp_path / "x.safetensors")
        options = ("--control_net_models", tmp_path / "x.safetensors", "--control_net_types", "canny")
        result = generate(sdxl.folder, *options, "--guide_image_path", guide, *PROMPT)
        assert (result.status, result.stderr.count("\n")) == (2, 1)
        assert "is no whole ControlNet Union" in result.stderr


def test_a_control_net_of_another_family_is_refused(sd1, sdxl, generate, guide, tmp_path):
    nets = {}
    for family in (sd1, sdxl):
        nets[family.folder] = tmp_path / family.folder.name
        unet = UNet2DConditionModel.from_pretrained(family.folder / "unet")
        thinned(unet, "full").save_pretrained(nets[family.folder])
    steered = ("--guide_image_path", guide, *PROMPT, "--control_net_models")
    for family, other in ((sd1, sdxl), (sdxl, sd1)):
        result = generate(family.folder, *steered, nets[other.folder])
        assert (result.status, result.stderr.count("\n")) == (2, 1)
        assert "use a ControlNet of the model's family" in result.stderr
