"""Reads distributed checkpoints: the index without executing code, and any region of any tensor.

torch's own reader loads every stored chunk that a region touches, whole, and copies out of it. Here the place of a chunk's bytes
is found once (torch parses its header, on the meta device), and only the rows that are asked for are read:

    __0_0.distcp   … | zip header, data.pkl | bytes of the chunk, row by row, as they are in memory | …
                                              └─ offset    └─ rows start … stop ─┘
"""

import io
import os
import pickle
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint._traverse import set_element
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.utils import _create_file_view

from minitron_megatron.checkpoints.damage import pass_on_unless_damage
from minitron_megatron.checkpoints.index import read_index, short
from minitron_megatron.errors import UserError
from minitron_megatron.models.axes import Slot
from minitron_megatron.models.shape import ModelShape

# Read at once where what is read is not wanted as it is: stays in a core's cache on its way from the file to its place.
SPAN_BYTES = 2 * 2**20
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def as_bits(tensor: torch.Tensor) -> np.ndarray:
    """A CPU tensor's memory as integers of its width: NumPy knows no bfloat16, and moving takes no arithmetic."""
    return tensor.view(_BITS[tensor.itemsize]).numpy()


@dataclass(frozen=True)
class _Place:
    """Where the bytes of a stored chunk begin."""

    path: Path
    offset: int


class WeightReader:
    """Reads any region of any key of a distributed checkpoint, without a process group and without executing code."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.metadata = folder, read_metadata(folder)
        self.places: dict[MetadataIndex, _Place] = {}
        self.boxes: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        self.file: IO[bytes] | None = None

    @property
    def tensors(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of every tensor, by key."""
        stored = self.metadata.state_dict_metadata.items()
        return {k: (tuple(v.size), v.properties.dtype) for k, v in stored if isinstance(v, TensorStorageMetadata)}

    def read(self, key: str, offsets: Sequence[int], sizes: Sequence[int]) -> torch.Tensor:
        """The region of `key` at `offsets` with extent `sizes`, in the dtype on disk."""
        out = torch.empty(tuple(sizes), dtype=self._stored(key).properties.dtype)
        self._fill(key, offsets, as_bits(out))
        return out

    def read_slot(self, slot: Slot, shape: ModelShape, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """One layer's tensor, or rows `start` to `stop` of it."""
        (rows, *rest), lead = slot.shape(shape), slot.lead(shape)
        sizes = ((rows if stop is None else stop) - start, *rest)
        offsets = (*lead, start, *(0 for _ in rest))
        return self.read(slot.key(shape), offsets, (*(1 for _ in lead), *sizes)).view(sizes)

    def read_into(self, out: torch.Tensor, slot: Slot, shape: ModelShape, start: int) -> None:
        """Fill `out` [rows, …], contiguous and in the dtype on disk, with rows of one layer's tensor from `start` on."""
        lead = slot.lead(shape)
        bits = as_bits(out)
        offsets = (*lead, start, *(0 for _ in bits.shape[1:]))
        self._fill(slot.key(shape), offsets, bits.reshape(*(1 for _ in lead), *bits.shape))

    def spans(self, slot: Slot, shape: ModelShape, rows: np.ndarray) -> Iterator[tuple[int, int, np.ndarray]]:
        """Chosen rows of a slot's tensor, a few MiB at a time.

        Args:
            slot, shape: the tensor and the model that it is part of.
            rows: which ones, int64, ascending.

        Yields:
            (first, stop, bits): entries `first` to `stop` of `rows`, as integers [stop - first, …] of the dtype's width, in
            memory that the next span uses again.
        """
        key, lead, rest = slot.key(shape), slot.lead(shape), slot.shape(shape)[1:]
        dtype = self._stored(key).properties.dtype
        span = max(1, SPAN_BYTES // (dtype.itemsize * torch.Size(rest).numel()))
        buffer, first = as_bits(torch.empty((span, *rest), dtype=dtype)), 0
        while first < len(rows):
            begin = int(rows[first])
            stop = int(np.searchsorted(rows, begin + span))
            block = buffer[: int(rows[stop - 1]) + 1 - begin]
            offsets = (*lead, begin, *(0 for _ in rest))
            self._fill(key, offsets, block.reshape(*(1 for _ in lead), *block.shape))
            yield first, stop, block if len(block) == stop - first else block[rows[first:stop] - begin]
            first = stop

    def _stored(self, key: str) -> TensorStorageMetadata:
        stored = self.metadata.state_dict_metadata.get(key)
        if not isinstance(stored, TensorStorageMetadata):
            raise UserError(f"{self.folder} has no tensor {key}: make the folder again")
        return stored

    def _fill(self, key: str, offsets: Sequence[int], out: np.ndarray) -> None:
        """Fill `out` with the region of `key` at `offsets`, from every chunk that has a part of it. Raises UserError."""
        if key not in self.boxes:
            chunks = self._stored(key).chunks
            starts = np.array([c.offsets for c in chunks], np.int64).reshape(len(chunks), -1)
            self.boxes[key] = starts, starts + np.array([c.sizes for c in chunks], np.int64).reshape(len(chunks), -1)
        starts, stops = self.boxes[key]
        low, high = np.maximum(starts, offsets), np.minimum(stops, np.add(offsets, out.shape))
        missing = out.size
        for i in np.flatnonzero((low < high).all(axis=1)):
            part = out[tuple(slice(a - o, b - o) for a, b, o in zip(low[i], high[i], offsets, strict=True))]
            self._fill_from_chunk(key, starts[i], stops[i] - starts[i], low[i] - starts[i], part)
            missing -= part.size
        if missing:
            raise UserError(f"{self.folder}: {key} is incomplete; make the folder again")

    def _fill_from_chunk(
        self, key: str, chunk: np.ndarray, sizes: np.ndarray, start: np.ndarray, part: np.ndarray
    ) -> None:
        """Fill `part` from the chunk of that offset and extent, from `start` within it."""
        place = self._place(key, tuple(map(int, chunk)), tuple(map(int, sizes)))
        # Dimensions before the rows have one entry: what is left is rows of `row` elements each.
        lead = next((dim for dim, n in enumerate(part.shape) if n > 1), part.ndim - 1)
        strides = [int(np.prod(sizes[dim + 1 :])) for dim in range(part.ndim)]
        rows, row = part[(0,) * lead], strides[lead]
        first = sum(int(s) * n for s, n in zip(start[: lead + 1], strides, strict=False))
        offset = place.offset + first * part.itemsize
        if rows[0].size == row and rows.flags.c_contiguous:
            self._read(place.path, offset, rows)
            return
        step = max(1, SPAN_BYTES // (row * part.itemsize))
        columns = tuple(slice(int(s), int(s) + n) for s, n in zip(start[lead + 1 :], rows.shape[1:], strict=True))
        buffer = np.empty((step, *map(int, sizes[lead + 1 :])), part.dtype)
        for begin in range(0, len(rows), step):
            block = buffer[: len(rows[begin : begin + step])]
            self._read(place.path, offset + begin * row * part.itemsize, block)
            rows[begin : begin + step] = block[(slice(None), *columns)]

    def _place(self, key: str, chunk: tuple[int, ...], sizes: tuple[int, ...]) -> _Place:
        """Where a chunk's bytes are: its header is parsed once, by torch, with no data. Raises UserError."""
        index = MetadataIndex(key, torch.Size(chunk))
        if index not in self.places:
            info = self.metadata.storage_data.get(index)
            if info is None or info.transform_descriptors or Path(info.relative_path).name != info.relative_path:
                raise UserError(f"{self.folder}: {key} is not stored as torch_dist does; make the folder again")
            path = self.folder / info.relative_path
            try:
                with open(path, "rb") as file:
                    view = _create_file_view(file, info.offset, info.length)
                    held = torch.load(view, map_location="meta", weights_only=True)
                begin = held.untyped_storage()._checkpoint_offset + held.storage_offset() * held.itemsize
                fits = begin + held.numel() * held.itemsize <= info.length and held.is_contiguous()
            except Exception as error:  # damaged bytes can fail in any way in torch's reader
                pass_on_unless_damage(error)
                raise UserError(f"{self.folder}: {key} is damaged ({short(error)}): make the folder again") from error
            if tuple(held.shape) != sizes or held.dtype is not self._stored(key).properties.dtype or not fits:
                raise UserError(f"{self.folder}: {key} is damaged (a chunk of another size): make the folder again")
            self.places[index] = _Place(path, info.offset + begin)
        return self.places[index]

    def _read(self, path: Path, offset: int, out: np.ndarray) -> None:
        """Fill contiguous memory from a file. Raises UserError where the file ends before."""
        if self.file is None or self.file.name != str(path):
            if self.file is not None:
                self.file.close()
            self.file = open(path, "rb", buffering=0)  # noqa: SIM115 (kept open: the next read is mostly of the same file)
        left = memoryview(out.reshape(-1)).cast("B")
        while left:
            done = os.preadv(self.file.fileno(), [left], offset)
            if not done:
                raise UserError(f"{path} is damaged (it ends too soon): make the folder again")
            left, offset = left[done:], offset + done


def read_metadata(folder: Path) -> Metadata:
    """The index of a distributed checkpoint as torch's own data classes, built of plain data. Raises UserError."""
    index = read_index(folder)
    tensors = {
        key: TensorStorageMetadata(
            TensorProperties(dtype=getattr(torch, of.dtype)),
            torch.Size(of.shape),
            [ChunkStorageMetadata(torch.Size(at), torch.Size(sizes)) for at, sizes in of.chunks],
        )
        for key, of in index.tensors.items()
    }
    places = {
        MetadataIndex(key, at): _StorageInfo(of.file, of.offset, of.length, ("unknown",) if of.transformed else None)
        for (key, at), of in index.pieces.items()
    }
    objects = {key: BytesStorageMetadata() for key in index.objects}
    return Metadata({**tensors, **objects}, storage_data=places, storage_meta=StorageMeta())


def _plain_object(data: io.BytesIO) -> Any:
    """What is no tensor, by torch's unpickler of plain data. Raises pickle.UnpicklingError."""
    with torch.serialization.safe_globals([io.BytesIO]):
        return torch.load(data, weights_only=True)


@contextmanager
def safe_reading() -> Iterator[None]:
    """Within it, megatron.core.dist_checkpointing takes plain data alone out of a checkpoint's index and objects.

    torch reads the index with bare pickle.load, and objects with a torch.load that takes any pickle.
    """
    seen: dict[Path, Metadata] = {}  # Megatron asks several times

    def read(self: dcp.FileSystemReader, *args: Any, **kwargs: Any) -> Metadata:
        folder = Path(self.path)
        if folder not in seen:
            seen[folder] = read_metadata(folder)
        return seen[folder]

    def load(self: DefaultLoadPlanner, read_item: ReadItem, value: io.BytesIO) -> None:
        key = read_item.dest_index.fqn
        try:
            found = _plain_object(value)
        except pickle.UnpicklingError:
            raise UserError(
                f"{next(reversed(seen))}: {key} is damaged, or more than data, which could run a program: make the folder again"
            ) from None
        if self.flatten_state_dict:
            set_element(self.original_state_dict, self.mappings[key], found)
        else:
            self.state_dict[key] = found

    index, objects = dcp.FileSystemReader.read_metadata, DefaultLoadPlanner.load_bytes
    dcp.FileSystemReader.read_metadata, DefaultLoadPlanner.load_bytes = read, load
    try:
        yield
    finally:
        dcp.FileSystemReader.read_metadata, DefaultLoadPlanner.load_bytes = index, objects
