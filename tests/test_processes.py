"""Several processes that share a run: the same pictures as one, and each survives the others."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from itertools import chain
from pathlib import Path

import pytest
from child_runs import contents, kill_at, start
from conftest import pictures_in

from library.run.processes import Team


def in_two_processes(models: Path, *options: object, outdir: Path, prepare=(None, None)) -> tuple[list[int], list[str]]:
    """Run the program in two processes, as a launcher would; gives their exit codes and outputs."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def join(rank: int):
        def prepared() -> None:
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            os.environ.update({name: str(value) for name, value in place.items()})
            if prepare[rank]:
                prepare[rank]()

        return prepared

    outputs = [outdir.with_name(f"{outdir.name}-{rank}.txt") for rank in range(2)]
    children = [start(models, *options, outdir=outdir, prepare=join(rank), output=outputs[rank]) for rank in range(2)]
    ended = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    return ended, [output.read_text() for output in outputs]


@pytest.fixture
def command(sd1):
    return (sd1.folder, "--prompt", "a cat", "--images_per_prompt", 7, "--sequential_file_name")


def test_two_processes_make_what_one_makes(command, generate, tmp_path):
    command = (*command, "--seed", 5)
    generate(*command, outdir=tmp_path / "one")
    ended, (first, second) = in_two_processes(*command, outdir=tmp_path / "two")
    assert ended == [0, 0]
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
    paths = [[line for line in text.splitlines() if line.startswith(str(tmp_path))] for text in (first, second)]
    assert [len(each) for each in paths] == [4, 3]
    assert sorted(chain(*paths)) == [str(path) for path in pictures_in(tmp_path / "two")]
    # one progress and one summary
    assert "7/7 images" in first
    assert re.search("^7 pictures made in", first, re.MULTILINE)
    assert second.splitlines() == paths[1]


def test_without_a_seed_all_follow_one_plan(sd1, tmp_path):
    out = tmp_path / "out"
    ended, _ = in_two_processes(sd1.folder, "--prompt", "{a|b|c} cat", "--images_per_prompt", 5, outdir=out)
    assert ended == [0, 0]
    names = [re.fullmatch(r"im_(\d{14})_(\d{3})_(\d+)\.png", name).groups() for name in contents(out)]
    assert len({time for time, _, _ in names}) == 1
    assert [number for _, number, _ in names] == ["000", "001", "002", "003", "004"]
    assert len({seed for _, _, seed in names}) == 5


@pytest.mark.parametrize(("victim", "survivor"), [(1, 0), (0, 1)])
def test_one_that_dies_leaves_the_other_at_work(command, generate, tmp_path, victim, survivor):
    command = (*command, "--seed", 5)
    generate(*command, outdir=tmp_path / "one")
    out = tmp_path / "two"
    prepare = [None, None]
    prepare[victim] = kill_at(os, "link", 2, after=True)
    ended, outputs = in_two_processes(*command, outdir=out, prepare=prepare)
    assert ended[victim] == -signal.SIGKILL
    shares = {0: 4, 1: 3}
    assert len([line for line in outputs[survivor].splitlines() if line.startswith(str(out))]) == shares[survivor]
    if survivor == 0:
        assert ended[0] == 3
        made = len(contents(out))
        assert made in (5, 6)  # the picture at which it died may be noted or not
        (listed,) = out.glob("failed_*.txt")
        lines = [line for line in listed.read_text().splitlines() if not line.startswith("#")]
        assert len(lines) in (7 - made, 7 - made + 1)
    assert generate(*command, "--resume", outdir=out).status == 0
    assert contents(out) == contents(tmp_path / "one")


def test_what_was_cut_off_is_finished_by_any_number(command, generate, tmp_path):
    command = (*command, "--seed", 5)
    generate(*command, outdir=tmp_path / "one")
    out = tmp_path / "two"
    child = start(*command, outdir=out, prepare=kill_at(os, "link", 3, after=True))
    os.waitpid(child, 0)
    ended, (first, _) = in_two_processes(*command, "--resume", outdir=out)
    assert ended == [0, 0]
    assert contents(out) == contents(tmp_path / "one")
    assert "there before" in first


def test_a_refusal_is_said_once(command, tmp_path):
    ended, (first, second) = in_two_processes(*command, "--clip_skip", 99, outdir=tmp_path / "out")
    assert ended == [2, 0]
    assert first.count("error: ") == 1
    assert second == ""


def test_a_dry_run_is_shown_once(command, tmp_path):
    ended, (first, second) = in_two_processes(*command, "--dry_run", outdir=tmp_path / "out")
    assert ended == [0, 0]
    assert first.count("a cat") == 7
    assert second == ""


def test_the_loop_is_for_one_process(sd1, tmp_path):
    ended, (first, second) = in_two_processes(sd1.folder, "--interactive", outdir=tmp_path / "out")
    assert ended == [2, 0]
    assert "--interactive: is for one process" in first
    assert second == ""


def test_places_from_the_environment():
    assert Team.from_environment({}) == Team()
    assert Team.from_environment({"RANK": "x", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}) == Team()
    team = Team.from_environment({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"})
    assert (team.rank, team.size, team.local_rank, team.is_first) == (3, 4, 1, False)
    shares = [Team(rank, 3).share(range(10)) for rank in range(3)]
    assert sorted(chain(*shares)) == list(range(10))


def workers(outdir: Path) -> dict[int, dict[str, int]]:
    """The processes of a launched run: the launched ones by rank, and the ones at work below them."""
    found: dict[int, tuple[int, int]] = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes()
            environment = dict(
                pair.split(b"=", 1) for pair in (process / "environ").read_bytes().split(b"\0") if b"=" in pair
            )
            parent = int((process / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        if str(outdir).encode() in command and b"RANK" in environment:
            found[int(process.name)] = (parent, int(environment[b"RANK"]))
    return {
        rank: {"launched": parent, "at work": number} for number, (parent, rank) in found.items() if parent in found
    }


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
def test_launched_by_accelerate_the_other_survives(sd1, tmp_path):
    """torchrun, below accelerate, stops all its processes when one is lost."""
    out = tmp_path / "out"
    argv = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    argv += ["--main_process_port", "0", "gen_img_diffusers.py", "--ckpt", sd1.folder, "--outdir", out, "--W", "64"]
    argv += ["--H", "64", "--steps", "20", "--prompt", "a", "--images_per_prompt", "30", "--seed", "1"]
    launcher = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    launcher.stdout.readline()
    at_work = workers(out)
    assert sorted(at_work) == [0, 1]
    os.kill(at_work[1]["at work"], signal.SIGKILL)
    before = time.time()
    _, stderr = launcher.communicate(timeout=300)
    assert launcher.returncode != 0
    assert "process 1 of 2: was ended by signal 9" in stderr
    made = len(contents(out))
    assert 15 <= made < 30, (stderr, before)
    assert re.search(rf"^{made} pictures made in .*, {30 - made} failed$", stderr, re.MULTILINE)
