"""Log-probabilities over logits whose vocabulary is spread over the tensor-parallel group; no rank ever holds a whole row.

rank 0: logits [s, b, V/tp]   ids 0 … V/tp-1          max and sum of each row are reduced over the group,
rank 1: logits [s, b, V/tp]   ids V/tp … V-1, pad     padded ids take no part in either

On a GPU the sums of rows are kernels' (models/kernels.py), on a CPU torch's over blocks of rows.
"""

import math
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist

# Sums [n, this rank's columns] over the whole vocabulary, [n].
Total = Callable[[torch.Tensor], torch.Tensor]
# Rows are taken in blocks of about this many elements, so that float32 copies stay small; on a CPU, so that they stay in a
# core's cache: a loss over 49,152 words is 4 times faster than in blocks of 2^24 (docs/benchmarks.md).
BLOCK_ELEMENTS = 2**24
CPU_BLOCK_ELEMENTS = 2**19


def block_rows(logits: torch.Tensor) -> int:
    """How many rows of [n, V / tp] a block has."""
    elements = CPU_BLOCK_ELEMENTS if logits.device.type == "cpu" else BLOCK_ELEMENTS
    return max(1, elements // max(1, logits.shape[-1]))


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
    highest = logits.amax(-1) if logits.shape[-1] else logits.new_full(logits.shape[:1], -torch.inf)
    logits -= reduce_over(highest, dist.ReduceOp.MAX, group)[:, None]
    total = reduce_over(logits.exp().sum(-1), dist.ReduceOp.SUM, group)
    return logits.sub_(total.log()[:, None])


def have_kernels(logits: torch.Tensor) -> bool:
    """Whether models/kernels.py is for these logits: on a GPU (or in Triton's interpreter), but not in float64."""
    return (logits.is_cuda or os.environ.get("TRITON_INTERPRET") == "1") and logits.dtype is not torch.float64


def log2_normalisers(
    logits: Sequence[torch.Tensor], columns: int, temperature: float, group: Any
) -> list[torch.Tensor]:
    """log2 Σ exp(logits / T) of each row over the group, float32 [n], for each of some contiguous [n, V / tp]; by kernels."""
    from minitron_megatron.models import kernels

    sums = [kernels.row_sums(one, columns, temperature) for one in logits]
    mine = torch.stack([one.highest for one in sums])
    highest = reduce_over(mine.clone(), dist.ReduceOp.MAX, group)
    total = torch.stack([one.total for one in sums]).mul_(torch.exp2(mine - highest))
    return list((highest + reduce_over(total, dist.ReduceOp.SUM, group).log2()).unbind())


def local_labels(labels: torch.Tensor, width: int, columns: int, group: Any) -> torch.Tensor:
    """Columns of this rank that labels [n] are, int32; -1 for those of other ranks, which have `width` columns too."""
    mine = labels - dist.get_rank(group) * width
    return torch.where((mine >= 0) & (mine < columns), mine, -1).int()


def label_nll(
    logits: torch.Tensor, labels: torch.Tensor, columns: int, group: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """−log softmax of labels [n], by kernels, of contiguous logits [n, V / tp]; with their columns and the log2 normalisers."""
    mine = local_labels(labels, logits.shape[-1], columns, group)
    (log2_z,) = log2_normalisers([logits], columns, 1.0, group)
    found = logits.gather(-1, mine.long().clamp_min(0)[:, None])[:, 0].float()
    of_label = reduce_over(torch.where(mine >= 0, found, 0), dist.ReduceOp.SUM, group)
    return log2_z * math.log(2) - of_label, mine, log2_z


def log_softmax(logits: torch.Tensor, columns: int, temperature: float, group: Any) -> torch.Tensor:
    """A copy [n, columns] in float32 (float64) of the log-softmax of logits [n, V / tp] / T."""
    compute, whole_rows = torch.promote_types(logits.dtype, torch.float32), dist.get_world_size(group) == 1
    if whole_rows and temperature == 1:
        return torch.log_softmax(logits[:, :columns].to(compute), -1)
    scaled = logits[:, :columns].to(compute, copy=True).div_(temperature)
    return torch.log_softmax(scaled, -1) if whole_rows else log_softmax_(scaled, group)


def label_loss(
    logits: torch.Tensor, labels: torch.Tensor, columns: int, group: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """−log q of labels [n], q the softmax of logits [n, V / tp], and its gradient q − 1 where the label is, [n, columns]."""
    log_q, mine = log_softmax(logits, columns, 1.0, group), local_labels(labels, logits.shape[-1], columns, group)
    there, places = mine >= 0, mine.long().clamp_min(0)[:, None]
    if not log_q.shape[-1]:
        return reduce_over(log_q.new_zeros(len(labels)), dist.ReduceOp.SUM, group), log_q
    nll = torch.where(there, -log_q.gather(-1, places)[:, 0], 0)
    gradient = log_q.exp_().scatter_add_(-1, places, -there[:, None].to(log_q.dtype))
    return reduce_over(nll, dist.ReduceOp.SUM, group), gradient


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
    rows, wanted = logits.detach().reshape(-1, logits.shape[-1]), labels.reshape(-1)
    if have_kernels(logits):
        return label_nll(rows, wanted, columns, group)[0].view(labels.shape)
    step = block_rows(rows)
    parts = zip(rows.split(step), wanted.split(step), strict=True)
    return torch.cat([label_loss(some, of, columns, group)[0] for some, of in parts]).view(labels.shape)


def vocab_parallel_entropy(logits: torch.Tensor, *, vocab_size: int, group: Any) -> torch.Tensor:
    """Entropy in nats of the softmax of logits [..., V / tp], per token, without a gradient; float32 (float64 for float64)."""
    columns = valid_columns(logits, vocab_size, group)
    if have_kernels(logits):
        return _entropy_by_kernels(logits.detach().reshape(-1, logits.shape[-1]), columns, group).view(
            logits.shape[:-1]
        )

    def entropy(rows: torch.Tensor) -> torch.Tensor:
        log_p = log_softmax_(rows, group)
        return -(log_p.exp() * log_p).sum(-1)

    found = torch.cat([entropy(rows) for rows in _blocks(logits, columns)])
    return reduce_over(found, dist.ReduceOp.SUM, group).view(logits.shape[:-1])


def vocab_parallel_argmax(logits: torch.Tensor, *, vocab_size: int, group: Any) -> torch.Tensor:
    """The most probable token id of logits [..., V / tp], int64; of several the smallest, whatever the ranks and the device."""
    columns, first = valid_columns(logits, vocab_size, group), dist.get_rank(group) * logits.shape[-1]
    ids = torch.arange(first, first + columns, dtype=torch.int32, device=logits.device)
    if have_kernels(logits):
        return _argmax_by_kernels(logits.detach().reshape(-1, logits.shape[-1]), columns, first, group).view(
            logits.shape[:-1]
        )

    def smallest_of_highest(rows: torch.Tensor) -> torch.Tensor:
        highest = rows.amax(-1) if columns else rows.new_full(rows.shape[:1], -torch.inf)
        reduce_over(highest, dist.ReduceOp.MAX, group)
        # torch's own argmax may give any of several.
        there = torch.where(rows == highest[:, None], ids, vocab_size)
        return there.amin(-1) if columns else there.new_full(rows.shape[:1], vocab_size)

    found = torch.cat([smallest_of_highest(rows) for rows in _blocks(logits, columns)])
    return reduce_over(found, dist.ReduceOp.MIN, group).view(logits.shape[:-1]).long()


def _entropy_by_kernels(rows: torch.Tensor, columns: int, group: Any) -> torch.Tensor:
    """H = log Z − Σ p x: of the sums of 2^(x − highest) and of that times (x − highest), moved to the group's highest."""
    from minitron_megatron.models import kernels

    mine = kernels.row_sums(rows, columns, 1.0, measure=True)
    highest = reduce_over(mine.highest.clone(), dist.ReduceOp.MAX, group)
    # A rank that has only padding has sums of 0, which are 0 wherever they are moved.
    shift = (mine.highest - highest).clamp_min(-1e30)
    moved = torch.stack((mine.total, mine.moment + shift * mine.total)) * torch.exp2(shift)
    total, moment = reduce_over(moved, dist.ReduceOp.SUM, group)
    return (total.log2() - moment / total) * math.log(2)


def _argmax_by_kernels(rows: torch.Tensor, columns: int, first: int, group: Any) -> torch.Tensor:
    """The smallest id of those that have the group's highest."""
    from minitron_megatron.models import kernels

    mine = kernels.row_sums(rows, columns, 1.0, measure=True)
    highest = reduce_over(mine.highest.clone(), dist.ReduceOp.MAX, group)
    there = torch.where(mine.highest == highest, mine.best + first, torch.iinfo(torch.int32).max)
    return reduce_over(there, dist.ReduceOp.MIN, group).long()


def _blocks(logits: torch.Tensor, columns: int) -> Iterator[torch.Tensor]:
    """Copies [n, columns] in float32 (float64) of a few rows each, in order."""
    compute = torch.promote_types(logits.dtype, torch.float32)
    rows = logits.detach().reshape(-1, logits.shape[-1])
    for block in rows.split(block_rows(rows)):
        yield block[:, :columns].to(compute, copy=True)
