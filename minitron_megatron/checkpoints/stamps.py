"""What tells, in a manifest, that files which a command read have been replaced since: a stamp of each, as inputs by name.

Small files (configs, tokenizers) are told by their contents: a fresh download of the same ones is the same. Weights are told by
size and time of change, as `cp -p` and rsync keep them: reading them all again for every command would take too long.
"""

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

# The largest file that is told by its contents, in bytes.
LARGEST_READ = 32 * 2**20
# Before the names of files among the inputs of a manifest.
PREFIX = "file "


def file_stamps(root: Path, files: Iterable[Path]) -> dict[str, str]:
    """A stamp of each file that is there, as inputs; named as they lie below `root`."""
    found = {file.relative_to(root).as_posix() if file.is_relative_to(root) else str(file): file for file in files}
    return {PREFIX + name: _stamp(file) for name, file in sorted(found.items()) if file.is_file()}


def stamp_of_folder(name: str, folder: Path, files: Iterable[Path]) -> dict[str, str]:
    """One stamp of many files together, as an input."""
    whole = hashlib.sha256(repr(sorted(file_stamps(folder, files).items())).encode())
    return {PREFIX + name: f"sha256:{whole.hexdigest()}"}


def _stamp(file: Path) -> str:
    stat = file.stat()
    if stat.st_size > LARGEST_READ:
        return f"{stat.st_size} bytes of {stat.st_mtime_ns}"
    return f"sha256:{hashlib.sha256(file.read_bytes()).hexdigest()}"


def for_all_nodes(inputs: Mapping[str, str]) -> dict[str, str]:
    """Inputs as every node has them: copies of large files on disks of the nodes have times of their own."""
    return {n: one.partition(" bytes of ")[0] if n.startswith(PREFIX) else one for n, one in inputs.items()}


def other_files(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Names of files among two sets of inputs that are not in both the same; nothing where other inputs differ too."""
    different = [name for name in sorted({*before, *now}) if before.get(name) != now.get(name)]
    if not all(name.startswith(PREFIX) for name in different):
        return []
    return [name.removeprefix(PREFIX) for name in different]
