"""Locks on files that last as long as the process that took them."""

try:
    import fcntl
except ImportError:  # Windows: two processes must not add to one manifest there
    fcntl = None


def lock(descriptor: int) -> bool:
    """Take the lock of an open file without waiting; False when another process has it."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return True
    return True
