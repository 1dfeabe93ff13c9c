"""Forward-only passes of a (pipelined) model over micro-batches, through Megatron's own schedules.

Importance and evaluation run on this: each stage calls `before` with the micro-batch it is about to run, and the last
stage turns final hidden states into whatever the caller collects, before any logits exist.
"""

import itertools
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch

Batch = dict[str, torch.Tensor]
Collect = Callable[..., Any]


def on_device(batch: Batch) -> Batch:
    """A micro-batch where this rank's model is."""
    here = torch.cuda.current_device()
    return {name: tensor.to(here) for name, tensor in batch.items()}


def labels_of(batch: Batch) -> torch.Tensor:
    """A micro-batch's labels as logits are laid out: [s, b]."""
    return batch["labels"].t().contiguous()


def attention_mask(batch: Batch) -> torch.Tensor | None:
    """Where a token must not look, [b, 1, s, s]: at later ones and at other `documents` [b, s]; None where a batch has none.

    Layers mask later tokens by themselves without a mask, and with one only what it says. Transformer Engine's ignore it.
    """
    documents = batch.get("documents")
    if documents is None:
        return None
    length = documents.shape[1]
    later = torch.ones(length, length, dtype=torch.bool, device=documents.device).triu(1)
    return (documents[:, None, :, None] != documents[:, None, None, :]) | later


def forward_only(
    chunks: Sequence[torch.nn.Module],
    batches: Iterable[Batch],
    *,
    num_micro_batches: int,
    micro_batch_size: int,
    sequence_length: int,
    collect: Collect,
    before: Callable[[Batch], None] = lambda batch: None,
    groups: Any = None,
) -> list[Any]:
    """Run every micro-batch through all pipeline stages without gradients.

    Args:
        chunks: this rank's model chunks.
        batches: micro-batches of this data-parallel rank: `tokens`, `position_ids`, `labels`, `loss_mask`, each
            [micro_batch_size, sequence_length]; the same sequence on every pipeline stage.
        num_micro_batches: how many of them; equal on all ranks.
        micro_batch_size: samples in each.
        sequence_length: tokens in each sample.
        collect: called on the last stage as `collect(batch, hidden_states=…, output_layer=…, output_weight=…)`, where
            hidden_states is [sequence / tp if sequence parallel, batch, hidden].
        before: called on every stage and model chunk before it runs a micro-batch.
        groups: of the model's layout, where it is not the one that Megatron's own state is set up for.

    Returns:
        What `collect` returned for each micro-batch, in order, on the last stage; an empty list elsewhere.
    """
    collected: list[Any] = []

    def processor(
        *, hidden_states: torch.Tensor, output_layer: Any, output_weight: Any, context: Batch, **_: Any
    ) -> Any:
        result = collect(context, hidden_states=hidden_states, output_layer=output_layer, output_weight=output_weight)
        collected.append(result)
        return hidden_states

    def step(data: Any, model: torch.nn.Module) -> tuple[torch.Tensor, Callable[..., Any]]:
        batch = {name: tensor.to(torch.cuda.current_device()) for name, tensor in next(data).items()}
        before(batch)
        out = model(
            batch["tokens"],
            batch["position_ids"],
            attention_mask(batch),
            output_processor=processor,
            output_processor_context=batch,
        )
        return out, lambda output, non_loss_data=True: None

    iterators = list(itertools.tee(iter(batches), len(chunks)))
    with torch.no_grad():
        for chunk in chunks:
            chunk.eval()
        _schedule(chunks, groups)(
            forward_step_func=step,
            data_iterator=iterators if len(chunks) > 1 else iterators[0],
            model=list(chunks),
            num_microbatches=num_micro_batches,
            seq_length=sequence_length,
            micro_batch_size=micro_batch_size,
            forward_only=True,
            collect_non_loss_data=True,
        )
    return collected


def _schedule(chunks: Sequence[torch.nn.Module], groups: Any) -> Callable[..., Any]:
    """Megatron's schedule for a model, in Megatron's own groups or in others."""
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator

    if groups is None:
        return get_forward_backward_func()
    links = P2PCommunicator(groups.pp, chunks[0].config)
    return partial(get_forward_backward_func(pp_size=groups.pp.size()), p2p_communicator=links, pg_collection=groups)
