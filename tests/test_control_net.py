"""ControlNet, as a user runs it: every layout of its files, and how it is used along the steps."""

import json
import os
import shutil

import cv2
import numpy as np
import pytest
import torch
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline, UNet2DConditionModel
from loading import load_all
from PIL import Image
from safetensors.torch import load_file, save_file
from test_relatives import make_relative

from library.draw import control_net
from library.draw.attention import use_kernel
from library.draw.guides import Guide
from library.draw.samplers import make_scheduler
from library.draw.text_conditions import TextConditions
from library.files import checkpoint_layout as layout
from library.files.model_files import find_model
from library.machine.attention import sdpa
from library.settings.noise_schedule import NoiseSchedule
from library.settings.samplers import SAMPLERS
from library.texts import readable
from networks import lora
from networks.keys import layer_shapes
from tools import random_model
from tools.random_network import random_lora

# at 64 pixels the tiny model normalises groups of two numbers, which makes a rounding error a change of sign
SIZE = ("--W", 128, "--H", 128, "--steps", 3)
PROMPT = ("--prompt", "a cat --n fog --d 1")


OWN = ("zero_convs.", "middle_block_out.", "input_hint_block.")  # what a difference holds whole


def original_names(model: ControlNetModel, unet: UNet2DConditionModel) -> dict[str, torch.Tensor]:
    modules = layout.control_net_modules(unet.config, len(model.controlnet_cond_embedding.blocks))
    return {layout.original_name(name, modules): value for name, value in model.state_dict().items()}


def write_control_net(folder, family, seed: int):
    """A ControlNet of random weights that has a say, in every layout there is."""
    unet = UNet2DConditionModel.from_pretrained(family.folder / "unet")
    torch.manual_seed(seed)
    model = ControlNetModel.from_unet(unet)
    for name, parameter in model.named_parameters():
        noise = torch.randn_like(parameter)
        parameter.data += noise * (0.2 if "controlnet_" in name else 0.02)
    model.save_pretrained(folder / "folder")
    state = original_names(model, unet)
    save_file(state, folder / "bare.safetensors")
    prefixed = {f"control_model.{name}": value for name, value in state.items()}
    whole = {"model.diffusion_model.out.2.bias": torch.zeros(4), "cond_stage_model.x": torch.zeros(1)}
    torch.save({"state_dict": prefixed | whole}, folder / "wrapped.pth")
    shared = original_names(ControlNetModel.from_unet(unet), unet)
    difference = {n: v if n.startswith(OWN) else v - shared[n] for n, v in state.items()}
    prefixed = {f"control_model.{name}": value for name, value in difference.items()}
    save_file(prefixed | {"difference": torch.tensor([])}, folder / "difference.safetensors")
    return folder


@pytest.fixture(scope="session")
def net1(sd1, tmp_path_factory):
    return write_control_net(tmp_path_factory.mktemp("net1"), sd1, 1)


@pytest.fixture(scope="session")
def net2(sd2, tmp_path_factory):
    return write_control_net(tmp_path_factory.mktemp("net2"), sd2, 2)


@pytest.fixture(scope="session")
def guides(tmp_path_factory):
    """Four different guide pictures of another size than the pictures drawn."""
    folder = tmp_path_factory.mktemp("guides")
    rng = np.random.default_rng(0)
    for number in range(4):
        pixels = rng.integers(0, 255, (6, 6, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((96, 160), Image.Resampling.BICUBIC).save(folder / f"{number}.png")
    return folder


def controlled(generate, family, net, *options, **settings):
    result = generate(family.folder, *family.options, *SIZE, "--control_net_models", net, *options, **settings)
    assert result.status == 0, result.stderr
    return result.pictures


def largest(first, second) -> int:
    assert len(first) == len(second) > 0
    return max(int(np.abs(a - b).max()) for a, b in zip(first, second))


def test_objects_for_scripts_tell_of_control_nets(sd1, net1, generate, guides):
    file = net1 / "folder" / "diffusion_pytorch_model.safetensors"
    options = ("--control_net_models", file, file, "--control_net_preps", "none", "canny_10_20", "--guide_image_path",
               guides, "--control_net_weights", 0.5, "--control_net_starts", 0, 0.25)  # fmt: skip
    result = generate(
        sd1.folder, "--prompt", "a", "--n_iter", 2, "--dry_run", "--json", *options, "--control_net_together"
    )
    assert result.status == 0, result.stderr
    _, second = map(json.loads, result.stdout.splitlines())
    each = {"name": file.stem, "file": str(file), "lllite": False, "is_difference": False, "kind": None, "end": 1}
    assert second["control_net_together"] is True
    assert second["control_nets"] == [
        each | {"preprocess": None, "canny": None, "weight": 0.5, "start": 0, "guide": str(guides / "2.png")},
        each
        | {"preprocess": {"name": "canny", "low": 10, "high": 20}, "canny": {"low": 10, "high": 20}}
        | {"weight": 1, "start": 0.25, "guide": str(guides / "3.png")},
    ]


@pytest.mark.parametrize("family_name", ["sd1", "sd2"])
def test_all_layouts_mean_the_same(request, generate, guides, family_name):
    family, folder = (request.getfixturevalue(name) for name in (family_name, f"net{family_name[-1]}"))
    options = ("--guide_image_path", guides / "0.png", *PROMPT)
    expected = controlled(generate, family, folder / "folder", *options)
    assert largest(expected, generate(family.folder, *family.options, *SIZE, *PROMPT).pictures) > 30
    diffusers_file = folder / "folder" / "diffusion_pytorch_model.safetensors"
    for layout_name in ("bare.safetensors", "wrapped.pth", "difference.safetensors", diffusers_file):
        # a difference is rounded when it is taken and when it is added
        assert largest(controlled(generate, family, folder / layout_name, *options), expected) <= 1, layout_name


@pytest.mark.parametrize("family_name", ["sd1", "sd2"])
def test_diffusers_pipeline_draws_the_same(request, generate, guides, family_name):
    family, folder = (request.getfixturevalue(name) for name in (family_name, f"net{family_name[-1]}"))
    options = ("--guide_image_path", guides / "1.png", "--control_net_weights", 0.7, "--scale", 5)
    ours = controlled(generate, family, folder / "bare.safetensors", *options, *PROMPT)[0]
    model = ControlNetModel.from_pretrained(folder / "folder")
    prediction = "v_prediction" if family_name == "sd2" else "epsilon"
    pipeline = StableDiffusionControlNetPipeline.from_pretrained(
        family.folder,
        controlnet=model,
        safety_checker=None,
        feature_extractor=None,
        scheduler=make_scheduler(SAMPLERS["ddim"], NoiseSchedule(prediction)),
    )
    theirs = pipeline(
        "a cat",
        negative_prompt="fog",
        image=Image.open(guides / "1.png").resize((128, 128), Image.Resampling.LANCZOS),
        num_inference_steps=3,
        guidance_scale=5,
        controlnet_conditioning_scale=0.7,
        latents=torch.randn((4, 16, 16), generator=torch.Generator().manual_seed(1))[None],
        output_type="np",
    ).images[0]
    assert np.abs(ours - (theirs * 255).round()).max() <= 1  # sums in another order


def steps_used(monkeypatch) -> list[tuple[str, int]]:
    """Record which ControlNet works at which timestep."""
    used = []
    real = control_net.ControlNet.residuals

    def record(self, sample, timestep, *rest):
        added = real(self, sample, timestep, *rest)
        if added is not None:
            used.append((self.specs[min(self.specs)].path.stem, int(timestep)))
        return added

    monkeypatch.setattr(control_net.ControlNet, "residuals", record)
    return used


@pytest.mark.parametrize(
    ("options", "bare", "difference"),
    [
        ((), [751, 251], [501, 1]),
        (["--control_net_ratios", 0.5, 1], [751, 251], [501, 1]),
        (["--control_net_ratios", 0.5, 0.25], [751, 251], [501]),
        (["--control_net_ratios", 0.49, 0], [751], []),
        (["--control_net_starts", 0.5], [251], [501, 1]),
        (["--control_net_weights", 0, 1], [], [501, 1]),
        (["--control_net_together"], [751, 501, 251, 1], [751, 501, 251, 1]),
        (["--control_net_together", "--control_net_ratios", 1, 0.25], [751, 501, 251, 1], [751, 501]),
    ],
)
def test_which_steps_each_has(sd1, net1, generate, guides, monkeypatch, options, bare, difference):
    used = steps_used(monkeypatch)
    nets = (net1 / "bare.safetensors", net1 / "difference.safetensors")
    options = ("--steps", 4, "--guide_image_path", guides / "0.png", *options, "--prompt", "a")
    assert generate(sd1.folder, "--control_net_models", *nets, *options).status == 0
    assert [timestep for name, timestep in used if name == "bare"] == bare
    assert [timestep for name, timestep in used if name == "difference"] == difference


def test_together_adds_up(sd1, net1, generate, guides, tmp_path):
    """Twice half of a ControlNet is the whole of it."""
    guide = ("--guide_image_path", guides / "0.png")
    once = controlled(generate, sd1, net1 / "bare.safetensors", *guide, *PROMPT)
    halves = (net1 / "folder", *guide, "--control_net_weights", 0.5, 0.5, "--control_net_together", *PROMPT)
    assert largest(once, controlled(generate, sd1, net1 / "bare.safetensors", *halves)) <= 1


@pytest.mark.parametrize("off", [("--control_net_weights", 0), ("--control_net_ratios", 0)])
def test_switched_off_it_changes_nothing(sd1, net1, generate, guides, off):
    options = ("--guide_image_path", guides / "0.png", *off, *PROMPT)
    plain = generate(sd1.folder, *SIZE, *PROMPT).pictures
    assert largest(plain, controlled(generate, sd1, net1 / "bare.safetensors", *options)) == 0


def test_a_batch_equals_pictures_alone(sd1, net1, generate, guides, tmp_path):
    """Guides go in step with the pictures, through a batch and three branches."""
    common = ("--negative_scale", 2, "--sampler", "euler_a")
    prompt = ("--prompt", "a cat --n fog --d 1,2,3,4,5", "--images_per_prompt", 5, "--batch_size", 3)
    batch = ("--guide_image_path", guides, *common, *prompt)
    together = controlled(generate, sd1, net1 / "bare.safetensors", *batch)
    for number in (1, 4):
        alone = (
            "--guide_image_path",
            guides / f"{number % 4}.png",
            *common,
            "--prompt",
            f"a cat --n fog --d {number + 1}",
        )
        pictures = controlled(generate, sd1, net1 / "bare.safetensors", *alone, outdir=tmp_path / f"o{number}")
        assert largest(pictures, [together[number]]) <= 1


def test_a_guide_is_embedded_once(sd1, net1, generate, guides, monkeypatch):
    embedded = []
    real = control_net.ControlNet.embed
    monkeypatch.setattr(control_net.ControlNet, "embed", lambda self, *rest: embedded.append(1) or real(self, *rest))
    options = ("--guide_image_path", guides / "0.png", "--prompt", "a", "--images_per_prompt", 4, "--batch_size", 2)
    controlled(generate, sd1, net1 / "bare.safetensors", *options)
    assert len(embedded) == 1


def test_each_control_net_has_its_guides(sd1, net1, generate, guides, monkeypatch):
    prepared = []
    real = Guide.prepare
    monkeypatch.setattr(Guide, "prepare", lambda guide: prepared.append(guide.file.stem) or real(guide))
    options = ("--control_net_models", *[net1 / "bare.safetensors"] * 2, "--prompt", "a", "--images_per_prompt", 2)
    assert generate(sd1.folder, *options, "--guide_image_path", guides, "--batch_size", 1).status == 0
    assert prepared == ["0", "1", "2", "3"]


def test_the_metadata_names_what_steered_a_picture(sd1, net1, generate, guides):
    options = ("--control_net_models", net1 / "bare.safetensors", "--control_net_weights", 0.5, *PROMPT)
    result = generate(
        sd1.folder, *SIZE, *options, "--control_net_preps", "canny", "--guide_image_path", guides / "2.png"
    )
    parameters = Image.open(result.files[0]).text["parameters"]
    assert 'ControlNet: "bare, weight 0.5, steps 0 to 1, canny 63 191, guide 2.png"' in parameters


def test_the_metadata_name_a_control_nets_folder(net1, sd1, generate, guides):
    options = ("--control_net_models", net1 / "folder", "--guide_image_path", guides / "2.png", *PROMPT)
    parameters = Image.open(generate(sd1.folder, *SIZE, *options).files[0]).text["parameters"]
    assert 'ControlNet: "folder, weight 1, ' in parameters


@pytest.mark.parametrize("layout_name", ["bare.safetensors", "wrapped.pth", "folder"])
def test_names_that_are_no_text(sd1, net1, generate, guides, tmp_path, layout_name):
    """Those of the ControlNet, of its guide and of the picture that is named like its source."""
    name = os.fsdecode("写真".encode("cp932"))
    copy = shutil.copytree if (net1 / layout_name).is_dir() else shutil.copy
    net = copy(net1 / layout_name, tmp_path / f"net{name}{(net1 / layout_name).suffix}")
    guide = shutil.copy(guides / "1.png", tmp_path / f"{name}.png")
    plain = ("--control_net_models", net1 / layout_name, "--guide_image_path", guides / "1.png")
    plain += ("--image_path", guides / "1.png")
    named = ("--control_net_models", net, "--guide_image_path", guide, "--image_path", guide)
    common = (*SIZE, *PROMPT, "--use_original_file_name", "--control_net_save_guides")
    result = generate(sd1.folder, *common, *named)
    assert (result.status, [file.name for file in result.files]) == (0, [f"{name}.png", f"{name}_guide1.png"])
    assert largest(generate(sd1.folder, *common, *plain, outdir=tmp_path / "plain").pictures, result.pictures) == 0
    parameters = Image.open(result.files[0]).text["parameters"]
    assert f"guide {readable(name)}.png" in parameters
    assert "net" + readable(name) in parameters


def test_canny_guides_are_saved(sd1, net1, generate, guides, tmp_path):
    options = ("--guide_image_path", guides / "0.png", "--control_net_preps", "canny_20_60", "--sequential_file_name")
    for pictures in (1, 2):
        generate(sd1.folder, *SIZE, "--control_net_models", net1 / "bare.safetensors", *options,
                 "--control_net_save_guides", "--prompt", "a", "--images_per_prompt", pictures,
                 outdir=tmp_path / "out")  # fmt: skip
    names = [f"im_00000{number}{end}.png" for number in (1, 2, 3) for end in ("", "_guide1")]
    assert sorted(path.name for path in (tmp_path / "out").glob("*.png")) == names
    guide = np.asarray(Image.open(guides / "0.png").resize((128, 128), Image.Resampling.LANCZOS))
    edges = cv2.Canny(cv2.cvtColor(guide, cv2.COLOR_RGB2GRAY), 20, 60)
    saved = np.asarray(Image.open(tmp_path / "out" / "im_000001_guide1.png"))
    assert 0 < np.count_nonzero(edges) < edges.size / 2
    assert np.array_equal(saved, np.stack([edges] * 3, axis=-1))


def test_half_precision_and_img2img(sd1, net1, generate, guides, tmp_path):
    options = ("--guide_image_path", guides / "0.png", *PROMPT)
    full = controlled(generate, sd1, net1 / "difference.safetensors", *options)
    half = controlled(generate, sd1, net1 / "difference.safetensors", *options, "--bf16")
    assert np.abs(half[0] - full[0]).mean() < 4  # bfloat16 keeps 8 bits
    source = ("--image_path", guides / "1.png", "--mask_path", guides / "2.png", "--strength", 0.7)
    assert largest(full, controlled(generate, sd1, net1 / "difference.safetensors", *source, *options)) > 10


def test_with_highres_fix_and_deep_shrink(sd1, net1, generate, guides, monkeypatch):
    """Each stage sees the guide at its own size, or the first one alone; shrunk features still fit together."""
    used, embedded = steps_used(monkeypatch), []
    real = control_net.ControlNet.embed
    monkeypatch.setattr(control_net.ControlNet, "embed", lambda self, g: embedded.append(g.shape) or real(self, g))
    options = ("--guide_image_path", guides / "0.png", "--highres_fix_scale", 0.5, "--highres_fix_steps", 2)
    options = (*options, "--strength", 0.5, "--ds_depth_1", 2, "--ds_timesteps_1", 400, "--steps", 4, *PROMPT)
    controlled(generate, sd1, net1 / "bare.safetensors", *options)
    assert [timestep for _, timestep in used] == [501, 1, 251, 1]
    assert embedded == [(64, 64, 3), (128, 128, 3)]
    used.clear()
    controlled(generate, sd1, net1 / "bare.safetensors", *options, "--highres_fix_disable_control_net")
    assert [timestep for _, timestep in used] == [501, 1]


def test_difference_files_with_ratios_and_highres_fix(sd1, net1, generate, guides, tmp_path):
    """They are the whole ControlNet wherever that is used, beside networks too, which only hang on the U-Net."""
    options = ("--guide_image_path", guides / "0.png", guides / "1.png", *PROMPT, "--steps", 4)
    nets = (net1 / "difference.safetensors", net1 / "difference.safetensors")
    whole = (net1 / "bare.safetensors", net1 / "bare.safetensors")
    layers = layer_shapes(find_model(str(sd1.folder), v2=False, v_parameterization=False))
    save_file(random_lora(layers, 4, alpha=None, convolutions=True, seed=1), tmp_path / "lora.safetensors")
    network = ("--network_module", "networks.lora", "--network_weights", tmp_path / "lora.safetensors")
    for more in (
        ("--control_net_ratios", 0.5, 0.25, "--negative_scale", 2),
        ("--highres_fix_scale", 0.5, "--highres_fix_steps", 2, "--strength", 0.5),
        network,
        (*network, "--network_pre_calc"),
    ):
        first, second = (
            generate(sd1.folder, *SIZE, "--control_net_models", *files, *options, *more).pictures
            for files in (nets, whole)
        )
        # differences are rounded when they are taken and added; the first stage of 64 pixels blows that up
        assert np.abs(first[0] - second[0]).mean() < 0.5, more


def test_differences_are_to_the_unet_that_networks_were_merged_into(sd1, net1, generate, guides, tmp_path):
    models = load_all(find_model(str(sd1.folder), v2=False, v_parameterization=False))
    layers = layer_shapes(find_model(str(sd1.folder), v2=False, v_parameterization=False))
    save_file(random_lora(layers, 4, alpha=None, convolutions=True, seed=1), tmp_path / "lora.safetensors")
    text_encoder = models.texts[0].model
    merged, _ = lora.create_network_from_weights(5, str(tmp_path / "lora.safetensors"), None, text_encoder, models.unet)
    merged.merge_to(text_encoder, models.unet)
    shared = original_names(ControlNetModel.from_unet(models.unet), models.unet)
    whole = {name.removeprefix("control_model."): v for name, v in load_file(net1 / "difference.safetensors").items()}
    whole.pop("difference")
    whole = {n: v if n.startswith(OWN) else v + shared[n] for n, v in whole.items()}
    save_file(whole, tmp_path / "whole.safetensors")
    options = ("--guide_image_path", guides / "0.png", *PROMPT, "--network_module", "networks.lora", "--network_merge")
    options = (*options, "--network_weights", tmp_path / "lora.safetensors", "--network_mul", 5)
    first, second, other = (
        controlled(generate, sd1, file, *options)
        for file in (net1 / "difference.safetensors", tmp_path / "whole.safetensors", net1 / "bare.safetensors")
    )
    assert np.abs(first[0] - second[0]).mean() < 0.5  # differences are rounded when they are taken and added
    assert np.abs(first[0] - other[0]).mean() > 1


def test_guides_of_several_control_nets_go_in_step(sd1, net1, generate, guides, tmp_path):
    """Picture j of a batch takes the j-th pair of guides."""
    nets = ("--control_net_models", net1 / "bare.safetensors", net1 / "folder", "--steps", 2)
    prompt = ("--prompt", "a cat --d 1,2", "--images_per_prompt", 2, "--batch_size", 2)
    together = generate(sd1.folder, *SIZE, *nets, "--guide_image_path", guides, *prompt).pictures
    pair = ("--guide_image_path", guides / "2.png", guides / "3.png", "--prompt", "a cat --d 2")
    alone = generate(sd1.folder, *SIZE, *nets, *pair, outdir=tmp_path / "alone").pictures
    assert largest(alone, together[1:]) <= 1
    pair = ("--guide_image_path", guides / "0.png", guides / "1.png", "--prompt", "a cat --d 2")
    assert largest(alone, generate(sd1.folder, *SIZE, *nets, *pair, outdir=tmp_path / "other").pictures) > 8


def test_with_gradual_latent_and_regions(sd1, net1, generate, guides, tmp_path):
    """The guide holds at every size that the latents grow through, and the ControlNet knows the regions."""
    Image.new("RGB", (8, 8), (255, 0, 0)).save(tmp_path / "map.png")
    options = (
        "--sampler",
        "euler_a",
        "--steps",
        4,
        "--gradual_latent_timesteps",
        900,
        "--gradual_latent_ratio_step",
        0.5,
    )
    options = (*options, "--gradual_latent_every_n_steps", 1, "--mask_path", tmp_path / "map.png")
    options = (*options, "--prompt", "a cat AND a dog --d 1")
    guided = controlled(generate, sd1, net1 / "bare.safetensors", "--guide_image_path", guides / "0.png", *options)
    assert largest(guided, generate(sd1.folder, *SIZE, *options).pictures) > 30


def test_features_follow_latents_of_other_sizes(sd1, net1):
    """While Gradual Latent draws small, the guide's features shrink along."""
    from library.files.control_net import find_control_net
    from library.settings.control_net import Control, ControlNetSpec

    unet = UNet2DConditionModel.from_pretrained(sd1.folder / "unet").requires_grad_(False)
    file = find_control_net(str(net1 / "bare.safetensors"), unet.config)
    net = control_net.ControlNet(control_net.load_control_net(file, unet), {0: ControlNetSpec(file, Control())})
    use_kernel(net.model, sdpa)
    text, timestep = TextConditions(torch.zeros(2, 77, unet.config.cross_attention_dim)), torch.tensor(500)
    with torch.inference_mode():
        features = net.embed(np.full((128, 64, 3), 255, np.uint8))
        down, middle = net.residuals(torch.zeros(2, 4, 24, 16), timestep, text, {0: features}, 0.0)
    assert down[0].shape == (2, 32, 24, 16)
    assert middle.shape[2:] == (3, 2)


# ---------------------------------------------------------------------------------------------------------------------
# Refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--control_net_preps", "depth"],
            "--control_net_preps depth: no such preprocessing; use none, canny,",
        ),
        (["--control_net_preps", "canny_200_100"], "the low threshold is above the high one"),
        (["--control_net_ratios", "1.5"], "--control_net_ratios 1.5: out of range"),
        (["--control_net_weights", "nan"], "--control_net_weights nan: not a finite number"),
        (["--control_net_weights", "1", "2"], "--control_net_weights: 2 values for 1 in --control_net_models"),
        (["--control_net_starts", "0.5", "--control_net_ratios", "0.4"], "would begin at 0.5 and end at 0.4"),
        (["--guide_image_path", "nowhere"], "--guide_image_path nowhere: no such file or folder"),
    ],
)
def test_bad_options(sd1, net1, generate, guides, options, message):
    given = ("--control_net_models", net1 / "bare.safetensors", "--guide_image_path", guides / "0.png", *options)
    result = generate(sd1.folder, *given, *PROMPT)
    assert result.status == 2
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_pictures_and_models_that_do_not_pair_up(sd1, net1, generate, guides):
    net = net1 / "bare.safetensors"
    result = generate(sd1.folder, "--control_net_models", net, *PROMPT)
    assert "--control_net_models: draws after a guide picture; give --guide_image_path" in result.stderr
    result = generate(sd1.folder, "--control_net_models", net, net, net, "--guide_image_path", guides, *PROMPT)
    assert "4 pictures for 3 ControlNets" in result.stderr
    for option in (["--control_net_weights", 1], ["--control_net_together"], ["--control_net_save_guides"]):
        result = generate(sd1.folder, *option, *PROMPT)
        assert f"{option[0]}: is for ControlNet; give --control_net_models" in result.stderr


@pytest.mark.parametrize(
    ("keys", "name"),
    [
        (["lora_controlnet", "zero_convs.0.0.weight", "input_blocks.0.0.up"], "a Control-LoRA"),
        (["adapter.body.0.resnets.0.block1.weight"], "a T2I-Adapter"),
        (["body.0.block1.weight", "conv_in.weight"], "a T2I-Adapter"),
        (["image_proj.proj.weight", "ip_adapter.1.to_k_ip.weight"], "an IP-Adapter"),
        (["lllite_unet_input_blocks_4_1.down.0.weight"], "a ControlNet-LLLite"),
        (["lora_unet_x.lora_down.weight"], "a LoRA"),
        (["something.else"], "no ControlNet"),
    ],
)
def test_other_files_are_named(sd1, generate, guides, tmp_path, keys, name):
    save_file({key: torch.zeros(2) for key in keys}, tmp_path / "x.safetensors")
    options = ("--control_net_models", tmp_path / "x.safetensors", "--guide_image_path", guides / "0.png")
    result = generate(sd1.folder, *options, *PROMPT)
    assert result.status == 2
    assert f"x.safetensors: is {name}" in result.stderr


@pytest.mark.parametrize("layout_name", ["folder", "bare.safetensors"])
def test_a_control_net_for_models_of_more_layers(net1, generate, guides, tmp_path, layout_name):
    networks, _ = make_relative("BK-SDM base")
    random_model.write_folder(networks, tmp_path / "small", "epsilon", variant=None)
    options = ("--control_net_models", net1 / layout_name, "--guide_image_path", guides / "0.png")
    result = generate(tmp_path / "small", *options, *PROMPT, "--dry_run")
    assert result.status == 2
    assert "adds to 12 places of a U-Net's encoder, the model's has 8; use a ControlNet made for this" in result.stderr


def test_an_ip_adapter_pickle_is_named(sd1, generate, guides, tmp_path):
    nested = {part: {"weight": torch.zeros(2)} for part in ("image_proj", "ip_adapter")}
    torch.save(nested, tmp_path / "ip.bin")
    options = ("--control_net_models", tmp_path / "ip.bin", "--guide_image_path", guides / "0.png")
    assert "ip.bin: is an IP-Adapter" in generate(sd1.folder, *options, *PROMPT).stderr


def test_another_familys_control_net(sd1, net1, generate, guides, tmp_path):
    from safetensors.torch import load_file

    state = load_file(net1 / "bare.safetensors")
    options = ("--control_net_models", tmp_path / "x.safetensors", "--guide_image_path", guides / "0.png", *PROMPT)
    name = "middle_block.1.transformer_blocks.0.attn2.to_k.weight"
    save_file(state | {name: torch.zeros(64, 1024)}, tmp_path / "x.safetensors")
    assert "is made for Stable Diffusion 2.x (texts 1024 wide)" in generate(sd1.folder, *options).stderr
    save_file(state | {"input_blocks.4.0.in_layers.2.weight": torch.zeros(80, 32, 3, 3)}, tmp_path / "x.safetensors")
    assert "its level 1 is 80 wide, the model's 64" in generate(sd1.folder, *options).stderr
    for lacking, named in (("zero_convs.3.0.bias", "1 tensors"), ("zero_convs.3.", "2 tensors")):
        save_file({n: v for n, v in state.items() if not n.startswith(lacking)}, tmp_path / "x.safetensors")
        result = generate(sd1.folder, *options)
        assert result.status == 2
        part = "bias" if lacking.endswith("bias") else "weight"
        assert f"lacks {named} of the ControlNetModel, 'controlnet_down_blocks.3.{part}' first" in result.stderr
