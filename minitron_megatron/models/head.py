"""Losses of final hidden states, without ever holding the logits of all tokens: the output matrix and the loss, fused.

    states [s, b, hidden] ─ pieces of tokens ─▶ logits [n, V / tp] ─▶ loss of each token; its gradient takes their place
                                                     │
                       gradient of the states [n, hidden] ◀── · W ──┤
                       gradient of W, added up [V / tp, hidden] ◀── · states

A piece is as many tokens as `LOGITS_BYTES` hold, with a teacher's logits beside the student's where there are some. The gradient
is made in forward, so a backward pass has nothing left to do. That of a matrix under Megatron's data parallelism goes straight
into its `main_grad`, in float32, as its fused linears do.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from minitron_megatron.models.fp8 import Fp8Matrix
from minitron_megatron.models.vocab_parallel import block_rows

# Per-token values by name.
Terms = dict[str, torch.Tensor]
# (logits [n, V / tp] of some rows of tokens, those rows, weight [n] or None) to terms [n], "loss" among them; with a weight the
# logits become the gradient of Σ weight · loss.
LossOfRows = Callable[[torch.Tensor, slice, torch.Tensor | None], Terms]

# Two pieces of 2048 tokens for Llama-3's vocabulary beside a teacher: smaller ones slow the products down (docs/benchmarks.md).
LOGITS_BYTES = 2**30


@dataclass(frozen=True)
class Head:
    """What logits are made of: states [s, b, hidden] of this rank's tokens and its output matrix [V / tp, hidden]."""

    states: torch.Tensor
    weight: torch.Tensor | Fp8Matrix  # a frozen one may be in FP8

    @classmethod
    def of(cls, hidden_states: torch.Tensor, output_layer: Any, output_weight: Any, group: Any) -> "Head":
        """Of what Megatron's `output_processor` is given: [s / tp if sequence parallel, b, hidden] and the output layer.

        In the backward pass the states' gradients of all ranks are summed, as Megatron's own output layer does.
        """
        from megatron.core.tensor_parallel import (
            copy_to_tensor_model_parallel_region,
            gather_from_sequence_parallel_region,
        )

        # The layer is not called: where its weight is gathered during the forward pass, its hooks wait for that.
        for hook in output_layer._forward_pre_hooks.values():
            hook(output_layer, (hidden_states,))
        whole = (
            gather_from_sequence_parallel_region
            if output_layer.sequence_parallel
            else copy_to_tensor_model_parallel_region
        )
        return cls(whole(hidden_states, group=group), output_layer.weight if output_weight is None else output_weight)

    @property
    def columns(self) -> int:
        """This rank's part of the vocabulary, V / tp."""
        return len(self.weight.values if isinstance(self.weight, Fp8Matrix) else self.weight)

    @property
    def rows(self) -> torch.Tensor:
        """[s · b, hidden]."""
        return self.states.reshape(-1, self.states.shape[-1])

    def logits(self, rows: slice | None = None) -> torch.Tensor:
        """[n, V / tp] of some rows of tokens, or all of them."""
        some = self.rows[rows] if rows else self.rows
        return self.weight.product(some) if isinstance(self.weight, Fp8Matrix) else torch.mm(some, self.weight.t())


class Summed(NamedTuple):
    """Σ mask · loss, a scalar that carries the gradient, and every term of each token, [s, b], without one."""

    total: torch.Tensor
    terms: Terms


def fused_loss(head: Head, loss: LossOfRows, mask: torch.Tensor, *, logits_bytes: int = LOGITS_BYTES) -> Summed:
    """The loss of a model's tokens, summed over those that count.

    Args:
        head: of the model that is trained.
        loss: makes terms of logits, a piece at a time.
        mask: [s, b], 1 for tokens that count.
        logits_bytes: most bytes of logits at once.

    Where W has a `main_grad` (Megatron's data parallelism) the total's gradient must be 1: it is added up before any is known.
    """
    names: list[str] = []
    total, *values = _FusedLoss.apply(head.states, head.weight, mask, loss, names, logits_bytes)
    return Summed(total, dict(zip(names, values, strict=True)))


@torch.no_grad()
def terms_of(head: Head, loss: LossOfRows, *, logits_bytes: int = LOGITS_BYTES) -> Terms:
    """The terms [s, b] alone."""
    parts = []
    for piece in _slices(head, logits_bytes):
        parts.append(loss(head.logits(piece), piece, None))
    return _joined(parts, head.states.shape[:-1])


def in_blocks(loss: LossOfRows, logits: torch.Tensor, rows: slice, weight: torch.Tensor | None) -> Terms:
    """A loss that makes copies of logits, of so few rows at a time that they stay small."""
    step, parts = block_rows(logits), []
    for start in range(0, len(logits), step):
        block = slice(start, min(start + step, len(logits)))
        of_tokens = slice(rows.start + block.start, rows.start + block.stop)
        parts.append(loss(logits[block], of_tokens, None if weight is None else weight[block]))
    return _joined(parts, logits.shape[:1])


class _FusedLoss(torch.autograd.Function):
    """Σ mask · loss and every term, with the gradients made in forward."""

    @staticmethod
    def forward(
        ctx: Any,
        states: torch.Tensor,
        weight: torch.Tensor,
        mask: torch.Tensor,
        loss: LossOfRows,
        names: list[str],
        logits_bytes: int,
    ) -> tuple[torch.Tensor, ...]:
        head, counts = Head(states, weight), mask.reshape(-1).to(torch.promote_types(states.dtype, torch.float32))
        of_states, of_weight = torch.empty_like(head.rows), _WeightGradient(weight)
        parts = []
        for piece in _slices(head, logits_bytes):
            logits = head.logits(piece)
            parts.append(loss(logits, piece, counts[piece]))
            torch.mm(logits, weight, out=of_states[piece])
            of_weight.add(logits, head.rows[piece])
            # Before the next piece's are made.
            del logits
        ctx.save_for_backward(of_states.view_as(states), weight, *of_weight.kept)
        terms = _joined(parts, states.shape[:-1])
        names.extend(terms)
        ctx.mark_non_differentiable(*terms.values())
        ctx.set_materialize_grads(False)
        return (terms["loss"].reshape(-1) * counts).sum(), *terms.values()

    @staticmethod
    def backward(ctx: Any, scale: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
        of_states, weight, *kept = ctx.saved_tensors
        if kept:
            return of_states.mul_(scale), kept[0].mul_(scale), None, None, None, None
        torch._assert_async(scale == 1)
        weight.grad_added_to_main_grad = True
        # Autograd wants a gradient to tell that this one is done; whoever adds it up all the same is to get nothing.
        kind = torch.zeros_like if getattr(weight, "zero_out_wgrad", False) else torch.empty_like
        return of_states, kind(weight), None, None, None, None


class _WeightGradient:
    """The gradient of W, piece by piece: in its `main_grad`, or `kept` in a tensor of its own."""

    def __init__(self, weight: torch.Tensor) -> None:
        main = getattr(weight, "main_grad", None)
        self.kept = [] if main is not None else [torch.empty_like(weight)]
        self.into, self.first = (self.kept[0], True) if main is None else (main, False)

    def add(self, gradient: torch.Tensor, rows: torch.Tensor) -> None:
        """Add that of logits whose gradient is [n, V / tp]."""
        if self.first:
            torch.mm(gradient.t(), rows, out=self.into)
            self.first = False
        elif self.into.dtype == rows.dtype:
            self.into.addmm_(gradient.t(), rows)
        elif rows.is_cuda:
            torch.addmm(self.into, gradient.t(), rows, out_dtype=self.into.dtype, out=self.into)
        else:
            self.into.add_(torch.mm(gradient.t(), rows))


def _slices(head: Head, most_bytes: int) -> Iterator[slice]:
    """Rows in equal parts, as few as logits of so many bytes allow."""
    rows = len(head.rows)
    count = math.ceil(rows * head.columns * head.states.element_size() / most_bytes)
    step = math.ceil(rows / min(count, rows))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def _joined(parts: list[Terms], shape: torch.Size) -> Terms:
    return {name: torch.cat([part[name] for part in parts]).view(shape) for name in parts[0]}
