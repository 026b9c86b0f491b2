"""Runs that Ray draws: the pictures of one process, whatever befalls workers and nodes."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest
import ray
from child_runs import contents
from conftest import pictures_in
from PIL import Image
from ray.cluster_utils import Cluster

DEMO = Path(__file__).resolve().parent.parent / "examples" / "shapes"
SMALL = ("--W", 64, "--H", 64, "--steps", 2, "--sequential_file_name")


@pytest.fixture(scope="module")
def hub(tmp_path_factory) -> Path:
    """A cache of the Hub that one node shares with the driver, with the demo model in it."""
    cache = tmp_path_factory.mktemp("hub")
    shutil.copytree(DEMO, cache / "models--me--shapes" / "snapshots" / "1")
    return cache


@pytest.fixture(scope="module")
def cluster(hub) -> Iterator[Cluster]:
    """Three nodes of one core each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("PYTHONPATH", str(Path(__file__).parent))  # where the nodes find a module that ends workers
        patch.setenv("HF_HUB_OFFLINE", "1")
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        cluster.add_node(num_cpus=1)
        cluster.add_node(num_cpus=1, env_vars={"HF_HUB_CACHE": str(hub)})
        yield cluster
        ray.shutdown()
        cluster.shutdown()


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("prompts") / "sixty.txt"
    shapes = [f"a {colour} {shape}" for colour in ("red", "blue", "green") for shape in ("circle", "square")]
    file.write_text("".join(f"{shapes[n % 6]} --d {n}\n" for n in range(60)))
    return file


@pytest.fixture(scope="module")
def alone(prompts, tmp_path_factory) -> dict[str, bytes]:
    """The sixty pictures of one process."""
    import gen_img_diffusers

    out = tmp_path_factory.mktemp("alone") / "out"
    options = ("--ckpt", DEMO, "--from_file", prompts, *SMALL, "--outdir", out, "--quiet")
    assert gen_img_diffusers.main([str(option) for option in options]) == 0
    return contents(out)


def workers(at: bytes = b"") -> list[int]:
    """The processes of workers, or of those that are at one of their methods."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if (process / "cmdline").read_bytes().startswith(b"ray::Worker" + at):
                found.append(int(process.name))
    return found


def kill_one() -> None:
    """Kill a worker in the middle of a batch."""
    while not (found := workers(b".draw")):
        time.sleep(0.01)
    os.kill(found[0], signal.SIGKILL)


@contextmanager
def beside(folder: Path, pictures: int, do: Callable[[], None]) -> Iterator[list[bool]]:
    """A block beside which something is done once so many pictures stand; gives a list that tells of it."""
    over, done = threading.Event(), []

    def watch() -> None:
        while not over.wait(0.02):
            if len(list(folder.glob("*.png"))) >= pictures:
                do()
                done.append(True)
                return

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield done
    finally:
        over.set()
        thread.join()


@pytest.fixture
def on_cluster(cluster, generate):
    def run(*options: object, outdir: Path, workers: int = 3, ckpt: Path = DEMO):
        return generate(ckpt, *SMALL, "--ray", cluster.address, "--ray_workers", workers, *options, outdir=outdir)

    return run


@contextmanager
def driver(cluster: Cluster, *options: object, outdir: Path) -> Iterator[subprocess.Popen]:
    """The program as a process, which draws on the cluster with as many workers as have room."""
    argv = [sys.executable, "gen_img_diffusers.py", "--ckpt", DEMO, *SMALL, "--outdir", outdir, *options]
    argv += ["--ray", cluster.address, "--ray_cpus", 1]
    process = subprocess.Popen([str(each) for each in argv], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def wait_for(pictures: int, outdir: Path, process: subprocess.Popen) -> None:
    while len(list(outdir.glob("*.png"))) < pictures:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)


def test_sixty_pictures_of_three_nodes_are_those_of_one_process(on_cluster, prompts, alone, tmp_path):
    result = on_cluster("--from_file", prompts, "--json", outdir=tmp_path / "out")
    assert result.status == 0, result.stderr
    assert contents(tmp_path / "out") == alone
    told = [json.loads(line) for line in result.stdout.splitlines()]
    assert sorted(each["file"] for each in told) == [str(path) for path in pictures_in(tmp_path / "out")]
    assert len({each["node"] for each in told}) == 3
    assert re.search(r"^60/60 images, .* 3 workers, ", result.stderr, re.MULTILINE)


def test_a_node_that_lacks_the_model_is_named_and_left_out_or_sent_it(on_cluster, hub, prompts, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(hub))
    model = hub / "models--me--shapes" / "snapshots" / "1"
    prompt = ("--prompt", "a red circle", "--images_per_prompt", 6, "--seed", 1)
    left_out = on_cluster(*prompt, ckpt=model, outdir=tmp_path / "left_out", workers=1)
    assert left_out.status == 0, left_out.stderr
    named = re.findall(r"^warning: node (.*) is left out: .* is not there; put the same there", left_out.stderr, re.M)
    assert len(set(named)) == 2
    sent = on_cluster(*prompt, "--ray_ship", "--json", ckpt=model, outdir=tmp_path / "sent")
    assert sent.status == 0, sent.stderr
    assert "left out" not in sent.stderr
    assert {json.loads(line)["node"] for line in sent.stdout.splitlines()} & set(named)
    assert contents(tmp_path / "sent") == contents(tmp_path / "left_out")
    assert not list(Path(tempfile.gettempdir()).glob("gen_img_diffusers-*"))  # taken away again


def test_a_killed_worker_leaves_no_trace_in_the_pictures(on_cluster, prompts, alone, tmp_path):
    with beside(tmp_path / "out", 10, kill_one) as killed:
        result = on_cluster("--from_file", prompts, outdir=tmp_path / "out")
    assert killed
    assert result.status == 0, result.stderr
    assert contents(tmp_path / "out") == alone
    reason = "its process (?:or its node )?ended"  # it may end before Ray knows
    lost = re.findall(rf"^warning: worker \d lost on node .*: {reason}; .* drawn again$", result.stderr, re.MULTILINE)
    assert len(lost) == 1, result.stderr


def test_nodes_come_and_go(cluster, prompts, alone, tmp_path):
    out = tmp_path / "out"
    with driver(cluster, "--from_file", prompts, "--json", outdir=out) as process:
        wait_for(6, out, process)
        cluster.remove_node(next(iter(cluster.worker_nodes)), allow_graceful=False)
        others = workers()
        for other in others:
            with suppress(ProcessLookupError):  # that of the node
                os.kill(other, signal.SIGSTOP)
        added = cluster.add_node(num_cpus=1)
        wait_for(len(contents(out)) + 12, out, process)  # more than was under way
        for other in others:
            with suppress(ProcessLookupError):
                os.kill(other, signal.SIGCONT)
        told, said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert contents(out) == alone
    nodes = [json.loads(line)["node"] for line in told.splitlines()]
    assert any(added.node_id[:8] in node for node in nodes), said
    assert re.search(
        r"^warning: worker \d lost on node .*: its (node is gone|process or its node ended)", said, re.M
    ), said


def test_a_killed_driver_is_resumed_without_ray(cluster, generate, prompts, alone, tmp_path):
    out = tmp_path / "out"
    with driver(cluster, "--from_file", prompts, outdir=out) as process:
        wait_for(20, out, process)
        process.kill()
    assert len(contents(out)) < 60
    assert generate(DEMO, *SMALL, "--from_file", prompts, "--resume", outdir=out).status == 0
    assert contents(out) == alone


def test_a_picture_that_ends_workers_is_found_and_left_out(on_cluster, generate, prompts, alone, tmp_path):
    """It stands in a batch of two, which is halved after it has ended three workers."""
    out, poison = tmp_path / "out", tmp_path / "poison.png"
    poison.write_bytes(alone["im_000004.png"])
    command = ("--from_file", prompts, "--batch_size", 2, "--upscale", 1.5)
    command += ("--highres_fix_upscaler", "ends_workers", "--highres_fix_upscaler_args", f"poison={poison}")
    result = on_cluster(*command, outdir=out)
    assert result.status == 3, result.stderr
    assert len(contents(out)) == 59
    assert "a batch of 2 pictures ended 3 workers; drawing 1 at a time" in result.stderr
    assert re.search(r"^error: im_000004.png .*: ended 3 workers that drew it", result.stderr, re.MULTILINE)
    assert "59 pictures made" in result.stderr
    poison.unlink()
    assert on_cluster(*command, "--resume", outdir=out).status == 0
    assert generate(DEMO, *SMALL, *command, outdir=tmp_path / "one").status == 0
    for ours, expected in zip(pictures_in(out), pictures_in(tmp_path / "one"), strict=True):
        assert ours.name == expected.name
        # other batches round otherwise
        assert np.abs(np.asarray(Image.open(ours), int) - np.asarray(Image.open(expected), int)).max() <= 1
