"""How long a command took to start: from the start of its process to its first useful work.

That is the first tensor that is read into a model or written into a folder; of a command without, the first time that it has an
output to fill. Manifests have it as seconds_starting.
"""

import os
import time
from pathlib import Path

_began: float | None = None


def seconds_of_process() -> float:
    """How long this process has been running, by the kernel's clock."""
    # After the program's name, which may have spaces and brackets, the start is field 22 in ticks since the machine started.
    fields = Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    since_boot = time.clock_gettime(time.CLOCK_BOOTTIME)
    return since_boot - int(fields[19]) / os.sysconf("SC_CLK_TCK")


def at_work() -> None:
    """The first useful work begins now, unless it has begun before."""
    global _began
    if _began is None:
        _began = seconds_of_process()


def seconds_starting(otherwise: float) -> float:
    """Seconds from the start of the process to its first useful work; `otherwise` where no such has been noted."""
    return round(otherwise if _began is None else _began, 2)
