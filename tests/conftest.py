"""Shared fixtures: tiny models of random weights in every layout, and the program run in this process."""

import copy
import gc
import http.server
import io
import os
import pickle
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path

# The tiny models gain nothing from threads, and many small parallel regions crawl on a machine that does other work.
os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import pytest
import torch
from PIL import Image

import gen_img_diffusers
from library import version
from library.files import safetensors_file, tokenizers
from library.files.model_files import ModelFiles
from library.files.model_inputs import PLAIN, ModelInputs
from library.machine import devices, packed_layers
from library.models import models, weight_reading
from library.models.weight_reading import ModelWeights
from library.plan import run_record
from library.results import metadata
from library.texts import readable
from tools import random_model


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Iterator[None]:
    """Reports go from process to process as UTF-8; what a test logs of names that are no text has none of it."""
    report = yield
    report.sections = [(title, readable(text)) for title, text in report.sections]
    return report


def _stamp(path: Path) -> tuple[int, ...]:
    """What tells a file by whatever name, and changes when it is written anew."""
    of = path.stat()
    return of.st_dev, of.st_ino, of.st_mtime_ns, of.st_size


def _once(read: Callable[[Path], object]) -> Callable[[Path], object]:
    """The same of each file once; small ones, which tests damage, and those written anew are read again."""
    known: dict[tuple, object] = {}

    def of(path: Path) -> object:
        if not path.is_file() or path.stat().st_size < 100_000:
            return read(path)
        stamp = _stamp(path)
        if stamp not in known:
            known[stamp] = read(path)
        return known[stamp]

    return of


@pytest.fixture(scope="session", autouse=True)
def _worked_out_once() -> Iterator[None]:
    """Options, versions of packages, headers and hashes of files: known from this process's earlier runs.

    They are a quarter of what a small run takes.
    """
    read_header, work_out = _once(safetensors_file._read_header), metadata.FileHash._work_out

    def digits(path: Path) -> str | None:
        asked = metadata.FileHash.__new__(metadata.FileHash)
        asked._path, asked._digits = path, None
        work_out(asked)
        return asked._digits

    digits_of = _once(digits)

    def hashed(asked: metadata.FileHash) -> None:
        asked._digits = digits_of(asked._path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(safetensors_file, "_read_header", lambda path: tuple(map(dict, read_header(path))))
        patch.setattr(metadata.FileHash, "_work_out", hashed)
        patch.setattr(tokenizers, "read_json", _once(tokenizers.read_json))
        patch.setattr(run_record, "_fingerprint", _once(run_record._fingerprint))
        patch.setattr(gen_img_diffusers, "make_parser", cache(gen_img_diffusers.make_parser))
        patch.setattr(version, "version", cache(version.version))
        patch.setattr(devices, "version", cache(devices.version))
        yield


_MOST_ORDERED = 4096  # weights, of some kilobytes each


@pytest.fixture(scope="session", autouse=True)
def _weights_ordered_once() -> Iterator[None]:
    """Weights of the same values are brought into oneDNN's order once, in a thread then and in none later.

    That is half of what a small run takes.
    """
    reorder, in_thread = packed_layers.PackedForward._reordered, packed_layers.to_stay
    known: dict[tuple, tuple[torch.Tensor, torch.Tensor]] = {}

    def ordered(asked: packed_layers.PackedForward, weight: torch.Tensor, input_shape: torch.Size) -> torch.Tensor:
        some = tuple(weight.reshape(-1)[:2].tolist())  # tells apart what has the same shape
        key = (asked._window, asked._on_pixels, input_shape, weight.shape, weight.stride(), weight.dtype, some)
        if key not in known or not torch.equal(known[key][0], weight):
            if len(known) == _MOST_ORDERED:
                known.pop(next(iter(known)))
            known[key] = weight.clone(), in_thread(partial(reorder, asked, weight, input_shape))
        return known[key][1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packed_layers.PackedForward, "_reordered", ordered)
        patch.setattr(packed_layers, "to_stay", lambda make: make())
        yield


@pytest.fixture(scope="session", autouse=True)
def _tokenizers_read_once() -> Iterator[None]:
    """A tokenizer's 49,408 words are read once for all runs of this process, a quarter of what a small run takes."""
    from transformers import CLIPTokenizer

    real, read = CLIPTokenizer.from_pretrained, {}

    def once(folder: Path, **settings: object) -> CLIPTokenizer:
        files = sorted((str(file), file.stat().st_mtime_ns) for file in Path(folder).glob("*.*"))
        key = (str(folder), *files, *sorted(settings.items()))
        if key not in read:
            read[key] = real(folder, **settings)
        return read[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CLIPTokenizer, "from_pretrained", once)
        yield


class Kept:
    """An object and all that hangs on it, to be copied many times in a third of `copy.deepcopy`'s time."""

    def __init__(self, original: object) -> None:
        self._tensors: list[torch.Tensor] = []
        places: dict[int, int] = {}

        class Pickler(pickle.Pickler):
            def persistent_id(_, each: object) -> int | None:
                if not isinstance(each, torch.Tensor):
                    return None
                if id(each) not in places:
                    places[id(each)] = len(self._tensors)
                    self._tensors.append(each)
                return places[id(each)]

        file = io.BytesIO()
        Pickler(file, protocol=5).dump(original)
        self._pickled = file.getvalue()

    def copy(self) -> object:
        """A copy; a tensor that stands in two places does so in the copy, too."""
        made = cache(lambda place: _copied(self._tensors[place]))
        unpickler = pickle.Unpickler(io.BytesIO(self._pickled))
        unpickler.persistent_load = made
        return unpickler.load()


def _copied(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of its own memory; of those on a device that is pretended, too."""
    if type(tensor) in (torch.Tensor, torch.nn.Parameter):
        return copy.deepcopy(tensor)
    fresh = tensor.detach().clone()
    return torch.nn.Parameter(fresh, tensor.requires_grad) if isinstance(tensor, torch.nn.Parameter) else fresh


_MOST_LOADED = 16  # tiny models, of some megabytes each


@pytest.fixture(scope="session", autouse=True)
def _models_loaded_once() -> Iterator[None]:
    """A model is read and built once for all runs of this process, half of what a small run takes; each gets a copy."""
    real_read, real_load, real_texts = weight_reading.read_ahead, models.load_models, models.load_texts
    loaded: dict[str, Kept] = {}
    frozen: list[int] = []

    def read(files: ModelFiles, device: torch.device, dtype: torch.dtype, **settings: object) -> tuple:
        components = (files.unet, files.vae, *files.texts)
        paths = [each.weights.path for each in components]
        key = None  # of a model that is not kept: its weights lie in several files
        if all(path.suffix in (".safetensors", ".ckpt") for path in paths):
            stamps = [_stamp(path) for path in paths]
            key = repr((stamps, [(each.config, each.weights.shapes) for each in components], device, dtype, settings))
        copies: list[models.Models] = []  # whose text encoders were taken already
        return key, cache(lambda: real_read(files, device, dtype, **settings)), copies

    def load_whole(files: ModelFiles, weights: ModelWeights) -> models.Models:
        return real_load(files, weights, real_texts(files, weights))

    def load_texts(files: ModelFiles, weights: tuple | ModelWeights) -> tuple[models.TextEncoder, ...]:
        if isinstance(weights, ModelWeights):  # read by a test itself
            return real_texts(files, weights)
        key, begin, copies = weights
        if key is None:
            return real_texts(files, begin())
        copies.append(load(files, weights))
        return copies[0].texts

    def load(files: ModelFiles, weights: tuple, texts: Sequence[models.TextEncoder] | None = None) -> models.Models:
        key, begin, copies = weights
        if key is None:
            return real_load(files, begin(), texts) if texts is not None else load_whole(files, begin())
        if key not in loaded:
            if len(loaded) == _MOST_LOADED:
                loaded.pop(next(iter(loaded)))
            loaded[key] = Kept(load_whole(files, begin()))
            if not frozen:  # all is imported by now; a search for garbage among that takes as long as a small run
                frozen.append(gc.collect())
                gc.freeze()
        copy = copies.pop() if copies else loaded[key].copy()
        return copy if texts is None else replace(copy, texts=tuple(texts))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weight_reading, "read_ahead", read)
        patch.setattr(models, "load_models", load)
        patch.setattr(models, "load_texts", load_texts)
        yield


@dataclass
class Models:
    """Paths of one family's tiny model in three layouts."""

    folder: Path
    safetensors: Path
    ckpt: Path
    options: list[str]  # what --ckpt needs beside it


def _write_model(
    root: Path, family: str, prediction_type: str, options: list[str], inputs: ModelInputs = PLAIN
) -> Models:
    networks = random_model.random_networks(family, tiny=True, seed=0, inputs=inputs)
    random_model.write_folder(networks, root / family, prediction_type, variant=None)
    state = random_model.original_state_dict(networks, ema=True)
    for suffix in (".safetensors", ".ckpt"):
        random_model.write_file(state, root / f"{family}{suffix}")
    return Models(root / family, root / f"{family}.safetensors", root / f"{family}.ckpt", options)


@pytest.fixture(scope="session")
def sd1(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """A tiny SD 1.x model."""
    return _write_model(tmp_path_factory.mktemp("sd1"), "sd1", "epsilon", [])


@pytest.fixture(scope="session")
def sd2(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """A tiny SD 2.x model that predicts v."""
    options = ["--v2", "--v_parameterization"]
    return _write_model(tmp_path_factory.mktemp("sd2"), "sd2", "v_prediction", options)


@pytest.fixture(scope="session")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """A tiny SDXL model."""
    return _write_model(tmp_path_factory.mktemp("sdxl"), "sdxl", "epsilon", [])


@pytest.fixture
def two_levels(tmp_path: Path) -> Callable[[str], Path]:
    """Write a model whose U-Net has two levels, and attention between them alone: each kind of layer, few of them."""

    def write(family: str) -> Path:
        few = {"block_out_channels": [32, 32], "layers_per_block": 1}
        few |= {"down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2}
        networks = random_model.random_networks(family, tiny=True, seed=0)
        config = dict(networks["unet"].config) | few
        if family == "sdxl":
            config |= {"transformer_layers_per_block": [1, 1], "attention_head_dim": [1, 1]}
        torch.manual_seed(0)
        networks["unet"] = type(networks["unet"]).from_config(config)
        random_model.write_folder(networks, tmp_path / "two_levels", "epsilon", variant=None)
        return tmp_path / "two_levels"

    return write


WriteModel = Callable[[str, ModelInputs], Models]


@pytest.fixture(scope="session")
def with_inputs(tmp_path_factory: pytest.TempPathFactory) -> WriteModel:
    """Write a tiny model that reads more than the noisy latents, once for all tests: `with_inputs("sd1", EDITING)`."""

    @cache
    def write(family: str, inputs: ModelInputs) -> Models:
        return _write_model(tmp_path_factory.mktemp(f"{family}-{inputs.kind}"), family, "epsilon", [], inputs)

    return write


@dataclass
class Result:
    """What a run of the program gave."""

    status: int
    stdout: str
    stderr: str
    files: list[Path] = field(default_factory=list)  # new pictures, in the order of their names

    @property
    def pictures(self) -> list[np.ndarray]:
        """The new pictures as (H, W, 3) arrays of int."""
        return [np.asarray(Image.open(file)).astype(int) for file in self.files]


def pictures_in(folder: Path) -> list[Path]:
    """The picture files of a folder, by name; none when it does not exist."""
    return sorted(path for path in folder.glob("[!.]*") if path.suffix in (".png", ".webp", ".jpg"))


Generate = Callable[..., Result]


@pytest.fixture
def generate(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Generate:
    """Run the program in this process: `generate(ckpt, *options)`, small and quick unless the options say otherwise."""

    def run(ckpt: object, *options: object, outdir: Path | None = None) -> Result:
        outdir = outdir or tmp_path / "out"
        before = set(pictures_in(outdir))
        argv = ["--ckpt", ckpt, "--outdir", outdir, "--W", 64, "--H", 64, "--steps", 2, *options]
        try:
            status = gen_img_diffusers.main([str(argument) for argument in argv])
        except SystemExit as leaving:
            status = leaving.code
        captured = capfd.readouterr()
        files = sorted(set(pictures_in(outdir)) - before)
        return Result(status, captured.out, captured.err, files)

    return run


@pytest.fixture
def site(tmp_path: Path) -> Iterator[tuple[str, list[tuple[str, int]]]]:
    """A folder served over HTTP: its address, and the paths that were asked for with the answers' status."""
    asked: list[tuple[str, int]] = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
            asked.append((self.path, int(code)))

        def log_error(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=tmp_path / "site")) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}", asked
        server.shutdown()
