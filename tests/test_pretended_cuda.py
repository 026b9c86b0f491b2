"""Whole pictures on a GPU that is not there: every tensor where it should be, in its type, and no step waits.

What a GPU refuses, and what it waits for, `pretended_cuda` knows; here is every feature that pictures are drawn with.
"""

import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Generate, Models, WriteModel
from diffusers import AutoencoderKL
from PIL import Image
from pretended_cuda import pretended_gpu
from safetensors.torch import save_file
from test_control_net import write_control_net
from test_guidance import clip_folder, vgg16_tensors  # noqa: F401  # a fixture
from test_highres import upscaler_file  # noqa: F401  # a fixture
from test_regional_networks import write_network
from test_upscalers import files as upscalers  # noqa: F401  # a fixture
from test_upscalers import spandrel  # noqa: F401  # another
from test_xl_features import lllite  # noqa: F401  # a fixture
from test_xl_pictures import union  # noqa: F401  # a fixture

from library.files.model_inputs import EDITING, INPAINTING
from library.files.textual_inversion import XTI_LAYERS
from library.machine import devices
from library.settings.computing import Computing
from library.settings.samplers import SAMPLERS

Files = dict[str, object]
CONTROL_NET = "--control_net_models {net} --guide_image_path {halves}"
LORAS = "--network_weights {lora} {lora2}"
REDRAWN = "--image_path {halves} --strength 0.7"
PROMPT = "a cat --n fog --d 1"


def write_files(folder, family: Models) -> Files:
    """What features need, by a name for each file."""
    folder.mkdir()
    halves = Image.new("RGB", (64, 64), (255, 0, 0))
    halves.paste((0, 255, 0), (32, 0, 64, 64))
    halves.save(folder / "halves.png")
    Image.fromarray(np.pad(np.full((32, 32), 255, np.uint8), ((0, 32), (16, 16)))).save(folder / "mask.png")
    (folder / "net").mkdir()
    return {
        "{halves}": folder / "halves.png",
        "{mask}": folder / "mask.png",
        "{net}": write_control_net(folder / "net", family, 1) / "bare.safetensors",
        "{lora}": write_network(folder / "a.safetensors", family, "lora", 1),
        "{lora2}": write_network(folder / "b.safetensors", family, "lora", 2),
        "{loha}": write_network(folder / "c.safetensors", family, "loha", 3),
        "{loras}": folder,
    }


@pytest.fixture(scope="module")
def sd1_files(sd1: Models, clip_folder, tmp_path_factory: pytest.TempPathFactory) -> Files:  # noqa: F811
    folder = tmp_path_factory.mktemp("sd1_files") / "files"
    files = write_files(folder, sd1)
    rng = torch.Generator().manual_seed(0)
    save_file({layer: torch.randn(2, 64, generator=rng) for layer in XTI_LAYERS}, folder / "exty.safetensors")
    save_file({"emb_params": torch.randn(2, 64, generator=rng)}, folder / "zzyzx.safetensors")
    torch.save(vgg16_tensors(), folder / "vgg16.pth")
    xti, word = folder / "exty.safetensors", folder / "zzyzx.safetensors"
    return files | {"{xti}": xti, "{word}": word, "{vgg16}": folder / "vgg16.pth", "{clip}": clip_folder}


@pytest.fixture(scope="module")
def sdxl_files(sdxl: Models, lllite, union, tmp_path_factory: pytest.TempPathFactory) -> Files:  # noqa: F811
    folder = tmp_path_factory.mktemp("sdxl_files") / "files"
    files = write_files(folder, sdxl)
    word = folder / "zzyzx.safetensors"
    save_file({"clip_l": torch.randn(2, 64), "clip_g": torch.randn(2, 32)}, word)
    return files | {"{lllite}": lllite[0], "{union}": union, "{word}": word}


def filled(options: str, files: Files) -> list[object]:
    """The words of options, with files in place of their names."""
    return [files.get(word, word) for word in options.split()]


def precision_of(request: pytest.FixtureRequest) -> str:
    """One of the two types of half the size, in turn: either mixes with float32 where something is in the wrong one."""
    return ("--fp16", "--bf16")[zlib.crc32(request.node.name.encode()) % 2]


def test_every_sampler(sd1: Models, sd1_files: Files, generate: Generate, tmp_path: Path) -> None:
    """With and without a picture and a mask to draw over; they compute in float32, whatever the model does."""
    lines = [f"a cat --d {seed} --sampler {name}" for seed, name in enumerate(SAMPLERS)]
    lines += ["a cat --eta 0.5", "a cat --sampler euler --s_churn 2", "a cat --sampler dpm_2 --schedule karras"]
    (tmp_path / "lines.txt").write_text("\n".join(lines))
    common = ("--bf16", "--steps", 4, "--from_file", tmp_path / "lines.txt")
    with pretended_gpu():
        for options in ("", f"{REDRAWN} --mask_path {{mask}}"):
            result = generate(sd1.folder, *common, *filled(options, sd1_files))
            assert result.status == 0, result.stderr
            assert len(result.files) == len(lines)


@pytest.mark.parametrize(
    ("prompt", "options"),
    [
        (PROMPT, ""),
        (PROMPT, "--negative_scale 3 --images_per_prompt 3 --batch_size 2 --vae_batch_size 1"),
        (PROMPT, "--guidance_start 0.4 --guidance_end 0.8 --guidance_rescale 0.5"),
        (PROMPT, "--vae_slices 2 --tile 64 --W 128"),
        (PROMPT, "--lowvram --zero_terminal_snr --v_parameterization"),
        (PROMPT, "--max_embeddings_multiples 3 --clip_skip 2 --emb_normalize_mode abs --opt_channels_last"),
        (PROMPT, "--upscale 2"),
        (PROMPT, REDRAWN),
        (PROMPT, f"{REDRAWN} --mask_path {{mask}} --mask_blur 4 --fill noise --inpaint_area mask --keep_unmasked"),
        (PROMPT, f"{REDRAWN} --extend 0,0,32,0 --fill blur --lowvram"),
        (PROMPT, "--highres_fix_scale 0.5 --highres_fix_steps 2 --W 128 --lowvram"),
        (PROMPT, "--highres_fix_scale 0.5 --highres_fix_latents_upscaling --sampler euler_a --W 128"),
        (PROMPT, "--sampler euler_a --steps 4 --gradual_latent_timesteps 999 --gradual_latent_ratio_step 0.5"),
        (
            PROMPT,
            "--sampler euler_a --steps 4 --gradual_latent_timesteps 999 --gradual_latent_unsharp_params 3,0.5,0.5",
        ),
        (PROMPT, "--ds_depth_1 2 --sampler dpmsolver++ --W 128"),
        (PROMPT, LORAS),
        (PROMPT, f"{LORAS} --network_merge"),
        (PROMPT, f"{LORAS} --network_pre_calc"),
        ("a <lora:a:0.5> cat <lora:c:1> --d 1", "--prompt_syntax webui --network_dir {loras}"),
        (f"{PROMPT} --am 0.3", "--network_weights {loha}"),
        ("[a:an exty:0.5] cat AND a dog :0.5", "--prompt_syntax webui --XTI_embeddings {xti}"),
        ("a zzyzx cat --d 1", "--textual_inversion_embeddings {word}"),
        (PROMPT, CONTROL_NET),
        (PROMPT, f"{CONTROL_NET} --control_net_preps canny_100_200 --control_net_ratios 0.5 --steps 4"),
        ("a cat AND a dog --d 1", "--mask_path {halves}"),
        ("a cat AND a dog --d 1", f"--mask_path {{halves}} {LORAS} --negative_scale 2"),
        ("a cat AND a dog --d 1", f"--mask_path {{halves}} {CONTROL_NET} --tile 64 --W 128"),
        ("a cat AND a dog --d 1", "--mask_path {halves} --network_weights {loha} {lora} --no_half_vae"),
        (PROMPT, "--network_weights {loha} --network_pre_calc --timesteps 900,300 --s_churn 2 --sampler euler"),
        (PROMPT, "--network_weights {loha} {lora} --network_mul 0.5@0.5-1 1@0-0.5 --steps 4"),
        (PROMPT, f"{CONTROL_NET} --ds_depth_1 2 --W 128 --negative_scale 2"),
        (PROMPT, f"{REDRAWN} --mask_path {{mask}} --sampler euler_a --steps 4 --gradual_latent_timesteps 999"),
        (PROMPT, f"{REDRAWN} --mask_path {{mask}} --inpaint_area mask --inpaint_regions each"),
        (PROMPT, "--clip_guidance_scale 60 --clip_model {clip}"),
        (PROMPT, "--clip_image_guidance_scale 60 --clip_model {clip} --guide_image_path {halves} --sampler lms"),
        (PROMPT, "--vgg16_guidance_scale 0.0003 --vgg16_model {vgg16} --guide_image_path {halves}"),
    ],
)
def test_every_feature(
    prompt: str, options: str, sd1: Models, sd1_files: Files, generate: Generate, request: pytest.FixtureRequest
) -> None:
    with pretended_gpu() as gpu:
        result = generate(sd1.folder, precision_of(request), *filled(options, sd1_files), "--prompt", prompt)
    assert result.status == 0, result.stderr
    assert result.files
    assert gpu.steps
    assert "overflows" not in result.stderr  # as it would seem where pictures are read before they have come


@pytest.mark.parametrize(
    ("prompt", "options"),
    [
        (f"{PROMPT} --ow 128 --oh 128", "--guidance_rescale 0.5 --zero_empty_negative"),
        (PROMPT, f"{REDRAWN} --mask_path {{mask}}"),
        (PROMPT, "--highres_fix_scale 0.5 --ds_depth_1 3 --W 128 --sampler euler_a --lowvram"),
        (PROMPT, f"{CONTROL_NET} {LORAS}"),
        (PROMPT, "--control_net_lllite_models {lllite} --guide_image_path {halves}"),
        (PROMPT, "--control_net_lllite_models {lllite} --guide_image_path {halves} --tile 64 --W 128"),
        (PROMPT, "--control_net_models {union} --control_net_types depth --guide_image_path {halves}"),
        ("a zzyzx cat --d 1", "--textual_inversion_embeddings {word}"),
        ("a cat AND a dog --d 1", f"--mask_path {{halves}} {LORAS}"),
    ],
)
def test_every_feature_of_xl(
    prompt: str, options: str, sdxl: Models, sdxl_files: Files, generate: Generate, request: pytest.FixtureRequest
) -> None:
    with pretended_gpu():
        result = generate(sdxl.folder, precision_of(request), *filled(options, sdxl_files), "--prompt", prompt)
    assert result.status == 0, result.stderr
    assert result.files


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("sd1", "--negative_scale 3 --cuda_graphs on"),
        ("sd1", f"{CONTROL_NET} {LORAS}"),
        ("sd1", f"{REDRAWN} --mask_path {{mask}} --fill noise --sampler euler_a"),
        ("sdxl", f"{REDRAWN} --zero_empty_negative"),  # of the text that has an empty one
        ("sdxl", "--control_net_lllite_models {lllite} --guide_image_path {halves}"),
    ],
)
def test_next_batch_is_begun_without_waiting(
    family: str, options: str, generate: Generate, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """Its texts and source pictures are encoded while the device is at work on the batch before it."""
    model, files = (request.getfixturevalue(name) for name in (family, f"{family}_files"))
    (tmp_path / "lines.txt").write_text("a cat --d 1\na (dog:1.2) --n fog --d 2\na house --d 3")
    with pretended_gpu() as gpu:
        gpu.works_ahead = True
        common = (precision_of(request), "--steps", 2, "--from_file", tmp_path / "lines.txt")
        result = generate(model.folder, *common, *filled(options, files))
    assert result.status == 0, result.stderr
    assert gpu.begun_ahead == 2


@pytest.mark.parametrize("precision", ["--fp16", "--bf16"])
def test_upscalers(precision: str, sd1: Models, upscaler_file, upscalers, generate: Generate) -> None:  # noqa: F811
    highres = (precision, "--W", 128, "--highres_fix_scale", 0.5, "--highres_fix_steps", 2, "--prompt", PROMPT)
    for module, argument in (
        ("tools.latent_upscaler", f"weights={upscaler_file}"),
        ("tools.esrgan", f"weights={upscalers['ESRGAN']}"),
    ):
        with pretended_gpu():
            result = generate(
                *(sd1.folder, *highres, "--highres_fix_upscaler", module, "--highres_fix_upscaler_args", argument)
            )
        assert result.status == 0, result.stderr
        assert len(result.files) == 1


@pytest.mark.parametrize("precision", ["--fp16", "--bf16"])
def test_model_that_predicts_v(precision: str, sd2: Models, generate: Generate) -> None:
    lines = ("--prompt", PROMPT, "--sampler", "euler_a", "--zero_terminal_snr", "--guidance_rescale", 0.7)
    with pretended_gpu():
        result = generate(sd2.folder, *sd2.options, precision, *lines)
    assert result.status == 0, result.stderr


@pytest.mark.parametrize("inputs", [EDITING, INPAINTING])
def test_models_with_more_inputs(inputs, with_inputs: WriteModel, sd1_files: Files, generate: Generate) -> None:
    options = filled("--image_path {halves} --bf16", sd1_files) + (
        ["--mask_path", sd1_files["{mask}"]] if inputs is INPAINTING else []
    )
    with pretended_gpu():
        result = generate(with_inputs("sd1", inputs).folder, *options, "--prompt", PROMPT)
    assert result.status == 0, result.stderr


@pytest.mark.parametrize(
    ("prompt", "options"),
    [
        (PROMPT, "--steps 4 --images_per_prompt 2 --batch_size 2"),
        (PROMPT, "--steps 5 --guidance_start 0.4 --sampler euler_a"),
        ("[a:the:2] cat --d 1", "--steps 5 --prompt_syntax webui"),
        (PROMPT, "--steps 6 --control_net_models {net} --guide_image_path {halves} --control_net_ratios 0.5"),
        (PROMPT, "--steps 4 --highres_fix_scale 0.5 --highres_fix_steps 4 --W 128 --H 128"),
        (PROMPT, f"--steps 3 --tile 64 --W 128 {LORAS}"),
        ("{e$$a --am 0.2|b --am 2|c --am 0.2} --d 1", "--steps 4 --network_weights {loha}"),
    ],
)
def test_graphs_give_the_same_pictures(
    prompt: str, options: str, sd1: Models, sd1_files: Files, generate: Generate, tmp_path: Path
) -> None:
    """What is recorded is started with each step's own inputs; on the CPU the same kernels give the same bits."""
    common = (sd1.folder, *filled(options, sd1_files), "--prompt", prompt)
    drawn = {}
    for graphs in ("off", "on"):
        with pretended_gpu() as gpu:
            result = generate(*common, "--cuda_graphs", graphs, outdir=tmp_path / graphs)
        assert result.status == 0, result.stderr
        drawn[graphs] = result.pictures
    assert gpu.replays > 1
    assert all(np.array_equal(*pair) for pair in zip(drawn["off"], drawn["on"], strict=True))


def test_graphs_are_made_anew_where_weights_have_moved(
    sd1: Models, sd1_files: Files, generate: Generate, tmp_path: Path
) -> None:
    """A picture with regions takes folded weights out and puts them back, into other memory: also where its text is
    kept, and no strength changes.
    """
    (tmp_path / "lines.txt").write_text("a cat AND a dog --d 1\na cat --d 2\na cat AND a dog --d 3\na cat --d 4")
    options = filled("--steps 3 --network_weights {loha} --mask_path {halves} --from_file", sd1_files)
    drawn = {}
    for graphs in ("off", "on"):
        with pretended_gpu() as gpu:
            lines = (*options, tmp_path / "lines.txt", "--cuda_graphs", graphs)
            result = generate(sd1.folder, *lines, outdir=tmp_path / graphs)
        assert result.status == 0, result.stderr
        drawn[graphs] = result.pictures
    assert gpu.replays == 4  # of three steps of each picture without regions all but the first
    assert all(np.array_equal(*pair) for pair in zip(drawn["off"], drawn["on"], strict=True))


def test_each_process_works_on_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Streams, graphs and free memory are those of the current device."""
    current = []
    with pretended_gpu():
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        monkeypatch.setattr(torch.cuda, "set_device", current.append)
        machine = devices.choose_machine(Computing(), process=3)
    assert current == [machine.device] == [torch.device("cuda", 1)]


def test_graphs_of_xl(sdxl: Models, generate: Generate, tmp_path: Path) -> None:
    lines = ("--prompt", "{e$$a|b} cat --d 1 --ow 128", "--steps", 3)
    with pretended_gpu():
        plain = generate(sdxl.folder, *lines, "--cuda_graphs", "off", outdir=tmp_path / "off")
    with pretended_gpu() as gpu:
        graphed = generate(sdxl.folder, *lines, "--cuda_graphs", "on", outdir=tmp_path / "on")
    assert graphed.status == 0, graphed.stderr
    assert gpu.replays == 5  # all steps of both pictures but the first
    assert all(np.array_equal(*pair) for pair in zip(plain.pictures, graphed.pictures, strict=True))


def test_graphs_come_by_themselves_after_some_pictures(sd1: Models, generate: Generate) -> None:
    lines = ("--prompt", "a cat", "--images_per_prompt", 5, "--steps", 10)
    with pretended_gpu() as gpu:
        assert generate(sd1.folder, *lines).status == 0
    assert gpu.replays == 10


@pytest.mark.parametrize("options", ["--lowvram", "--ds_depth_1 2 --W 128"])
def test_no_graphs_where_they_do_harm(options: str, sd1: Models, generate: Generate) -> None:
    """Of --lowvram they take memory; of Deep Shrink they would repeat what the first steps did."""
    lines = ("--prompt", "a cat", "--images_per_prompt", 5, "--steps", 10)
    with pretended_gpu() as gpu:
        assert generate(sd1.folder, *lines, *options.split()).status == 0
    assert gpu.replays == 0


def test_graphs_are_left_where_memory_is_short(sd1: Models, generate: Generate) -> None:
    lines = ("--prompt", "a cat", "--images_per_prompt", 6, "--steps", 10)
    with pretended_gpu() as gpu:
        gpu.free = [500 * 2**20, 300 * 2**20]  # before and after one has been recorded
        result = generate(sd1.folder, *lines)
    assert (result.status, len(result.files), gpu.replays) == (0, 6, 0)
    assert result.stderr.count("CUDA graphs: one takes 200 MiB of the device's memory, and 300 are left; going on") == 1


@pytest.mark.parametrize("problem", [RuntimeError("operation not permitted\nCUDA"), torch.OutOfMemoryError("CUDA")])
def test_what_cannot_be_recorded_is_drawn_without(problem: RuntimeError, sd1: Models, generate: Generate) -> None:
    with pretended_gpu() as gpu:
        gpu.failing = problem
        result = generate(sd1.folder, "--prompt", "a cat", "--steps", 4, "--cuda_graphs", "on")
    assert (result.status, len(result.files), gpu.replays) == (0, 1, 0)
    reason = str(problem).splitlines()[0]
    assert f"CUDA graphs: {reason}; going on without them" in result.stderr


def test_graphs_give_way_where_memory_runs_out(
    sd1: Models, generate: Generate, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = AutoencoderKL.decode, []

    def short_once(vae: AutoencoderKL, latents: torch.Tensor) -> object:
        calls.append(None)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(vae, latents)

    monkeypatch.setattr(AutoencoderKL, "decode", short_once)
    with pretended_gpu() as gpu:
        result = generate(
            sd1.folder, "--prompt", "a cat", "--images_per_prompt", 2, "--steps", 4, "--cuda_graphs", "on"
        )
    assert (result.status, len(result.files), gpu.replays) == (0, 2, 3)  # of the first picture alone
    assert "CUDA graphs: out of memory; going on without them" in result.stderr


def test_without_a_gpu_it_is_said(sd1: Models, generate: Generate) -> None:
    result = generate(sd1.folder, "--prompt", "a cat", "--cuda_graphs", "on")
    assert result.status == 0
    assert "--cuda_graphs: there is no GPU of NVIDIA here, it changes nothing" in result.stderr
    both = generate(sd1.folder, "--prompt", "a cat", "--cuda_graphs", "on", "--compile")
    assert both.status == 2
    assert "--cuda_graphs and --compile: do not go together" in both.stderr
