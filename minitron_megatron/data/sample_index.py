"""Indices of samples, kept next to the data: rank 0 builds one once, and compares it with its digests whenever it is opened.

    data/cache/train-4096-1234-0a1b2c3d/   what Megatron builds, and digests.json: size and BLAKE3 of each of its files

Which samples a run sees is in there, so no byte of it is taken on trust. What differs, or is missing, is built again: an index
follows from data, seed and length alone. It has 12 bytes a sample and 4 a document: reading all of it takes about a second for
100 billion tokens, and the run is going to read it anyway.
"""

import json
import logging
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from minitron_megatron.checkpoints.digests import MOST_THREADS, FileDigest, digest_files
from minitron_megatron.console import busy
from minitron_megatron.errors import UserError
from minitron_megatron.parallel.deciding import ask_rank_zero, wait_until_seen
from minitron_megatron.plain_files import read_json

DIGESTS = "digests.json"
log = logging.getLogger(__name__)


def keep_index(cache: Path, build: Callable[[Path], object]) -> list[Path]:
    """Have a whole index in a folder, on every rank, which must all call it; gives its files.

    Args:
        cache: where it is, or is going to be.
        build: fills a folder with it, on rank 0.

    Raises:
        UserError: on every rank, when it cannot be written.
    """

    def make() -> list[Path]:
        try:
            odd = what_is_odd(cache) if cache.is_dir() else "it is not there"
            if odd:
                if cache.is_dir():
                    log.warning("the sample index %s is not as it was made (%s): it is made again", cache, odd)
                _build(cache, build)
            return sorted(cache.iterdir())
        except OSError as error:
            why = error.strerror or error
            raise UserError(
                f"data.path={cache.parent.parent}: the sample index cannot be written to {cache.parent} ({why})"
            ) from None

    files = ask_rank_zero(make)
    wait_until_seen(*files)
    return files


def what_is_odd(cache: Path) -> str | None:
    """Why an index is not to be read: a file of it that is not as it was made; None for a whole one."""
    try:
        known = {name: FileDigest.from_json(one) for name, one in read_json(cache / DIGESTS).items()}
        there = {path.name for path in cache.iterdir()} - {DIGESTS}
        if there != known.keys():
            return f"{min(there ^ known.keys())} is missing, or was added"
        found = digest_files(cache, known, MOST_THREADS)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{DIGESTS}: {type(error).__name__}"
    return next((f"{name} has other bytes" for name in sorted(known) if found[name] != known[name]), None)


def _build(cache: Path, build: Callable[[Path], object]) -> None:
    """Build an index in a folder that is renamed when whole: a killed or a second job cannot spoil it. Raises OSError."""
    cache.parent.mkdir(exist_ok=True)
    with (
        busy(f"making the sample index {cache}"),
        tempfile.TemporaryDirectory(dir=cache.parent, prefix=".partial-") as unfinished,
    ):
        made = Path(unfinished) / "index"
        build(made)
        digests = digest_files(made, sorted(path.name for path in made.iterdir()), MOST_THREADS)
        (made / DIGESTS).write_text(json.dumps({name: one.to_json() for name, one in digests.items()}))
        if cache.is_dir():
            os.rename(cache, Path(unfinished) / "replaced")
        try:
            os.rename(made, cache)
        except OSError:
            # Another job was quicker; its index is the same.
            if not cache.is_dir():
                raise
