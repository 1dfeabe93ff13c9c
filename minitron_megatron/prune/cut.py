"""Cuts one chunk of a smaller model out of the source's weights folder, by the axis table alone.

    source tensor  [rows, columns] ──selection of rows, copied or merged──▶ ──selection of columns──▶  target chunk

Rows are read a span at a time, so that no step holds more than two blocks of the source beside the chunk that is made.
"""

from collections.abc import Callable

import numpy as np
import torch

from minitron_megatron.checkpoints.weights import BLOCK_BYTES, Chunk, WeightReader
from minitron_megatron.models.axes import Selection, Slot
from minitron_megatron.models.shape import ModelShape
from minitron_megatron.prune.select import Kept

Rows = Callable[[np.ndarray], torch.Tensor]


def combine(read: Rows, selection: Selection, like: torch.Tensor) -> torch.Tensor:
    """Entries of a selection along the first dimension, out of `read(sources)`, which gives them for any int64 [n].

    Copies keep their bits. Merged entries are summed in float32 (float64 for float64), term by term, and rounded once.
    `like` [0, …] has the shape of the other dimensions, the dtype and the device.
    """
    if selection.plain:
        return read(selection.sources[0])
    compute = torch.promote_types(like.dtype, torch.float32)
    out = torch.zeros((selection.sources.shape[1], *like.shape[1:]), dtype=compute, device=like.device)
    for sources, weights in zip(selection.sources, selection.weights, strict=True):
        (rows,) = np.nonzero(weights)
        if len(rows):
            scale = torch.from_numpy(weights[rows]).to(out).view(-1, *(1 for _ in like.shape[1:]))
            where = torch.from_numpy(rows).to(out.device)
            out.index_add_(0, where, read(sources[rows]).to(compute) * scale)
    return out.to(like.dtype)


def cut_chunk(reader: WeightReader, source: ModelShape, kept: Kept, chunk: Chunk) -> torch.Tensor:
    """One chunk of the pruned model, cut out of the source's tensor of the same name."""
    slot = chunk.slot
    layer = None if slot.layer is None else int(kept.layers[slot.layer])
    origin = Slot(slot.row, layer)
    rows, *columns = slot.row.select(source, kept.of_layer(source, layer), layer)
    chosen = [None if c is None else torch.from_numpy(c.sources[0]) for c in columns]

    def read(sources: np.ndarray) -> torch.Tensor:
        return _read_rows(reader, origin, source, sources, chosen)

    if rows is None:
        return read(np.arange(chunk.start, chunk.stop))
    like = torch.empty((0, *chunk.shape[1:]), dtype=getattr(torch, source.dtype))
    return combine(read, rows.part(np.arange(chunk.start, chunk.stop)), like)


def _read_rows(
    reader: WeightReader, slot: Slot, shape: ModelShape, rows: np.ndarray, columns: list[torch.Tensor | None]
) -> torch.Tensor:
    """Any rows of a slot's tensor, in any order, with columns already cut.

    Read in spans that do not cross the source's own chunks: torch reads a stored chunk whole, however little of it is asked for.
    """
    whole = slot.shape(shape)
    row_bytes = torch.Size(whole[1:]).numel() * getattr(torch, shape.dtype).itemsize
    span = max(1, BLOCK_BYTES // row_bytes)
    ordered, back = np.unique(rows, return_inverse=True)
    parts, start = [], 0
    while start < len(ordered):
        first = int(ordered[start])
        stop = int(np.searchsorted(ordered, (first // span + 1) * span))
        block = reader.read_slot(slot, shape, first, int(ordered[stop - 1]) + 1)
        wanted = ordered[start:stop] - first
        if len(wanted) < len(block):
            block = block[torch.from_numpy(wanted)]
        for dim, chosen in enumerate(columns, start=1):
            if chosen is not None:
                block = block.index_select(dim, chosen)
        parts.append(block)
        start = stop
    whole_part = parts[0] if len(parts) == 1 else torch.cat(parts)
    in_order = len(back) == len(ordered) and bool((np.diff(back) == 1).all())
    return whole_part if in_order else whole_part[torch.from_numpy(back)]
