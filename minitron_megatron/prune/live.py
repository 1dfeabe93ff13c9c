"""Cuts a live sharded model into a live smaller one, from any layout into any other, without a file in between.

Both sides of every tensor follow from the axis table: which flat positions a rank of a layout holds. What a target rank needs
is a selection of source positions; the ranks that hold them send just those. Kept indices that lie unevenly over the source's
ranks so come out even:

    ffn neurons, tensor 2      rank 0: 0 1 2 3    rank 1: 4 5 6 7         kept: 1 2 3 6
    target, tensor 2           rank 0: 1 2        rank 1: 3 6             rank 0 keeps 1 2, sends 3 to rank 1

Tensor by tensor, in the order of the data flow: beside its two shards a rank holds the pieces of one tensor.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
import torch.distributed as dist

from minitron_megatron.models.axes import Keep, Place, Row, Selection, Slot, axis_table, slots, tensor_parallel_keep
from minitron_megatron.models.limits import layers_of_stages
from minitron_megatron.models.shape import ModelShape
from minitron_megatron.parallel import collectives
from minitron_megatron.parallel.layout import Layout
from minitron_megatron.prune.cut import combine
from minitron_megatron.prune.select import Kept


@dataclass(frozen=True)
class Side:
    """A model in a layout: which ranks hold which positions of which tensor."""

    shape: ModelShape
    layout: Layout

    @cached_property
    def _stage_of_layer(self) -> np.ndarray:
        """Pipeline rank of each layer; stages of the interleaved schedule go round the ranks."""
        layers = layers_of_stages(self.shape.num_layers, self.layout)
        return np.repeat(np.arange(len(layers)), layers) % self.layout.pipeline

    def stages(self, slot: Slot) -> list[int]:
        """Pipeline ranks that hold a slot: one, or the first and the last for a tied embedding."""
        last = self.layout.pipeline - 1
        if slot.row.place is Place.LAYER:
            return [int(self._stage_of_layer[slot.layer])]
        if slot.row.place is Place.LAST:
            return [last]
        return sorted({0, last}) if slot.row.tied_path else [0]

    def ranks(self, slot: Slot, tensor: int) -> list[int]:
        """Ranks that hold tensor-parallel shard `tensor` of a slot: its replicas."""
        layout = self.layout
        return [
            layout.rank(tensor=tensor, pipeline=p, data=d, context=c)
            for p in self.stages(slot)
            for d in range(layout.data)
            for c in range(layout.context)
        ]

    def positions(self, slot: Slot, dim: int, tensor: int) -> np.ndarray:
        """Flat positions of dimension `dim` that a tensor-parallel rank holds, in its own order."""
        axis = slot.row.tensor_parallel_axis
        if axis is None:
            return np.arange(slot.shape(self.shape)[dim])
        mine = tensor_parallel_keep(self.shape, tensor, self.layout.tensor, slot.layer)
        held = slot.row.indices(self.shape, {axis: mine[axis]}, slot.layer)[dim]
        return np.arange(slot.shape(self.shape)[dim]) if held is None else held


Tensors = Mapping[tuple[str, int | None], torch.Tensor]


def local_tensors(chunks: Sequence[torch.nn.Module], shape: ModelShape) -> Tensors:
    """This rank's parameters by (row's name, layer); a tied embedding's copy on the last stage is `embedding` there."""
    found: dict[tuple[str, int | None], torch.Tensor] = {}
    for chunk in chunks:
        parameters = dict(chunk.named_parameters())
        layers = {layer.layer_number - 1: i for i, layer in enumerate(chunk.decoder.layers)}
        for row in axis_table(shape):
            where = layers.items() if row.place is Place.LAYER else [(None, 0)]
            pairs = {(row.name, number): row.parameter(parameters, i) for number, i in where}
            found |= {key: parameter.data for key, parameter in pairs.items() if parameter is not None}
    return found


def cut_live(source: Side, given: Tensors, target: Side, wanted: Tensors, kept: Kept) -> None:
    """Fill the target model's parameters from the source's, over all ranks of both layouts (the same processes).

    Args:
        source, given: the whole model's layout, and this rank's part of it (`local_tensors`).
        target, wanted: the same of the smaller one, whose tensors are overwritten.
        kept: what stays.
    """
    for slot in slots(target.shape):
        _Move(source, target, kept, slot).run(given, wanted)


@dataclass(frozen=True)
class _Pieces:
    """What a target's tensor-parallel rank makes of the sharded dimension, and which source rank has which of it."""

    selection: Selection
    needed: np.ndarray
    # For each source tensor-parallel rank: places in `needed`, and positions in that rank's own tensor.
    of: list[tuple[np.ndarray, np.ndarray]]


class _Move:
    """One tensor on its way."""

    def __init__(self, source: Side, target: Side, kept: Kept, slot: Slot) -> None:
        self.source, self.target, self.slot = source, target, slot
        layer = None if slot.layer is None else int(kept.layers[slot.layer])
        self.origin = Slot(slot.row, layer)
        self.keep: Keep = kept.of_layer(source.shape, layer)
        self.dim = _sharded_dim(slot.row)
        sizes = self.origin.shape(source.shape)
        chosen = slot.row.select(source.shape, self.keep, layer)
        self.selections = [
            Selection.of(np.arange(size)) if c is None else c for c, size in zip(chosen, sizes, strict=True)
        ]
        self.cut = [c is not None for c in chosen]

    def run(self, given: Tensors, wanted: Tensors) -> None:
        """Send what others need of this rank's part, and put together what this rank needs."""
        me = collectives.rank()
        pieces = [self._pieces(i) for i in range(self.target.layout.tensor)]
        mine = wanted.get((self.slot.row.name, self.slot.layer))
        operations, parts = [], {}
        # By (target's, source's tensor rank): replicas that need the same get the same, made once however many there are.
        taken: dict[tuple[int, int], torch.Tensor] = {}
        for to, i, j, sender in self._messages(pieces):
            if me not in (to, sender):
                continue
            if me == sender:
                if (i, j) not in taken:
                    taken[i, j] = self._take(given[self.origin.row.name, self.origin.layer], pieces[i].of[j][1])
                part = taken[i, j]
            else:
                part = self._buffer(mine, len(pieces[i].of[j][0]))
            if me == to:
                parts[j] = part
            if to != sender:
                operations.append(
                    dist.P2POp(dist.isend, part, to) if me == sender else dist.P2POp(dist.irecv, part, sender)
                )
        for work in dist.batch_isend_irecv(operations) if operations else []:
            work.wait()
        if mine is not None:
            self._put(mine, pieces[self.target.layout.place(me)[0]], parts)

    def _messages(self, pieces: list[_Pieces]) -> list[tuple[int, int, int, int]]:
        """(target rank, its tensor rank, source's tensor rank, the replica that sends), the same list on every rank."""
        out = []
        for i, piece in enumerate(pieces):
            for number, to in enumerate(self.target.ranks(self.slot, i)):
                for j, (places, _) in enumerate(piece.of):
                    if len(places):
                        replicas = self.source.ranks(self.origin, j)
                        # Its own part if it has it; else replicas share the work.
                        out.append((to, i, j, to if to in replicas else replicas[number % len(replicas)]))
        return out

    def _pieces(self, tensor: int) -> _Pieces:
        whole = self.selections[self.dim]
        selection = whole.part(self.target.positions(self.slot, self.dim, tensor))
        needed = np.unique(selection.sources[selection.weights != 0])
        of, found = [], np.zeros(len(needed), bool)
        for j in range(self.source.layout.tensor):
            held = self.source.positions(self.origin, self.dim, j)
            order = np.argsort(held, kind="stable")
            at = np.minimum(np.searchsorted(held[order], needed), len(held) - 1)
            # A replicated tensor is on every tensor-parallel rank: the first that has a position gives it, but a rank of
            # the same number saves the way.
            there = (held[order[at]] == needed) & ~found
            if self.slot.row.tensor_parallel_axis is None and j != tensor % self.source.layout.tensor:
                there[:] = False
            found |= there
            of.append((np.flatnonzero(there), order[at[there]]))
        return _Pieces(selection, needed, of)

    def _take(self, tensor: torch.Tensor, positions: np.ndarray) -> torch.Tensor:
        """This rank's positions of the sharded dimension, every other dimension cut already."""
        for dim, selection in enumerate(self.selections):
            if dim != self.dim and self.cut[dim]:
                tensor = tensor.index_select(dim, torch.from_numpy(selection.sources[0]).to(tensor.device))
        if len(positions) == tensor.shape[self.dim] and (np.diff(positions) == 1).all():
            return tensor.contiguous()
        return tensor.index_select(self.dim, torch.from_numpy(positions).to(tensor.device)).contiguous()

    def _buffer(self, like: torch.Tensor, count: int) -> torch.Tensor:
        size = list(like.shape)
        size[self.dim] = count
        return like.new_empty(size)

    def _put(self, out: torch.Tensor, piece: _Pieces, parts: Mapping[int, torch.Tensor]) -> None:
        """Put the parts in the order of `needed`, make the selection of them, write it into the parameter."""
        if len(parts) == 1:
            (have,) = parts.values()
        else:
            have = self._buffer(out, len(piece.needed))
            for j, part in parts.items():
                have.index_copy_(self.dim, torch.from_numpy(piece.of[j][0]).to(out.device), part)

        def read(sources: np.ndarray) -> torch.Tensor:
            places = np.searchsorted(piece.needed, sources)
            if len(places) == len(piece.needed) and (np.diff(places) == 1).all():
                return have.movedim(self.dim, 0)
            return have.index_select(self.dim, torch.from_numpy(places).to(out.device)).movedim(self.dim, 0)

        target = out.movedim(self.dim, 0)
        target.copy_(combine(read, piece.selection, target[:0]))


def _sharded_dim(row: Row) -> int:
    """The dimension that tensor parallelism shards; the first where it shards none."""
    axis = row.tensor_parallel_axis
    return next((i for i, dim in enumerate(row.dims) if axis in dim.axes), 0)
