"""The program run in child processes of the tests, which have everything imported, so that it starts at once."""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

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
    if child := os.fork():
        return child
    status = 99
    try:
        with output.open("wb") as stream:
            os.dup2(stream.fileno(), 1)
            os.dup2(stream.fileno(), 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        if prepare:
            prepare()
        status = gen_img_diffusers.main(argv)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


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
