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
_LONGEST_OPERATION_S = 60  # far longer than any takes: nothing waits for ever
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
        begun = beside.begin()
        with _one_of_pieces(threads // _PIECES):
            mine = first()
            # where the system gives no thread it comes afterwards, computed in the same way
            return mine, beside.result() if begun else second()
    finally:
        try:
            beside.end()
        finally:
            torch.set_num_threads(threads)  # for threads that begin from now on as well


@contextmanager
def _one_of_pieces(threads: int) -> Iterator[None]:
    torch.set_num_threads(threads)
    _here.pieces = _PIECES
    try:
        yield
    finally:
        _here.pieces = 1


class _Beside(Generic[Result]):
    """A piece of work in a thread of its own."""

    def __init__(self, work: Callable[[], Result], threads: int) -> None:
        self._work, self._threads = work, threads
        self._inference = torch.is_inference_mode_enabled()  # of the thread that asks
        self._done: list[Result] = []
        self._problem: BaseException | None = None
        # held by the work; Python's own `join` takes a thread for ended when Ctrl-C comes while it waits
        self._at_work = threading.Lock()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def begin(self) -> bool:
        """Begin; False where the system gives no thread."""
        self._at_work.acquire()
        try:
            self._thread.start()
        except RuntimeError:
            self._at_work.release()
            return False
        return True

    def result(self) -> Result:
        with self._at_work:
            pass
        if self._problem is not None:
            raise self._problem
        return self._done[0]

    def end(self) -> None:
        """Let it end, and wait for that."""
        if self._at_work.locked() and self._thread.ident is not None:
            # as Ctrl-C does in the main thread; of this exception threads say nothing
            raised = ctypes.py_object(SystemExit)
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(self._thread.ident), raised)
            self._at_work.acquire(timeout=_LONGEST_OPERATION_S)

    def _run(self) -> None:
        try:
            with _one_of_pieces(self._threads), torch.inference_mode(self._inference), torch.no_grad():
                self._done.append(self._work())
        except BaseException as problem:  # whatever it is, it is raised where the work is waited for
            self._problem = problem
        finally:
            self._at_work.release()
