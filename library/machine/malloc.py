"""How the C library comes by memory, where it is glibc: large blocks are its weak side.

It gets each block of 32 MB and more from the system and gives it back when it is freed. The system clears it each time,
page by page, which is a fifth of the time that a CPU takes to decode a picture.
"""

import ctypes
import platform
from collections.abc import Iterator
from contextlib import contextmanager

# Numbers of options in glibc's malloc.h
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -2, -3, -4


def _glibc() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None


@contextmanager
def blocks_from_system() -> Iterator[None]:
    """A block, or a function, in which the system gives 1 MB and more at a time and gets it back when it is freed.

    From its end on freed memory is kept for what comes next. For work that frees its memory in another order than it
    took it, which would leave holes: loading, where weights are made of others, and gradients.
    """
    if (libc := _glibc()) is None:
        yield
        return
    libc.mallopt(_M_MMAP_MAX, 1 << 16)  # glibc's own number
    libc.mallopt(_M_MMAP_THRESHOLD, 1 << 20)
    try:
        yield
    finally:
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, -1)  # never by itself
        libc.mallopt(_M_TOP_PAD, 64 << 20)


def give_back() -> None:
    """Let the system have the memory that is kept, before other sizes are asked for: the holes would add up."""
    if libc := _glibc():
        libc.malloc_trim(0)
