"""The program run in child processes of the tests, which have everything imported, so that it starts at once."""

import os
import runpy
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import NoReturn

from conftest import pictures_in

import gen_img_diffusers


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in pictures_in(folder)}


def start(
    models: Path,
    *options: object,
    outdir: Path,
    prepare: Callable[[], None] | None = None,
    output: Path = Path(os.devnull),
) -> int:
    """Start the program in a child process, after `prepare` there; gives the process's number."""
    small = ["--W", 64, "--H", 64, "--steps", 2]
    argv = [str(o) for o in ("--ckpt", models, "--outdir", outdir, *small, *options)]
    child = os.fork()
    if not child:
        with output.open("wb") as stream:
            _run_here(partial(gen_img_diffusers.main, argv), (0, stream.fileno(), stream.fileno()), prepare)
    return child


def _run_here(
    program: Callable[[], object], streams: tuple[int, int, int], prepare: Callable[[], None] | None = None
) -> NoReturn:
    """Be a program: with these files as its standard input, output and errors; ends the process as Python does."""
    status: object = 99
    try:
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
        sys.stdin, sys.stdout, sys.stderr = os.fdopen(0), os.fdopen(1, "w"), os.fdopen(2, "w")
        if prepare:
            prepare()
        status = program()
    except SystemExit as leaving:
        status = leaving.code
    except BaseException:
        traceback.print_exc()
        status = 1
    finally:
        os._exit(_flushed(status))


def _flushed(status: object) -> int:
    """The exit status, when all is written that is not yet."""
    try:
        if isinstance(status, str):
            print(status, file=sys.stderr)
            status = 1
        sys.stderr.flush()
        sys.stdout.flush()
    except BaseException as problem:
        os.write(2, f"Exception ignored: {problem!r}\n".encode())
        status = 120
    return int(status or 0)


class Forked:
    """What `subprocess.Popen` is of a Python script, in a child of this process, which has everything imported.

    Args:
        command: Python, the script, its arguments.
        settings: for `Popen`; `stdout` and `stderr` are pipes.
    """

    def __init__(self, command: list[str], *, cwd: Path, env: Mapping[str, str], **settings: object) -> None:
        assert settings == {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        (out, to_out), (err, to_err) = os.pipe(), os.pipe()
        self.returncode: int | None = None
        self.pid = os.fork()
        if not self.pid:

            def become() -> None:
                for end in (out, err):
                    os.close(end)
                os.chdir(cwd)
                os.environ.update(env)
                sys.argv = command[1:]

            _run_here(lambda: runpy.run_path(command[1], run_name="__main__") and 0, (0, to_out, to_err), become)
        for end in (to_out, to_err):
            os.close(end)
        self.stdout, self.stderr = os.fdopen(out), os.fdopen(err)

    def wait(self) -> subprocess.CompletedProcess[str]:
        """What it came to."""
        err, out = self.stderr.read(), self.stdout.read()
        _, ended = os.waitpid(self.pid, 0)
        self.returncode = os.waitstatus_to_exitcode(ended)
        self.__exit__()
        return subprocess.CompletedProcess([], self.returncode, out, err)

    def __enter__(self) -> "Forked":
        return self

    def __exit__(self, *_: object) -> None:
        self.stdout.close()
        self.stderr.close()


class Child:
    """The program begun in a child process, with `text` at its standard input, and what it says kept."""

    def __init__(self, *options: object, text: str = "", prepare: Callable[[], None] | None = None) -> None:
        self._outputs = [tempfile.TemporaryFile() for _ in range(2)]  # noqa: SIM115  # closed by `wait`
        source, typed = os.pipe()
        os.write(typed, text.encode(errors="surrogateescape"))
        os.close(typed)
        argv = [str(option) for option in options]
        self.number = os.fork()
        if not self.number:
            streams = (source, *(each.fileno() for each in self._outputs))
            _run_here(partial(gen_img_diffusers.main, argv), streams, prepare)
        os.close(source)

    def wait(self) -> subprocess.CompletedProcess[str]:
        """What it came to."""
        _, ended = os.waitpid(self.number, 0)
        texts = []
        for output in self._outputs:
            with output:
                output.seek(0)
                texts.append(output.read().decode(errors="surrogateescape"))
        return subprocess.CompletedProcess([], os.waitstatus_to_exitcode(ended), *texts)


def killed(prepare: Callable[[], None], models: Path, *options: object, outdir: Path) -> int:
    """Run the program in a child process; gives the signal that ended it, or -status."""
    _, ended = os.waitpid(start(models, *options, outdir=outdir, prepare=prepare), 0)
    return -os.waitstatus_to_exitcode(ended)


def kill_at(owner: object, name: str, call: int, *, after: bool) -> Callable[[], None]:
    """Prepares a SIGKILL at one call of a function, before or after it did its work."""

    def prepare() -> None:
        real, calls = getattr(owner, name), []

        def wrapper(*arguments):
            calls.append(name)
            now = len(calls) == call
            if now and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            result = real(*arguments)
            if now:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        setattr(owner, name, wrapper)

    return prepare
