"""Two pieces of work at once on a CPU, each on half of the cores.

An operation that is shared out among cores lasts as long as it does on the slowest of them, each time. Pieces that have
nothing to do with each other do not wait.
"""

import ctypes
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

import torch

Result = TypeVar("Result")

_PIECES = 2
_here = threading.local()  # what is known in a thread


def pieces_at_once() -> int:
    """How many pieces of work are done at once, where this thread does one of them."""
    return getattr(_here, "pieces", 1)


def can_halve_cores() -> bool:
    """Whether this thread's operations are shared out among cores that can be halved."""
    # a thread that OpenMP has bound to a core hands that on to the threads it starts: both halves would be on it
    free = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0
    threads = torch.get_num_threads()
    return threads % _PIECES == 0 and threads <= free


def at_once(first: Callable[[], Result], second: Callable[[], Result]) -> tuple[Result, Result]:
    """Do two pieces of work without gradients, the first in this thread; gives what both give.

    What ends the first, Ctrl-C for one, ends the second at its next operation.
    """
    threads = torch.get_num_threads()
    beside = _Beside(second, threads // _PIECES)
    try:
        beside.start()
        with _one_of_pieces(threads // _PIECES):
            mine = first()
        return mine, beside.result()
    finally:
        beside.end()
        torch.set_num_threads(threads)  # for threads that begin from now on as well


@contextmanager
def _one_of_pieces(threads: int) -> Iterator[None]:
    torch.set_num_threads(threads)
    _here.pieces = _PIECES
    try:
        yield
    finally:
        _here.pieces = 1


class _Beside(threading.Thread, Generic[Result]):
    def __init__(self, work: Callable[[], Result], threads: int) -> None:
        super().__init__(daemon=True)
        self._work, self._threads = work, threads
        self._inference = torch.is_inference_mode_enabled()  # of the thread that asks
        self._done: list[Result] = []
        self._problem: BaseException | None = None

    def run(self) -> None:
        try:
            with _one_of_pieces(self._threads), torch.inference_mode(self._inference), torch.no_grad():
                self._done.append(self._work())
        except BaseException as problem:  # whatever it is, it is raised where the work is waited for
            self._problem = problem

    def result(self) -> Result:
        self.join()
        if self._problem is not None:
            raise self._problem
        return self._done[0]

    def end(self) -> None:
        if self.is_alive() and self.ident is not None:
            # as Ctrl-C does in the main thread; of this exception threads say nothing
            raised = ctypes.py_object(SystemExit)
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(self.ident), raised)
            self.join()
