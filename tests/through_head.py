"""Losses of given logits, through the path that training takes: states that are the logits, and an identity as output matrix."""

import torch
import torch.distributed as dist

from minitron_megatron.distill.losses import DistillationLoss, TopK
from minitron_megatron.models.head import Head, fused_loss, terms_of
from minitron_megatron.models.objective import CrossEntropy


def identity_of_this_rank(logits, group):
    """The rows of the identity that make this rank's columns of logits [.., V]."""
    width = logits.shape[-1] // dist.get_world_size(group)
    whole = torch.eye(logits.shape[-1], dtype=logits.dtype, device=logits.device)
    return whole[dist.get_rank(group) * width :][:width].clone()


def distance(student, teacher, how, weights, *, vocab_size, group, logits_bytes=2**14, **more):
    """(terms, this rank's columns' gradient of Σ weights · loss) by logits [s, b, V] of both, the teacher's perhaps a top K."""
    targets = teacher if isinstance(teacher, TopK) else Head(teacher, identity_of_this_rank(teacher, group))
    loss = DistillationLoss(targets, how, vocab_size=vocab_size, group=group, **more)
    return of_logits(student, loss, weights, group, logits_bytes)


def label_loss(student, labels, weights, *, vocab_size, group, logits_bytes=2**14):
    """The same of the labels' cross entropy."""
    return of_logits(student, CrossEntropy(labels, vocab_size=vocab_size, group=group), weights, group, logits_bytes)


def of_logits(student, loss, weights, group, logits_bytes):
    """Terms with and without a gradient must be the same."""
    head = Head(student.clone().requires_grad_(), identity_of_this_rank(student, group).requires_grad_())
    total, terms = fused_loss(head, loss, weights, logits_bytes=logits_bytes)
    alone = terms_of(head, loss, logits_bytes=logits_bytes)
    for name, term in terms.items():
        assert not term.requires_grad and torch.equal(term, alone[name]), name
    torch.testing.assert_close(total.detach(), (terms["loss"] * weights).sum().to(total.dtype))
    (total * 2).backward()
    mine = head.states.grad.chunk(dist.get_world_size(group), -1)[dist.get_rank(group)] / 2
    # Σ over tokens of gradient · states, the states being logits.
    wanted = torch.einsum("sbv,sbh->vh", mine.double(), student.double())
    exact = {torch.float64: 1e-12, torch.float32: 1e-5}.get(student.dtype, 2**-6)
    torch.testing.assert_close(
        head.weight.grad.double() / 2, wanted, rtol=exact, atol=exact * float(wanted.abs().max())
    )
    return terms, mine
