"""Cuts one chunk of a smaller model out of the source's weights folder, by the axis table alone.

    source tensor  [rows, columns] ──selection of rows, copied or merged──▶ ──selection of columns──▶  target chunk

Rows are read and cut a few MiB at a time, so that beside the chunk that is made there is next to nothing of the source.
"""

from collections.abc import Callable

import numpy as np
import torch

from minitron_megatron.checkpoints.reading import WeightReader, as_bits
from minitron_megatron.checkpoints.weights import Chunk
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
    chosen = [None if c is None else c.sources[0] for c in columns]

    def read(sources: np.ndarray) -> torch.Tensor:
        return _read_rows(reader, origin, source, sources, chosen)

    if rows is None:
        return read(np.arange(chunk.start, chunk.stop))
    like = torch.empty((0, *chunk.shape[1:]), dtype=getattr(torch, source.dtype))
    return combine(read, rows.part(np.arange(chunk.start, chunk.stop)), like)


def _read_rows(
    reader: WeightReader, slot: Slot, shape: ModelShape, rows: np.ndarray, columns: list[np.ndarray | None]
) -> torch.Tensor:
    """Any rows of a slot's tensor, in any order, with columns already cut, a span in a core's cache at a time."""
    ordered, back = np.unique(rows, return_inverse=True)
    sizes = [n if c is None else len(c) for n, c in zip(slot.shape(shape)[1:], columns, strict=True)]
    out = torch.empty((len(ordered), *sizes), dtype=getattr(torch, shape.dtype))
    bits = as_bits(out)
    for first, stop, block in reader.spans(slot, shape, ordered):
        for dim, chosen in enumerate(columns, start=1):
            if chosen is not None:
                # Clipping skips NumPy's check of every index, and with it a copy: the plan's are in range.
                block = np.take(block, chosen, axis=dim, mode="clip")
        bits[first:stop] = block
    in_order = len(back) == len(ordered) and bool((np.diff(back) == 1).all())
    return out if in_order else out[torch.from_numpy(back)]
