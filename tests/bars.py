"""Every progress bar ends at its total: watched wherever a test, in its own process or in the pool's workers, runs what has one.

A bar whose work was given up (an error, Ctrl-C) may stop anywhere.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator

from minitron_megatron import console
from minitron_megatron.parallel.layout import world_size_from_env

# Of what data-parallel ranks have shared out rank 0 counts its own part for the others' too.
COUNTED_FOR_ALL = ("samples", "prompts")
_plain = console.progress


@contextlib.contextmanager
def counted(
    description: str, total: int, *, unit: str = "", done: int = 0, **how: str
) -> Iterator[Callable[..., None]]:
    """`console.progress`, which raises AssertionError where it was told of more or less than the total."""
    moved = done
    with _plain(description, total, unit=unit, done=done, **how) as advance:

        def count(n: int, made: int = 0) -> None:
            nonlocal moved
            moved += n
            advance(n, made)

        yield count
    exact = unit not in COUNTED_FOR_ALL or world_size_from_env() == 1
    if type(total) is not int or not (moved == total if exact else total <= 2 * moved <= 4 * total):
        raise AssertionError(f"the bar of {description!r} ended at {moved} of {total} {unit}")


def watch() -> None:
    """From here on every bar of this process is counted."""
    for name, module in list(sys.modules.items()):
        if name.startswith("minitron_megatron") and vars(module).get("progress") is _plain:
            module.progress = counted
