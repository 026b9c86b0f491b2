"""Several processes that share a run: the same pictures as one."""

import errno
import os
import re
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from itertools import chain
from pathlib import Path

import pytest
from child_runs import contents, kill_at, start
from conftest import pictures_in
from diffusers import UNet2DConditionModel

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


def test_what_fails_in_another_process_is_listed_by_the_first(command, tmp_path):
    def give_nan() -> None:
        real = UNet2DConditionModel.forward

        def broken(self, *arguments, **named):
            output = real(self, *arguments, **named)
            output.sample[:] = float("nan")
            return output

        UNet2DConditionModel.forward = broken

    out = tmp_path / "two"
    ended, (first, second) = in_two_processes(*command, "--seed", 5, outdir=out, prepare=(None, give_nan))
    assert ended == [3, 0]  # a launcher stops all once one ends otherwise: the first one does, when all is done
    assert second.count("the model gave NaN") == 3
    assert re.search("^4 pictures made in .*, 3 failed$", first, re.MULTILINE)
    (listed,) = out.glob("failed_*.txt")
    assert len(re.findall(r"--d \d+", listed.read_text())) == 3


def test_one_that_gives_up_does_not_keep_the_first_waiting(command, generate, tmp_path):
    def fill_disk() -> None:
        def full(*_: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        os.fsync = full

    out = tmp_path / "two"
    ended, (first, second) = in_two_processes(*command, "--seed", 5, outdir=out, prepare=(None, fill_disk))
    assert ended == [3, 4]
    assert "No space left" in second
    assert re.search("^4 pictures made in .*, 3 not made$", first, re.MULTILINE)
    assert generate(*command, "--seed", 5, "--resume", outdir=out).status == 0
    generate(*command, "--seed", 5, outdir=tmp_path / "one")
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


@pytest.mark.parametrize("taken", [False, True])
def test_without_a_place_to_meet_that_is_one_line(generate, sd1, monkeypatch, taken):
    with socket.create_server(("127.0.0.1", 0)) as other:
        places = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 2}
        if taken:
            places |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": other.getsockname()[1]}
        for name, value in places.items():
            monkeypatch.setenv(name, str(value))
        result = generate(sd1.folder, "--prompt", "a cat")
    (line,) = result.stderr.splitlines()
    assert result.status == 4
    assert line.startswith("error: process 0: does not find the others (")
    assert line.endswith("; set MASTER_ADDR and MASTER_PORT as torchrun does, or unset RANK and WORLD_SIZE")


def launched(outdir: Path) -> dict[int, int]:
    """The processes of a launched run, by rank."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            variables = (process / "environ").read_bytes().split(b"\0")
            environment = dict(pair.split(b"=", 1) for pair in variables if b"=" in pair)
            if str(outdir).encode() in (process / "cmdline").read_bytes() and b"RANK" in environment:
                found[int(environment[b"RANK"])] = int(process.name)
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
def test_when_one_dies_the_launcher_stops_the_rest_and_resume_completes(sd1, generate, tmp_path):
    """torchrun, below accelerate, ends all its processes when one is lost."""
    out = tmp_path / "out"
    run = ["--W", "64", "--H", "64", "--steps", "20", "--prompt", "a", "--images_per_prompt", "16", "--seed", "1"]
    run.append("--sequential_file_name")
    argv = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    argv += ["--main_process_port", "0", "gen_img_diffusers.py", "--ckpt", sd1.folder, "--outdir", out, *run]
    launcher = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    launcher.stdout.readline()
    processes = launched(out)
    assert sorted(processes) == [0, 1]
    os.kill(processes[1], signal.SIGKILL)
    _, stderr = launcher.communicate(timeout=300)
    assert launcher.returncode != 0
    assert 0 < len(contents(out)) < 16, stderr
    assert re.search(r"^\d+ pictures made in .*, \d+ not made$", stderr, re.MULTILINE)
    assert generate(sd1.folder, *run, "--resume", outdir=out).status == 0
    generate(sd1.folder, *run, outdir=tmp_path / "one")
    assert contents(out) == contents(tmp_path / "one")
