"""What programs started here may use of this machine: cores and memory, whatever limits them."""

import contextlib
import math
import os
from pathlib import Path

_CGROUP, _MEMINFO = Path("/sys/fs/cgroup"), Path("/proc/meminfo")


def usable_cores(cgroup: Path = _CGROUP) -> int:
    """Cores that this process may run on and that its control group is given the time of; 1 at least."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    # No such file, or "max" in place of a number: no limit.
    with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
        quota, period = (cgroup / "cpu.max").read_text(encoding="ascii").split()
        cores = min(cores, math.ceil(int(quota) / int(period)))
    return max(1, cores)


def free_gib(cgroup: Path = _CGROUP, meminfo: Path = _MEMINFO) -> float:
    """GiB of memory that programs can still take; infinite where nothing says."""
    free = math.inf
    with contextlib.suppress(OSError, ValueError):
        lines = meminfo.read_text(encoding="ascii").splitlines()
        free = min((int(line.split()[1]) / 2**20 for line in lines if line.startswith("MemAvailable:")), default=free)
    with contextlib.suppress(OSError, ValueError):
        limit, used = (int((cgroup / f"memory.{name}").read_text(encoding="ascii")) for name in ("max", "current"))
        # What files left in memory counts as used, and goes when it is needed.
        stat = (cgroup / "memory.stat").read_text(encoding="ascii").splitlines()
        files = sum(int(line.split()[1]) for line in stat if line.startswith(("inactive_file ", "active_file ")))
        free = min(free, (limit - used + files) / 2**30)
    return free
