"""Distillation losses over logits whose vocabulary is spread over the tensor-parallel group (models/vocab_parallel.py)."""

from typing import Any

import torch
import torch.distributed as dist

from minitron_megatron.models.vocab_parallel import BLOCK_ELEMENTS, log_softmax_, reduce_over, valid_columns


class _ForwardKL(torch.autograd.Function):
    """KL(teacher ‖ student) with the gradient, which needs no second pass, made in forward."""

    @staticmethod
    def forward(
        ctx: Any, student: torch.Tensor, teacher: torch.Tensor, vocab_size: int, temperature: float, group: Any
    ) -> torch.Tensor:
        columns = valid_columns(student, vocab_size, group)
        compute = torch.promote_types(student.dtype, torch.float32)
        rows = student.reshape(-1, student.shape[-1])
        targets = teacher.reshape(-1, teacher.shape[-1])
        gradient = torch.zeros_like(rows)
        loss = rows.new_empty(len(rows), dtype=compute)
        step = max(1, BLOCK_ELEMENTS // rows.shape[-1])
        for start in range(0, len(rows), step):
            block = slice(start, start + step)
            log_q = log_softmax_(rows[block, :columns].to(compute, copy=True).div_(temperature), group)
            log_p = log_softmax_(targets[block, :columns].to(compute, copy=True).div_(temperature), group)
            p = log_p.exp()
            loss[block] = (p * (log_p - log_q)).sum(-1)
            gradient[block, :columns] = (log_q.exp_() - p).mul_(temperature).to(gradient.dtype)
        reduce_over(loss, dist.ReduceOp.SUM, group)
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
