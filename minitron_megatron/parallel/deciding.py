"""One rank decides: what depends on files, clocks, signals or the environment is looked at once and told to all ranks.

    rank 0     looks: a listing, a clock, a file's presence ─▶ value, or what is wrong ─┐
    the others                                                                          └─▶ the same value, the same mistake

Ranks may see different things for a moment: file systems shared by nodes keep listings for seconds, clocks differ, a signal
reaches one process before another. Ranks that act on what they see themselves wait for each other in different places, or mix
weights of two checkpoints. What all of them have read before they met (options, digests) is compared. `tests/test_deciding.py`
holds the modules that run in a process group to this. Without a process group each function is what it does on rank 0.
"""

import hashlib
import os
import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from minitron_megatron.errors import UserError
from minitron_megatron.parallel import collectives

# How long a rank may see less of a file system than rank 0: NFS keeps what it knows of a folder for a minute at the most.
SECONDS_UNTIL_SEEN = 120.0


def ask_rank_zero[T](look: Callable[[], T]) -> T:
    """What rank 0 finds, on every rank; what is wrong there is raised as UserError on every rank. Every rank must call it.

    `look` runs on rank 0 alone, and gives small control data: it is pickled.
    """
    found, problem = _on_rank_zero(look)
    found, problem = collectives.broadcast_object((found, problem))
    if problem is not None:
        raise UserError(problem)
    return found


def from_rank_zero[T](make: Callable[[], T]) -> T | None:
    """The same for what is too large to be told, or cannot be: it stays on rank 0, and is None elsewhere."""
    made, problem = _on_rank_zero(make)
    problem = collectives.broadcast_object(problem)
    if problem is not None:
        raise UserError(problem)
    return made


def _on_rank_zero[T](make: Callable[[], T]) -> tuple[T | None, str | None]:
    if collectives.is_rank_zero():
        try:
            return make(), None
        except UserError as error:
            return None, str(error)
    return None, None


def check_same(given: Mapping[str, Any], what: str) -> None:
    """Raise UserError, on every rank, where a rank has read other values than rank 0; every rank must call it.

    Args:
        given: small plain values by name, as options or digests of inputs.
        what: they are, for the message, as in "inputs".
    """
    digests = collectives.all_gather_objects(hashlib.sha256(repr(sorted(given.items())).encode()).digest())
    if len(set(digests)) == 1:
        return
    of_ranks = collectives.all_gather_objects((socket.gethostname(), dict(given)))
    first_host, first = of_ranks[0]
    for rank, (host, values) in enumerate(of_ranks):
        odd = next((n for n in sorted({*first, *values}) if first.get(n) != values.get(n)), None)
        if odd is not None:
            raise UserError(
                f"the ranks of this job have different {what}: {odd} is {_short(first.get(odd))} on rank 0 ({first_host}), "
                f"{_short(values.get(odd))} on rank {rank} ({host}): give all nodes the same, and start again"
            )


def wait_until_seen(*paths: Path) -> None:
    """Return when every rank sees these files or folders, which rank 0 has made. Every rank must call it.

    Raises UserError on every rank, naming one that does not see them in time.
    """
    missing = None if collectives.is_rank_zero() else _not_seen(paths)
    of_ranks = collectives.all_gather_objects((socket.gethostname(), missing))
    for rank, (host, path) in enumerate(of_ranks):
        if path is not None:
            raise UserError(
                f"rank {rank} ({host}) does not see {path}, which rank 0 ({of_ranks[0][0]}) does: put it on a disk that all "
                "nodes share"
            )


def _not_seen(paths: tuple[Path, ...]) -> str | None:
    """The first of the paths that has not appeared in time, None when all are there."""
    deadline, pause = time.monotonic() + SECONDS_UNTIL_SEEN, 0.01
    for path in paths:
        while not path.exists():
            if time.monotonic() > deadline:
                return str(path)
            # Hundreds of ranks ask one server.
            time.sleep(pause := min(1.0, 2 * pause))
            _look_anew(path.parent)
    return None


def _look_anew(folder: Path) -> None:
    """Have a network file system ask its server for a folder again."""
    try:
        with os.scandir(folder) as entries:
            next(entries, None)
    except OSError:
        return


def _short(value: Any) -> str:
    return "not there" if value is None else str(value)[:80]
