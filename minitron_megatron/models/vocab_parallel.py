"""Log-probabilities over logits whose vocabulary is spread over the tensor-parallel group; no rank ever holds a whole row.

rank 0: logits [s, b, V/tp]   ids 0 … V/tp-1          max and sum of each row are reduced over the group,
rank 1: logits [s, b, V/tp]   ids V/tp … V-1, pad     padded ids take no part in either
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

# Rows are taken in blocks of about this many elements, so that float32 copies stay small.
BLOCK_ELEMENTS = 2**24


def valid_columns(logits: torch.Tensor, vocab_size: int, group: Any) -> int:
    """How many of this rank's columns are real token ids."""
    width = logits.shape[-1]
    return max(0, min(width, vocab_size - dist.get_rank(group) * width))


def reduce_over(tensor: torch.Tensor, op: Any, group: Any) -> torch.Tensor:
    """Reduce in place over a group; nothing to do in a group of one."""
    if dist.get_world_size(group) > 1:
        dist.all_reduce(tensor, op=op, group=group)
    return tensor


def log_softmax_(logits: torch.Tensor, group: Any) -> torch.Tensor:
    """Log-softmax of [n, real columns of this rank] over the whole group; n rows, in place."""
    # A rank may hold nothing but padding.
    highest = logits.max(-1).values if logits.shape[-1] else logits.new_full(logits.shape[:1], -torch.inf)
    logits -= reduce_over(highest, dist.ReduceOp.MAX, group)[:, None]
    total = reduce_over(logits.exp().sum(-1), dist.ReduceOp.SUM, group)
    return logits.sub_(total.log()[:, None])


def vocab_parallel_nll(logits: torch.Tensor, labels: torch.Tensor, *, vocab_size: int, group: Any) -> torch.Tensor:
    """Negative log likelihood of `labels`, per token, without a gradient.

    Args:
        logits: [s, b, V / tp].
        labels: int64 [s, b], ids below vocab_size.
        vocab_size: real ids; the rest is padding.
        group: the tensor-parallel process group.

    Returns:
        [s, b] float32 (float64 for float64).
    """
    columns = valid_columns(logits, vocab_size, group)
    first = dist.get_rank(group) * logits.shape[-1]
    compute = torch.promote_types(logits.dtype, torch.float32)
    rows, wanted = logits.detach().reshape(-1, logits.shape[-1]), labels.reshape(-1) - first
    out = rows.new_zeros(len(rows), dtype=compute)
    step = max(1, BLOCK_ELEMENTS // rows.shape[-1])
    for start in range(0, len(rows), step):
        block = slice(start, start + step)
        log_q = log_softmax_(rows[block, :columns].to(compute, copy=True), group)
        mine = (wanted[block] >= 0) & (wanted[block] < columns)
        if columns:
            found = log_q.gather(-1, wanted[block].clamp(0, columns - 1)[:, None])[:, 0]
            out[block] = torch.where(mine, -found, out[block])
    return reduce_over(out, dist.ReduceOp.SUM, group).view(labels.shape)


def vocab_parallel_entropy(logits: torch.Tensor, *, vocab_size: int, group: Any) -> torch.Tensor:
    """Entropy in nats of the softmax of logits [..., V / tp], per token, without a gradient; float32 (float64 for float64)."""
    columns = valid_columns(logits, vocab_size, group)

    def entropy(rows: torch.Tensor) -> torch.Tensor:
        log_p = log_softmax_(rows, group)
        return -(log_p.exp() * log_p).sum(-1)

    found = torch.cat([entropy(rows) for rows in _blocks(logits, columns)])
    return reduce_over(found, dist.ReduceOp.SUM, group).view(logits.shape[:-1])


def vocab_parallel_argmax(logits: torch.Tensor, *, vocab_size: int, group: Any) -> torch.Tensor:
    """The most probable token id of logits [..., V / tp], int64; of several the smallest, whatever the ranks and the device."""
    columns, first = valid_columns(logits, vocab_size, group), dist.get_rank(group) * logits.shape[-1]
    ids = torch.arange(first, first + columns, dtype=torch.int32, device=logits.device)

    def smallest_of_highest(rows: torch.Tensor) -> torch.Tensor:
        highest = rows.max(-1).values if columns else rows.new_full(rows.shape[:1], -torch.inf)
        reduce_over(highest, dist.ReduceOp.MAX, group)
        # torch's own argmax may give any of several.
        there = torch.where(rows == highest[:, None], ids, vocab_size)
        return there.min(-1).values if columns else there.new_full(rows.shape[:1], vocab_size)

    found = torch.cat([smallest_of_highest(rows) for rows in _blocks(logits, columns)])
    return reduce_over(found, dist.ReduceOp.MIN, group).view(logits.shape[:-1]).long()


def _blocks(logits: torch.Tensor, columns: int) -> Iterator[torch.Tensor]:
    """Copies [n, columns] in float32 (float64) of a few rows each, in order."""
    compute = torch.promote_types(logits.dtype, torch.float32)
    rows = logits.detach().reshape(-1, logits.shape[-1])
    for block in rows.split(max(1, BLOCK_ELEMENTS // rows.shape[-1])):
        yield block[:, :columns].to(compute, copy=True)
