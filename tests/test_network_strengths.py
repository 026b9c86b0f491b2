"""Networks by part: U-Net and text encoder, blocks, steps; the grammar, and what comes of it in the layers."""

import json
from argparse import ArgumentTypeError

import numpy as np
import pytest
import torch
from loading import load_all
from network_runs import find, networks, refused, same
from PIL import Image
from safetensors.torch import load_file, save_file
from test_networks import random_loha
from torch import nn
from torch._dynamo.testing import CompileCounter

from library.errors import InputError
from networks.keys import UNET, layer_shapes
from networks.kinds import LORA
from networks.layers import LayerChange, adapter_of
from networks.lora import LoraNetwork, merge_together
from networks.strengths import OFF, Strength, block_names, parse_strength, parse_strengths, parse_tag
from tools.random_network import kohya_name, random_lora

# ---------------------------------------------------------------------------------------------------------------------
# Grammar

ONES = ",".join("1" * 17)
STRENGTHS = [  # text, U-Net, text encoder, blocks, range
    ("0.8", 0.8, 0.8, "", (0, 1)),
    (" -1.5 ", -1.5, -1.5, "", (0, 1)),
    ("0.8/0.4", 0.8, 0.4, "", (0, 1)),
    ("0/1", 0, 1, "", (0, 1)),
    ("1[MIDD]", 1, 1, "MIDD", (0, 1)),
    ("1[outall]", 1, 1, "OUTALL", (0, 1)),
    ("1[in04 = 0.50, OUT03=0]", 1, 1, "IN04=0.5,OUT03=0", (0, 1)),
    (f"1[{ONES}]", 1, 1, ONES, (0, 1)),
    ("0.8@0.2-0.7", 0.8, 0.8, "", (0.2, 0.7)),
    ("1@0.00001-1.0", 1, 1, "", (1e-5, 1)),
    ("0.8/0.4[M00=-2]@.5-1", 0.8, 0.4, "M00=-2", (0.5, 1)),
]


@pytest.mark.parametrize(("text", "unet", "te", "blocks", "steps"), STRENGTHS)
def test_grammar(text, unet, te, blocks, steps):
    strength = parse_strength(text)
    assert strength == Strength(unet, te, blocks, *steps)
    assert parse_strength(str(strength)) == strength
    assert (strength.number is None) == bool(blocks or te != unet or steps != (0, 1))


def test_commas_divide_networks_but_not_within_brackets():
    assert parse_strengths("0.5") == (Strength.of(0.5),)
    assert parse_strengths(f"0.5/1,1[{ONES}]@0-0.5,2[IN04=1,M00=0],3") == (
        *(Strength(0.5, 1), Strength(1, 1, ONES, 0, 0.5)),
        *(Strength(2, 2, "IN04=1,M00=0"), Strength(3, 3)),
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not a number"),
        ("x", "not a number; write a number not below -1000, up to 1000"),
        ("1/", "not a number"),
        ("1/nan", "not a finite number"),
        ("2000", "out of range"),
        ("1/2/3", "not a strength; write U or U/T"),
        ("1[ALL]2", "not a strength"),
        ("1[ALL", "not a strength"),
        ("1@0-1[ALL]", "not a strength"),
        ("1[]", "no blocks between the brackets"),
        ("1[1,1]", "2 factors of blocks; give 17 or 26 for SD 1.x and 2.x, 12 or 20 for XL, or name blocks"),
        ("1[MIDX]", "there is no preset MIDX; did you mean MIDD?"),
        ("1[x]", "there is no preset X; known are NONE, ALL, INS"),
        ("1[IN4=1]", "there is no block IN4; did you mean IN04?"),
        ("1[OUT12=1]", "there is no block OUT12; did you mean OUT1"),
        ("1[IN04=1,2]", "'2' between names of blocks"),
        ("1[IN04=1,in04=2]", "IN04 is given twice"),
        ("1[IN04=x]", "not a number"),
        ("1@0.5", "@0.5 is no range of steps; write shares of them, as in @0.2-0.7"),
        ("1@0.7-0.2", "ends at 0.2, where it has not begun"),
        ("1@0.5-0.5", "ends at 0.5"),
        ("1@0-2", "out of range"),
    ],
)
def test_what_is_no_strength(text, message):
    with pytest.raises(ArgumentTypeError) as problem:
        parse_strength(text)
    assert message in str(problem.value)


IN_17 = ["BASE", "IN01", "IN02", "IN04", "IN05", "IN07", "IN08", "M00", *(f"OUT{place:02}" for place in range(3, 12))]
PRESETS = {  # as the extension lists them
    "NONE": "0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0",
    "ALL": "1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1",
    "INS": "1,1,1,1,0,0,0,0,0,0,0,0,0,0,0,0,0",
    "IND": "1,0,0,0,1,1,1,0,0,0,0,0,0,0,0,0,0",
    "INALL": "1,1,1,1,1,1,1,0,0,0,0,0,0,0,0,0,0",
    "MIDD": "1,0,0,0,1,1,1,1,1,1,1,1,0,0,0,0,0",
    "OUTD": "1,0,0,0,0,0,0,0,1,1,1,1,0,0,0,0,0",
    "OUTS": "1,0,0,0,0,0,0,0,0,0,0,0,1,1,1,1,1",
    "OUTALL": "1,0,0,0,0,0,0,0,1,1,1,1,1,1,1,1,1",
}


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_and_short_lists(preset):
    """A block that a short list leaves out, IN03, gets 0."""
    wanted = dict(zip(IN_17, map(float, PRESETS[preset].split(",")))) | {"IN00": 0, "IN03": 0, "OUT02": 0}
    for blocks in (preset, PRESETS[preset]):
        strength = parse_strength(f"1[{blocks}]")
        assert {block: strength.in_block(block) for block in wanted} == wanted


def test_the_range_of_steps():
    strength = parse_strength("0.8/0.4@0.2-0.7")
    acting = [strength.at(step, 10) for step in range(10)]
    assert [each.unet for each in acting] == [0, 0, 0.8, 0.8, 0.8, 0.8, 0.8, 0, 0, 0]
    assert {(each.te, each.has_range) for each in acting} == {(0.4, False)}
    assert parse_strength("0.8").at(3, 4) == Strength.of(0.8)
    assert not OFF.acts
    assert parse_strength("0/1").acts
    assert not parse_strength("0/1[BASE=0]").acts


# ---------------------------------------------------------------------------------------------------------------------
# Tags

TAGS = [  # what stands between the colons after the name
    ("", "1"),
    ("0.8", "0.8"),
    ("0.4:0.8", "0.8/0.4"),  # the web UI's order
    ("te=0.5", "0.5"),  # there, the U-Net takes the text encoder's number
    ("1:te=0.5", "0.5"),
    ("unet=0.8", "0.8/1"),
    ("0.4:0.8:unet=0.2", "0.2/0.4"),
    ("1:lbw=OUTALL", "1[OUTALL]"),
    ("1:MIDD", "1[MIDD]"),
    (f"0.5:0.8:{ONES}", f"0.8/0.5[{ONES}]"),
    ("1:start=0.2:stop=0.7", "1@0.2-0.7"),
    ("1:stop=0.5", "1@0-0.5"),
    ("0.8/0.4[IN04=0.5]@0.2-0.7", "0.8/0.4[IN04=0.5]@0.2-0.7"),
]


@pytest.mark.parametrize(("arguments", "strength"), TAGS)
def test_tags(arguments, strength):
    parsed = parse_tag("style", arguments.split(":") if arguments else [])
    assert parsed == ("style", parse_strength(strength))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("x", "not a number"),
        ("1:1:64", "'64' is a third number; a rank that is cut when it is used (dyn)"),
        ("1:dyn=64", "(dyn) is not known here"),
        ("1:lwb=ALL", "there is no lwb=; did you mean lbw=?"),
        ("1:colour=1", "there is no colour=; known are te, unet, lbw, start, stop"),
        ("te=1:te=1", "te= is given twice"),
        ("1:ALL:lbw=MIDD", "blocks are given twice"),
        ("1[ALL]:lbw=MIDD", "blocks are given twice"),
        ("1:start=10", "start=10 counts steps; write a share of them, as in start=0.5"),
        ("1@0-0.5:stop=0.5", "a range of steps is given twice"),
        ("1:start=0.7:stop=0.5", "ends at 0.5, where it has not begun"),
    ],
)
def test_tags_that_are_refused(arguments, message):
    with pytest.raises(InputError) as problem:
        parse_tag("style", arguments.split(":"), "lyco", "prompts.txt:3")
    assert str(problem.value).startswith(f"<lyco:style:{arguments}> (prompts.txt:3): ")
    assert message in str(problem.value)


def test_a_tag_without_a_name():
    with pytest.raises(InputError, match="names no network; write <lora:NAME:STRENGTH>"):
        parse_tag(" ", ["1"])


# ---------------------------------------------------------------------------------------------------------------------
# In the layers

SD_LAYERS = {
    "conv_in": "IN00",
    "down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_q": "IN02",
    "down_blocks.0.downsamplers.0.conv": "IN03",
    "down_blocks.1.resnets.0.conv1": "IN04",
    "down_blocks.3.resnets.1.conv2": "IN11",
    "mid_block.attentions.0.transformer_blocks.0.attn2.to_k": "M00",
    "up_blocks.0.upsamplers.0.conv": "OUT02",
    "up_blocks.1.attentions.0.transformer_blocks.0.ff.net.2": "OUT03",
    "up_blocks.3.attentions.2.transformer_blocks.0.attn1.to_q": "OUT11",
    "time_embedding.linear_1": None,
    "conv_out": None,
}
XL_LAYERS = {
    "conv_in": "IN00",
    "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q": "IN04",
    "down_blocks.2.attentions.1.transformer_blocks.1.attn1.to_q": "IN08",
    "mid_block.resnets.1.conv1": "M00",
    "up_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q": "OUT00",
    "up_blocks.2.resnets.2.conv1": "OUT08",
    "add_embedding.linear_1": None,
    "conv_out": None,
}


@pytest.mark.parametrize(
    ("family_name", "layers", "count"), [("sd1", SD_LAYERS, 12), ("sdxl", XL_LAYERS, 9)], ids=["sd1", "sdxl"]
)
@torch.no_grad()
def test_each_layer_gets_the_factor_of_its_block(request, family_name, layers, count):
    """The original's numbers of blocks, by hand; merged weights are W + factor · alpha / rank · up @ down."""
    files = find(request.getfixturevalue(family_name))
    shapes, models = layer_shapes(files), load_all(files)
    texts = {text.kind.part: text.model for text in models.texts}
    encoder = "text_encoder"
    targets = [(UNET, path) for path in layers]
    targets.append((encoder, next(path for part, path in shapes if part == encoder and path.endswith("q_proj"))))
    generator, state, wanted, places = torch.Generator().manual_seed(0), {}, {}, {}
    factors = {block: 0.5 + place / 10 for place, block in enumerate(block_names(count))}
    listed = ",".join(str(factor) for factor in factors.values())
    for target in targets:
        shape = shapes[target]
        down = torch.randn(2, *shape[1:], generator=generator)
        up = torch.randn(shape[0], 2, *[1] * (len(shape) - 2), generator=generator)
        name = kohya_name(target, several=len(texts) > 1)
        state |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(1.0)}
        part = models.unet if target[0] == UNET else texts[target[0]]
        path = target[1] if target[0] == UNET or hasattr(part, "text_model") else target[1].removeprefix("text_model.")
        layer = part.get_submodule(path)
        block = layers[target[1]] if target[0] == UNET else "BASE"
        factor = (0.4 if target[0] != UNET else 0.8) * (1 if block is None else factors[block])
        product = (up.flatten(1) @ down.flatten(1)).reshape(shape)
        wanted[target], places[target] = layer.weight + factor * 0.5 * product, layer
    text_encoders = [text.model for text in models.texts]
    network = LoraNetwork(text_encoders, models.unet, parse_strength(f"0.8/0.4[{listed}]"))
    network.load_state_dict(state)
    merge_together([network])
    for target, weight in wanted.items():
        torch.testing.assert_close(places[target].weight.data, weight.data, msg=lambda text, t=target: f"{t}: {text}")


def change(rank: int, seed: int, layer: nn.Linear, multiplier: float) -> LayerChange:
    generator = torch.Generator().manual_seed(seed)
    parts = {
        "lora_down": torch.randn(rank, layer.in_features, generator=generator),
        "lora_up": torch.randn(layer.out_features, rank, generator=generator),
    }
    return LayerChange(LORA, parts, multiplier)


@torch.no_grad()
def test_networks_that_do_not_act_cost_and_change_nothing():
    """One of many is bit for bit that one alone; with none, nothing is called."""
    alone, among, x = nn.Linear(8, 8), nn.Linear(8, 8), torch.randn(5, 8)
    among.load_state_dict(alone.state_dict())
    adapter_of(alone).add(change(4, 3, alone, 0.7), folded=False)
    changes = [change(4, place, among, 0.0) for place in range(6)]
    for each in changes:
        adapter_of(among).add(each, folded=False)
    assert not among._forward_hooks
    changes[3].multiplier = 0.7
    adapter_of(among).update()
    assert torch.equal(among(x), alone(x))
    changes[3].multiplier = 0.0
    adapter_of(among).update()
    assert not among._forward_hooks
    folded = nn.Linear(8, 8)
    weight = folded.weight
    one = change(4, 1, folded, 0.0)
    adapter_of(folded).add(one, folded=True)
    adapter_of(folded).fold()
    assert folded.weight is weight  # no other weights are put in place


@pytest.mark.parametrize("folded", [False, True])
@torch.no_grad()
def test_strengths_that_change_while_regions_hold(folded):
    """As they do at a step's end: what is gated follows, and is gone afterwards."""
    layer, x = nn.Linear(8, 8), torch.randn(5, 8)
    plain, one = layer(x), change(4, 1, layer, 0.0)
    adapter_of(layer).add(one, folded=folded)
    adapter_of(layer).fold()
    whole = x @ one.parts["lora_down"].T @ one.parts["lora_up"].T
    with adapter_of(layer).gated(lambda effect, networks: effect * 0.25, {one: 0}):
        for multiplier in (0.0, 0.5, 2.0, 0.0, 1.0):
            one.multiplier = multiplier
            adapter_of(layer).update()
            adapter_of(layer).fold()
            torch.testing.assert_close(layer(x), plain + 0.25 * multiplier * whole)
    torch.testing.assert_close(layer(x), plain + whole)


@torch.no_grad()
def test_compiled_layers_follow_whatever_acts():
    """Dynamo notes no hooks that come or go; with shapes kept there are none that do."""
    plain, compiled, x = nn.Linear(8, 8), nn.Linear(8, 8), torch.randn(5, 8)
    compiled.load_state_dict(plain.state_dict())
    pairs = [[change(rank, rank, layer, 0.0) for rank in (2, 4)] for layer in (plain, compiled)]
    for layer, its in zip((plain, compiled), pairs):
        for each in its:
            adapter_of(layer).add(each, folded=False)
    adapter_of(compiled).keep_shapes()
    torch._dynamo.reset()
    counter = CompileCounter()
    run = torch.compile(compiled, backend=counter, dynamic=False)
    for step, multipliers in enumerate([(0, 0), (1, 0), (0, 0.5), (0, 0), (1, 0.5), (0, 2)]):
        for its in pairs:
            for each, multiplier in zip(its, multipliers):
                each.multiplier = multiplier
        for layer in (plain, compiled):
            adapter_of(layer).update()
        torch.testing.assert_close(run(x), plain(x))
        # room for the widest is there from the start; both together need more, once
        assert counter.frame_count == (1 if step < 4 else 2), multipliers


# ---------------------------------------------------------------------------------------------------------------------
# On the command line


@pytest.fixture(scope="session")
def files(sd1, tmp_path_factory):
    folder, layers = tmp_path_factory.mktemp("strengths"), layer_shapes(find(sd1))
    save_file(random_lora(layers, 4, alpha=2, convolutions=True, seed=1), folder / "style.safetensors")
    save_file(random_loha(layers), folder / "loha.safetensors")
    return {name: folder / f"{name}.safetensors" for name in ("style", "loha")}


def test_parts_are_weighed_alike_in_every_mode(sd1, files, generate):
    said = ("0.8/-0.4[IN04=0.2,OUT03=2]", "0.5/1[OUTALL]")
    options = ("--prompt", "a cat --d 1", *networks(*files.values(), mul=said))
    pictures = generate(sd1.folder, *options).pictures
    whole = generate(sd1.folder, "--prompt", "a cat --d 1", *networks(*files.values(), mul=(0.8, 0.5))).pictures
    assert not same(whole, pictures)
    for mode in (["--network_merge"], ["--network_pre_calc"]):
        assert same(pictures, generate(sd1.folder, *options, *mode).pictures), mode


def test_a_part_by_itself(sd1, files, generate, tmp_path):
    """`1/0` is a file without its layers of the text encoder, `0/1` one without the U-Net's; told in the metadata."""
    state = load_file(files["style"])
    for said, prefix in (("1/0", "lora_unet_"), ("0/1", "lora_te_"), ("1[BASE=0]", "lora_unet_")):
        part = tmp_path / f"{prefix}.safetensors"
        save_file({key: value for key, value in state.items() if key.startswith(prefix)}, part)
        prompt = ("--prompt", f"a cat --d 1 --am {said}")
        by_part = generate(sd1.folder, *prompt, *networks(files["style"]), "--json", outdir=tmp_path / prefix)
        wanted = generate(sd1.folder, "--prompt", "a cat --d 1", *networks(part)).pictures
        assert (by_part.pictures[0] == wanted[0]).all()
        assert Image.open(by_part.files[0]).info["networks"] == f"style: {said}"
        assert json.loads(by_part.stdout.splitlines()[-1])["networks"][0]["multiplier"] == said
        for file in by_part.files:
            file.unlink()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--network_mul", "1@0-0.5", "--network_merge"],
         "--network_mul 1@0-0.5: a range of steps is for networks that are not merged"),
        (["--network_mul", "1/x"], "--network_mul 1/x: not a number"),
        (["--network_mul", "1[1,1,1,1,1,1,1,1,1,1,1,1]"],
         "12 factors of blocks are for another family's; give 17 or 26, or name blocks"),
    ],
)  # fmt: skip
def test_options_that_are_refused(sd1, files, generate, options, message):
    assert message in refused(generate, sd1.folder, *networks(files["style"]), *options)


def test_blocks_that_xl_lacks(sdxl, generate, tmp_path):
    save_file(random_lora(layer_shapes(find(sdxl)), 2, alpha=1, convolutions=False, seed=1), tmp_path / "x.safetensors")
    for said, message in (
        ("1[IN09=0]", "this model has no block IN09; it has BASE, IN00 to IN08, M00, OUT00 to OUT08"),
        (f"1[{ONES}]", "17 factors of blocks are for another family's; give 12 or 20"),
        ("1[MIDD]", "the preset MIDD is for the blocks of SD 1.x and 2.x; name blocks"),
    ):
        (tmp_path / "p.txt").write_text(f"a --am {said}\n")
        options = ("--from_file", tmp_path / "p.txt", *networks(tmp_path / "x.safetensors"))
        result = generate(sdxl.folder, *options)
        assert result.status == 2
        assert result.stderr.startswith(f"error: --am {said} ({tmp_path}/p.txt:1): {message}"), result.stderr


def test_other_modules_take_a_number(sd1, files, generate):
    module = ("--network_module", "lycoris.kohya", "--network_weights", files["style"])
    line = refused(generate, sd1.folder, *module, "--network_mul", "1/0.5")
    assert "--network_mul 1/0.5: lycoris.kohya takes one number for all layers" in line
    assert generate(sd1.folder, "--prompt", "a", *module, "--network_mul", "1@0-0.5", "--dry_run").status == 0


# ---------------------------------------------------------------------------------------------------------------------
# Steps


@pytest.mark.parametrize("name", ["style", "loha"])
def test_a_network_acts_in_its_steps_alone(sd1, files, generate, name):
    """Its text part counts in all steps, its part for the U-Net between the shares that are given, of four steps."""
    drawn = {}
    for mul in ("0.8/0", "0.8/0@0-0.5", "0.8/0@0.5-1", "0.8/0@0.9-1", "0"):
        result = generate(
            *(sd1.folder, "--W", 128, "--H", 128, "--steps", 4, "--prompt", "a cat --n fog --d 1"),
            *networks(files[name], mul=[mul]),
        )
        assert result.status == 0, result.stderr
        drawn[mul] = result.pictures[0]
    assert np.array_equal(drawn["0"], drawn["0.8/0@0.9-1"])  # the last step begins at three quarters
    assert len({picture.tobytes() for picture in drawn.values()}) == 4
