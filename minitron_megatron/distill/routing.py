"""Moves what ranks have of a step's micro-batches to the ranks that need it, from one layout to another in the same processes.

A step's micro-batches are numbered over all data-parallel ranks, as data/datasets.py hands them out: the i-th of data rank d in a
layout of D is number i · D + d. Of each a rank has some positions of the sequence: all, or a share where context or sequence
parallelism split it.

    4 micro-batches                          teacher: tensor 2, sequence parallel, data 1       student: data 2
    number  0  1  2  3                       rank 0: first half of 0 1 2 3                      rank 0: 0 2
    student's data rank  0  1  0  1          rank 1: second half of 0 1 2 3                     rank 1: 1 3

    rank 0 keeps the first half of 0 and 2 and sends those of 1 and 3 to rank 1, which sends the second halves of 0 and 2

Who sends what is arithmetic that every rank does for itself; only tensors travel, each position once to each rank that needs it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
import torch.distributed as dist

from minitron_megatron.parallel import collectives
from minitron_megatron.parallel.layout import Layout


@dataclass(frozen=True)
class Side:
    """Who has, or needs, which positions of which micro-batch in a layout.

    Attributes:
        layout: of one of the models.
        last_stage: on ranks of the last pipeline stage only, as final hidden states are; else on all, as tokens are.
        split: over tensor-parallel ranks, as sequence parallelism splits hidden states.
    """

    layout: Layout
    last_stage: bool = False
    split: bool = False

    @classmethod
    def of_tokens(cls, layout: Layout) -> "Side":
        """Tokens: every rank has its data-parallel share."""
        return cls(layout)

    @classmethod
    def of_final_states(cls, layout: Layout) -> "Side":
        """Final hidden states."""
        return cls(layout, last_stage=True, split=layout.sequence and layout.tensor > 1)

    @property
    def _stages(self) -> range:
        last = self.layout.pipeline - 1
        return range(last if self.last_stage else 0, last + 1)

    def numbers(self, rank: int, count: int) -> range:
        """Which of `count` micro-batches a rank has, in order."""
        _, _, data, stage = self.layout.coordinates(rank)
        return range(data, count, self.layout.data) if stage in self._stages else range(0)

    def ranks(self, number: int) -> Iterator[int]:
        """Every rank that has something of a micro-batch."""
        for stage in self._stages:
            for context in range(self.layout.context):
                for tensor in range(self.layout.tensor):
                    yield self._rank(number, tensor, context, stage)

    def senders(self, number: int, to: int) -> list[int]:
        """Ranks that together have a micro-batch, each position once, for rank `to`: of several that have the same, `to`
        itself, else one of them by its number, so that they share the work."""
        found = []
        for context in range(self.layout.context):
            for shard in range(self.layout.tensor) if self.split else [None]:
                tensors = range(self.layout.tensor) if shard is None else [shard]
                alike = [self._rank(number, t, context, stage) for stage in self._stages for t in tensors]
                found.append(to if to in alike else alike[to % len(alike)])
        return found

    def positions(self, rank: int, length: int) -> np.ndarray:
        """Positions of a sequence that a rank has of each of its micro-batches, in its order.

        A context-parallel rank has chunks c and 2C - 1 - c of 2C, as `data.datasets.on_this_context_rank` takes them.
        """
        tensor, context, _, _ = self.layout.coordinates(rank)
        parts, positions = self.layout.context, np.arange(length)
        if parts > 1:
            positions = positions.reshape(2 * parts, -1)[[context, 2 * parts - 1 - context]].ravel()
        return np.split(positions, self.layout.tensor)[tensor] if self.split else positions

    def _rank(self, number: int, tensor: int, context: int, stage: int) -> int:
        layout = self.layout
        return layout.rank(tensor=tensor, context=context, data=number % layout.data, pipeline=stage)


@dataclass(frozen=True)
class Message:
    """Positions of one micro-batch from one rank to another: rows of the sender's tensor, and their places in the receiver's."""

    number: int
    sender: int
    to: int
    rows: np.ndarray
    places: np.ndarray


def messages(source: Side, target: Side, rank: int, count: int, length: int) -> Iterator[Message]:
    """What a rank sends, and then what it gets (from itself, too), both by the number of the micro-batch.

    So two ranks have the messages between them in the same order.
    """
    for number in source.numbers(rank, count):
        for to in target.ranks(number):
            if to != rank and rank in source.senders(number, to):
                yield from _message(source, target, number, rank, to, length)
    for number in target.numbers(rank, count):
        for sender in source.senders(number, rank):
            yield from _message(source, target, number, sender, rank, length)


def _message(source: Side, target: Side, number: int, sender: int, to: int, length: int) -> Iterator[Message]:
    rows, places = _overlap(source, target, sender, to, length)
    if len(rows):
        yield Message(number, sender, to, rows, places)


@lru_cache(maxsize=4096)
def _overlap(source: Side, target: Side, sender: int, to: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the sender's positions that the receiver needs, and their places there, in the receiver's order."""
    has, needs = source.positions(sender, length), target.positions(to, length)
    _, rows, places = np.intersect1d(has, needs, assume_unique=True, return_indices=True)
    order = np.argsort(places)
    return rows[order], places[order]


def route(
    tensors: Sequence[torch.Tensor], source: Side, target: Side, *, count: int, length: int, like: torch.Tensor
) -> list[torch.Tensor]:
    """Give every rank of `target` what ranks of `source` have; every rank of the job calls it.

    Args:
        tensors: of this rank's micro-batches in order, [positions, …] each; none where it has none.
        source, target: who has what now, and afterwards.
        count: micro-batches over all data-parallel ranks.
        length: tokens of a whole sequence.
        like: of the dtype, device and trailing dimensions of what is moved; its first dimension does not matter.

    Returns:
        What this rank needs, of its micro-batches in order: [positions, …] each; its own tensor where it has it all.
    """
    me = collectives.rank()
    given = dict(zip(source.numbers(me, count), tensors, strict=True))
    needed = len(target.positions(me, length))
    found: dict[int, list[tuple[np.ndarray, torch.Tensor]]] = {number: [] for number in target.numbers(me, count)}
    operations = []
    for message in messages(source, target, me, count, length):
        if message.sender == me:
            part = _rows(given[message.number], message.rows)
            if message.to == me and len(part) < len(given[message.number]):
                part = part.clone()  # a view would keep all of it
        else:
            part = like.new_empty((len(message.rows), *like.shape[1:]))
        if message.to == me:
            found[message.number].append((message.places, part))
        if message.sender != message.to:
            peer, direction = (message.to, dist.isend) if message.sender == me else (message.sender, dist.irecv)
            operations.append(dist.P2POp(direction, part, peer))
    for work in dist.batch_isend_irecv(operations) if operations else []:
        work.wait()
    return [_joined(parts, needed) for parts in found.values()]


def _rows(tensor: torch.Tensor, rows: np.ndarray) -> torch.Tensor:
    """Rows of a tensor, contiguous; a view where they follow one another."""
    if (np.diff(rows) == 1).all():
        return tensor[rows[0] : rows[-1] + 1].contiguous()
    return tensor[torch.from_numpy(rows).to(tensor.device)]


def _joined(parts: list[tuple[np.ndarray, torch.Tensor]], needed: int) -> torch.Tensor:
    """Parts put at their places."""
    if len(parts) == 1:
        return parts[0][1]
    out = parts[0][1].new_empty((needed, *parts[0][1].shape[1:]))
    for places, part in parts:
        out[torch.from_numpy(places).to(out.device)] = part
    return out
