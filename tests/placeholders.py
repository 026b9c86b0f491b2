"""Stand-ins for the files that commands in the documentation name: `model.safetensors`, `photo.png`, `prompts.txt`, …

Which stand-in a name gets follows from the option it is given to. What is for SD 1.x is the demo model and its
companions, what is for XL (its `--ckpt` has "sdxl" in its name) the tiny model of tests/expected and its networks.
"""

from pathlib import Path

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from library.files.loss_guidance import VGG16_LAYERS
from tools.demo.showcase import ROOT

SHAPES = ROOT / "examples" / "shapes"
COMPANIONS = SHAPES / "companions"
_DEMO_LORAS = [COMPANIONS / f"{name}.safetensors" for name in ("dipped", "dotted")]
PROMPTS = "a castle --n blurry\na red cat --d 1,2\n"
ROWS = {".csv": "prompt,n\na castle,blurry\n", ".jsonl": '{"prompt": "a castle", "n": "blurry"}\n'}
TOLD = "a castle\nNegative prompt: blurry\nSteps: 2, Sampler: Euler a, CFG scale: 5, Seed: 1, Size: 64x64"
MASK_ALPHA = 128  # half transparent, so that --mask_from_alpha has something to repaint
PICTURES = ("--image_path", "--mask_path", "--guide_image_path", "--from_pictures")
WEIGHTS = ("--ckpt", "--network_weights", "--textual_inversion_embeddings", "--control_net_models",
           "--control_net_lllite_models")  # fmt: skip
# options that take from the Hub, or from PyTorch's site, what is not given: what is given here
FETCHED = {
    "--clip_guidance_scale": ("--clip_model", str(COMPANIONS / "clip")),
    "--clip_image_guidance_scale": ("--clip_model", str(COMPANIONS / "clip")),
    "--vgg16_guidance_scale": ("--vgg16_model", "vgg16.pth"),
}


class Placeholders:
    """What commands name, made in the current folder where it is not there yet."""

    def __init__(self, models: dict[str, Path], xl: Path, union: Path) -> None:
        """Take what has to be written first.

        Args:
            models: model files by a part of their name: "inpaint", "pix2pix".
            xl: folder with the models and the assets of tests/expected/sdxl.
            union: a ControlNet Union for XL.
        """
        self._models = {"sdxl": xl / "models" / "sdxl-tiny", **models}
        self._xl, self._union = xl / "assets", union

    def make(self, argv: list[str]) -> list[str]:
        """Make what a command line names; returns options to add to it."""
        given = _values(argv)
        xl = any("sdxl" in name for name in given.get("--ckpt", []))
        for option, names in given.items():
            for place, name in enumerate(names):
                self._make_one(option, Path(name), place, xl)
        for name in given.get("--highres_fix_upscaler_args", []):
            file = Path(name.partition("weights=")[2].partition(";")[0])
            torch.save({"conv.weight": torch.zeros(1)}, file)  # what is in it is looked at when it is loaded
        added = {further for option, further in FETCHED.items() if option in given and further[0] not in given}
        if ("--vgg16_model", "vgg16.pth") in added:
            torch.save(_vgg16(), "vgg16.pth")
        return [word for further in sorted(added) for word in further]

    def _make_one(self, option: str, path: Path, place: int, xl: bool) -> None:
        if option not in (*WEIGHTS, *PICTURES, "--network_dir", "--config", "--from_file") or path.exists():
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        if option in WEIGHTS:
            path.symlink_to(self._weights(option, path.name, place, xl))
        elif option == "--network_dir":
            path.mkdir()
            (path / "style.safetensors").symlink_to(COMPANIONS / "dipped.safetensors")
        elif option == "--config":
            path.write_text('ckpt = "examples/shapes"\nprompt = "a castle"\n')
        elif option == "--from_file" and path.name != "-":
            path.write_text(ROWS.get(path.suffix, PROMPTS))
        elif option in PICTURES:
            _write_pictures(path)

    def _weights(self, option: str, name: str, place: int, xl: bool) -> Path:
        """The file or folder that stands in for one of WEIGHTS."""
        if option == "--ckpt":
            return next((file for part, file in self._models.items() if part in name), SHAPES)
        for_xl = {
            "--network_weights": self._xl / "sdxl_style.safetensors",
            "--textual_inversion_embeddings": self._xl / "sdxl_word.safetensors",
            "--control_net_models": self._union,
            "--control_net_lllite_models": self._xl / "sdxl_lllite.safetensors",
        }
        for_sd = {
            "--network_weights": _DEMO_LORAS[place % 2],
            "--textual_inversion_embeddings": COMPANIONS / "zorb.safetensors",
            "--control_net_models": COMPANIONS / "canny.safetensors",
        }
        return (for_xl if xl else for_sd)[option]


def _values(argv: list[str]) -> dict[str, list[str]]:
    """The values that each option of a command line has."""
    given: dict[str, list[str]] = {}
    option = ""
    for word in argv:
        if word.startswith("--"):
            option = word
            given[option] = []
        elif option:
            given[option].append(word)
    return given


def _write_pictures(path: Path) -> None:
    """A picture, a list of two, or two in a folder or in that of a glob: red on the left, green on the right."""
    if path.suffix == ".txt":
        path.write_text("0.png\n1.png\n")
        files = [path.parent / name for name in ("0.png", "1.png")]
    elif path.suffix and "*" not in path.name:
        files = [path]
    else:
        folder = path.parent if "*" in path.name else path
        folder = Path(*(part for part in folder.parts if part != "**"))
        files = [folder / f"{number}{path.suffix or '.png'}" for number in (0, 1)]
    told = PngInfo()
    told.add_text("parameters", TOLD)
    picture = Image.new("RGBA", (128, 128), (255, 0, 0, MASK_ALPHA))
    picture.paste((0, 255, 0, 255), (64, 0, 128, 128))
    picture.paste((255, 255, 255, 255), (96, 96, 128, 128))
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.suffix == ".png":
            picture.save(file, pnginfo=told)
        else:
            picture.convert("RGB").save(file)


def _vgg16() -> dict[str, torch.Tensor]:
    """A narrow VGG16 in torchvision's layout."""
    tensors, channels = {}, 3
    for place, layer in enumerate(VGG16_LAYERS):
        if layer == "convolution":
            tensors[f"features.{place}.weight"] = torch.zeros(8, channels, 3, 3)
            tensors[f"features.{place}.bias"] = torch.zeros(8)
            channels = 8
    return tensors
