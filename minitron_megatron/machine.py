"""What programs started here may use of this machine: cores and memory, whatever limits them; and what starting one takes.

Control groups limit a container, a Slurm job or a service. This process's group may be deep in the tree: every group above it
limits too, so all are read. Version 2 has one tree; version 1 one for each resource, in a folder of its own.

    /proc/self/cgroup    "0::/job/step"        ─▶ /sys/fs/cgroup/job/step/memory.max, …/job/memory.max, …/memory.max
                         "4:memory:/job/step"  ─▶ /sys/fs/cgroup/memory/job/step/memory.limit_in_bytes, …
"""

import contextlib
import math
import os
import sys
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path

_ROOT, _OWN, _MEMINFO = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup"), Path("/proc/meminfo")
# What a process of Megatron has in memory before its models are there.
GIB_OF_PROGRAM = 0.8
# Seconds of CPU time that importing torch takes, where it was imported before anybody asked.
_IMPORT = 2.0


def usable_cores(root: Path = _ROOT, own: Path = _OWN) -> int:
    """Cores that this process may run on and that its control groups are given the time of; 1 at least."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for group in _groups("cpu", root, own):
        # No such file, or "max" or -1 in place of a number of microseconds: no limit.
        with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
            if (group / "cpu.max").exists():
                quota, period = map(int, _words(group / "cpu.max"))
            else:
                quota, period = (int(*_words(group / f"cpu.cfs_{name}_us")) for name in ("quota", "period"))
            if quota > 0:
                cores = min(cores, math.ceil(quota / period))
    return max(1, cores)


def free_gib(root: Path = _ROOT, own: Path = _OWN, meminfo: Path = _MEMINFO) -> float:
    """GiB of memory that programs can still take; infinite where nothing says."""
    free = math.inf
    with contextlib.suppress(OSError, ValueError):
        lines = meminfo.read_text(encoding="ascii").splitlines()
        free = min((int(line.split()[1]) / 2**20 for line in lines if line.startswith("MemAvailable:")), default=free)
    for group in _groups("memory", root, own):
        with contextlib.suppress(OSError, ValueError):
            free = min(free, _left_in(group) / 2**30)
    return free


def _left_in(group: Path) -> int:
    """Bytes that a group may still take; what files left in memory counts as used, and goes when it is needed."""
    second = (group / "memory.max").exists()
    names = ("memory.max", "memory.current") if second else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    limit, used = (int(*_words(group / name)) for name in names)
    of_files = ("inactive_file ", "active_file ") if second else ("total_inactive_file ", "total_active_file ")
    stat = (group / "memory.stat").read_text(encoding="ascii").splitlines()
    return limit - used + sum(int(line.split()[1]) for line in stat if line.startswith(of_files))


def _groups(resource: str, root: Path, own: Path) -> Iterator[Path]:
    """Folders of the groups that limit this process's use of a resource, those of both versions; the innermost first."""
    paths = {"": "/", resource: "/"}
    with contextlib.suppress(OSError, ValueError):
        for line in own.read_text(encoding="utf-8").splitlines():
            _, controllers, path = line.split(":", 2)
            for name in controllers.split(","):
                if name in paths:
                    paths[name] = path
    for name, path in paths.items():
        # In a container the path may be the host's, which is not there: what the container sees is its own limit.
        tree, inner = root / name, Path(path.lstrip("/"))
        for group in (inner, *inner.parents):
            if ".." not in group.parts:
                yield tree / group


def _words(file: Path) -> list[str]:
    return file.read_text(encoding="ascii").split()


@cache
def seconds_to_import_torch() -> float:
    """Seconds of CPU time that importing torch takes here; it is imported now, to be timed, unless it was before."""
    if "torch" in sys.modules:
        return _IMPORT
    began = time.process_time()
    import torch  # noqa: F401

    return time.process_time() - began
