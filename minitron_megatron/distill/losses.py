"""Distillation losses over logits whose vocabulary is spread over the tensor-parallel group (models/vocab_parallel.py).

    student logits [.., V/tp] ─ rows in blocks ─▶ log q ─┬─▶ loss of each row, summed over the group
    teacher logits [.., V/tp], or its top K ─────▶ log p ─┘   gradient of the block, in the student's dtype

Every loss is a function of one block: (log q, log p) to (loss, gradient of the logits), written out by hand, so that the
gradient is made in forward, which needs no second pass, and only a block is ever held in float32. (Forward KL on a GPU has
kernels of its own: kernels.py.) With p and q the softmaxes of the teacher's and the student's logits z over the temperature T,
and L a loss between them,

    ∂(T² L) / ∂z_v = T · (a_v − q_v Σ_u a_u),    a_v = ∂L / ∂log q_v

T² keeps the gradient's size independent of the temperature (Hinton et al., arXiv 1503.02531).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from minitron_megatron.config import DistillOptions
from minitron_megatron.errors import UserError
from minitron_megatron.models.vocab_parallel import BLOCK_ELEMENTS, log_softmax_, reduce_over, valid_columns

# Sums [n, this rank's columns] over the whole vocabulary, [n].
Total = Callable[[torch.Tensor], torch.Tensor]
LossAndGradient = tuple[torch.Tensor, torch.Tensor]


def check_top_k(k: int, vocab_size: int) -> None:
    """Raise UserError where a vocabulary has fewer tokens than are asked for."""
    if k > vocab_size:
        raise UserError(f"distill.top_k={k} is above the vocabulary of {vocab_size}")


@dataclass(frozen=True)
class Divergence:
    """Which distance between teacher and student, with its settings; the words are those of `DistillOptions`."""

    kind: str = "forward_kl"
    temperature: float = 1.0
    beta: float = 0.5
    top_k: int = 1000
    rest: str = "bucket"

    @classmethod
    def from_options(cls, options: DistillOptions, vocab_size: int) -> "Divergence":
        """What the command line asks for, of models of this vocabulary. Raises UserError."""
        if options.loss == "topk_kl":
            check_top_k(options.top_k, vocab_size)
        return cls(options.loss, options.temperature, options.jsd_beta, options.top_k, options.top_k_rest)


class TopK(NamedTuple):
    """The K most probable tokens of each row, best first, equal ones by their number; the same on every rank of the group."""

    ids: torch.Tensor  # [..., K] int64, ids of the whole vocabulary
    log_probs: torch.Tensor  # [..., K] log of the full softmax at the temperature
    rest: torch.Tensor  # [...] the probability of all other tokens together


def divergence(
    student: torch.Tensor, teacher: torch.Tensor | TopK, how: Divergence, *, vocab_size: int, group: Any
) -> torch.Tensor:
    """The distance of a student from its teacher, per token, times T².

        forward_kl   KL(p ‖ q) = Σ_v p_v (log p_v − log q_v)                                arXiv 2407.14679, section 3, eq. 6
        reverse_kl   KL(q ‖ p)
        jsd          β KL(p ‖ m) + (1 − β) KL(q ‖ m),  m = β p + (1 − β) q                  arXiv 2306.13649, section 2
                     tends to 0 at both ends: like β KL(p ‖ q) for β → 0, like (1 − β) KL(q ‖ p) for β → 1
        topk_kl      over the set S of the teacher's K most probable tokens, arXiv 2407.14679, section 3;
                     rest=bucket:      Σ_S p_v (log p_v − log q_v) + p_R (log p_R − log q_R): the tokens outside S are one
                                       class R. Below KL(p ‖ q) by just p_R KL(p|R ‖ q|R); 0 where p and q agree on S
                     rest=renormalize: Σ_S p̃_v (log p̃_v − log q_v), p̃ = p / Σ_S p: the teacher without its tail, which the
                                       student learns to do without; not 0 at p = q

    Args:
        student: logits [..., V / tp], any floating dtype; arithmetic is float32 (float64 for float64).
        teacher: logits [..., V / tp]; or, for topk_kl, its top K at the same temperature (`top_k`, a cached teacher).
        how: the kind of distance, and its settings.
        vocab_size: real ids; columns of ids from there on are padding: no probability, no gradient.
        group: the tensor-parallel process group.

    Returns:
        [...] float32 (or float64), the same on every rank of the group; its gradient goes to the student alone.
    """
    if how.kind == "topk_kl":
        if not isinstance(teacher, TopK):
            teacher = top_k(teacher, how.top_k, vocab_size=vocab_size, temperature=how.temperature, group=group)
        if how.rest == "renormalize":
            inside = teacher.log_probs.logsumexp(-1, keepdim=True)
            teacher = TopK(teacher.ids, teacher.log_probs - inside, torch.zeros_like(teacher.rest))
        return _sparse(student, teacher, how, vocab_size, group)
    kinds = {"forward_kl": _forward_kl, "reverse_kl": _reverse_kl, "jsd": partial(_jsd, beta=how.beta)}
    dense, total = kinds[how.kind], _total(group)
    targets, columns = _rows(teacher.detach()), valid_columns(student, vocab_size, group)

    if how.kind == "forward_kl" and student.is_cuda and student.dtype is not torch.float64:
        return _GradientInForward.apply(student, partial(_fused_forward_kl, targets, columns, how.temperature, group))

    def loss(log_q: torch.Tensor, block: slice) -> LossAndGradient:
        log_p = log_softmax_(targets[block, :columns].to(log_q.dtype, copy=True).div_(how.temperature), group)
        return dense(log_q, log_p, total)

    return _GradientInForward.apply(student, partial(_blockwise, loss, columns, how.temperature, group))


def cross_entropy(student: torch.Tensor, labels: torch.Tensor, *, vocab_size: int, group: Any) -> torch.Tensor:
    """−log q of the labels, per token: a teacher that is certain.

    Args:
        student: logits [..., V / tp].
        labels: int64 [...], ids below vocab_size.
        vocab_size: real ids; the rest is padding.
        group: the tensor-parallel process group.

    Returns:
        [...] float32 (float64 for float64), on every rank of the group, with a gradient.
    """
    certain = student.new_zeros(labels.shape, dtype=torch.promote_types(student.dtype, torch.float32))
    return _sparse(student, TopK(labels[..., None], certain[..., None], certain), _ONE_HOT, vocab_size, group)


def top_k(logits: torch.Tensor, k: int, *, vocab_size: int, temperature: float = 1.0, group: Any) -> TopK:
    """The K most probable tokens over the whole vocabulary, without a gradient.

    Which they are is decided on the logits' float32 bits and, between equal ones, by the lower id: the same in any layout.

    Args:
        logits: [..., V / tp], any floating dtype.
        k: how many; at most vocab_size.
        vocab_size: real ids; the rest is padding.
        temperature: T of the softmax.
        group: the tensor-parallel process group.
    """
    if k > vocab_size:
        raise ValueError(f"top {k} of {vocab_size} tokens")
    columns, total = valid_columns(logits, vocab_size, group), _total(group)
    compute = torch.promote_types(logits.dtype, torch.float32)
    rows, first = _rows(logits.detach()), dist.get_rank(group) * logits.shape[-1]
    ids = torch.empty(len(rows), k, dtype=torch.int64, device=rows.device)
    log_probs, rest = rows.new_empty(len(rows), k, dtype=compute), rows.new_empty(len(rows), dtype=compute)
    for block in _blocks(rows):
        ids[block] = _largest(rows[block, :columns], first, k, group)
        log_p = log_softmax_(rows[block, :columns].to(compute, copy=True).div_(temperature), group)
        places = _places(ids[block], first, columns)
        log_probs[block] = reduce_over(_take(log_p, places), dist.ReduceOp.SUM, group)
        rest[block] = total(log_p.exp_().masked_fill_(_inside(places, columns), 0))
    shape = logits.shape[:-1]
    return TopK(ids.view(*shape, k), log_probs.view(*shape, k), rest.view(shape))


class _GradientInForward(torch.autograd.Function):
    """A loss of the student's logits that comes with its gradient: `made` gives both, [n] and [n, V / tp], of rows of logits."""

    @staticmethod
    def forward(ctx: Any, student: torch.Tensor, made: Callable[[torch.Tensor], LossAndGradient]) -> torch.Tensor:
        losses, gradient = made(_rows(student))
        ctx.save_for_backward(gradient.view_as(student))
        return losses.view(student.shape[:-1])

    @staticmethod
    def backward(ctx: Any, weight: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        # In place, or there would be two tensors of the logits' size; torch refuses a second backward through it.
        return gradient.mul_(weight[..., None]), None


def _blockwise(
    loss: Callable[[torch.Tensor, slice], LossAndGradient],
    columns: int,
    temperature: float,
    group: Any,
    rows: torch.Tensor,
) -> LossAndGradient:
    """Any loss of rows of logits and its gradient, a block of rows in float32 (float64) at a time."""
    compute = torch.promote_types(rows.dtype, torch.float32)
    gradient = torch.zeros_like(rows)
    losses = rows.new_empty(len(rows), dtype=compute)
    for block in _blocks(rows):
        log_q = log_softmax_(rows[block, :columns].to(compute, copy=True).div_(temperature), group)
        losses[block], of_logits = loss(log_q, block)
        gradient[block, :columns] = of_logits.mul_(temperature).to(gradient.dtype)
    return losses.mul_(temperature**2), gradient


def _fused_forward_kl(
    teacher: torch.Tensor, columns: int, temperature: float, group: Any, student: torch.Tensor
) -> LossAndGradient:
    """The same for forward KL on a GPU, by kernels of its own."""
    from minitron_megatron.distill import kernels

    student, teacher = student.contiguous(), teacher.contiguous()
    log_z = [_log_z(logits, columns, temperature, group) for logits in (student, teacher)]
    loss, gradient = kernels.forward_kl(student, teacher, *log_z, columns, temperature)
    return reduce_over(loss, dist.ReduceOp.SUM, group).mul_(temperature**2), gradient


def _log_z(logits: torch.Tensor, columns: int, temperature: float, group: Any) -> torch.Tensor:
    """log Σ exp(logits / T) of each row over the group: float32 [n]."""
    from minitron_megatron.distill import kernels

    mine, total = kernels.log_sum_exp_parts(logits, columns, temperature)
    highest = reduce_over(mine.clone(), dist.ReduceOp.MAX, group)
    total.mul_((mine - highest).exp())
    return highest + reduce_over(total, dist.ReduceOp.SUM, group).log()


# Losses of one block: log q and log p [n, this rank's columns] to the loss [n] and the gradient, without T; both are used up.


def _forward_kl(log_q: torch.Tensor, log_p: torch.Tensor, total: Total) -> LossAndGradient:
    p = log_p.exp()
    return total(p * (log_p - log_q)), log_q.exp_().sub_(p)


def _reverse_kl(log_q: torch.Tensor, log_p: torch.Tensor, total: Total) -> LossAndGradient:
    ratio = torch.sub(log_q, log_p, out=log_p)
    q = log_q.exp_()
    loss = total(q * ratio)
    return loss, ratio.sub_(loss[:, None]).mul_(q)


def _jsd(log_q: torch.Tensor, log_p: torch.Tensor, total: Total, *, beta: float) -> LossAndGradient:
    p, ratio = log_p.exp(), log_p.sub_(log_q)
    q = log_q.exp_()
    # log(m / q) = log(β p/q + 1 − β), from the smaller of p/q and q/p: nothing overflows, and p = q gives 0.
    share = (ratio > 0).to(ratio.dtype).mul_(1 - 2 * beta).add_(beta)
    mixed = ratio.abs().neg_().expm1_().mul_(share).log1p_().add_(ratio.clamp_min(0))
    from_student = total(q * mixed).neg_()
    loss = beta * total(p.mul_(ratio.sub_(mixed))) + (1 - beta) * from_student
    return loss, mixed.neg_().sub_(from_student[:, None]).mul_(q).mul_(1 - beta)


def _sparse(student: torch.Tensor, teacher: TopK, how: Divergence, vocab_size: int, group: Any) -> torch.Tensor:
    """Forward KL to a teacher of which K tokens and the mass of the rest are known (that mass may be 0)."""
    columns, first = valid_columns(student, vocab_size, group), dist.get_rank(group) * student.shape[-1]
    targets, total, bucket = TopK(*map(_flat(student), teacher)), _total(group), how.rest == "bucket"

    def loss(log_q: torch.Tensor, block: slice) -> LossAndGradient:
        ids, log_p, rest_p = (part[block] for part in targets)
        log_p, rest_p = log_p.to(log_q.dtype), rest_p.to(log_q.dtype)
        places = _places(ids, first, columns)
        mine, p = places < columns, log_p.exp()
        known = torch.where(mine, p * (log_p - _take(log_q, places)), 0)
        q = log_q.exp_()
        loss = reduce_over(known.sum(-1), dist.ReduceOp.SUM, group)
        if bucket:
            inside = _inside(places, columns)
            # A student whose whole rest is below the smallest number would make this infinite.
            rest_q = total(q.masked_fill(inside, 0)).clamp_min_(torch.finfo(q.dtype).tiny)
            loss += torch.xlogy(rest_p, rest_p.clamp_min(torch.finfo(q.dtype).tiny) / rest_q)
            q.mul_(torch.where(inside, 1, (1 - rest_p / rest_q)[:, None]))
        if columns:
            q.scatter_add_(-1, places.clamp_max(columns - 1), torch.where(mine, -p, 0))
        return loss, q

    return _GradientInForward.apply(student, partial(_blockwise, loss, columns, how.temperature, group))


_ONE_HOT = Divergence(kind="topk_kl", rest="renormalize")


def _largest(logits: torch.Tensor, first: int, k: int, group: Any) -> torch.Tensor:
    """Ids [n, K] of the K largest of each row over the group, best first, equal ones by their number.

    topk picks any of equal values, so it is given integers that are all different: the bits of the float32, in an order that
    integers have too, before the id turned round.
    """
    # Adding 0 makes one zero of the two.
    bits = logits.float().add(0.0).view(torch.int32)
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()
    ids = torch.arange(first, first + logits.shape[-1], device=logits.device)
    keys = (ordered << 32) | (_LAST_ID - ids)
    keys = keys.topk(min(k, keys.shape[-1]), -1).values
    if dist.get_world_size(group) > 1:
        mine = keys.new_full((len(keys), k), torch.iinfo(torch.int64).min)
        mine[:, : keys.shape[-1]] = keys
        parts = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, mine, group=group)
        keys = torch.cat(parts, -1).topk(k, -1).values
    return _LAST_ID - (keys & _LAST_ID)


_LAST_ID = 2**32 - 1


def _places(ids: torch.Tensor, first: int, columns: int) -> torch.Tensor:
    """Columns of this rank that hold some ids [n, K]; `columns` for those of other ranks."""
    places = ids - first
    return torch.where((places >= 0) & (places < columns), places, columns)


def _inside(places: torch.Tensor, columns: int) -> torch.Tensor:
    """Whether a column of this rank is among some places [n, K]: bool [n, columns]."""
    mask = torch.zeros(len(places), columns + 1, dtype=torch.bool, device=places.device)
    return mask.scatter_(-1, places, True)[:, :columns]


def _take(values: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Values [n, columns] at some places [n, K], 0 for those of other ranks."""
    columns = values.shape[-1]
    if not columns:
        return values.new_zeros(places.shape)
    return torch.where(places < columns, values.gather(-1, places.clamp_max(columns - 1)), 0)


def _total(group: Any) -> Total:
    return lambda values: reduce_over(values.sum(-1), dist.ReduceOp.SUM, group)


def _rows(logits: torch.Tensor) -> torch.Tensor:
    return logits.reshape(-1, logits.shape[-1])


def _flat(student: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """Turns what is known of each token, [...] or [..., K], into rows as those of the student's logits."""
    return lambda values: values.detach().flatten(0, student.dim() - 2)


def _blocks(rows: torch.Tensor) -> list[slice]:
    step = max(1, BLOCK_ELEMENTS // rows.shape[-1])
    return [slice(start, start + step) for start in range(0, len(rows), step)]
