"""The loss of a live model in any layout: negative log likelihood, summed over tokens in float64."""

from collections.abc import Callable, Sequence

import torch

from minitron_megatron.models.forward import Batch, forward_only, labels_of
from minitron_megatron.models.head import Head, terms_of
from minitron_megatron.models.objective import CrossEntropy
from minitron_megatron.parallel import collectives


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

    def collect(
        batch: Batch, *, hidden_states: torch.Tensor, output_layer: object, output_weight: object
    ) -> torch.Tensor:
        head = Head.of(hidden_states, output_layer, output_weight, group)
        nll = terms_of(head, CrossEntropy(labels_of(batch), vocab_size=vocab_size, group=group))["loss"]
        mask = batch["loss_mask"].t()
        return torch.stack(((nll * mask).sum(dtype=torch.float64), mask.sum(dtype=torch.float64)))

    collected = forward_only(
        chunks,
        batches,
        num_micro_batches=len(batches),
        micro_batch_size=micro_batch_size,
        sequence_length=sequence_length,
        collect=collect,
        before=before,
    )
    mine = sum((c.cpu() for c in collected), torch.zeros(2, dtype=torch.float64))
    nll, tokens = collectives.sum_from_last_stage(mine.tolist())
    return nll, tokens
