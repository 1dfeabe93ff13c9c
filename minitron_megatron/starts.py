"""Who works on an output, since when, and how it is started again: a line of `starts.jsonl` for each start.

    output/starts.jsonl    {"time", "step", "host", "pid", "born", "processes", "directory", "command"}

`born` is the clock tick in which the process began: a process of that number today may be another one. The file is for people and
for `launch/status.py`; nothing that is computed depends on it, so a folder where it cannot be written goes without.
"""

import contextlib
import json
import os
import socket
import time
from pathlib import Path
from typing import Any

from minitron_megatron.parallel.layout import world_size_from_env
from minitron_megatron.plain_files import parse_json

STARTS = "starts.jsonl"


def record_start(folder: Path, step: int | None = None) -> None:
    """Note that this process begins, or continues, what is in `folder`, from a step where it has steps."""
    from minitron_megatron.cli.next_command import this_line

    line = {
        "time": round(time.time(), 1),
        "step": step,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "born": born(os.getpid()),
        "processes": world_size_from_env(),
        "directory": str(Path.cwd()),
        "command": this_line(),
    }
    with contextlib.suppress(OSError), open(folder / STARTS, "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def seconds_left(step: int, steps: int, first: int, seconds: float) -> float:
    """Seconds that a run needs from `step` of `steps` on, at the pace since its last start from step `first`, `seconds` ago.

    What lies between steps is in it: validations and checkpoints.
    """
    return seconds / max(1, step - first) * (steps - step)


def read_starts(folder: Path) -> list[dict[str, Any]]:
    """The starts of what is in a folder, oldest first; lines that cannot be read are left out."""
    return [line for line in tail_of(folder / STARTS) if isinstance(line.get("command"), str)]


def is_alive(start: dict[str, Any]) -> bool | None:
    """Whether the process of a start still runs; None where that was on another machine."""
    if start.get("host") != socket.gethostname():
        return None
    pid = start.get("pid")
    return type(pid) is int and born(pid) is not None and born(pid) == start.get("born")


def born(pid: int) -> int | None:
    """The clock tick after the machine's start in which a process began; None where there is none of that number."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        # "pid (name) state parent …", where a name may hold blanks and parentheses; zombies have ended
        after = stat.rpartition(")")[2].split()
        return None if after[0] == "Z" else int(after[19])
    except (OSError, ValueError, IndexError):
        return None


def when_born(pid: int) -> float | None:
    """When a process began, in seconds since the epoch; None where there is none of that number."""
    ticks = born(pid)
    if ticks is None:
        return None
    return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) + ticks / os.sysconf("SC_CLK_TCK")


def tail_of(file: Path, size: int = 1 << 18) -> list[dict[str, Any]]:
    """The last lines of a JSON-lines file that are whole, those of the last `size` bytes; nothing where it cannot be read."""
    try:
        with open(file, "rb") as lines:
            length = os.fstat(lines.fileno()).st_size
            lines.seek(max(0, length - size))
            text = lines.read().decode("utf-8", errors="replace")
    except OSError:
        return []
    found = []
    for line in text.splitlines()[1 if length > size else 0 :]:
        with contextlib.suppress(ValueError):
            values = parse_json(line)
            if isinstance(values, dict):
                found.append(values)
    return found
