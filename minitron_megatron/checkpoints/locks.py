"""A folder's lock belongs to the run that took it, and to nobody whom the run forks.

A lock of flock() belongs to an open file, and a forked process shares the open files of the one that forked it: a writer of
checkpoints that outlives a killed run would hold the run's lock until it ends. So every fork lets go of it in the new process.
What is started as another program does not inherit the descriptor in the first place.
"""

import contextlib
import fcntl
import os
from pathlib import Path

_HELD: set[int] = set()


def lock(folder: Path) -> int | None:
    """Take the lock of a folder; gives what `unlock` takes, or None where another run has it."""
    descriptor = os.open(folder, os.O_RDONLY)
    _HELD.add(descriptor)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BaseException as error:
        unlock(descriptor)
        if isinstance(error, BlockingIOError):
            return None
        raise
    return descriptor


def is_locked(folder: Path) -> bool:
    """Whether a run has the lock of a folder. Those who ask at the same time do not see one another."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def unlock(descriptor: int) -> None:
    """Give a lock back."""
    _HELD.discard(descriptor)
    os.close(descriptor)


def _let_go() -> None:
    """In a forked process: close what is locked, which leaves the lock with the process that forked it."""
    while _HELD:
        with contextlib.suppress(OSError):
            os.close(_HELD.pop())


os.register_at_fork(after_in_child=_let_go)
