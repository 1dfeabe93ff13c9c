"""Megatron's indexed datasets on disk: written so that a killed run can continue, checked before they are read.

    train.bin    token ids, uint16 or int32, document after document
    train.idx    magic, version, dtype code, number of sequences, number of document ends; then of each sequence its length
                 int32 and its first byte int64; then the document ends int64

While a split is written, train.bin and train.lengths (int32) grow, and their lengths at the last commit are what is good.
"""

import io
import os
import struct
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from minitron_megatron.errors import UserError

# What Megatron's .idx files begin with.
INDEX_HEADER = b"MMIDIDX\x00\x00"
# Version, dtype code, sequences, document ends.
_FIELDS = struct.Struct("<QBQQ")
# Megatron's codes of the types that hold token ids.
_DTYPES = {4: np.dtype(np.int32), 8: np.dtype(np.uint16)}
# Token ids fit 16 bits below this; Megatron's readers apply the same rule to the vocabulary's size.
UINT16_VOCABULARY = 65500
# A look at a split reads so many blocks of so many tokens, evenly spread.
_BLOCKS, _BLOCK = 64, 2**16


def token_dtype(vocabulary: int) -> np.dtype:
    """The type that holds the ids of a vocabulary."""
    return np.dtype(np.uint16 if vocabulary < UINT16_VOCABULARY else np.int32)


def beside(prefix: Path, ending: str) -> Path:
    """A split's file: its prefix may have dots of its own."""
    return prefix.with_name(prefix.name + ending)


class SplitWriter:
    """A split that grows document by document, from where its last commit left it."""

    def __init__(self, prefix: Path, dtype: np.dtype, *, documents: int = 0, tokens: int = 0) -> None:
        self.prefix, self.dtype = prefix, dtype
        self._open = ExitStack()
        self._tokens = self._open.enter_context(_append(beside(prefix, ".bin"), tokens * dtype.itemsize))
        self._lengths = self._open.enter_context(_append(beside(prefix, ".lengths"), documents * 4))

    def add(self, ids: np.ndarray) -> None:
        """One document's ids, in the split's dtype."""
        self._tokens.write(ids.tobytes())
        self._lengths.write(np.int32(len(ids)).tobytes())

    def commit(self) -> None:
        """What was added is on the disk when this returns."""
        for file in (self._tokens, self._lengths):
            file.flush()
            os.fsync(file.fileno())

    def __enter__(self) -> "SplitWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def finish(self) -> None:
        """Write the index. What a later writer needs to go on stays until `forget`."""
        self.commit()
        lengths = np.fromfile(beside(self.prefix, ".lengths"), dtype=np.int32)
        code = next(code for code, dtype in _DTYPES.items() if dtype == self.dtype)
        ends = np.arange(len(lengths) + 1, dtype=np.int64)
        starts = np.concatenate(([0], np.cumsum(lengths[:-1], dtype=np.int64) * self.dtype.itemsize))[: len(lengths)]
        with open(beside(self.prefix, ".idx"), "wb") as index:
            index.write(INDEX_HEADER + _FIELDS.pack(1, code, len(lengths), len(ends)))
            for numbers in (lengths, starts.astype(np.int64), ends):
                index.write(numbers.tobytes())

    def forget(self) -> None:
        """Leave nothing but tokens and index."""
        beside(self.prefix, ".lengths").unlink()


def _append(path: Path, size: int) -> BinaryIO:
    """The file, cut back to a size, to be written on from there."""
    path.touch()
    os.truncate(path, size)
    return io.BufferedWriter(io.FileIO(path, "ab"))


@dataclass(frozen=True)
class Split:
    """A split that was found whole."""

    prefix: Path
    dtype: np.dtype
    sequences: int
    documents: int
    tokens: int

    @property
    def ids(self) -> np.ndarray:
        """All token ids, [tokens], mapped from the disk."""
        return np.memmap(beside(self.prefix, ".bin"), dtype=self.dtype, mode="r")

    def check_ids(self, vocabulary: int, name: str, *, whole: bool = False) -> None:
        """Raise UserError where an id is not of the vocabulary: looks at blocks over the split, or at the whole of it."""
        ids = self.ids
        count = -(-len(ids) // _BLOCK)
        for block in range(count) if whole else np.unique(np.linspace(0, count - 1, min(count, _BLOCKS)).astype(int)):
            piece = ids[block * _BLOCK : (block + 1) * _BLOCK]
            if piece.max() >= vocabulary or piece.min() < 0:
                wrong = int(piece.max() if piece.max() >= vocabulary else piece.min())
                raise UserError(
                    f"{name}: token id {wrong} is not of the vocabulary of {vocabulary}: "
                    "the data are damaged, or of another tokenizer"
                )


def open_split(prefix: Path, name: str) -> Split:
    """Check that index and tokens fit each other, reading a few bytes. Raises UserError that begins with `name`."""
    index, tokens = beside(prefix, ".idx"), beside(prefix, ".bin")
    for file in (index, tokens):
        if not file.is_file():
            raise UserError(f"{name}: {file} is missing")
    with open(index, "rb") as file:
        head = file.read(len(INDEX_HEADER) + _FIELDS.size)
        if not head.startswith(INDEX_HEADER) or len(head) < len(INDEX_HEADER) + _FIELDS.size:
            raise UserError(f"{name}: {index} is damaged, or no index of Megatron's")
        version, code, sequences, ends = _FIELDS.unpack(head[len(INDEX_HEADER) :])
        if version != 1 or code not in _DTYPES:
            raise UserError(f"{name}: {index} is of version {version} and dtype code {code}: 1, and 4 or 8, are read")
        if index.stat().st_size != len(head) + 12 * sequences + 8 * ends:
            raise UserError(f"{name}: {index} is damaged: its size is not that of {sequences} sequences")
        last, start = _last(file, len(head), sequences) if sequences else (0, 0)
    dtype = _DTYPES[code]
    size = tokens.stat().st_size
    if size != start + last * dtype.itemsize:
        raise UserError(f"{name}: {tokens} has {size} bytes, not the {start + last * dtype.itemsize} of its index")
    return Split(prefix, dtype, sequences, ends - 1, size // dtype.itemsize)


def _last(file: BinaryIO, head: int, sequences: int) -> tuple[int, int]:
    """(length in tokens, first byte) of the last sequence."""
    file.seek(head + 4 * (sequences - 1))
    (length,) = struct.unpack("<i", file.read(4))
    file.seek(head + 4 * sequences + 8 * (sequences - 1))
    (start,) = struct.unpack("<q", file.read(8))
    return length, start
