"""The U-Net called for two halves of its rows at once, each on half of the cores."""

import signal
import threading
import time
from collections.abc import Callable

import numpy as np
import pytest
import torch
from conftest import Generate, Models
from test_control_net import write_control_net
from test_guidance import clip_folder  # noqa: F401  # a fixture
from test_networks import LYCORIS, loaded, write_lycoris_file  # noqa: F401  # one is a fixture
from test_regional_networks import write_network
from test_regions import write_map
from test_speed import CPU, TOLERANCE, make_u_net
from test_xl_features import lllite  # noqa: F401  # a fixture

from library.draw import unet_call
from library.draw.attention import keep_text
from library.draw.text_conditions import TextConditions
from library.machine import at_once as at_once_module
from library.machine.at_once import at_once, can_halve_cores, pieces_at_once
from library.machine.fused_blocks import fuse_blocks
from library.machine.packed_layers import PackedForward, can_pack, pack_layers
from library.settings.computing import Computing


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def halved(monkeypatch, two_threads) -> list[int]:
    """Any U-Net is worth halving, on any machine; gives what is filled with a 1 for each time that one is halved."""
    times: list[int] = []

    def counted(first: Callable, second: Callable) -> tuple:
        times.append(1)
        return at_once(first, second)

    monkeypatch.setattr(unet_call, "_WORTH_HALVING", 0)
    monkeypatch.setattr(unet_call, "can_halve_cores", lambda: True)
    monkeypatch.setattr(unet_call, "at_once", counted)
    return times


class Lasting:
    """Work that lasts, and tells how it ends."""

    def __init__(self) -> None:
        self.begun = threading.Event()

    def __call__(self, ends: list[str]) -> None:
        self.begun.set()
        try:
            for _ in range(3000):  # half a minute
                time.sleep(0.01)
            ends.append("by itself")
        except SystemExit:
            ends.append("ended")
            raise


@pytest.mark.parametrize("inference", [True, False])
def test_both_are_done_each_on_half_of_the_cores(two_threads, inference):
    meeting = threading.Barrier(2, timeout=30)  # which neither passes alone

    def work(name: str) -> tuple:
        meeting.wait()
        state = torch.is_inference_mode_enabled(), torch.is_grad_enabled()
        return name, torch.get_num_threads(), pieces_at_once(), *state, threading.current_thread()

    with torch.inference_mode() if inference else torch.no_grad():
        *first, own = (both := at_once(lambda: work("a"), lambda: work("b")))[0]
        *second, others = both[1]
    assert first == ["a", 1, 2, inference, False] and second == ["b", 1, 2, inference, False]
    assert own is threading.current_thread() is not others
    assert torch.get_num_threads() == 2 and pieces_at_once() == 1


def test_what_the_second_raises_is_raised(two_threads):
    with pytest.raises(ZeroDivisionError):
        at_once(lambda: 1, lambda: 1 // 0)
    assert torch.get_num_threads() == 2 and pieces_at_once() == 1


@pytest.mark.parametrize("problem", [KeyboardInterrupt, MemoryError])
def test_what_ends_the_first_ends_the_second(two_threads, problem):
    second, ends = Lasting(), []

    def first() -> None:
        second.begun.wait(30)
        raise problem

    with pytest.raises(problem):
        at_once(first, lambda: second(ends))
    assert ends == ["ended"] and torch.get_num_threads() == 2 and pieces_at_once() == 1


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="signals by a timer are Unix's")
def test_an_interruption_of_the_wait_ends_the_second(two_threads):
    second, ends = Lasting(), []

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            at_once(lambda: signal.setitimer(signal.ITIMER_REAL, 0.3), lambda: second(ends))
    finally:
        signal.signal(signal.SIGALRM, before)
    assert ends == ["ended"] and torch.get_num_threads() == 2 and pieces_at_once() == 1


def test_without_a_thread_the_second_comes_after_the_first(two_threads, monkeypatch):
    def start(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    def work(done: list[str] = []) -> tuple:  # noqa: B006
        done.append("done")
        return len(done), torch.get_num_threads(), pieces_at_once()

    monkeypatch.setattr(threading.Thread, "start", start)
    assert at_once(work, work) == ((1, 1, 2), (2, 1, 2))
    assert torch.get_num_threads() == 2 and pieces_at_once() == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_single_row_is_the_same_whatever_was_first(dtype):
    """What the U-Net is told of time is one row in a half, and in a picture without guidance."""
    if not can_pack(CPU, dtype):
        pytest.skip("weights are not packed here")
    torch.manual_seed(0)
    layer, row = torch.nn.Linear(1280, 640).to(dtype).requires_grad_(False), torch.randn(1, 1280).to(dtype)
    given = []
    for first in (1, 2, 4):
        packed = PackedForward(layer, keep=True)
        packed(row.expand(first, -1).contiguous())
        given.append(packed(row))
    assert torch.equal(given[0], given[1]) and torch.equal(given[0], given[2])


@pytest.mark.parametrize(("compiles", "in_threads"), [(True, True), (False, False)])
def test_what_is_not_ready_for_threads_is_called_directly(halved, compiles, in_threads):
    unet = make_u_net(torch.float32, linear=True)
    computing = Computing(compile=compiles)
    call = unet_call.steady_call(unet, computing, lambda: 0, in_threads=in_threads)
    with torch.no_grad():
        call(torch.randn(2, 4, 8, 8), torch.tensor(5), keep_text(TextConditions(torch.randn(2, 7, 16)), unet), {})
    assert not halved


@pytest.mark.parametrize(("threads", "free", "can"), [(2, 2, True), (2, 4, True), (2, 1, False), (1, 2, False)])
def test_cores_that_can_be_halved(monkeypatch, two_threads, threads, free, can):
    """One that OpenMP has bound to a core has that one alone, whatever the number of threads."""
    monkeypatch.setattr(at_once_module.os, "sched_getaffinity", lambda _: set(range(free)), raising=False)
    torch.set_num_threads(threads)
    assert can_halve_cores() == can


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("steered", [True, False])
def test_halves_give_what_all_rows_give(halved, dtype, steered):
    if not can_pack(CPU, dtype):
        pytest.skip("weights are not packed here")
    plain, unet = (make_u_net(dtype, linear=True) for _ in range(2))
    pack_layers(unet)
    fuse_blocks(unet)
    call = unet_call.in_halves(unet)
    for size in (12, 9):  # an odd one is enlarged another way
        rows, told = torch.randn(4, 4, size, size).to(dtype), TextConditions(torch.randn(4, 7, 16).to(dtype))
        residuals = {}
        if steered:
            down = [(4, 32, size, size), (4, 32, size, size), (4, 32, -(-size // 2), -(-size // 2))]
            down += [(4, 64, -(-size // 2), -(-size // 2))]
            residuals = {
                "down_block_additional_residuals": [torch.randn(shape).to(dtype) for shape in down],
                "mid_block_additional_residual": torch.randn(down[-1]).to(dtype),
            }
        with torch.no_grad():
            expected = unet_call.direct(plain)(rows, torch.tensor(500), keep_text(told, plain), residuals)
            got = call(rows, torch.tensor(500), keep_text(told, unet), residuals)
            again = call(rows, torch.tensor(500), keep_text(told, unet), residuals)
        assert (got - expected).norm() < TOLERANCE[dtype]["rtol"] * expected.norm()
        assert torch.equal(got, again)  # the first call, which packs, too
    assert len(halved) == 4


def test_odd_rows_and_small_pictures_are_not_halved(halved, monkeypatch):
    unet = make_u_net(torch.float32, linear=True)
    call = unet_call.in_halves(unet)
    told = keep_text(TextConditions(torch.randn(3, 7, 16)), unet)
    with torch.no_grad():
        assert len(call(torch.randn(3, 4, 8, 8), torch.tensor(500), told, {})) == 3
        monkeypatch.setattr(unet_call, "_WORTH_HALVING", 5e12)
        told = keep_text(TextConditions(torch.randn(2, 7, 16)), unet)
        assert len(call(torch.randn(2, 4, 8, 8), torch.tensor(500), told, {})) == 2
    assert not halved


PROMPT = "a cat --n fog --d 1"


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_pictures_are_the_same(request, halved, generate: Generate, tmp_path, monkeypatch, family):
    """With a network beside and a ControlNet, whatever was drawn before."""
    models: Models = request.getfixturevalue(family)
    (tmp_path / "net").mkdir()
    net = write_control_net(tmp_path / "net", models, 1) / "bare.safetensors"
    lora = write_network(tmp_path / "a.safetensors", models, "lora", 1)
    (tmp_path / "prompts.txt").write_text(f"{PROMPT}\n{PROMPT}\na dog --n fog --d 2\n")
    options = ["--from_file", tmp_path / "prompts.txt", "--W", 128, "--H", 128, "--network_weights", lora]
    options += ["--control_net_models", net, "--guide_image_path", write_map(tmp_path / "g.png", (255, 0, 0))]
    first, second, third = generate(models.folder, *options).pictures
    assert len(halved) == 6 and np.array_equal(first, second) and not np.array_equal(first, third)
    monkeypatch.setattr(unet_call, "can_halve_cores", lambda: False)
    plain, _, _ = generate(models.folder, *options).pictures
    assert len(halved) == 6 and np.abs(plain.astype(int) - first).max() <= 1  # float32, in another order


@pytest.mark.parametrize(
    "options",
    [
        ["--negative_scale", "0.5"],
        ["--scale", "1"],
        ["--ds_depth_1", "1"],
        ["--mask_path", "{map}", "--prompt", "a cat AND a dog --n fog"],
        ["--network_module", "lycoris.kohya", "--network_weights", "{lycoris}"],
    ],
)
def test_what_is_not_halved(halved, sd1, loaded, generate: Generate, tmp_path, options):  # noqa: F811
    write_lycoris_file(loaded, tmp_path / "x.safetensors", **LYCORIS["LoCon"])
    places = {"{map}": write_map(tmp_path / "m.png", (255, 0, 0), (0, 255, 0)), "{lycoris}": tmp_path / "x.safetensors"}
    result = generate(sd1.folder, "--prompt", PROMPT, *(places.get(option, option) for option in options))
    assert result.status == 0 and len(result.pictures) == 1 and not halved


def test_guidance_and_lllites_are_not_halved(halved, sd1, sdxl, clip_folder, lllite, generate: Generate, tmp_path):  # noqa: F811
    guided = generate(sd1.folder, "--prompt", PROMPT, "--clip_model", clip_folder, "--clip_guidance_scale", 10)
    guide = write_map(tmp_path / "g.png", (255, 0, 0))
    options = ["--control_net_lllite_models", lllite[0], "--guide_image_path", guide]
    steered = generate(sdxl.folder, "--prompt", PROMPT, *options)
    assert len(guided.pictures) == len(steered.pictures) == 1 and not halved, guided.stderr + steered.stderr
