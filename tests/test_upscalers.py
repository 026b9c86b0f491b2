"""Upscalers of pictures: spandrel's models in tiles and files of all kinds; `--upscale` with and without them."""

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from library.errors import InputError
from tools import esrgan

pytestmark = pytest.mark.filterwarnings("ignore:torch.meshgrid:UserWarning")  # SwinIR's way of calling it

# Of what is worked out in parts or by other sums, in float32, which rounding can turn into one level
ONE_LEVEL = 1
UPSCALE = ["--upscale", 2, "--sequential_file_name", "--prompt", "a cat --d 7"]


@pytest.fixture(scope="session")
def spandrel() -> ModuleType:
    """spandrel, as the program imports it."""
    return esrgan.import_spandrel()


def _network(kind: str) -> torch.nn.Module:
    torch.manual_seed(0)
    architectures = importlib.import_module(f"spandrel.architectures.{kind}")
    if kind == "ESRGAN":
        network = architectures.ESRGAN(num_filters=8, num_blocks=2, scale=4)
        network.load_state_dict({name: 2 * value for name, value in network.state_dict().items()})
        return network
    sizes = {"depths": [2, 2], "num_heads": [2, 2], "embed_dim": 12, "window_size": 8, "mlp_ratio": 2}
    return architectures.SwinIR(
        **sizes, img_size=64, upscale=2, upsampler="pixelshuffledirect", resi_connection="1conv"
    )


@pytest.fixture(scope="session")
def files(spandrel, tmp_path_factory) -> dict[str, Path]:
    """A tiny ESRGAN of scale 4 and a tiny SwinIR of scale 2, as they are published."""
    folder = tmp_path_factory.mktemp("upscalers")
    esrgan_state, swin_state = (_network(kind).state_dict() for kind in ("ESRGAN", "SwinIR"))
    torch.save({"params": swin_state, "params_ema": esrgan_state}, folder / "ESRGAN.pth")
    save_file({name: value.contiguous() for name, value in swin_state.items()}, folder / "SwinIR.safetensors")
    return {file.stem: file for file in folder.iterdir()}


@pytest.fixture
def photo() -> Image.Image:
    """100 × 72 pixels of soft shapes and noise."""
    random = np.random.default_rng(0)
    soft = Image.fromarray(random.integers(0, 255, (9, 13, 3), np.uint8)).resize((100, 72), Image.Resampling.BICUBIC)
    return Image.fromarray((0.8 * np.asarray(soft) + random.integers(0, 50, (72, 100, 3))).astype(np.uint8))


def _levels(picture: object) -> np.ndarray:
    return np.asarray(picture).astype(int)


@pytest.mark.parametrize(("kind", "scale"), [("ESRGAN", 4), ("SwinIR", 2)])
def test_models_enlarge_as_spandrel_alone_does(spandrel, files, photo, kind, scale):
    model = spandrel.ModelLoader().load_from_file(files[kind])
    pixels = torch.from_numpy(np.array(photo)).permute(2, 0, 1)[None].float() / 255
    expected = (model(pixels)[0].permute(1, 2, 0) * 255).round().byte().numpy()
    assert expected.shape == (72 * scale, 100 * scale, 3) and expected.std() > 10  # it is a picture
    upscaler = esrgan.create_upscaler(str(files[kind]))
    (whole,) = upscaler.enlarge([photo], 100 * scale, 72 * scale)
    assert np.array_equal(whole, expected)
    both = upscaler.enlarge([photo, photo.rotate(180)], 150, 108)
    assert np.array_equal(both[0], Image.fromarray(expected).resize((150, 108), Image.Resampling.LANCZOS))
    assert both[1].size == (150, 108) and not np.array_equal(both[0], both[1])


def test_tiles_make_the_whole(photo):
    """Exactly, where the model sees no further than a quarter of the overlap (8 pixels)."""

    class Blur:
        scale, device, dtype = 2, torch.device("cpu"), torch.float32

        def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
            sizes.append(tuple(pixels.shape[-2:]))
            return torch.nn.functional.interpolate(torch.nn.functional.avg_pool2d(pixels, 15, 1, 7), scale_factor=2)

    sizes: list[tuple[int, int]] = []
    (whole,) = esrgan.ModelUpscaler(Blur(), 128, "x").enlarge([photo], 200, 144)
    (parts,) = esrgan.ModelUpscaler(Blur(), 64, "x").enlarge([photo], 200, 144)
    assert sizes == [(72, 100), (64, 64), (64, 64), (64, 36), (40, 64), (40, 64), (40, 36)]
    assert np.abs(_levels(whole) - _levels(parts)).max() <= ONE_LEVEL
    assert esrgan.tiles(64, 64) == [(0, 64)] and esrgan.tiles(65, 64) == [(0, 64), (32, 65)]
    assert esrgan.tiles(8, 64) == [(0, 8)]


@pytest.mark.parametrize("kind", ["ESRGAN", "SwinIR"])
def test_tiles_of_real_models_show_no_seams(files, photo, kind):
    """These see further than an overlap; what is left of that is a level here and there."""
    (whole,) = esrgan.create_upscaler(str(files[kind])).enlarge([photo], 200, 144)
    (parts,) = esrgan.create_upscaler(str(files[kind]), tile="64").enlarge([photo], 200, 144)
    difference = np.abs(_levels(whole) - _levels(parts))
    assert difference.max() <= 2 and difference.mean() < 0.01


def test_a_model_too_large_for_memory_gets_smaller_tiles(files, photo, monkeypatch, caplog):
    upscaler = esrgan.create_upscaler(str(files["SwinIR"]), tile="128")
    (whole,) = upscaler.enlarge([photo], 200, 144)
    run, sizes = upscaler._model._call_fn, []

    def too_large_for_all_but_small_ones(model: object, pixels: torch.Tensor) -> torch.Tensor:
        sizes.append(max(pixels.shape))
        if max(pixels.shape) > 64:
            raise torch.OutOfMemoryError("no memory")
        return run(model, pixels)

    monkeypatch.setattr(upscaler._model, "_call_fn", too_large_for_all_but_small_ones)
    (parts,) = upscaler.enlarge([photo], 200, 144)
    assert sizes[:2] == [100, 64]
    assert np.abs(_levels(whole) - _levels(parts)).max() <= 2
    assert "out of memory in the upscaler; enlarging in tiles of 64 pixels" in caplog.text


def test_half_precision_is_for_gpus_and_for_models_that_stand_it():
    kinds = []
    model = SimpleNamespace(to=lambda device, kind: kinds.append(kind), supports_half=True, supports_bfloat16=True)
    upscaler, gpu, cpu = esrgan.ModelUpscaler(model, 64, "x"), torch.device("cuda"), torch.device("cpu")
    for device, kind in ((gpu, torch.float16), (gpu, torch.bfloat16), (gpu, torch.float32), (cpu, torch.bfloat16)):
        upscaler.to(device, kind)
    model.supports_half = False
    upscaler.to(gpu, torch.float16)
    model.supports_bfloat16 = False
    upscaler.to(gpu, torch.bfloat16)
    half, single = torch.float16, torch.float32
    assert kinds == [half, half, single, single, torch.bfloat16, single]


def test_numbers_that_half_precision_does_not_hold(photo):
    """Such a tile is enlarged again in float32; a model that gives none there either is named."""

    class Doubling:
        scale, device, dtype, factor = 2, torch.device("cpu"), torch.float16, 1e5

        def to(self, dtype: torch.dtype) -> None:
            self.dtype = dtype

        def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.interpolate((pixels + 1) * self.factor / self.factor - 1, scale_factor=2)

    upscaler = esrgan.ModelUpscaler(Doubling(), 64, "x.pth")
    (large,) = upscaler.enlarge([photo], 200, 144)
    assert np.abs(_levels(large) - _levels(photo.resize((200, 144), Image.Resampling.NEAREST))).max() <= ONE_LEVEL
    upscaler._model.factor = 1e39
    with pytest.raises(InputError, match=r"x.pth: gives NaN or infinite values"):
        upscaler.enlarge([photo], 200, 144)


# ---------------------------------------------------------------------------------------------------------------------
# spandrel without torchvision


def test_what_stands_in_for_torchvision_leaves_no_trace(tmp_path, monkeypatch):
    """With none, and with one that does not load; a true one is left alone."""
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        monkeypatch.delitem(sys.modules, name)
    for found in ("none", "broken", "true"):
        package = tmp_path / "torchvision"
        if found == "broken":
            (package / "transforms").mkdir(parents=True)
            (package / "extension.py").touch()
            (package / "__init__.py").write_text("from torchvision import extension\nraise RuntimeError('no nms')")
        elif found == "true":
            (package / "__init__.py").write_text("")
            (package / "transforms" / "__init__.py").write_text("")
            (package / "transforms" / "functional.py").write_text("rotate = normalize = InterpolationMode = 1")
        importlib.invalidate_caches()
        with esrgan._torchvision():
            functional = importlib.import_module("torchvision.transforms.functional")
            assert hasattr(functional, "rotate") and (functional.rotate == 1) is (found == "true")
        left = {name for name in sys.modules if name.partition(".")[0] == "torchvision"}
        modules = {"torchvision", "torchvision.transforms", "torchvision.transforms.functional"}
        assert left == (modules if found == "true" else set()), found
    for name in modules:
        del sys.modules[name]


def test_a_torchvision_that_does_not_load_is_named(sd1, generate, tmp_path, monkeypatch):
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text("raise RuntimeError('no nms\\nat all')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    result = generate(sd1.folder, "--prompt", "a cat")
    assert result.status == 2
    assert result.stderr.startswith("error: torchvision: is installed, but does not load (no nms); run `pip uninstall")
    assert result.stderr.count("\n") == 1


def test_without_spandrel_there_is_one_line(sd1, generate, tmp_path, monkeypatch):
    (tmp_path / "x.pth").touch()
    monkeypatch.setitem(sys.modules, "spandrel", None)
    result = generate(sd1.folder, *UPSCALE, *_by(tmp_path / "x.pth"), "--dry_run")
    assert (result.status, result.stderr) == (
        2,
        "error: --highres_fix_upscaler tools.esrgan: needs the package spandrel; "
        "run `pip install --no-deps -r requirements-upscalers.txt`\n",
    )


# ---------------------------------------------------------------------------------------------------------------------
# In the program


def _by(file: Path, more: str = "") -> list[object]:
    return ["--highres_fix_upscaler", "tools.esrgan", "--highres_fix_upscaler_args", f"weights={file}{more}"]


def test_upscale_is_lanczos_of_the_finished_picture(sd1, generate, tmp_path):
    plain = generate(sd1.folder, "--prompt", "a cat --d 7", outdir=tmp_path / "plain")
    result = generate(sd1.folder, *UPSCALE[2:], "--upscale", 1.3, "--json", "--html", "--grid")
    (file,) = [file for file in result.files if file.name.startswith("im")]
    small = Image.open(plain.files[0])
    assert np.array_equal(Image.open(file), small.resize((83, 83), Image.Resampling.LANCZOS))
    texts = Image.open(file).text["parameters"]
    assert "Size: 64x64" in texts and "Postprocess upscale by: 1.3, Postprocess upscaler: Lanczos" in texts
    assert "upscale" not in small.text["parameters"]
    told = json.loads(result.stdout)
    assert (told["width"], told["height"], told["drawn_size"]) == (83, 83, [64, 64])
    assert told["upscale"] == {"factor": 1.3, "upscaler": None}
    page = (file.parent / "index.html").read_text()
    assert "width=83 height=83" in page and "--upscale 1.3" in page
    again = generate(sd1.folder, *UPSCALE[2:], "--upscale", 1.3, "--resume")
    assert (again.status, again.files) == (0, []), again.stderr
    assert "64x64" not in generate(sd1.folder, *UPSCALE[2:], "--upscale", 1.3, "--dry_run").stdout


def test_kept_pixels_are_enlarged_with_the_picture(sd1, generate, tmp_path, photo):
    photo.resize((64, 64)).save(tmp_path / "source.png")
    Image.new("L", (64, 64)).save(tmp_path / "mask.png")
    options = ["--image_path", tmp_path / "source.png", "--mask_path", tmp_path / "mask.png", "--keep_unmasked"]
    result = generate(sd1.folder, *UPSCALE, *options)
    assert np.array_equal(
        result.pictures[0], _levels(photo.resize((64, 64)).resize((128, 128), Image.Resampling.LANCZOS))
    )


def test_a_model_enlarges_in_highres_fix_and_afterwards(sd1, generate, files, tmp_path):
    """Each picture of a batch by itself: as the model enlarges the first stage's, drawn over by img2img, and again."""
    upscaler = esrgan.create_upscaler(str(files["ESRGAN"]))
    common = ["--W", 64, "--H", 64, "--steps", 4, "--strength", 0.5]
    highres = [*common, "--highres_fix_scale", 0.5, "--highres_fix_steps", 2, "--highres_fix_save_1st"]
    seeds = ["--images_per_prompt", 2, "--batch_size", 2, "--sequential_file_name", "--prompt", "a cat --d 7,20"]
    both = generate(sd1.folder, *highres, *_by(files["ESRGAN"]), "--upscale", 1.5, *seeds)
    assert both.status == 0, both.stderr
    first, _, enlarged, _ = map(Image.open, both.files)
    assert (first.size, enlarged.size) == ((32, 32), (96, 96))
    upscaler.enlarge([first], 64, 64)[0].save(tmp_path / "large.png")
    prompt = ["--image_path", tmp_path / "large.png", "--prompt", "a cat --d 8"]
    redrawn = generate(sd1.folder, *common, *prompt, outdir=tmp_path / "redrawn")
    (expected,) = upscaler.enlarge([Image.open(redrawn.files[0])], 96, 96)
    assert np.abs(_levels(enlarged) - _levels(expected)).max() <= ONE_LEVEL
    texts = enlarged.text["parameters"]
    assert "Upscaler: ESRGAN, Postprocess upscale by: 1.5, Postprocess upscaler: ESRGAN" in texts
    assert "upscale by" not in first.text["parameters"] and "Size: 32x32" in first.text["parameters"]


class _Runs:
    def __reduce__(self) -> tuple[object, ...]:
        return importlib.import_module, ("antigravity",)


def test_files_that_are_no_upscalers_are_refused(spandrel, sd1, generate, files, tmp_path):
    """In one line."""
    bad = {name: tmp_path / name for name in ("code.pth", "lora.pt", "noise.pth", "gray.pth", "cut.pth", "list.pth")}
    torch.save({"params": _Runs()}, bad["code.pth"])
    torch.save({"lora_unet_x.lora_down.weight": torch.ones(1, 1)}, bad["lora.pt"])
    torch.save({"a.weight": torch.ones(1, 1)}, bad["noise.pth"])
    torch.save([torch.ones(1)], bad["list.pth"])
    gray = importlib.import_module("spandrel.architectures.ESRGAN").ESRGAN(
        in_nc=1, out_nc=1, num_filters=4, num_blocks=2
    )
    torch.save(gray.state_dict(), bad["gray.pth"])
    state = torch.load(files["ESRGAN"])["params_ema"]
    state.popitem()
    torch.save(state, bad["cut.pth"])
    bad |= {"sd1.safetensors": sd1.safetensors, "no.pth": tmp_path / "no.pth"}
    for name, problem in {
        "code.pth": "would run importlib.import_module when loaded, so it was not loaded and nothing ran",
        "lora.pt": "is a LoRA or one of its relatives; give a model that enlarges pictures",
        "sd1.safetensors": "is a Stable Diffusion checkpoint; give a model that enlarges pictures",
        "noise.pth": "is no model of a kind that spandrel reads",
        "list.pth": "is a checkpoint without names of weights",
        "gray.pth": "is a model of another kind (ESRGAN, SR, scale 4, 1 channels to 1); give one that enlarges",
        "cut.pth": "spandrel cannot load it (",
        "no.pth": "no such file",
    }.items():
        result = generate(sd1.folder, *UPSCALE, *_by(bad[name]))
        assert (result.status, result.files) == (2, []), name
        assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result.stderr
        assert problem in result.stderr and name in result.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--upscale", 1], "--upscale 1: out of range; write a number above 1, up to 16"),
        (["--upscale", 4, "--W", 8192], "--upscale 4: 8192 x 64 pixels become 32768 x 256, more than 16384 a side"),
        (
            ["--upscale", 2, "--W", 8192, "--format", "webp"],
            "16384 x 128 pixels: WEBP takes 16383 a side; enlarge less",
        ),
        (["--highres_fix_upscaler", "tools.esrgan"], "is for Highres. fix; give --highres_fix_scale or --upscale too"),
        (
            ["--upscale", 2, "--highres_fix_upscaler", "tools.latent_upscaler"],
            "--upscale and --highres_fix_upscaler tools.latent_upscaler: that module gives latents, not finished",
        ),
    ],
)
def test_what_cannot_work_is_refused(sd1, generate, options, message):
    result = generate(sd1.folder, *options, "--prompt", "a cat", "--dry_run")
    assert (result.status, result.files) == (2, [])
    assert message in result.stderr and result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (";tile=100", "tile=100: must be a multiple of 32; use 96 or 128"),
        (";tile=9", "tile=9: out of range; write a whole number from 64 to 16384"),
        (
            ";tiles=64",
            "--highres_fix_upscaler_args: tools.esrgan refuses them: got an unexpected keyword argument 'tiles'",
        ),
    ],
)
def test_arguments_that_cannot_be(sd1, generate, files, more, message):
    result = generate(sd1.folder, *UPSCALE, *_by(files["SwinIR"], more))
    assert result.status == 2 and message in result.stderr and result.stderr.count("\n") == 1


def test_a_module_of_latents_alone_is_refused_once_it_is_known(sd1, generate, tmp_path, monkeypatch):
    module = "class Latents:\n    def upscale(self): ...\n    def to(self): ...\ncreate_upscaler = Latents\n"
    (tmp_path / "latents_alone.py").write_text(module)
    monkeypatch.syspath_prepend(tmp_path)
    result = generate(sd1.folder, *UPSCALE, "--highres_fix_upscaler", "latents_alone")
    assert result.status == 2
    assert "error: --upscale and --highres_fix_upscaler latents_alone: that module gives latents" in result.stderr
