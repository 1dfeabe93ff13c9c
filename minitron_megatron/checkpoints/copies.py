"""Whether all nodes read the same bytes: folders may be copies on disks of their own, one of them another one's or damaged.

    check_copies   always: every rank looks at a little of every file, and one collective compares what they saw
    verify_copies  verify=true: every node reads all of it, its ranks share out the files, and the verdict is that of all nodes

A look tells copies of another model or other data apart, and one that ends too soon. A flipped bit is for verify=true.
"""

import os
import random
import socket
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from blake3 import blake3

from minitron_megatron.checkpoints.digests import MOST_THREADS, joint_digest, sha256_of
from minitron_megatron.checkpoints.folder import MANIFEST, read_manifest
from minitron_megatron.errors import UserError
from minitron_megatron.parallel import collectives
from minitron_megatron.parallel.deciding import ask_rank_zero, check_same

# Looked at as a whole up to so many bytes.
_SMALL = 2**20
# Of a larger file, the first, the last and so many more in between; all of a folder's files together have at most so many.
_PAGE, _PAGES, _PAGES_OF_ALL = 4096, 64, 2048
# Of a cache's thousands of files.
_MOST_FILES = 256


def check_copies(*folders: Path, files: Iterable[Path] = ()) -> None:
    """Raise UserError, on every rank, where one sees other files than rank 0; it names both. Every rank must call it.

    Args:
        folders: with manifests; the files that those list are looked at, a part of them where they are thousands.
        files: others, all of them; those that rank 0 names.
    """
    if collectives.world_size() == 1:
        return
    names = ask_rank_zero(lambda: [*(path for folder in folders for path in _some(folder)), *map(str, files)])
    pages = max(1, min(_PAGES, _PAGES_OF_ALL // max(1, len(names))))
    with ThreadPoolExecutor(MOST_THREADS) as pool:
        seen = pool.map(partial(_look, pages=pages), names)
        check_same(dict(zip(names, seen, strict=True)), "files")


def _some(folder: Path) -> list[str]:
    return [str(folder / name) for name in (MANIFEST, *some_of(sorted(read_manifest(folder)["files"])))]


def some_of[T: (str, Path)](names: list[T]) -> list[T]:
    """As many of thousands of names as are looked at, the first and the last among them."""
    if len(names) <= _MOST_FILES:
        return names
    return sorted({names[0], names[-1], *random.Random(len(names)).sample(names, _MOST_FILES)})


def _look(name: str, pages: int) -> str | None:
    """What is seen of a file: its size, and the digest of a part of it, the same on every rank; None where it is not there."""
    try:
        with open(name, "rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            if size <= _SMALL:
                return f"{size} bytes, {blake3(file.read()).hexdigest()[:16]}"
            draw = random.Random(size)
            places = [0, size - _PAGE, *(draw.randrange(size - _PAGE) for _ in range(pages))]
            whole = blake3()
            for place in places:
                whole.update(os.pread(file.fileno(), _PAGE, place))
            return f"{size} bytes, {whole.hexdigest()[:16]}"
    except OSError:
        return None


def node() -> tuple[str, str]:
    """The host, and the container on it, whose disks this rank sees."""
    try:
        return socket.gethostname(), os.readlink("/proc/self/ns/mnt")
    except OSError:
        return socket.gethostname(), ""


def ranks_by_node() -> dict[tuple[str, str], list[int]]:
    """Of each node its ranks, ascending; the node of rank 0 first. Every rank must call it."""
    found: dict[tuple[str, str], list[int]] = {}
    for rank, where in enumerate(collectives.all_gather_objects(node())):
        found.setdefault(where, []).append(rank)
    return found


def share_of_node[T](things: Iterable[T]) -> list[T]:
    """Of some things, in the same order on every rank, those that this one takes off its node's. Every rank must call it."""
    peers = next(ranks for ranks in ranks_by_node().values() if collectives.rank() in ranks)
    return list(things)[peers.index(collectives.rank()) :: len(peers)]


def by_node[K, V](mine: Mapping[K, V], problem: str | None) -> dict[str, dict[K, V]]:
    """What the ranks of each node have found together, by the node's name, rank 0's first. Every rank must call it.

    Raises UserError, on every rank, with the `problem` of the first that has one.
    """
    nodes, of_ranks = ranks_by_node(), collectives.all_gather_objects((dict(mine), problem))
    for (host, _), ranks in nodes.items():
        for rank in ranks:
            if of_ranks[rank][1] is not None:
                raise UserError(of_ranks[rank][1] + (f" (rank {rank} on {host})" if len(nodes) > 1 else ""))
    return {
        f"{host} (rank {ranks[0]})": {name: one for rank in ranks for name, one in of_ranks[rank][0].items()}
        for (host, _), ranks in nodes.items()
    }


def verify_copies(path: Path, digest: str, also: Callable[[str], None] = lambda name: None) -> None:
    """Read every file of a folder that `output_folder` made on every node, and compare with its digest. Every rank must call it.

    Args:
        path, digest: of the folder.
        also: another check of a file, by its name, on the rank that reads it.

    Raises:
        UserError: on every rank, where a node has other files, or `also` raises it.
    """
    sizes = ask_rank_zero(lambda: read_manifest(path)["files"])
    mine, problem = {}, None
    try:
        for name in share_of_node(sorted(sizes, key=lambda name: (-sizes[name], name))):
            mine[name] = sha256_of(path / name)
            also(name)
    except UserError as error:
        problem = str(error)
    except OSError as error:
        problem = f"{path}: {error.strerror} ({error.filename})"
    found = by_node(mine, problem)
    whole = next((files for files in found.values() if joint_digest(files) == digest), {})
    for where, files in found.items():
        if joint_digest(files) != digest:
            odd = next((f"/{name}" for name in whole if files.get(name) != whole[name]), "")
            at = f" on {where}" if len(found) > 1 else ""
            raise UserError(
                f"{path}{odd} is damaged{at}: its files differ from the digest in its {MANIFEST}; make it again"
            )
