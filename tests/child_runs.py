"""The program run in child processes of the tests, which have everything imported, so that it starts at once."""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
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
            _run_here(argv, (0, stream.fileno(), stream.fileno()), prepare)
    return child


def _run_here(argv: list[str], streams: tuple[int, int, int], prepare: Callable[[], None] | None) -> NoReturn:
    """Be the program: with these files as its standard input, output and errors; ends the process."""
    status = 99
    try:
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
        sys.stdin, sys.stdout, sys.stderr = os.fdopen(0), os.fdopen(1, "w"), os.fdopen(2, "w")
        if prepare:
            prepare()
        status = gen_img_diffusers.main(argv)
    except SystemExit as leaving:
        status = leaving.code
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


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
            _run_here(argv, (source, *(each.fileno() for each in self._outputs)), prepare)
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
