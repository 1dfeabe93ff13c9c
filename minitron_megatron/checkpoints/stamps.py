"""What tells, in a manifest, that files which a command read have been replaced since: a stamp of each, as inputs by name.

Small files (configs, tokenizers, texts) are told by their contents: a fresh download of the same ones is the same. Large ones are
told by size and time of change, as `cp -p` and rsync keep them: reading them all again for every command would take too long.
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
    return {PREFIX + name: stamp(file) for name, file in sorted(found.items()) if file.is_file()}


def of_tokenizer(name: str) -> bool:
    """Whether an input is a file of a model folder's tokenizer."""
    return name.startswith(f"{PREFIX}tokenizer/")


def stamp_of_folder(name: str, folder: Path, files: Iterable[Path]) -> dict[str, str]:
    """One stamp of many files together, as an input."""
    whole = hashlib.sha256(repr(sorted(file_stamps(folder, files).items())).encode())
    return {PREFIX + name: f"sha256:{whole.hexdigest()}"}


def stamp_of_files(files: Iterable[Path]) -> str:
    """One stamp of many files in their order, by their names and whatever folder they are in. Raises OSError."""
    return f"sha256:{hashlib.sha256(repr([(file.name, stamp(file)) for file in files]).encode()).hexdigest()}"


def stamp(file: Path) -> str:
    """What tells that a file is another one now: the one way to say so. Raises OSError."""
    stat = file.stat()
    if stat.st_size > LARGEST_READ:
        return f"{stat.st_size} bytes of {stat.st_mtime_ns}"
    return f"sha256:{hashlib.sha256(file.read_bytes()).hexdigest()}"


def for_all_nodes(inputs: Mapping[str, str]) -> dict[str, str]:
    """Inputs as every node has them: copies of large files on disks of the nodes have times of their own."""
    return {n: one.partition(" bytes of ")[0] if n.startswith(PREFIX) else one for n, one in inputs.items()}


def other_inputs(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Names of inputs that are not in both sets the same: of files alone where only files differ."""
    different = [name for name in sorted({*before, *now}) if before.get(name) != now.get(name)]
    return [name.removeprefix(PREFIX) for name in different]


def say_others(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What an output was made from that is another one now, as "from another model (…)"; empty where nothing is."""
    different = other_inputs(before, now)
    if not different:
        return ""
    named = f"{', '.join(different[:3])}{' …' * (len(different) > 3)}"
    if all(f"{PREFIX}{name}" in {*before, *now} for name in different):
        return f"from other files: {named} changed since"
    return f"from other inputs: {named} changed since"
