"""Whether an error says that a file's contents are damaged, or that something else is wanting where it is read.

Somebody who is told that a file is damaged removes it, or makes it again. That is right for bytes that are no zip archive, pickle
or header, and for a file that is missing. It is wrong where memory, descriptors, rights or a peer are wanting: the file is whole.
"""

import re
from pathlib import Path
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
        return isinstance(error, FileNotFoundError) and not _is_there(error)
    return not _WANTING.search(str(error))


def _is_there(error: FileNotFoundError) -> bool:
    """Whether the file is there all the same: safetensors says this, and no number, of every file that it could not open."""
    return error.errno is None and _named_in(error).exists()


def _named_in(error: FileNotFoundError) -> Path:
    """The file of "No such file or directory: FILE"."""
    return Path(str(error).partition(": ")[2])


def pass_on_unless_damage(error: BaseException) -> None:
    """Raise the error again where it does not say that a file is damaged."""
    if is_damage(error):
        return
    if isinstance(error, FileNotFoundError):
        with open(_named_in(error), "rb"):
            pass  # what was wanting is there by now
    raise error


def cause_of(failed: Any) -> BaseException:
    """What ended torch's distributed reading or writing (a CheckpointException), of the first rank.

    Of several ranks that failed, one that says anything else than damage comes first: the others may have failed with it.
    """
    causes = [error for _, (error, _) in sorted(failed.failures.items())]
    return next((error for error in causes if not is_damage(error)), causes[0] if causes else failed)
