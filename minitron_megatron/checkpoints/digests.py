"""Digests of folders, and of large files in segments, so that several threads, and several ranks, can share out one file's bytes.

    file of 600 MiB    | 256 MiB | 256 MiB | 88 MiB |    ──▶   {"size": 629145600, "segments": [digest, digest, digest]}

BLAKE3 as for model folders (checkpoints/weights.py): as strong as SHA-256 at several times its speed.
"""

import hashlib
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from blake3 import blake3

SEGMENT_BYTES = 256 * 2**20
# Read at once: stays in a core's cache on its way to the digest.
_BLOCK_BYTES = 2**20
# Of a process: more read no faster from most disks.
MOST_THREADS = 8


@dataclass(frozen=True)
class FileDigest:
    """A file's size in bytes, and the digest of each of its segments; an empty file has none."""

    size: int
    segments: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """As it stands in a file."""
        return {"size": self.size, "segments": list(self.segments)}

    @classmethod
    def from_json(cls, values: Any) -> Self:
        """Raises ValueError where it is none."""
        size, segments = values["size"], values["segments"]
        if type(size) is not int or size < 0 or len(segments) != number_of_segments(size):
            raise ValueError(f"no digest of a file: {size!r} bytes")
        if not all(isinstance(one, str) for one in segments):
            raise ValueError("no digest of a file: a segment's is no text")
        return cls(size, tuple(segments))


def number_of_segments(size: int) -> int:
    """Of a file of so many bytes."""
    return -(-size // SEGMENT_BYTES)


def digest_of_segment(file: Path, number: int) -> str:
    """BLAKE3 of one segment of a file, or of what there is of it. Raises OSError."""
    whole, at = blake3(), number * SEGMENT_BYTES
    end = at + SEGMENT_BYTES
    buffer = memoryview(bytearray(min(_BLOCK_BYTES, SEGMENT_BYTES)))
    with open(file, "rb", buffering=0) as opened:
        while at < end and (count := os.preadv(opened.fileno(), [buffer[: end - at]], at)):
            whole.update(buffer[:count])
            at += count
    return whole.hexdigest()


def digest_files(folder: Path, names: Iterable[str], threads: int = 1) -> dict[str, FileDigest]:
    """Digests of some files of a folder, by name. Raises OSError."""
    sizes = {name: (folder / name).stat().st_size for name in names}
    places = [(name, number) for name, size in sizes.items() for number in range(number_of_segments(size))]
    with ThreadPoolExecutor(max(1, min(threads, MOST_THREADS))) as pool:
        digests = pool.map(lambda place: digest_of_segment(folder / place[0], place[1]), places)
        found = dict(zip(places, digests, strict=True))
    return {
        name: FileDigest(size, tuple(found[name, number] for number in range(number_of_segments(size))))
        for name, size in sizes.items()
    }


def segments_of(files: Mapping[str, FileDigest]) -> list[tuple[str, int]]:
    """Every segment of some files, as (name, number), in one order for all ranks."""
    return [(name, number) for name in sorted(files) for number in range(len(files[name].segments))]


def other_segments(
    folder: Path, files: Mapping[str, FileDigest], places: Iterable[tuple[str, int]], threads: int = 1
) -> list[tuple[str, int]]:
    """Those of some segments, as `segments_of` names them, whose bytes are others now. Raises OSError."""
    places = list(places)

    def is_other(place: tuple[str, int]) -> bool:
        name, number = place
        return digest_of_segment(folder / name, number) != files[name].segments[number]

    with ThreadPoolExecutor(max(1, min(threads, MOST_THREADS))) as pool:
        return [place for place, other in zip(places, pool.map(is_other, places), strict=True) if other]


def digest_of_files(folder: Path, names: Iterable[str]) -> str:
    """The digest of a folder, out of all bytes of some of its files. Raises OSError."""
    return joint_digest({name: sha256_of(folder / name) for name in names})


def sha256_of(file: Path) -> bytes:
    """SHA-256 of a whole file. Raises OSError."""
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").digest()


def digests_of(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """A digest of each of some files, by name. Raises OSError."""
    return {name: f"sha256:{sha256_of(folder / name).hex()}" for name in names}


def joint_digest(files: Mapping[str, bytes]) -> str:
    """The digest of a folder out of the SHA-256 of each of its files, for who has those from writing them."""
    whole = hashlib.sha256()
    for name in sorted(files):
        whole.update(name.encode() + files[name])
    return "sha256:" + whole.hexdigest()
