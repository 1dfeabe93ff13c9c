"""Whoever reads what a command prints may be gone before it ends, and that changes neither its work nor its exit status.

    a terminal that closed: SIGHUP, and EIO for who writes     ─┐
    `| tee log`, which the same Ctrl-C has ended: EPIPE        ─┴──▶ what is written from then on goes nowhere

A handler of signals asks for it, a broken pipe does, and so does the end of a command. Nothing heavy is imported.
"""

import contextlib
import os
import select


def leave_lost_readers() -> None:
    """Where nobody reads standard output or error any more, have what is written to it go nowhere; a signal's handler may."""
    for descriptor in (1, 2):
        with contextlib.suppress(OSError):
            if _is_lost(descriptor):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, descriptor)
                os.close(nowhere)


def _is_lost(descriptor: int) -> bool:
    """Whether the other end of a pipe or terminal is gone; a file has none, and what is closed is the affair of who closed it."""
    watching = select.poll()
    watching.register(descriptor, 0)
    return any(events & (select.POLLERR | select.POLLHUP) for _, events in watching.poll(0))
