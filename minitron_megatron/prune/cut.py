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


def cut_chunk(reader: WeightReader, source: ModelShape, kept: Kept, chunk: Chunk, out: torch.Tensor) -> None:
    """Fill one chunk of the pruned model, cut out of the source's tensor of the same name."""
    slot = chunk.slot
    layer = None if slot.layer is None else int(kept.layers[slot.layer])
    origin = Slot(slot.row, layer)
    rows, *columns = slot.row.select(source, kept.of_layer(source, layer), layer)
    chosen = [None if c is None else c.sources[0] for c in columns]

    def read(sources: np.ndarray) -> torch.Tensor:
        ordered, back = np.unique(sources, return_inverse=True)
        values = torch.empty((len(ordered), *chunk.shape[1:]), dtype=out.dtype)
        _fill_rows(reader, origin, source, ordered, chosen, as_bits(values))
        return values[torch.from_numpy(back)]

    wanted = np.arange(chunk.start, chunk.stop)
    selection = None if rows is None else rows.part(wanted)
    if selection is None or (selection.plain and (np.diff(selection.sources[0]) > 0).all()):
        _fill_rows(reader, origin, source, wanted if selection is None else selection.sources[0], chosen, as_bits(out))
    else:
        out.copy_(combine(read, selection, out[:0]))


def _fill_rows(
    reader: WeightReader,
    slot: Slot,
    shape: ModelShape,
    rows: np.ndarray,
    columns: list[np.ndarray | None],
    out: np.ndarray,
) -> None:
    """Fill `out` with ascending rows of a slot's tensor, columns cut on the way, a span in a core's cache at a time."""
    cut = [(dim, chosen) for dim, chosen in enumerate(columns, start=1) if chosen is not None]
    for first, stop, block in reader.spans(slot, shape, rows):
        for dim, chosen in cut[:-1]:
            block = np.take(block, chosen, axis=dim, mode="clip")
        if cut:
            # Clipping skips NumPy's check of every index, and with it a copy: the plan's are in range.
            dim, chosen = cut[-1]
            np.take(block, chosen, axis=dim, out=out[first:stop], mode="clip")
        else:
            out[first:stop] = block
