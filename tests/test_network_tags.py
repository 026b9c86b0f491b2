"""Networks that tags in prompts name: found in a folder, checked, and each picture drawn with its own."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from network_runs import find, networks, same
from PIL import Image
from safetensors.torch import load_file, save_file
from test_networks import random_loha

import gen_img_diffusers
from library.errors import InputError
from library.plan.planning import make_plan
from networks import tags as tags_module
from networks.files import NetworkPlan, open_network
from networks.folder import NetworkFolder
from networks.keys import layer_shapes
from networks.strengths import Strength, parse_tag
from networks.tags import TaggedNetworks
from tools.random_network import random_lora

# ---------------------------------------------------------------------------------------------------------------------
# Finding


@pytest.fixture
def folder(tmp_path):
    """A folder with networks of every sort, and with what is none."""
    tensors = {"lora_te_x.lora_down.weight": torch.zeros(1, 1)}
    for name, noted in (
        *(("style", None), ("sub/detail", None), ("a/twin", None), ("b/twin", None), ("Case", None), ("case", None)),
        *(("epoch-000010", "Painting"), ("v1.5", None), ("sub/.hidden", None), ("Capital", None)),
        *(("x1", "same"), ("x2", "same")),
    ):
        file = tmp_path / "networks" / f"{name}.safetensors"
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, file, metadata={"ss_output_name": noted} if noted else None)
    for name in ("old.pt", "notes.txt", "sub/diffusers/broken.safetensors"):
        (tmp_path / "networks" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "networks" / name).write_bytes(b"no weights")
    peft = tmp_path / "networks/sub/trained"
    peft.mkdir()
    save_file(tensors, peft / "adapter_model.safetensors")
    (tmp_path / "networks/sub/round").symlink_to(tmp_path / "networks")
    return tmp_path / "networks"


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("style", "style.safetensors"),
        ("STYLE", "style.safetensors"),
        ("detail", "sub/detail.safetensors"),
        ("sub/detail", "sub/detail.safetensors"),
        ("sub\\detail", "sub/detail.safetensors"),
        ("a/twin", "a/twin.safetensors"),
        ("Case", "Case.safetensors"),
        ("case", "case.safetensors"),
        ("capital", "Capital.safetensors"),
        ("v1.5", "v1.5.safetensors"),
        ("old", "old.pt"),
        ("trained", "sub/trained"),
        ("Painting", "epoch-000010.safetensors"),
        ("painting", "epoch-000010.safetensors"),
    ],
)
def test_names(folder, name, file):
    assert NetworkFolder(folder).find(name, "x") == folder / file


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("twin", "2 networks have that name: a/twin.safetensors, b/twin.safetensors; write a folder before it"),
        ("CASE", "2 networks have that name: Case.safetensors, case.safetensors"),
        ("same", "2 networks have that name: x1.safetensors, x2.safetensors"),
        ("stile", "there is no network of that name in {folder}; the nearest: style"),
        ("paintng", "the nearest: Painting"),
        ("sub/style", "the nearest: style"),
        ("detai", "the nearest: detail"),
        ("notes", "there is no network of that name"),
        ("hidden", "there is no network of that name"),
        ("adapter_model", "there is no network of that name"),
        ("zzzzzz", "in {folder}; it has 14 others"),
    ],
)
def test_names_that_are_refused(folder, name, message):
    with pytest.raises(InputError) as problem:
        NetworkFolder(folder).find(name, f"<lora:{name}>", "p.txt:3")
    assert str(problem.value).startswith(f"<lora:{name}> (p.txt:3): ")
    assert message.format(folder=folder) in str(problem.value)


def test_a_folder_that_is_not_there(sd1, generate, tmp_path):
    result = generate(sd1.folder, "--prompt", "a", "--network_dir", tmp_path / "x")
    message = f"--network_dir {tmp_path}/x: is no folder; give the one that the networks are in"
    assert (result.status, result.stderr) == (2, f"error: {message}\n")


# ---------------------------------------------------------------------------------------------------------------------
# Checking

STYLE, DETAIL, LOHA = (parse_tag(name, ["0.8"]) for name in ("style", "detail", "loha"))


@pytest.fixture(scope="session")
def files(sd1, sdxl, tmp_path_factory):
    """A folder of networks for the tiny model, of several ranks and kinds, and one for XL."""
    root, layers = tmp_path_factory.mktemp("tagged"), layer_shapes(find(sd1))
    states = {
        "style": random_lora(layers, 4, alpha=2, convolutions=False, seed=1),
        "sub/detail": random_lora(layers, 2, alpha=None, convolutions=True, seed=2),
        "loha": random_loha(layers),
        "xl": random_lora(layer_shapes(find(sdxl)), 2, alpha=None, convolutions=False, seed=2),
    }
    for name, state in states.items():
        (root / name).parent.mkdir(exist_ok=True)
        save_file(state, root / f"{name}.safetensors")
    return root


@pytest.fixture
def registry(sd1, files):
    return TaggedNetworks(str(files), find(sd1))


def test_places_are_those_of_first_use(registry, files):
    first = registry.use([STYLE, DETAIL], "p:1")
    second = registry.use([LOHA, ("sub/detail", Strength(0.5, 0))], "p:2")
    assert [(use.place, use.file.stem, str(use.strength)) for use in (*first, *second)] == [
        *((0, "style", "0.8"), (1, "detail", "0.8")),
        *((1, "detail", "0.5/0"), (2, "loha", "0.8")),
    ]
    plan = registry.added_to(NetworkPlan(pre_calculated=True))
    assert [spec.name for spec in plan.specs] == ["style", "detail", "loha"]
    assert plan.tagged == 3
    assert plan.pre_calculated
    assert plan.multipliers == ()
    assert registry.files == [spec.weights.path for spec in plan.specs]
    strengths = (Strength.of(0), Strength(0.5, 0))
    assert plan.describe(strengths) == "detail: 0.5/0"  # the others do not act in the picture


def test_what_acts_nowhere_is_checked_and_not_loaded(registry):
    assert registry.use([("style", Strength.of(0))], "p:1") == ()
    assert registry.added_to(NetworkPlan()).specs == ()
    with pytest.raises(InputError, match="no network of that name"):
        registry.use([("stile", Strength.of(0))], "p:1")


@pytest.mark.parametrize(
    ("tags", "message"),
    [
        ([STYLE, DETAIL, STYLE], "<lora:style:0.8> (p:1): names a second time in one prompt; keep one of the tags"),
        ([DETAIL, ("sub/detail", Strength())], "<lora:sub/detail:1> (p:1): is the network detail, a second time"),
        ([parse_tag("xl", [])], "it is made for Stable Diffusion XL, the model is Stable Diffusion 1.x"),
        ([parse_tag("style", ["1", "lbw=1,1,1,1,1,1,1,1,1,1,1,1"])], "12 factors of blocks are for another family's"),
    ],
)
def test_tags_that_are_refused(registry, tags, message):
    with pytest.raises(InputError) as problem:
        registry.use(tags, "p:1")
    assert message in str(problem.value)


def test_a_tag_without_a_folder(sd1):
    with pytest.raises(
        InputError, match=r"<lora:style:0.8> \(p:1\): names a network in a folder; give that with --netw"
    ):
        TaggedNetworks(None, find(sd1)).use([STYLE], "p:1")


def test_networks_that_are_not_loaded_are_refused_while_the_program_runs(registry):
    """So with `--interactive`; those that are loaded can be used."""
    registry.use([STYLE], "p:1")
    registry.added_to(NetworkPlan())
    assert registry.use([("style", Strength.of(0.3))], "the prompt")[0].place == 0
    with pytest.raises(InputError, match="no tags with --interactive"):
        registry.use([DETAIL], "the prompt")


# ---------------------------------------------------------------------------------------------------------------------
# Drawing


@pytest.fixture
def tagged(generate, files):
    """Runs the program on lines with tags."""
    tags = ("--prompt_syntax", "webui", "--network_dir", files)
    return lambda ckpt, *options, **run: generate(ckpt, *tags, *options, **run)


def write_lines(path: Path, *lines: str) -> tuple:
    path.write_text("\n".join(lines) + "\n")
    return "--from_file", path, "--sequential_file_name"


LINES = [  # a line with tags, and the same as options: the files and their strengths
    ("a <lora:style:0.8>cat --d 1", ["style"], [0.8]),
    ("a cat --d 1", [], []),
    ("a <lora:loha:0.7>cat --d 1", ["loha"], [0.7]),
    ("a <lora:detail:0.5/1>cat --d 1", ["sub/detail"], ["0.5/1"]),
    ("a cat <lora:style:0.3[MIDD]><lora:loha:0.2> --d 1", ["style", "loha"], ["0.3[MIDD]", 0.2]),
    ("a cat <lora:style:0.8> --d 2", ["style"], [0.8]),
]


@pytest.mark.parametrize(("mode", "count"), [([], 6), (["--network_pre_calc"], 3)])
def test_each_line_is_drawn_with_its_own_network_bit_for_bit(sd1, files, tagged, generate, tmp_path, mode, count):
    """In a file of many lines, at batch size 4, as with the same networks by option; and told so."""
    lines = LINES[:count]
    pair = write_lines(tmp_path / "tags.txt", *(line for line, *_ in lines))
    run = tagged(sd1.folder, *pair, *mode, "--batch_size", 4, "--json", outdir=tmp_path / "tags")
    assert run.status == 0, run.stderr
    for names, mul in dict.fromkeys((tuple(names), tuple(mul)) for _, names, mul in lines):
        alike = [place for place, (_, *its) in enumerate(lines) if its == [list(names), list(mul)]]
        plain = [re.sub("<[^>]*>", "", lines[place][0]) for place in alike]
        options = (*networks(*(files / f"{name}.safetensors" for name in names), mul=mul), *mode) if names else ()
        pair = write_lines(tmp_path / "options.txt", *plain)
        outdir = tmp_path / f"options{alike[0]}"
        wanted = generate(sd1.folder, *pair, *options, "--batch_size", 4, outdir=outdir)
        for place, picture, file in zip(alike, wanted.pictures, wanted.files):
            assert np.array_equal(run.pictures[place], picture), lines[place]
            described = [Image.open(each).info.get("networks") for each in (run.files[place], file)]
            assert described[0] == described[1]
    objects = [json.loads(line) for line in run.stdout.splitlines()]
    told = {each["raw_prompt"]: [(net["name"], net["multiplier"]) for net in each["networks"]] for each in objects}
    assert told == {line: [(Path(name).name, m) for name, m in zip(names, mul)] for line, names, mul in lines}


def test_tags_act_everywhere_beside_networks_with_regions(sd1, files, tagged, tmp_path):
    """With the networks of the parts switched off, a tag's acts as if there were no others; also on their own texts."""
    halves = np.zeros((64, 64, 3), dtype=np.uint8)
    halves[:, :32, 0] = halves[:, 32:, 1] = 255
    Image.fromarray(halves).save(tmp_path / "halves.png")
    common = (sd1.folder, "--mask_path", tmp_path / "halves.png", "--W", 128, "--H", 128)
    parts = networks(files / "style.safetensors", files / "style.safetensors")
    prompt = "a cat <lora:detail:1> AND a dog <lora:loha:1> --n fog --d 1"
    alone = tagged(*common, "--prompt", prompt, outdir=tmp_path / "alone").pictures
    beside = tagged(*common, *parts, "--prompt", f"{prompt} --am 0", outdir=tmp_path / "beside").pictures
    assert same(alone, beside)
    without = tagged(*common, "--prompt", re.sub("<[^>]*>", "", prompt), outdir=tmp_path / "without").pictures
    assert not same(alone, without)


def test_new_lines_may_bring_new_networks_to_a_run(sd1, files, tagged, tmp_path):
    lines = ["a <lora:style:0.8>cat --d 1"]
    options = (sd1.folder, "--resume", *write_lines(tmp_path / "p.txt", *lines))
    assert len(tagged(*options).files) == 1
    lines.append("a <lora:detail:1>dog --d 1")
    write_lines(tmp_path / "p.txt", *lines)
    again = tagged(*options)
    assert (again.status, len(again.files)) == (0, 1), again.stderr
    assert len(tagged(*options).files) == 0
    manifest = map(json.loads, (tmp_path / "out/manifest.jsonl").read_text().splitlines())
    records = [{Path(file).stem for file in line["files"]} for line in manifest if "files" in line]
    assert [record & {"style", "detail", "loha"} for record in records] == [{"style"}, {"style", "detail"}]


def test_a_run_does_not_go_on_with_another_file(sd1, files, tagged, tmp_path):
    folder = tmp_path / "networks"
    folder.mkdir()
    state = load_file(files / "style.safetensors")
    save_file(state, folder / "style.safetensors")
    pair = write_lines(tmp_path / "p.txt", "a <lora:style:0.8>cat --d 1")
    options = (sd1.folder, "--resume", *pair, "--network_dir", folder)
    assert len(tagged(*options).files) == 1
    save_file({key: tensor + 1 for key, tensor in state.items()}, folder / "style.safetensors")
    changed = tagged(*options)
    assert changed.status == 2
    assert "style.safetensors: has changed since the run to resume was begun" in changed.stderr


def test_files_are_opened_once_for_all_lines(sd1, files, monkeypatch, tagged, tmp_path):
    opened = []
    monkeypatch.setattr(tags_module, "open_network", lambda path: opened.append(path) or open_network(path))
    pair = write_lines(tmp_path / "p.txt", *["a <lora:style:0.8>cat <lora:detail:1>"] * 300)
    argv = ["--ckpt", sd1.folder, "--outdir", tmp_path / "o", *pair, "--network_dir", files]
    argv += ["--prompt_syntax", "webui", "--dry_run"]
    plan = make_plan(gen_img_diffusers.make_parser().parse([str(argument) for argument in argv]))
    assert len(opened) == 2
    assert len(plan.batches(plan.jobs)) == 300
    assert {job.tag_strengths for job in plan.jobs} == {(Strength.of(0.8), Strength.of(1))}
