"""Losses over logits whose vocabulary is spread over the tensor-parallel group; no rank ever holds a whole row.

rank 0: logits [s, b, V/tp]   ids 0 … V/tp-1          max and sum of each row are reduced over the group,
rank 1: logits [s, b, V/tp]   ids V/tp … V-1, pad     padded ids take no part in either
"""

from typing import Any

import torch
import torch.distributed as dist

# Rows are taken in blocks of about this many elements, so that float32 copies stay small.
BLOCK_ELEMENTS = 2**24


def _valid_columns(logits: torch.Tensor, vocab_size: int, group: Any) -> int:
    """How many of this rank's columns are real token ids."""
    width = logits.shape[-1]
    return max(0, min(width, vocab_size - dist.get_rank(group) * width))


def _reduce(tensor: torch.Tensor, op: Any, group: Any) -> torch.Tensor:
    if dist.get_world_size(group) > 1:
        dist.all_reduce(tensor, op=op, group=group)
    return tensor


def _log_softmax(logits: torch.Tensor, group: Any) -> torch.Tensor:
    """Log-softmax of [n, real columns of this rank] over the whole group; n rows, in place."""
    # A rank may hold nothing but padding.
    highest = logits.max(-1).values if logits.shape[-1] else logits.new_full(logits.shape[:1], -torch.inf)
    logits -= _reduce(highest, dist.ReduceOp.MAX, group)[:, None]
    total = _reduce(logits.exp().sum(-1), dist.ReduceOp.SUM, group)
    return logits.sub_(total.log()[:, None])


class _ForwardKL(torch.autograd.Function):
    """KL(teacher ‖ student) with the gradient, which needs no second pass, made in forward."""

    @staticmethod
    def forward(
        ctx: Any, student: torch.Tensor, teacher: torch.Tensor, vocab_size: int, temperature: float, group: Any
    ) -> torch.Tensor:
        columns = _valid_columns(student, vocab_size, group)
        compute = torch.promote_types(student.dtype, torch.float32)
        rows = student.reshape(-1, student.shape[-1])
        targets = teacher.reshape(-1, teacher.shape[-1])
        gradient = torch.zeros_like(rows)
        loss = rows.new_empty(len(rows), dtype=compute)
        step = max(1, BLOCK_ELEMENTS // rows.shape[-1])
        for start in range(0, len(rows), step):
            block = slice(start, start + step)
            log_q = _log_softmax(rows[block, :columns].to(compute, copy=True).div_(temperature), group)
            log_p = _log_softmax(targets[block, :columns].to(compute, copy=True).div_(temperature), group)
            p = log_p.exp()
            loss[block] = (p * (log_p - log_q)).sum(-1)
            gradient[block, :columns] = (log_q.exp_() - p).mul_(temperature).to(gradient.dtype)
        _reduce(loss, dist.ReduceOp.SUM, group)
        ctx.save_for_backward(gradient.view_as(student))
        return (loss * temperature**2).view(student.shape[:-1])

    @staticmethod
    def backward(ctx: Any, weight: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * weight[..., None].to(gradient.dtype), None, None, None, None


def vocab_parallel_kl(
    student: torch.Tensor, teacher: torch.Tensor, *, vocab_size: int, temperature: float = 1.0, group: Any
) -> torch.Tensor:
    """Forward KL divergence of the full softmax, per token (arXiv 2407.14679, section 3, equation 6).

        T² · Σ_v p_T(v) · (log p_T(v) − log q_T(v)),   p_T = softmax(teacher / T),  q_T = softmax(student / T)

    T² keeps the gradient's size independent of the temperature (Hinton et al., arXiv 1503.02531).

    Args:
        student, teacher: logits [..., V / tp], any floating dtype; arithmetic is float32 (float64 for float64).
        vocab_size: real ids; columns of ids from there on are padding: no probability, no gradient.
        temperature: T.
        group: the tensor-parallel process group.

    Returns:
        [...] float32 (or float64), on every rank of the group; its gradient goes to the student alone.
    """
    return _ForwardKL.apply(student, teacher.detach(), vocab_size, temperature, group)


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
    columns = _valid_columns(logits, vocab_size, group)
    first = dist.get_rank(group) * logits.shape[-1]
    compute = torch.promote_types(logits.dtype, torch.float32)
    rows, wanted = logits.detach().reshape(-1, logits.shape[-1]), labels.reshape(-1) - first
    out = rows.new_zeros(len(rows), dtype=compute)
    step = max(1, BLOCK_ELEMENTS // rows.shape[-1])
    for start in range(0, len(rows), step):
        block = slice(start, start + step)
        log_q = _log_softmax(rows[block, :columns].to(compute, copy=True), group)
        mine = (wanted[block] >= 0) & (wanted[block] < columns)
        if columns:
            found = log_q.gather(-1, wanted[block].clamp(0, columns - 1)[:, None])[:, 0]
            out[block] = torch.where(mine, -found, out[block])
    return _reduce(out, dist.ReduceOp.SUM, group).view(labels.shape)
