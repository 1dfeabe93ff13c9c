"""Distillation losses over logits whose vocabulary is spread over the tensor-parallel group (models/vocab_parallel.py).

    student logits [n, V/tp] of a block ─────▶ log q ─┬─▶ loss of each row, summed over the group
    teacher logits [n, V/tp], or its top K ──▶ log p ─┘   gradient, in place of the student's logits

Every loss is a function of one block: (log q, log p) to (loss, gradient of the logits), written out by hand, so that the
gradient is made in forward, which needs no second pass, and only a block is ever held in float32; models/head.py makes the
logits, piece by piece, and takes the gradients on. (Forward and reverse KL have kernels on a GPU: models/kernels.py.) With p and
q the softmaxes of the teacher's and the student's logits z over the temperature T, and L a loss between them,

    ∂(T² L) / ∂z_v = T · (a_v − q_v Σ_u a_u),    a_v = ∂L / ∂log q_v

T² keeps the gradient's size independent of the temperature (Hinton et al., arXiv 1503.02531).
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from minitron_megatron.distill.choices import Divergence
from minitron_megatron.models.head import Head, Terms, in_blocks
from minitron_megatron.models.vocab_parallel import (
    Total,
    block_rows,
    have_kernels,
    label_loss,
    label_nll,
    log2_normalisers,
    log_softmax,
    reduce_over,
    valid_columns,
    vocab_parallel_argmax,
    vocab_parallel_entropy,
)

LossAndGradient = tuple[torch.Tensor, torch.Tensor]


class TopK(NamedTuple):
    """The K most probable tokens of each row, best first, equal ones by their number; the same on every rank of the group."""

    ids: torch.Tensor  # [..., K] int64, ids of the whole vocabulary
    log_probs: torch.Tensor  # [..., K] log of the full softmax at the temperature
    rest: torch.Tensor  # [...] the probability of all other tokens together


class DistillationLoss:
    """The distance of a student from its teacher, per token, times T²; of some rows of tokens at a time (models/head.py).

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
        teacher: the head of a teacher beside the student; or, for topk_kl, its top K [s, b, K] at the same temperature
            (`top_k`, a cached teacher).
        how: the kind of distance, and its settings.
        vocab_size: real ids; columns of ids from there on are padding: no probability, no gradient.
        group: the tensor-parallel process group.
        labels: int64 [s, b], ids of the next tokens: gives their cross entropy as a term, at temperature 1.
        cross_entropy: its weight in the loss.
        measure: also how sure the teacher is, and whether both would say the same token; of the distributions at temperature 1.

    Terms, float32 (or float64) [n], the same on every rank of the group: `loss`, `divergence`, and where asked for
    `cross_entropy`, `teacher_entropy` (nats; not of a top K), `agreement`.
    """

    def __init__(
        self,
        teacher: Head | TopK,
        how: Divergence,
        *,
        vocab_size: int,
        group: Any,
        labels: torch.Tensor | None = None,
        cross_entropy: float = 0.0,
        measure: bool = False,
    ) -> None:
        self.how, self.vocab_size, self.group, self.measure = how, vocab_size, group, measure
        self.teacher = TopK(*(part.flatten(0, 1) for part in teacher)) if isinstance(teacher, TopK) else teacher
        self.labels = None if labels is None else labels.reshape(-1)
        self.cross_entropy = cross_entropy

    def __call__(self, logits: torch.Tensor, rows: slice, weight: torch.Tensor | None) -> Terms:
        """Of the rows `rows`: LossOfRows of models/head.py."""
        given = self.teacher
        targets = TopK(*(part[rows] for part in given)) if isinstance(given, TopK) else given.logits(rows)
        labels = None if self.labels is None else self.labels[rows]
        if self.how.kind in _WITH_KERNELS and have_kernels(logits):
            return self._terms_by(self._by_kernels, logits, targets, labels, weight)

        def of_block(some: torch.Tensor, block: slice, of: torch.Tensor | None) -> Terms:
            part = TopK(*(t[block] for t in targets)) if isinstance(targets, TopK) else targets[block]
            return self._terms_by(self._by_torch, some, part, None if labels is None else labels[block], of)

        # Copies in float32 are made of a block at a time.
        return in_blocks(of_block, logits, slice(0, len(logits)), weight)

    def _terms_by(
        self,
        terms: Callable[..., Terms],
        logits: torch.Tensor,
        targets: torch.Tensor | TopK,
        labels: torch.Tensor | None,
        weight: torch.Tensor | None,
    ) -> Terms:
        measured = self._measured(logits, targets) if self.measure else {}
        return {**terms(logits, targets, labels, weight), **measured}

    def _by_torch(
        self,
        logits: torch.Tensor,
        targets: torch.Tensor | TopK,
        labels: torch.Tensor | None,
        weight: torch.Tensor | None,
    ) -> Terms:
        columns, total = valid_columns(logits, self.vocab_size, self.group), _total(self.group)
        temperature, of_label, moved = self.how.temperature, None, None
        if labels is not None:
            of_label, moved = label_loss(logits, labels, columns, self.group)
            moved = moved.mul_(self.cross_entropy) if self.cross_entropy else None
        log_q = log_softmax(logits, columns, temperature, self.group)
        if isinstance(targets, torch.Tensor) and self.how.kind == "topk_kl":
            k = self.how.top_k
            targets = top_k(targets, k, vocab_size=self.vocab_size, temperature=temperature, group=self.group)
        if isinstance(targets, TopK):
            loss, gradient = _sparse(log_q, targets, self.how, logits.shape[-1], self.group)
        else:
            kinds = {"forward_kl": _forward_kl, "reverse_kl": _reverse_kl, "jsd": partial(_jsd, beta=self.how.beta)}
            loss, gradient = kinds[self.how.kind](log_q, log_softmax(targets, columns, temperature, self.group), total)
        if weight is not None:
            if moved is not None:
                gradient = moved.add_(gradient, alpha=temperature).mul_(weight[:, None])
            else:
                gradient.mul_(temperature * weight[:, None])
            logits[:, :columns] = gradient
            logits[:, columns:] = 0
        return self._named(loss.mul_(temperature**2), of_label)

    def _by_kernels(
        self, logits: torch.Tensor, targets: torch.Tensor, labels: torch.Tensor | None, weight: torch.Tensor | None
    ) -> Terms:
        columns, temperature, of_label = valid_columns(logits, self.vocab_size, self.group), self.how.temperature, None
        mine = log_z_plain = log_z = None
        if labels is not None:
            of_label, mine, log_z_plain = label_nll(logits, labels, columns, self.group)
        # One rank's kernel of forward KL makes them itself.
        if self.how.kind == "reverse_kl" or dist.get_world_size(self.group) > 1:
            log_z = log2_normalisers([logits, targets], columns, temperature, self.group)
        from minitron_megatron.models import kernels

        wanted = None if weight is None else kernels.Gradient(weight, self.cross_entropy, mine, log_z_plain)
        sum_up = partial(reduce_over, op=dist.ReduceOp.SUM, group=self.group)
        kernel = kernels.kl_ if self.how.kind == "forward_kl" else kernels.reverse_kl_
        loss = kernel(logits, targets, log_z, columns, temperature, wanted, sum_up)
        return self._named(loss.mul_(temperature**2), of_label)

    def _named(self, loss: torch.Tensor, of_label: torch.Tensor | None) -> Terms:
        if of_label is None:
            return {"loss": loss, "divergence": loss}
        return {"loss": loss + self.cross_entropy * of_label, "divergence": loss, "cross_entropy": of_label}

    def _measured(self, logits: torch.Tensor, targets: torch.Tensor | TopK) -> Terms:
        over = {"vocab_size": self.vocab_size, "group": self.group}
        said = vocab_parallel_argmax(logits, **over)
        if isinstance(targets, TopK):
            return {"agreement": (targets.ids[:, 0] == said).float()}
        return {
            "teacher_entropy": vocab_parallel_entropy(targets, **over),
            "agreement": (vocab_parallel_argmax(targets, **over) == said).float(),
        }


# Kinds that models/kernels.py has.
_WITH_KERNELS = ("forward_kl", "reverse_kl")


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
        log_p = log_softmax(rows[block], columns, temperature, group)
        places = _places(ids[block], first, columns)
        log_probs[block] = reduce_over(_take(log_p, places), dist.ReduceOp.SUM, group)
        rest[block] = total(log_p.exp_().masked_fill_(_inside(places, columns), 0))
    shape = logits.shape[:-1]
    return TopK(ids.view(*shape, k), log_probs.view(*shape, k), rest.view(shape))


def nll_of_top_k(top: TopK, labels: torch.Tensor, *, vocab_size: int, temperature: float = 1.0) -> torch.Tensor:
    """−log p of the labels at temperature 1, [...], as well as a top K at a temperature tells it.

    The tokens outside the K are taken to be equally probable. With z the log probabilities at the temperature T,
    log p_v = T z_v − log Σ_u exp(T z_u).

    Args:
        top: ids and log_probs [..., K], rest [...].
        labels: int64 [...].
        vocab_size: tokens of the vocabulary.
        temperature: T.
    """
    others = max(1, vocab_size - top.ids.shape[-1])
    inside = temperature * top.log_probs
    outside = temperature * (top.rest.clamp_min(torch.finfo(top.rest.dtype).tiny) / others).log()
    normaliser = torch.logaddexp(inside.logsumexp(-1), outside + math.log(others))
    hit = top.ids == labels[..., None]
    own = inside.masked_fill(~hit, -torch.inf).amax(-1)
    return normaliser - torch.where(hit.any(-1), own, outside)


# Losses of one block: log q and log p [n, this rank's columns] to the loss [n] and the gradient, without T; both are used up.


def _forward_kl(log_q: torch.Tensor, log_p: torch.Tensor, total: Total) -> LossAndGradient:
    p = log_p.exp()
    loss = total(log_p.sub_(log_q).mul_(p))
    return loss, log_q.exp_().sub_(p)


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


def _sparse(log_q: torch.Tensor, teacher: TopK, how: Divergence, width: int, group: Any) -> LossAndGradient:
    """Forward KL to a teacher's K tokens and the mass of the rest; of a rank's `width` columns log q has the real ones."""
    columns, first, bucket = log_q.shape[-1], dist.get_rank(group) * width, how.rest == "bucket"
    ids, log_p, rest_p = teacher.ids, teacher.log_probs.to(log_q.dtype), teacher.rest.to(log_q.dtype)
    if not bucket:
        log_p = log_p - log_p.logsumexp(-1, keepdim=True)
    places = _places(ids, first, columns)
    mine, p = places < columns, log_p.exp()
    known = torch.where(mine, p * (log_p - _take(log_q, places)), 0)
    q = log_q.exp_()
    loss = reduce_over(known.sum(-1), dist.ReduceOp.SUM, group)
    if bucket:
        inside = _inside(places, columns)
        # A student whose whole rest is below the smallest number would make this infinite.
        rest_q = _total(group)(q.masked_fill(inside, 0)).clamp_min_(torch.finfo(q.dtype).tiny)
        loss += torch.xlogy(rest_p, rest_p.clamp_min(torch.finfo(q.dtype).tiny) / rest_q)
        q.mul_(torch.where(inside, 1, (1 - rest_p / rest_q)[:, None]))
    if columns:
        q.scatter_add_(-1, places.clamp_max(columns - 1), torch.where(mine, -p, 0))
    return loss, q


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


def _blocks(rows: torch.Tensor) -> list[slice]:
    step = block_rows(rows)
    return [slice(start, start + step) for start in range(0, len(rows), step)]
