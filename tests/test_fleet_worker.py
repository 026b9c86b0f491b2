"""What goes between driver and workers, without a cluster: the worker in this process, all that it is sent as bytes."""

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
from child_runs import contents
from conftest import Generate, Models
from diffusers import UNet2DConditionModel
from PIL import Image
from test_guidance import clip_folder  # noqa: F401  # a fixture
from test_highres import upscaler_file  # noqa: F401  # a fixture
from test_pretended_cuda import CONTROL_NET, LORAS, PROMPT, REDRAWN, Files, filled, sd1_files, sdxl_files  # noqa: F401  # fixtures
from test_xl_features import lllite  # noqa: F401  # a fixture
from test_xl_pictures import union  # noqa: F401  # a fixture

from library.fleet import driver
from library.fleet.worker import Worker
from library.results import writer


@pytest.fixture
def worker_here(monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """--ray draws in this process, by a worker that is sent bytes alone; gives the files that each order names."""
    named = []

    @contextmanager
    def opened(plan, fleet, program, load, fail) -> Iterator[SimpleNamespace]:
        order = pickle.loads(pickle.dumps(driver.order_for(plan, program, load)))
        named.append(order.files)
        worker = Worker()
        worker._order = order  # `look` asks Ray for the node
        worker.load({})

        def draw(batches, interruptions, progress):
            for number, jobs in enumerate(batches):
                answer = pickle.loads(pickle.dumps(worker.draw(number, driver.inputs.pack(jobs))))
                yield driver.pictures_of(plan, jobs, answer.done[number], fail)

        yield SimpleNamespace(draw=draw, node_of={})

    monkeypatch.setattr(driver, "opened", opened)
    return named


def everything(folder: Path) -> dict[str, bytes]:
    return contents(folder) | {file.name: file.read_bytes() for file in folder.glob("*.guide*")}


def same_with_ray(generate: Generate, tmp_path: Path, *command: object) -> None:
    command = (*command, "--sequential_file_name")
    alone = generate(*command, outdir=tmp_path / "alone")
    fleet = generate(*command, "--ray", outdir=tmp_path / "fleet")
    assert (fleet.status, alone.status) == (0, 0), fleet.stderr
    assert everything(tmp_path / "fleet") == everything(tmp_path / "alone") != {}


@pytest.mark.parametrize(
    ("prompt", "options"),
    [
        (PROMPT, "--images_per_prompt 3 --batch_size 2 --vae_batch_size 1 --negative_scale 3 --guidance_rescale 0.5"),
        (PROMPT, f"{REDRAWN} --mask_path {{mask}} --mask_blur 4 --inpaint_area mask --keep_unmasked"),
        (PROMPT, "--highres_fix_scale 0.5 --highres_fix_steps 2 --W 128 --highres_fix_save_1st --upscale 2"),
        (
            PROMPT,
            "--sampler euler_a --steps 4 --gradual_latent_timesteps 999 --gradual_latent_unsharp_params 3,0.5,0.5",
        ),
        (f"{PROMPT} --am 0.3", f"{LORAS} --network_pre_calc"),
        ("a <lora:a:0.5> cat <lora:c:1> --d 1", "--prompt_syntax webui --network_dir {loras}"),
        ("a zzyzx cat --d 1", "--textual_inversion_embeddings {word} --sweep scale=2,7"),
        ("a cat AND a dog --d 1", f"--mask_path {{halves}} {LORAS} --format webp"),
        (PROMPT, f"{CONTROL_NET} --control_net_preps canny_100_200 --control_net_save_guides --images_per_prompt 2"),
        (PROMPT, "--clip_image_guidance_scale 60 --clip_model {clip} --guide_image_path {halves}"),
        (PROMPT, f"{LORAS} --engine openvino --bf16"),
    ],
)
def test_what_one_process_draws_a_worker_draws(
    sd1: Models,
    sd1_files: Files,  # noqa: F811
    generate: Generate,
    worker_here,
    tmp_path: Path,
    prompt: str,
    options: str,
) -> None:
    same_with_ray(generate, tmp_path, sd1.folder, "--prompt", prompt, *filled(options, sd1_files))
    (files,) = worker_here
    read = [value for word, value in sd1_files.items() if word in options.split() and word != "{word}"]  # planned with
    assert {driver.inputs.place_of(path) for path in map(Path, read) if path.is_file()} <= set(files)


@pytest.mark.parametrize("options", ["", "--control_net_lllite_models {lllite} --guide_image_path {halves}"])
def test_xl_models(
    sdxl: Models,
    sdxl_files: Files,  # noqa: F811
    generate: Generate,
    worker_here,
    tmp_path: Path,
    options: str,
) -> None:
    same_with_ray(generate, tmp_path, sdxl.safetensors, "--prompt", PROMPT, *filled(options, sdxl_files))


def test_what_fails_is_told_as_one_process_tells_it(
    sd1: Models, generate: Generate, worker_here, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seed 1 gives no numbers, seed 2 nothing that its format takes, and seed 3's source is damaged meanwhile."""
    real_forward, real_encode, drawn = UNet2DConditionModel.forward, writer.encode, []

    def forward(self, *arguments, **named):
        output = real_forward(self, *arguments, **named)
        if not drawn:  # the first picture's first step
            output.sample[:] = float("nan")
            drawn.append(True)
            sources[2].write_bytes(b"")
        return output

    def encode(pixels, suffix, texts, quality):
        if texts["seed"] == "2":
            raise OSError("encoder error -2")
        return real_encode(pixels, suffix, texts, quality)

    monkeypatch.setattr(UNet2DConditionModel, "forward", forward)
    monkeypatch.setattr(writer, "encode", encode)
    (tmp_path / "sources").mkdir()
    sources = [tmp_path / "sources" / f"{number}.png" for number in range(4)]
    told = []
    for options in ((), ("--ray",)):
        drawn.clear()
        for source in sources:
            Image.new("RGB", (64, 64), "red").save(source)
        command = ("--prompt", "a cat --d 1-4", "--images_per_prompt", 4, "--image_path", tmp_path / "sources")
        out = tmp_path / f"out{len(told)}"
        result = generate(sd1.folder, *command, "--sequential_file_name", *options, outdir=out)
        assert (result.status, [file.name for file in result.files]) == (3, ["im_000004.png"]), result.stderr
        told.append(sorted(line for line in result.stderr.splitlines() if line.startswith("error: ")))
    assert told[0] == told[1]
    assert [line.split("(", 1)[0] for line in told[0]] == [f"error: im_00000{number}.png " for number in (1, 2, 3)]
