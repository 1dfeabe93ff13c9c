"""Where a path leads, and whether a finished folder can be put there.

A finished folder gets its name by a rename, which takes the place of nothing or of an empty folder. It does not follow links, and
a mount point cannot be replaced; replacing the working directory leaves the shell in a folder that is gone.
"""

import os
import re
from pathlib import Path

from minitron_megatron.errors import UserError

MOUNTS = Path("/proc/self/mountinfo")


def place_of(path: Path) -> Path:
    """The folder that a path names: links are followed, and `.` and `..` have names; any other path is left as it is typed."""
    if path.name not in ("", "..") and not os.path.islink(path):
        return path
    return Path(os.path.realpath(path))


def check_replaceable(path: Path) -> None:
    """Raise UserError where the folder that is at a path cannot be replaced by a finished one."""
    inside = f"give a folder in it, as output={path / 'new'}"
    if _is_mount_point(path):
        raise UserError(f"output={path} is a mount point, which a finished folder cannot replace: {inside}")
    if os.path.samefile(path, os.getcwd()):
        raise UserError(f"output={path} is the working directory, which a finished folder cannot replace: {inside}")
    if not os.access(path.absolute().parent, os.W_OK):
        raise UserError(
            f"output={path} cannot be made: {path.absolute().parent}, where it gets its name, is not writable; {inside}"
        )


def _is_mount_point(path: Path) -> bool:
    """Whether something is mounted at a folder; a part of the same disk too, which `os.path.ismount` does not see."""
    return os.path.ismount(path) or os.path.realpath(path) in _mounts()


def devices_of(path: Path) -> set[tuple[int, int]]:
    """Major and minor numbers by which the kernel may call the disk of a path: a part of one has numbers of its own."""
    device = path.stat().st_dev
    mounts, place = _mounts(), Path(os.path.realpath(path))
    point = next((str(one) for one in (place, *place.parents) if str(one) in mounts), None)
    return {(os.major(device), os.minor(device)), *([mounts[point]] if point else [])}


def _mounts() -> dict[str, tuple[int, int]]:
    """Mount points with the numbers of what is mounted there, by the kernel's list."""
    try:
        lines = MOUNTS.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return {}
    found = {}
    for line in lines:
        # "36 35 98:0 /root /mount\040point options …", where blanks and the like are octal
        _, _, device, _, point, *_ = line.split()
        major, _, minor = device.partition(":")
        found[re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), point)] = int(major), int(minor)
    return found
