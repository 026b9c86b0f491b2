"""What makes it fast changes no picture: reordered weights, attention by products, reading ahead, compiling."""

import gc
import logging
import platform
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import torch._inductor.config
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.resnet import Upsample2D
from loading import load_one
from safetensors.torch import load_file, save_file

from library.draw.attention import use_kernel
from library.draw.text_conditions import TextConditions
from library.errors import InputError
from library.files.model_files import find_model
from library.machine import devices, fused_blocks, malloc
from library.machine.attention import sdpa
from library.machine.enlarging import enlarge_at_once
from library.machine.matmul_attention import matmul_attention
from library.machine.packed_layers import can_pack, pack_layers
from library.models.models import load_unet
from library.models.weight_reading import CastWeights, read_ahead

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parent.parent


def make_layers(dtype: torch.dtype) -> torch.nn.Sequential:
    torch.manual_seed(0)
    layers = torch.nn.Sequential(
        torch.nn.Conv2d(4, 32, 3, padding=1, bias=False),
        torch.nn.Conv2d(32, 64, 3, stride=2, padding=1),
        torch.nn.Conv2d(64, 48, 1),
        torch.nn.Conv2d(48, 48, 1, stride=2),
        torch.nn.Linear(4, 16),
    )
    return layers.to(dtype).requires_grad_(False)


# sums in another order; bfloat16 has 8 bits
TOLERANCE = {torch.float32: {"rtol": 1e-5, "atol": 1e-5}, torch.bfloat16: {"rtol": 2e-2, "atol": 2e-2}}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reordered_weights_give_the_same(dtype):
    pictures = [torch.randn(rows, 4, 16, 16).to(dtype) for rows in (2, 1, 5)]
    plain, packed, kept = (make_layers(dtype) for _ in range(3))
    if can_pack(CPU, dtype):
        pack_layers(packed)
        pack_layers(kept, keep=set(kept))
    for picture in pictures:
        torch.testing.assert_close(packed(picture), plain(picture), **TOLERANCE[dtype])
        assert torch.equal(packed(picture), kept(picture))
    assert packed[0].weight.shape == (32, 4, 3, 3)
    assert packed[0].weight.dtype == dtype


def test_only_the_reordered_weight_is_kept():
    layers = make_layers(torch.float32)
    kept = layers[0].weight.clone()
    pack_layers(layers, keep={layers[0]})
    layers(torch.randn(1, 4, 16, 16))
    assert torch.equal(layers[0].weight, kept)
    assert layers[1].weight.untyped_storage().nbytes() < 100
    layers[0].weight = torch.nn.Parameter(2 * kept, requires_grad=False)  # as networks do that are put into weights
    picture = torch.randn(1, 4, 16, 16)
    expected = F.conv2d(picture, 2 * kept, None, 1, 1)
    torch.testing.assert_close(layers[0](picture), expected, **TOLERANCE[torch.float32])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_enlarging_at_once_gives_the_same(dtype):
    plain, at_once = (make_enlarging(dtype) for _ in range(2))
    if can_pack(CPU, dtype):
        pack_layers(at_once, keep=enlarge_at_once(at_once))
    wanted = [None, None, (31, 16), None, (32, 32)]  # the U-Net tells the size where it was not halved evenly
    for rows, size in zip((2, 1, 2, 3, 1), wanted):
        picture = torch.randn(rows, 16, 16, 16).to(dtype).contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(at_once(picture, size), plain(picture, size), **TOLERANCE[dtype])


def test_enlarging_follows_what_becomes_of_its_convolution():
    block, picture = make_enlarging(torch.float32), torch.randn(1, 16, 8, 8)
    if can_pack(CPU, torch.bfloat16):
        assert enlarge_at_once(block) == {block.conv}
        assert enlarge_at_once(Upsample2D(16)) == set()  # has no convolution
    before = block(picture)
    adding_one = block.conv.register_forward_hook(lambda layer, inputs, output: output + 1)  # as networks beside it
    torch.testing.assert_close(block(picture), before + 1, **TOLERANCE[torch.float32])
    adding_one.remove()
    packed = block.conv.forward
    block.conv.forward = lambda x: packed(x) + 1  # as other people's networks, which may come to act at a later line
    torch.testing.assert_close(block(picture), before + 1, **TOLERANCE[torch.float32])
    block.conv.forward = packed  # left there when they act no more
    block.conv.weight = torch.nn.Parameter(2 * block.conv.weight, requires_grad=False)  # as networks put into it
    bias = block.conv.bias[:, None, None]
    torch.testing.assert_close(block(picture), 2 * (before - bias) + bias, **TOLERANCE[torch.float32])
    block.to(torch.bfloat16)  # as a VAE whose picture has values that are not numbers, the other way round
    assert block(picture.bfloat16()).dtype == torch.bfloat16


def make_enlarging(dtype: torch.dtype) -> Upsample2D:
    torch.manual_seed(0)
    return Upsample2D(16, use_conv=True).to(dtype).requires_grad_(False)


def test_what_others_have_taken_over_is_left_alone():
    layer = torch.nn.Linear(4, 4)
    layer.forward = taken = lambda x: x
    pack_layers(torch.nn.Sequential(layer))
    assert layer.forward is taken


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("linear", [True, False])
@pytest.mark.parametrize("steered", [True, False])
def test_fused_blocks_give_the_same(dtype, linear, steered):
    if not can_pack(CPU, dtype):
        return
    plain, fused = (make_u_net(dtype, linear) for _ in range(2))
    pack_layers(fused, keep=set(fused.modules()), parts=fused_blocks.feed_forward_parts(fused))
    fused_blocks.fuse_blocks(fused)
    inner = fused.mid_block.attentions[0].transformer_blocks[0]
    if steered:  # networks beside layers, which are seen at each call
        for model in (plain, fused):
            block, resnet = model.mid_block.attentions[0].transformer_blocks[0], model.mid_block.resnets[0]
            for layer in (block.attn1.to_out[0], block.ff.net[0].proj, resnet.conv2, model.mid_block.attentions[0]):
                layer.register_forward_hook(doubled)
    for size in (12, 8):
        sample, text = torch.randn(2, 4, size, size).to(dtype), TextConditions(torch.randn(2, 7, 16).to(dtype))
        with torch.no_grad():
            expected = plain(sample, 500, **text.unet_arguments()).sample
            got = fused(sample, 500, **text.unet_arguments()).sample
        assert (got - expected).norm() < TOLERANCE[dtype]["rtol"] * expected.norm()
    assert inner.ff.net[0].proj.forward.parts.number == 2 * inner.ff.net[2].forward.parts.number == 8


def doubled(layer: torch.nn.Module, inputs: object, output: torch.Tensor | tuple[torch.Tensor]) -> object:
    return (2 * output[0],) if isinstance(output, tuple) else 2 * output


def make_u_net(dtype: torch.dtype, linear: bool) -> UNet2DConditionModel:
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=4,
        norm_num_groups=8,
        use_linear_projection=linear,
    )
    use_kernel(unet, sdpa)
    return unet.to(dtype, memory_format=torch.channels_last).eval().requires_grad_(False)


@pytest.mark.parametrize("columns", [1, 77, 78, 80])
def test_attention_to_any_number_of_tokens(columns):
    """Which becomes a multiple of 16 in bfloat16."""
    query, key, value = (torch.randn(2, count, 3, 40) for count in (64, columns, columns))
    expected = sdpa(query, key, value)
    with torch.no_grad():  # with gradients it stays as it is
        got = sdpa(*(x.bfloat16() for x in (query, key, value)))
    assert (got - expected).norm() < 0.02 * expected.norm()  # bfloat16 has 8 bits


# Draws nothing, but asks for memory as drawing does: a block of 160 MB again and again
_SAME_SIZES = """
import resource
import numpy as np
from library.machine import malloc

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def resident_mb():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / 1e6

def use():
    before = faults()
    np.ones(20_000_000)
    return faults() - before

plain = [use() for _ in range(3)][-1]
with malloc.blocks_from_system():
    inside = [use() for _ in range(3)][-1]
kept = [use() for _ in range(3)][-1]
before = resident_mb()
malloc.give_back()
print(plain, inside, kept, before - resident_mb())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is about glibc's malloc alone")
def test_memory_is_kept_after_loading_and_given_back_when_asked_for():
    run = subprocess.run([sys.executable, "-c", _SAME_SIZES], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    plain, inside, kept, given_back_mb = map(float, run.stdout.split())
    # a fault for each page, of 4 KB or, where the system deals in large ones, of 2 MB
    assert min(plain, inside) > 60
    assert kept < 10
    assert given_back_mb > 100


def test_the_u_nets_memory_goes_back_before_each_decoding(sd1, generate, monkeypatch):
    given_back = []
    monkeypatch.setattr(malloc, "give_back", lambda: given_back.append(1))
    assert generate(sd1.folder, "--prompt", "a", "--images_per_prompt", 3, "--batch_size", 2).status == 0
    assert len(given_back) == 2


def attention_error(*inputs: torch.Tensor) -> float:
    """How far attention by products is from attention in float64, relative to its length."""
    expected = sdpa(*(x.double() for x in inputs))
    return ((matmul_attention(*inputs).double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("tokens, columns", [(64, 77), (1500, 1500), (3, 5)])
@pytest.mark.parametrize("spread", [1, 2, 4])  # of queries and keys; at 4 a row's scores are up to 200 apart
def test_attention_by_products(tokens, columns, spread):
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, count, 3, 40, generator=generator) for count in (tokens, columns, columns))
    wide = query * spread, key * spread + 5, value  # what all keys share changes no weight
    # sums in another order, and the sigmoid is a millionth less than exp
    assert attention_error(*wide) < 1e-5
    # bfloat16 has 8 bits: scores are rounded to it, which tells in the exponential function where they are large
    assert attention_error(*(x.bfloat16() for x in wide)) < (0.04 if spread == 4 else 0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_leaves_its_inputs_alone(dtype):
    """They are kept for all steps; with one head they are used where they lie."""
    inputs = [torch.randn(1, 1500, 1, 40).to(dtype) for _ in range(3)]
    before = [x.clone() for x in inputs]
    matmul_attention(*inputs)
    assert all(torch.equal(x, y) for x, y in zip(inputs, before))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens, size", [(4096, 40), (1600, 80)])
def test_attention_of_a_picture_does_not_depend_on_its_batch(dtype, tokens, size):
    query, key, value = (torch.randn(2, tokens, 2, size).to(dtype) for _ in range(3))
    both = matmul_attention(query, key, value)
    assert torch.equal(both[:1], matmul_attention(query[:1], key[:1], value[:1]))


def test_attention_of_a_head_is_its_own():
    """Scores that are too far apart in one head change nothing in the others."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 1500, 2, 40, generator=generator).bfloat16() for _ in range(3))
    alone = matmul_attention(query, key, value)[:, :, 1]
    query[:, :, 0] *= 100
    both = matmul_attention(query, key, value)
    assert torch.equal(both[:, :, 1], alone)
    assert both.isfinite().all()


def machine(dtype: torch.dtype) -> devices.Machine:
    return devices.Machine(CPU, dtype, channels_last=True)


def test_the_kernel_follows_the_machine(monkeypatch):
    for capabilities, dtype, expected in (
        ({"avx512_bf16": True, "amx_bf16": False}, torch.bfloat16, matmul_attention),
        ({"avx512_bf16": True, "amx_bf16": True}, torch.bfloat16, sdpa),
        ({"avx512_f": True, "amx_bf16": True}, torch.float32, matmul_attention),
        ({"avx2": True}, torch.float32, sdpa),
        ({}, torch.bfloat16, sdpa),
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda capabilities=capabilities: capabilities)
        assert devices.choose_attention(machine(dtype), xformers=False) is expected
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    assert devices.choose_attention(machine(torch.bfloat16), xformers=False, gradients=True) is sdpa


@pytest.mark.parametrize("layout", ["folder", "safetensors", "ckpt"])
def test_weights_read_ahead_are_the_same(sd1, layout):
    files = find_model(str(getattr(sd1, layout)), v2=False, v_parameterization=False, vae=None)
    plain = load_one(load_unet, files.unet, torch.bfloat16).state_dict()
    again = find_model(str(getattr(sd1, layout)), v2=False, v_parameterization=False, vae=None)
    weights = read_ahead(again, CPU, torch.bfloat16, channels_last=True)
    ahead = load_unet(again.unet, weights.unet).state_dict()
    assert plain.keys() == ahead.keys()
    assert all(torch.equal(plain[name], ahead[name]) for name in plain)


def test_whoever_waits_reads_what_is_not_begun(sd1):
    """One thread that is kept busy reads nothing: all that is asked for is read by the asker."""
    files = find_model(str(sd1.folder), v2=False, v_parameterization=False, vae=None)
    weights, plain = (CastWeights(files.unet.weights, CPU, torch.bfloat16) for _ in range(2))
    with ThreadPoolExecutor(1) as pool:
        busy = threading.Event()
        pool.submit(busy.wait)
        weights.begin(weights.shapes, pool)
        values = {name: weights.tensor(name) for name in weights.shapes}
        busy.set()
    assert all(torch.equal(value, plain.tensor(name)) for name, value in values.items())


def test_settings_for_loading_last_for_a_block_only():
    threads = torch.get_num_threads()
    with pytest.raises(ZeroDivisionError), devices.single_threaded(), devices.no_collection():
        assert torch.get_num_threads() == 1 and not gc.isenabled()
        raise ZeroDivisionError
    assert torch.get_num_threads() == threads and gc.isenabled()


def test_a_nan_read_ahead_is_named(sd1, tmp_path):
    state = load_file(sd1.safetensors)
    name = next(name for name in state if name.startswith("model.diffusion_model.") and name.endswith("weight"))
    state[name].view(-1)[0] = torch.nan
    save_file(state, tmp_path / "x.safetensors")
    files = find_model(str(tmp_path / "x.safetensors"), v2=False, v_parameterization=False, vae=None)
    with pytest.raises(InputError, match=f"{name}.*NaN"):
        load_unet(files.unet, read_ahead(files, CPU, torch.float32, channels_last=True).unet)


def test_compiled_pictures(two_levels, generate, monkeypatch, tmp_path):
    model = two_levels("sd1")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(torch._inductor.config, "compile_threads", 1)  # more are processes that import PyTorch first
    options = ("--prompt", "a cat --d 1", "--images_per_prompt", 2)
    plain = generate(model, *options).pictures
    compiled = generate(model, *options, "--compile")
    assert compiled.status == 0, compiled.stderr
    # fused operations round in other places
    assert max(np.abs(a - b).max() for a, b in zip(plain, compiled.pictures)) <= 1
    assert len(plain) == len(compiled.pictures) == 2
    assert any((tmp_path / "cache").rglob("*.so"))


def test_compiling_without_a_compiler(sd1, generate, monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CXX", "no-such-compiler")
    result = generate(sd1.folder, "--prompt", "a cat", "--compile")
    assert result.status == 2
    assert result.stderr.splitlines()[-1].startswith("error: --compile: needs a C++ compiler; install no-such-compiler")


@pytest.mark.parametrize("option", ["--compile", "--lowvram"])
def test_neither_goes_with_gradients(sd1, generate, option):
    result = generate(sd1.folder, "--prompt", "a cat", option, "--clip_guidance_scale", 100)
    assert result.status == 2
    assert f"{option}: does not go together with guidance" in result.stderr


def test_lowvram_on_a_cpu_changes_nothing(sd1, generate, caplog):
    plain = generate(sd1.folder, "--prompt", "a cat --d 1").pictures
    with caplog.at_level(logging.WARNING):
        low = generate(sd1.folder, "--prompt", "a cat --d 1", "--lowvram").pictures
    assert np.array_equal(plain, low)
    assert "--lowvram: there is no GPU here" in caplog.text


def test_lowvram_moves_models_away(monkeypatch):
    """`meta` stands for a GPU; what is on it has no values."""
    model = torch.nn.Linear(2, 2)
    moves = []
    monkeypatch.setattr(model, "to", moves.append)
    with pytest.raises(ZeroDivisionError), devices.on_device(model, torch.device("meta")):
        raise ZeroDivisionError
    assert moves == [torch.device("meta"), "cpu"]
