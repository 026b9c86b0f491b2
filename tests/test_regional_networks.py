"""Regional LoRA: networks that keep to the parts of a prompt, and to their regions."""

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from loading import prompt_encoder
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPTextModel, CLIPTextModelWithProjection

import gen_img_diffusers
from library.files.model_files import find_model
from library.plan.planning import make_plan

# at 64 pixels the tiny model normalises groups of two numbers, which makes a rounding error a change of sign
SIZE = ("--W", 128, "--H", 128, "--steps", 2)
OWN = ("--network_module", "networks.lora", "networks.lora")


def write_network(path, family, kind: str, seed: int):
    """A network of random weights for every layer but the embeddings of time and sizes, which regions do not divide."""
    models = {
        "unet": UNet2DConditionModel.from_pretrained(family.folder / "unet"),
        "te": CLIPTextModel.from_pretrained(family.folder / "text_encoder"),
    }
    if (family.folder / "text_encoder_2").is_dir():
        models["te1"] = models.pop("te")
        models["te2"] = CLIPTextModelWithProjection.from_pretrained(family.folder / "text_encoder_2")
    rng = torch.Generator().manual_seed(seed)
    state = {}
    for part, model in models.items():
        for name, layer in model.named_modules():
            if not isinstance(layer, torch.nn.Linear | torch.nn.Conv2d) or "time_emb" in name or "add_emb" in name:
                continue
            bare = part == "unet" or name == "text_projection" or name.startswith("text_model.")
            name = name if bare else f"text_model.{name}"
            state |= {
                f"lora_{part}_{name.replace('.', '_')}.{key}": value
                for key, value in layer_parts(kind, layer.weight.shape, rng).items()
            }
    save_file(state, path)
    return path


def layer_parts(kind: str, shape: torch.Size, rng: torch.Generator) -> dict[str, torch.Tensor]:
    scale = {"lora": 0.15, "loha": 0.3}[kind]  # weights change by about as much

    def randn(*size):
        return torch.randn(size, generator=rng) * scale

    outputs, inputs, *window = shape
    if kind == "lora":
        ups = {"lora_up.weight": randn(outputs, 2, *[1] * len(window))}
        return ups | {"lora_down.weight": randn(2, inputs, *window), "alpha": torch.tensor(1.0)}
    columns = inputs * int(np.prod(window))
    return {
        f"hada_w{n}_{side}": randn(*size) for n in (1, 2) for side, size in (("a", (outputs, 2)), ("b", (2, columns)))
    }


@pytest.fixture(scope="module")
def networks(sd1, sd2, sdxl, tmp_path_factory):
    """A LoRA and a LoHa, and LoRAs for SD 2.x and XL."""
    folder = tmp_path_factory.mktemp("networks")
    files = {kind: write_network(folder / f"{kind}.safetensors", sd1, kind, 1) for kind in ("lora", "loha")}
    others = {"sd2": sd2, "sdxl": sdxl}
    return files | {
        f"lora for {name}": write_network(folder / f"{name}.safetensors", other, "lora", 2)
        for name, other in others.items()
    }


@pytest.fixture
def halves(tmp_path):
    """Red on the left, green on the right."""
    picture = Image.new("RGB", (128, 128), (255, 0, 0))
    picture.paste((0, 255, 0), (64, 0, 128, 128))
    picture.save(tmp_path / "halves.png")
    return tmp_path / "halves.png"


def largest(first, second) -> int:
    assert len(first) == len(second) > 0
    return max(int(np.abs(a - b).max()) for a, b in zip(first, second))


@pytest.mark.parametrize(
    ("family_name", "kind"), [("sd1", "lora"), ("sd1", "loha"), ("sd2", "lora for sd2"), ("sdxl", "lora for sdxl")]
)
def test_one_network_in_both_halves_is_one_everywhere(request, generate, networks, halves, family_name, kind):
    """Every rule at once: text, keys and values by part, outcomes averaged, the rest by region.

    Without guidance, since the negative prompt sees no network's text where there are regions.
    """
    family = request.getfixturevalue(family_name)
    common = (family.folder, *family.options, *SIZE, "--scale", 1)
    plain = generate(*common, "--prompt", "a cat --d 1").pictures
    once = ("--network_module", "networks.lora", "--network_weights", networks[kind])
    whole = generate(*common, *once, "--prompt", "a cat --d 1").pictures
    twice = (*OWN, "--network_weights", networks[kind], networks[kind], "--mask_path", halves)
    regional = generate(*common, *twice, "--prompt", "a cat AND a cat --d 1").pictures
    assert largest(plain, whole) > 20
    assert largest(regional, whole) <= 2  # averages are divided by 1.0001


def test_networks_of_every_kind_leave_no_trace(sd1, generate, networks, halves, tmp_path):
    """A prompt without parts, drawn after one with regions, is drawn as by itself; and a batch as single pictures."""
    lines = tmp_path / "prompts.txt"
    lines.write_text("a cat AND a dog --n fog --d 1\na bird --n fog --d 2\na cat AND a dog --n fog --d 3\n")
    both = (*OWN, "--network_weights", networks["loha"], networks["lora"], "--mask_path", halves)
    batch = ("--from_file", lines, "--batch_size", 2, "--negative_scale", 2, "--sequential_file_name")
    run = generate(sd1.folder, *SIZE, *both, *batch).pictures
    without_mask = (*both[:-2], "--negative_scale", 2)
    alone = generate(
        sd1.folder, *SIZE, *without_mask, "--prompt", "a bird --n fog --d 2", outdir=tmp_path / "a"
    ).pictures
    assert largest(alone, [run[1]]) <= 1
    options = ("--negative_scale", 2, "--prompt", "a cat AND a dog --n fog --d 3")
    alone = generate(sd1.folder, *SIZE, *both, *options, outdir=tmp_path / "b").pictures
    assert largest(alone, [run[2]]) <= 1


def test_a_text_sees_its_own_parts_network(sd1, networks, halves):
    """Network i for part i, none for the negative and the empty prompt; without a map all for all."""

    def multipliers(*options):
        argv = ["--ckpt", sd1.folder, *OWN, "--network_weights", networks["lora"], networks["loha"], *options]
        argv += ["--network_mul", 0.5, 0.7, "--negative_scale", 2]
        job = make_plan(gen_img_diffusers.make_parser().parse([str(argument) for argument in argv])).jobs[0]
        return {text: tuple(m.in_text for m in its) for text, its in zip(job.texts_at(0), job.text_multipliers)}

    prompt = ("--prompt", "a cat AND a dog AND a bird --n fog")
    assert multipliers("--mask_path", halves, *prompt) == {
        "fog": (0, 0),
        "a cat": (0.5, 0),
        "a dog": (0, 0.7),
        "a bird": (0, 0),
        "": (0, 0),
    }
    assert set(multipliers(*prompt).values()) == {(0.5, 0.7)}


def test_a_text_is_encoded_with_its_multipliers(sd1):
    """The same text with other multipliers is another one, also among those that are kept."""
    files = find_model(str(sd1.folder), v2=False, v_parameterization=False)
    used = []
    encoder = prompt_encoder(files, use_multipliers=used.append)
    encoder.encode(["a", "b", "a"], 1, [(0.0,), (1.0,), (1.0,)])
    assert used == [(0.0,), (1.0,)]
    encoder.encode(["b", "a"], 1, [(1.0,), (0.0,)])
    assert used == [(0.0,), (1.0,)]
    encoder.encode(["b"], 1, [(0.0,)])
    assert used == [(0.0,), (1.0,), (0.0,)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompt", "a AND b"], "3 of them: the prompt has 2 parts (AND)"),
        (["--prompt", "a AND b AND c", "--network_merge"], "--network_merge: acts on the whole picture"),
        (["--prompt", "a AND b AND c", "--network_pre_calc"], "--network_pre_calc: acts on the whole picture"),
    ],
)
def test_bad_options(sd1, generate, networks, halves, options, message):
    files = [networks["lora"]] * 3
    result = generate(sd1.folder, *OWN, "networks.lora", "--network_weights", *files, "--mask_path", halves, *options)
    assert result.status == 2
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1
