"""Whether an error says that a file's contents are damaged, or that something else is wanting where it is read.

Somebody who is told that a file is damaged removes it, or makes it again. That is right for bytes that are no zip archive, pickle
or header, and for a file that is missing. It is wrong where memory, descriptors, rights or a peer are wanting: the file is whole.
"""

import re
from typing import Any

# Of exceptions, by the names of their classes: torch's own are known without importing it.
_OTHERWISE = frozenset(("MemoryError", "OutOfMemoryError", "AcceleratorError", "DistError"))
# What torch, CUDA, NCCL, gloo and safetensors (written in Rust) say in errors of no class of their own.
_WANTING = re.compile(
    r"out of memory|can.?t allocate|cannot allocate|alloc_cpu|not enough memory|no space left|too many open files"
    r"|permission denied|input/output error|stale file|CUDA error|cudaError|\bnccl|\bgloo\b|TCPStore|timed out",
    re.IGNORECASE,
)


def is_damage(error: BaseException) -> bool:
    """Whether an error while a file was read says that the file is damaged, or missing."""
    if not isinstance(error, Exception) or {kind.__name__ for kind in type(error).__mro__} & _OTHERWISE:
        return False
    if isinstance(error, OSError):
        return isinstance(error, FileNotFoundError)
    return not _WANTING.search(str(error))


def pass_on_unless_damage(error: BaseException) -> None:
    """Raise the error again where it does not say that a file is damaged."""
    if not is_damage(error):
        raise error


def cause_of(failed: Any) -> BaseException:
    """What ended torch's distributed reading or writing (a CheckpointException), of the first rank.

    Of several ranks that failed, one that says anything else than damage comes first: the others may have failed with it.
    """
    causes = [error for _, (error, _) in sorted(failed.failures.items())]
    return next((error for error in causes if not is_damage(error)), causes[0] if causes else failed)
