"""Networks on the command line and on a model: modes, multipliers, ways of naming, other people's modules, faults."""

import subprocess
import sys
import zlib
from itertools import product

import numpy as np
import pytest
import torch
from loading import load_all
from lycoris import kohya
from network_runs import find, networks, refused, same
from PIL import Image
from safetensors.torch import load_file, save_file

from library.files.checkpoint_layout import original_name, unet_modules
from networks import lora
from networks.attach import HuggingFaceNames
from networks.keys import UNET, layer_shapes
from tools.random_network import kohya_name, random_lora

OWN = ("--network_module", "networks.lora")


@pytest.fixture(scope="session")
def files(sd1, tmp_path_factory):
    """Network files for the tiny SD 1.x model, by name."""
    folder, layers = tmp_path_factory.mktemp("networks"), layer_shapes(find(sd1))
    states = {
        "style": random_lora(layers, 4, alpha=2, convolutions=False, seed=1),
        "detail": random_lora(layers, 2, alpha=None, convolutions=True, seed=2),
        "loha": random_loha(layers),
    }
    for name, state in states.items():
        save_file(state, folder / f"{name}.safetensors", metadata={"ss_output_name": name, "ss_tags": '{"cat": 3}'})
    return {name: folder / f"{name}.safetensors" for name in states}


def random_loha(layers, *, several=False):
    generator, state = torch.Generator().manual_seed(3), {}
    for target, shape in layers.items():
        if "attn" in target[1] and len(shape) == 2:
            for part, size in (("a", (shape[0], 2)), ("b", (2, shape[1]))):
                for n in (1, 2):
                    state[f"{kohya_name(target, several=several)}.hada_w{n}_{part}"] = (
                        torch.randn(size, generator=generator) * 0.15
                    )
    return state


def test_the_modes_draw_the_same_picture(sd1, files, generate):
    options = ("--prompt", "a cat --d 1", *networks(*files.values(), mul=(0.8, -0.5, 0.7)))
    plain = generate(sd1.folder, "--prompt", "a cat --d 1").pictures
    pictures = generate(sd1.folder, *options).pictures
    assert not same(plain, pictures)
    for mode in (["--network_merge"], ["--network_pre_calc"], ["--network_merge_n_models", 2]):
        assert same(pictures, generate(sd1.folder, *options, *mode).pictures), mode


def test_a_multiplier_of_zero_is_no_network(sd1, files, generate):
    plain = generate(sd1.folder, "--prompt", "a cat --d 1").pictures
    zero = generate(sd1.folder, "--prompt", "a cat --d 1 --am 0", *networks(*files.values())).pictures
    assert np.array_equal(plain, zero)


def test_each_picture_has_its_own_multipliers(sd1, files, generate, tmp_path):
    lines = [
        "a cat --d 1 --am 0.5,1",
        "a cat --d 1 --am 0",
        "a cat --d 1",
        "a cat --d 1 --am -1",
        "a cat --d 1 --am 0.5,1",
    ]
    (tmp_path / "prompts.txt").write_text("\n".join(lines))
    options = networks(files["style"], files["loha"], mul=(0.8,))
    settings = (sd1.folder, "--from_file", tmp_path / "prompts.txt", "--sequential_file_name", *options)
    alone = []
    for number, line in enumerate(lines[:-1]):
        alone += generate(sd1.folder, "--prompt", line, *options, outdir=tmp_path / str(number)).pictures
    assert not same(alone[:1], alone[2:3])
    for mode, batch_size in product([[], ["--network_pre_calc"]], [1, 4]):
        outdir = tmp_path / f"{batch_size}{''.join(mode)}"
        together = generate(*settings, "--batch_size", batch_size, *mode, outdir=outdir)
        assert same([*alone, alone[0]], together.pictures), (mode, batch_size)
        assert Image.open(together.files[0]).info["networks"] == "style: 0.5, loha: 1"
        assert 'Networks: "style: 0.8, loha: 1"' in Image.open(together.files[2]).info["parameters"]
        assert Image.open(together.files[3]).info["networks"] == "style: -1, loha: -1"


def test_metadata_names_merged_networks_too(sd1, files, generate):
    options = networks(files["style"], files["detail"], mul=(0.8, 0.3))
    result = generate(sd1.folder, "--prompt", "a --am 0.5", *options, "--network_merge_n_models", 1)
    assert Image.open(result.files[0]).info["networks"] == "style: 0.8, detail: 0.5"


@pytest.fixture(scope="session")
def xl_files(sdxl, tmp_path_factory):
    """Network files for the tiny SD XL model, of all its three parts."""
    folder, layers = tmp_path_factory.mktemp("xl_networks"), layer_shapes(find(sdxl))
    states = {
        "style": random_lora(layers, 4, alpha=2, convolutions=False, seed=1),
        "detail": random_lora(layers, 2, alpha=None, convolutions=True, seed=2),
        "loha": random_loha(layers, several=True),
        "tokens": {  # what ComfyUI extracts, text encoders' tables among it
            f"text_encoders.clip_{letter}.transformer.text_model.embeddings.{table}_embedding.{part}": tensor
            for letter, width in (("l", 64), ("g", 32))
            for table, rows in (("token", 49408), ("position", 77))
            for part, tensor in low_rank(rows, width).items()
        },
    }
    for name, state in states.items():
        save_file(state, folder / f"{name}.safetensors")
    return {name: folder / f"{name}.safetensors" for name in states}


def low_rank(rows, width):
    generator = torch.Generator().manual_seed(rows + width)
    down, up = torch.randn(2, width, generator=generator), torch.randn(rows, 2, generator=generator) * 0.02
    return {"lora_down.weight": down, "lora_up.weight": up, "alpha": torch.tensor(2.0)}


def test_the_modes_draw_the_same_picture_with_xl(sdxl, xl_files, generate):
    options = ("--prompt", "a cat --d 1", *networks(*xl_files.values(), mul=(0.8, -0.5, 0.7, 0.6)))
    plain = generate(sdxl.folder, "--prompt", "a cat --d 1").pictures
    result = generate(sdxl.folder, *options)
    assert "keys fit" not in result.stderr
    assert not same(plain, result.pictures)
    for mode in (["--network_merge"], ["--network_pre_calc"], ["--network_merge_n_models", 2]):
        assert same(result.pictures, generate(sdxl.folder, *options, *mode).pictures), mode


def test_token_tables_that_networks_change_and_embeddings_lengthen(sdxl, xl_files, generate, tmp_path):
    """Multipliers that change from line to line; each line as by itself."""
    tensors = {"clip_l": torch.randn(2, 64), "clip_g": torch.randn(2, 32)}
    save_file(tensors, tmp_path / "zorb.safetensors")
    lines = ["a zorb cat --d 1 --am 0.5", "a zorb cat --d 1 --am 0", "a zorb cat --d 1 --am -1"]
    (tmp_path / "prompts.txt").write_text("\n".join(lines))
    embedding = ("--textual_inversion_embeddings", tmp_path / "zorb.safetensors")
    options = (sdxl.folder, *embedding, *networks(xl_files["tokens"]))
    together = generate(*options, "--from_file", tmp_path / "prompts.txt", "--sequential_file_name").pictures
    for place, line in enumerate(lines):
        alone = generate(*options, "--prompt", line, outdir=tmp_path / str(place)).pictures
        assert same(alone, together[place : place + 1]), line
    without = generate(sdxl.folder, *embedding, "--prompt", "a zorb cat --d 1", outdir=tmp_path / "without")
    assert np.array_equal(without.pictures[0], together[1])
    assert not same(together[:1], together[1:2])


@pytest.mark.parametrize("precision", ["--bf16"])
def test_networks_work_in_half_precision(sd1, files, generate, precision):
    options = ("--prompt", "a cat --d 1", *networks(files["style"], files["loha"]))
    exact, rounded = (generate(sd1.folder, *options, *p).pictures[0] for p in ([], [precision]))
    # bfloat16 has 8 bits: some levels over a few steps, against 40 between two seeds
    assert np.abs(exact - rounded).mean() < 6


def test_sd2_text_encoders_are_under_the_same_names(sd2, generate, tmp_path):
    layers = layer_shapes(find(sd2))
    for network in (UNET, "text_encoder"):
        part = {target: shape for target, shape in layers.items() if target[0] == network}
        file = tmp_path / f"{network}.safetensors"
        save_file(random_lora(part, 4, alpha=None, convolutions=True, seed=1), file)
        for ckpt in (sd2.folder, sd2.safetensors):
            options = ("--prompt", "a cat --d 1", *sd2.options)
            plain = generate(ckpt, *options).pictures
            result = generate(ckpt, *options, *networks(file))
            assert result.status == 0
            assert not same(plain, result.pictures)


# ---------------------------------------------------------------------------------------------------------------------
# The contract


def weights_of(models):
    components = {"unet": models.unet, "text_encoder": models.texts[0].model}
    return {
        f"{part}.{name}": tensor.clone()
        for part, component in components.items()
        for name, tensor in component.state_dict().items()
    }


def make_network(models, file, multiplier=1.0):
    network, state = lora.create_network_from_weights(
        multiplier, str(file), models.vae, models.texts[0].model, models.unet, for_inference=True
    )
    network.apply_to(models.texts[0].model, models.unet)
    network.load_state_dict(state, False)
    return network


@torch.no_grad()
def predict(models):
    from library.draw.text_conditions import TextConditions

    text = models.texts[0].model(torch.arange(77)[None]).last_hidden_state
    sample = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    return models.unet(sample, 10, encoder_hidden_states=TextConditions(text)).sample


@pytest.fixture
def loaded(sd1):
    from library.draw.attention import use_kernel
    from library.machine.attention import sdpa

    models = load_all(find(sd1))
    use_kernel(models.unet, sdpa)
    return models


@pytest.mark.parametrize("pre_calculated", [False, True])
def test_networks_come_and_go_without_a_trace(loaded, files, pre_calculated):
    before, plain = weights_of(loaded), predict(loaded)
    for order in ([0, 1, 2], [2, 0, 1]):
        attached = [make_network(loaded, file, 0.9) for file in files.values()]
        if pre_calculated:
            for network in attached:
                network.backup_weights()
            for network in attached:
                network.set_multiplier(-0.4)
            for network in attached:
                network.pre_calculation()
        assert not torch.equal(predict(loaded), plain)
        for place in order:
            attached[place].detach()
        after = weights_of(loaded)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)
        assert torch.equal(predict(loaded), plain)


def test_pre_calculation_accumulates_nothing(loaded, files):
    network = make_network(loaded, files["style"])
    network.backup_weights()
    plain = predict(loaded)
    predictions = []
    for multiplier in (0.8, 3.0, -2.0, 0.8):
        network.restore_weights()
        assert torch.equal(predict(loaded), plain)
        network.set_multiplier(multiplier)
        network.pre_calculation()
        predictions.append(predict(loaded))
    assert torch.equal(predictions[0], predictions[3])
    assert not torch.equal(predictions[0], predictions[1])


def test_attaching_twice_is_an_error(loaded, files):
    network = make_network(loaded, files["style"])
    with pytest.raises(RuntimeError, match="attached already"):
        network.apply_to(loaded.texts[0].model, loaded.unet)


# What LyCORIS trains with, as sd-scripts calls it; its preset `full` fails on any U-Net of diffusers in version 4.1
LYCORIS = {
    "LoCon": {"algo": "locon"},
    "LoHa": {"algo": "loha"},
    "LoKr": {"algo": "lokr", "factor": 4},
    "DoRA": {"algo": "lora", "dora_wd": True},
    "OFT": {"algo": "diag-oft"},
    "full": {"algo": "full"},
    "norms": {"algo": "lora", "train_norm": True},
}


@torch.no_grad()
def write_lycoris_file(models, file, **settings):
    """A file that LyCORIS' trainer wrote, of random weights."""
    text_encoder = HuggingFaceNames(models.texts[0].model)
    network = kohya.create_network(1, 4, 2, models.vae, text_encoder, models.unet, preset="attn-mlp", **settings)
    network.apply_to(text_encoder, models.unet, True, True)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in network.named_parameters():
        if "dora_scale" not in name:
            parameter += torch.randn(parameter.shape, generator=generator) * 0.05
    network.save_weights(str(file), torch.float32, None)


@pytest.mark.parametrize("name", LYCORIS)
def test_lycoris_draws_the_same_from_its_own_files(sd1, loaded, generate, tmp_path, name):
    write_lycoris_file(loaded, tmp_path / "x.safetensors", **LYCORIS[name])
    weights = ("--network_weights", tmp_path / "x.safetensors")
    multiplier = 1 if name == "DoRA" else 0.6  # LyCORIS leaves V, not W, at multiplier 0
    options = ("--prompt", f"a cat --d 1 --am {multiplier}", *weights)
    plain = generate(sd1.folder, "--prompt", "a cat --d 1").pictures
    ours = generate(sd1.folder, *options, "--network_module", "networks.lora")
    theirs = generate(sd1.folder, *options, "--network_module", "lycoris.kohya")
    assert theirs.status == 0, theirs.stderr
    assert "keys fit" not in ours.stderr + theirs.stderr  # all of them do
    assert same(ours.pictures, theirs.pictures)
    assert not same(plain, ours.pictures)


@pytest.mark.parametrize("algo", ["locon", "loha"])
@pytest.mark.parametrize("naming", ["original", "diffusers"])
def test_lycoris_draws_the_same_with_xl(sdxl, generate, tmp_path, algo, naming):
    """Its files for XL have the original's names of the U-Net, which this U-Net does not."""
    model = find(sdxl)
    layers = layer_shapes(model)
    state = random_lora(layers, 4, alpha=2, convolutions=False, seed=1)
    if algo == "loha":
        state = {key: tensor * 2 for key, tensor in random_loha(layers, several=True).items()}
        state |= {f"{key.partition('.')[0]}.alpha": torch.tensor(2.0) for key in state}
    if naming == "original":
        modules = unet_modules(model.unet.config)
        names = {
            kohya_name(target): f"lora_unet_{original_name(target[1], modules).replace('.', '_')}"
            for target in layers
            if target[0] == UNET
        }
        split = [(*key.partition("."), tensor) for key, tensor in state.items()]
        state = {f"{names.get(module, module)}.{part}": tensor for module, _, part, tensor in split}
    save_file(state, tmp_path / "x.safetensors")
    options = ("--prompt", "a cat --d 1", "--network_mul", 0.7, "--network_weights", tmp_path / "x.safetensors")
    ours = generate(sdxl.folder, *options, "--network_module", "networks.lora")
    theirs = generate(sdxl.folder, *options, "--network_module", "lycoris.kohya")
    assert theirs.status == 0, theirs.stderr
    assert "keys fit" not in ours.stderr + theirs.stderr
    assert same(ours.pictures, theirs.pictures)
    assert not same(generate(sdxl.folder, "--prompt", "a cat --d 1").pictures, ours.pictures)


def test_what_other_modules_print_is_no_result(sd1, files, generate, tmp_path, monkeypatch):
    """Standard output is for what a script reads, whatever a module says when it is looked for, imported and used."""
    (tmp_path / "loud").mkdir()
    (tmp_path / "loud" / "__init__.py").write_text("print('package')")
    (tmp_path / "loud" / "module.py").write_text(
        "import networks.lora\nprint('module')\n"
        "def create_network_from_weights(*arguments, **options):\n    print('made')\n"
        "    return networks.lora.create_network_from_weights(*arguments, **options)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    options = ("--network_module", "loud.module", "--network_weights", files["style"])
    result = generate(sd1.folder, "--prompt", "a", *options)
    assert result.stdout.splitlines() == [str(file) for file in result.files]
    assert all(f"{word}\n" in result.stderr for word in ("package", "module", "made"))


@pytest.mark.parametrize(
    ("network", "reason"),
    [
        ("class Network:\n    pass", "AttributeError: 'Network' object has no attribute 'apply_to'"),
        ("class Network:\n    def apply_to(self, *models):\n        raise KeyError('x')", "KeyError: 'x'"),
        ("class Network:\n    def apply_to(self, *models):\n        pass", "AttributeError: 'Network' object has no"),
    ],
)
def test_a_fault_of_another_module_is_told_as_its_own(sd1, files, generate, tmp_path, monkeypatch, network, reason):
    name = f"faulty_{zlib.crc32(network.encode())}"  # what is imported stays
    made = "def create_network_from_weights(*arguments, weights_sd, **options):\n    return Network(), weights_sd\n"
    (tmp_path / f"{name}.py").write_text(f"{network}\n{made}")
    monkeypatch.syspath_prepend(tmp_path)
    message = refused(generate, sd1.folder, "--network_module", name, "--network_weights", files["style"])
    assert f"--network_weights {files['style']}: {name} cannot use it ({reason}" in message


def test_lycoris_log_is_no_result(sd1, loaded, tmp_path):
    write_lycoris_file(loaded, tmp_path / "x.safetensors", algo="lora")
    options = [
        "--ckpt",
        sd1.folder,
        "--outdir",
        tmp_path,
        "--W",
        64,
        "--H",
        64,
        "--steps",
        1,
        "--prompt",
        "a",
        "--quiet",
    ]
    options += ["--network_module", "lycoris.kohya", "--network_weights", tmp_path / "x.safetensors"]
    command = [sys.executable, "gen_img_diffusers.py", *map(str, options)]  # LyCORIS takes hold of stdout when imported
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert ended.stdout.splitlines() == [str(next(tmp_path.glob("*.png")))]
    assert ended.stderr == ""


def test_lycoris_modes_that_would_be_wrong_are_refused(sd1, loaded, generate, tmp_path):
    write_lycoris_file(loaded, tmp_path / "x.safetensors", algo="loha")
    network = ("--network_module", "lycoris.kohya", "--network_weights", tmp_path / "x.safetensors")
    assert "use networks.lora, which reads its files" in refused(generate, sd1.folder, *network, "--network_merge")
    assert "the module cannot do that" in refused(generate, sd1.folder, *network, "--network_pre_calc")


# ---------------------------------------------------------------------------------------------------------------------
# Faults


def test_metadata_is_shown_in_readable_form(sd1, files, generate):
    result = generate(sd1.folder, "--prompt", "a", *networks(files["style"]), "--network_show_meta")
    assert '  ss_output_name: style\n  ss_tags:\n    {\n      "cat": 3\n    }\n' in result.stderr


def test_the_usual_module_may_be_left_out(sd1, files, generate):
    named = generate(sd1.folder, "--prompt", "a --d 1", *OWN, "--network_weights", files["style"])
    unnamed = generate(sd1.folder, "--prompt", "a --d 1", "--network_weights", files["style"], "--network_mul", 1)
    without = generate(sd1.folder, "--prompt", "a --d 1")
    assert (named.pictures[0] == unnamed.pictures[0]).all()
    assert (without.pictures[0] != unnamed.pictures[0]).any()


def test_numbers_that_do_not_pair_up(sd1, files, generate, tmp_path):
    file = files["style"]
    two = ("--network_module", "networks.lora", "networks.lora")
    one = (*OWN, "--network_weights", file)
    for options, message in (
        ((*two, "--network_weights", file), "--network_weights: 1 for 2 --network_module: each module needs one"),
        (OWN, "--network_weights: 0 for 1 --network_module"),
        (
            (*one, "--network_mul", 1, 2),
            "--network_mul: has 2 values for 1 network; give at most as "
            "many; to compare strengths, give --sweep network_mul=1,2, or a line for each (--am 1)",
        ),
        ((*one, "--network_mul", "x"), "--network_mul x: not a number"),
        ((*one, "--network_args", "a"), "--network_args a: 'a' is not key=value"),
        ((*one, "--network_merge", "--network_pre_calc"), "--network_pre_calc: is for networks that are not merged"),
        ((*one, "--network_merge_n_models", 2), "--network_merge_n_models 2: there are 1 networks"),
        (("--network_mul", 1), "--network_mul: is for networks; give --network_weights too"),
        (("--network_merge",), "--network_merge: is for networks; give --network_weights too"),
        (
            ("--network_module", "networks.dylora", "--network_weights", file),
            "networks.lora reads LoRA and its relatives",
        ),
        (
            ("--network_module", "nowhere.x", "--network_weights", file),
            "--network_module nowhere.x: cannot be imported",
        ),
        (("--network_module", "json", "--network_weights", file), "has no create_network_from_weights"),
        ((*OWN, "--network_weights", tmp_path / "no.safetensors"), "cannot be read: No such file"),
    ):
        assert message in refused(generate, sd1.folder, *options)


@pytest.mark.parametrize(
    ("am", "message"),
    [
        ("1,2", "--am 1,2: 2 multipliers for 1 networks"),
        ("x", "--am x (column 3): not a number"),
        ("1,,2", "--am 1,,2 (column 3): not a number"),
    ],
)
def test_bad_multipliers_in_a_line(sd1, files, generate, am, message):
    result = generate(sd1.folder, *networks(files["style"]), "--prompt", f"a --am {am}")
    assert result.status == 2
    assert message in result.stderr


@pytest.mark.parametrize("mode", [[], ["--network_merge"]])
def test_multipliers_need_a_network_that_they_can_change(sd1, files, generate, mode):
    result = generate(sd1.folder, *(networks(files["style"]) if mode else ()), *mode, "--prompt", "a --am 0.5")
    assert result.status == 2
    assert "--am 0.5: there is no network whose multiplier could change" in result.stderr


def test_keys_without_a_layer_are_counted(sd1, files, generate, tmp_path):
    state = load_file(files["style"])
    state |= {f"lora_unet_elsewhere.{part}.weight": torch.ones(2, 2) for part in ("lora_down", "lora_up")}
    save_file(state, tmp_path / "more.safetensors")
    result = generate(sd1.folder, "--prompt", "a", *networks(tmp_path / "more.safetensors"))
    assert result.status == 0
    assert f"{len(state) - 2} of {len(state)} keys fit; left aside: 'lora_unet_elsewhere" in result.stderr


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_weights_name_their_tensor(sd1, files, generate, tmp_path, value):
    state = load_file(files["style"])
    key = next(iter(state))
    state[key].view(-1)[0] = value
    save_file(state, tmp_path / "broken.safetensors")
    assert f"{key!r} holds NaN or infinite values" in refused(
        generate, sd1.folder, *networks(tmp_path / "broken.safetensors")
    )


def test_pickled_networks(sd1, files, generate, tmp_path):
    torch.save(load_file(files["style"]), tmp_path / "style.pt")
    options = ("--prompt", "a cat --d 1")
    pictures = [
        generate(sd1.folder, *options, *networks(file)).pictures for file in (files["style"], tmp_path / "style.pt")
    ]
    assert same(*pictures)
