"""Figures of a live model in any layout, summed over tokens in float64: negative log likelihood, and whatever a loss gives."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from minitron_megatron.models.forward import Batch, forward_only, labels_of
from minitron_megatron.models.head import Head, LossOfRows, terms_of
from minitron_megatron.models.objective import CrossEntropy
from minitron_megatron.parallel import collectives

# Of logits that FirstLoss holds: little beside a pass that makes none otherwise.
_LOGITS_BYTES = 2**26


def summed_loss(
    chunks: Sequence[torch.nn.Module],
    batches: Sequence[Batch],
    *,
    micro_batch_size: int,
    sequence_length: int,
    vocab_size: int,
    before: Callable[[Batch], None] = lambda batch: None,
) -> tuple[float, float]:
    """(sum of the negative log likelihood in nats, tokens) over all ranks' micro-batches, the same on every rank."""
    group = collectives.tensor_parallel_group()
    nll, tokens = summed_terms(
        chunks,
        batches,
        ("loss",),
        lambda batch: CrossEntropy(labels_of(batch), vocab_size=vocab_size, group=group),
        micro_batch_size=micro_batch_size,
        sequence_length=sequence_length,
        before=before,
    )
    return nll, tokens


def summed_terms(
    chunks: Sequence[torch.nn.Module],
    batches: Sequence[Batch],
    names: Sequence[str],
    loss: Callable[[Batch], LossOfRows],
    *,
    micro_batch_size: int,
    sequence_length: int,
    before: Callable[[Batch], None] = lambda batch: None,
) -> list[float]:
    """Terms of a loss by name, each summed over the tokens that count in all ranks' micro-batches, and how many these are.

    Args:
        chunks: this rank's model chunks.
        batches: micro-batches of this data-parallel rank, as many on every rank.
        names: terms that `loss` gives.
        loss: makes terms of logits (models/head.py), of a micro-batch on this device; asked on the last stage, in order.
        micro_batch_size, sequence_length: of the micro-batches.
        before: called on every stage and chunk before it runs a micro-batch.

    Returns:
        As many sums as names, and the tokens; the same on every rank.
    """
    group = collectives.tensor_parallel_group()

    def collect(
        batch: Batch, *, hidden_states: torch.Tensor, output_layer: object, output_weight: object
    ) -> torch.Tensor:
        terms = terms_of(Head.of(hidden_states, output_layer, output_weight, group), loss(batch))
        mask = batch["loss_mask"].t()
        sums = [(terms[name] * mask).sum(dtype=torch.float64) for name in names]
        return torch.stack((*sums, mask.sum(dtype=torch.float64)))

    collected = forward_only(
        chunks,
        batches,
        num_micro_batches=len(batches),
        micro_batch_size=micro_batch_size,
        sequence_length=sequence_length,
        collect=collect,
        before=before,
    )
    mine = sum((c.cpu() for c in collected), torch.zeros(len(names) + 1, dtype=torch.float64))
    return collectives.sum_from_last_stage(mine.tolist())


class FirstLoss:
    """The loss of each rank's first micro-batch, taken by the way in a forward pass that is made for something else.

    It is what `forward_only` calls as `collect`; afterwards every rank asks for `mean`.
    """

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.sums: list[float] | None = None

    def __call__(self, batch: Batch, *, hidden_states: torch.Tensor, output_layer: Any, output_weight: Any) -> None:
        """On the last stage, of each micro-batch in turn."""
        if self.sums is not None:
            return
        group, mask = collectives.tensor_parallel_group(), batch["loss_mask"].t()
        head = Head.of(hidden_states, output_layer, output_weight, group)
        nll = CrossEntropy(labels_of(batch), vocab_size=self.vocab_size, group=group)
        found = terms_of(head, nll, logits_bytes=_LOGITS_BYTES)["loss"]
        self.sums = [float((found * mask).sum(dtype=torch.float64)), float(mask.sum())]

    def mean(self) -> float:
        """Nats a token over the first micro-batches of all data-parallel ranks, on every rank, which all must call it."""
        nll, tokens = collectives.sum_from_last_stage(self.sums or [0.0, 0.0])
        return nll / max(1.0, tokens)
