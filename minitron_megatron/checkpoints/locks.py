"""A folder's lock belongs to the run that took it, and to nobody whom the run forks.

A lock of flock() belongs to an open file, and a forked process shares the open files of the one that forked it: a writer of
checkpoints that outlives a killed run would hold the run's lock until it ends. So every fork lets go of it in the new process.
What is started as another program does not inherit the descriptor in the first place.

Who holds a lock is told by the kernel's list, and of other machines by what a start leaves beside the output (starts.py).
Nobody is asked, and no lock is taken for it.
"""

import contextlib
import fcntl
import os
import socket
import time
from pathlib import Path

from minitron_megatron.checkpoints.places import devices_of
from minitron_megatron.console import format_time
from minitron_megatron.errors import UserError
from minitron_megatron.starts import is_alive, read_starts, when_born

LOCKS = Path("/proc/locks")
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


def holder(folder: Path) -> int | None:
    """The process that holds a folder's lock on this machine, by the kernel's list; None where nobody does."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        number, devices = str(folder.stat().st_ino), devices_of(folder)
        for line in LOCKS.read_text(encoding="utf-8").splitlines():
            # "1: FLOCK ADVISORY WRITE pid major:minor:inode …", the first two in hexadecimal
            fields = line.split()
            if fields[1] != "FLOCK":  # of another kind, or waiting: "1: -> FLOCK …"
                continue
            major, minor, locked = fields[5].split(":")
            # 0: a process that this container does not see.
            if locked == number and (int(major, 16), int(minor, 16)) in devices and int(fields[4]) > 0:
                return int(fields[4])
    return None


def another_run(does: str, folder: Path) -> UserError:
    """The refusal of a folder whose lock another run has: which process that is, since when, and how to end it.

    `does`: what it does there, as "is writing".
    """
    pid, here = holder(folder), socket.gethostname()
    host, began = here, None if pid is None else when_born(pid)
    if pid is None:
        # On another machine, or in another container. A training run's starts stand beside the model that it is going to write.
        starts = [start for place in (folder, folder.parent) for start in read_starts(place)[-1:]]
        last = next((start for start in starts if is_alive(start) is not False), {})
        pid, host, began = last.get("pid"), last.get("host"), last.get("time")
    if pid is None:
        return UserError(f"another run {does} {folder}: wait for it or choose another output=")
    since = ""
    if isinstance(began, int | float):
        day = "%H:%M:%S" if time.time() - began < 43200 else "%Y-%m-%d %H:%M"
        since = f", since {time.strftime(day, time.localtime(began))}, {format_time(max(0.0, time.time() - began))} ago"
    there = "" if host == here else f" on {host}"
    return UserError(
        f"another run {does} {folder} (process {pid} on {host}{since}): wait for it, end it with kill {pid}{there}, or choose "
        "another output="
    )


def _let_go() -> None:
    """In a forked process: close what is locked, which leaves the lock with the process that forked it."""
    while _HELD:
        with contextlib.suppress(OSError):
            os.close(_HELD.pop())


os.register_at_fork(after_in_child=_let_go)
