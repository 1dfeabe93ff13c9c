"""Log-likelihoods of continuations by a live model in any layout: requests of one length run together, over all ranks.

requests that differ in their last token at most run once ─▶ buckets of padded length ─▶ micro-batches ─▶ rows that are
scored, and only these, become logits, sharded over the vocabulary ─▶ Σ log p and "is greedy" of each request, everywhere
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from minitron_megatron.console import progress
from minitron_megatron.data.datasets import MicroBatches, RequestSamples
from minitron_megatron.data.questions import Request, buckets
from minitron_megatron.models.forward import Batch, forward_only
from minitron_megatron.models.head import Head, Terms, terms_of
from minitron_megatron.models.limits import sequence_parts
from minitron_megatron.models.objective import CrossEntropy
from minitron_megatron.models.vocab_parallel import vocab_parallel_argmax
from minitron_megatron.parallel import collectives
from minitron_megatron.parallel.layout import Layout


def score(
    chunks: Sequence[torch.nn.Module],
    layout: Layout,
    vocab_size: int,
    requests: Sequence[Request],
    *,
    tokens_at_once: int,
    what: str = "log-likelihoods",
) -> tuple[np.ndarray, np.ndarray]:
    """Σ log p of the scored tokens of each request, and whether each of them is the most probable one, on every rank.

    Args:
        chunks: this rank's chunks of the loaded model.
        layout: the one that Megatron's groups are set up for.
        vocab_size: real ids.
        requests: the same on every rank; of at most the model's positions + 1 tokens.
        tokens_at_once: of a micro-batch; one request is a micro-batch if it has more.
        what: name of the progress bar.

    Returns:
        float64 [requests] in nats, bool [requests].
    """
    inputs = _inputs(requests)
    first = [requests[numbers[0]] for numbers in inputs]
    # Log-likelihood, and tokens that are the most probable, of each request.
    table = torch.zeros(len(requests), 2, dtype=torch.float64, device=torch.cuda.current_device())
    runs = []
    for length, places in buckets(first, sequence_parts(layout)).items():
        size = max(1, min(tokens_at_once // length, math.ceil(len(places) / layout.data)))
        samples = RequestSamples([first[place] for place in places], length)
        batches = MicroBatches.of_this_rank(samples, range(len(places)), size, layout)
        runs.append((length, size, batches, [inputs[place] for place in places]))
    with progress(what, sum(len(run[2]) for run in runs) * len(chunks), unit="micro-batches") as advance:
        for length, size, batches, numbers in runs:
            forward_only(
                chunks,
                batches,
                num_micro_batches=len(batches),
                micro_batch_size=size,
                sequence_length=length,
                collect=_Collect(requests, numbers, table, vocab_size),
                before=lambda batch: advance(1),
            )
    found = collectives.sum_over_all(table).cpu().numpy()
    return found[:, 0], found[:, 1] == [request.scored for request in requests]


def _inputs(requests: Sequence[Request]) -> list[list[int]]:
    """Numbers of the requests of each different input: the choices of a question are often one token each."""
    found: dict[bytes, list[int]] = {}
    for number, request in enumerate(requests):
        found.setdefault(np.asarray(request.tokens[:-1], np.int32).tobytes(), []).append(number)
    return list(found.values())


class _Collect:
    """Adds what a micro-batch says of its requests to a table [requests, 2]; `numbers` are those of each sample."""

    def __init__(
        self, requests: Sequence[Request], numbers: Sequence[Sequence[int]], table: torch.Tensor, vocab_size: int
    ) -> None:
        self.requests, self.numbers, self.table, self.vocab_size = requests, numbers, table, vocab_size

    def __call__(self, batch: Batch, *, hidden_states: torch.Tensor, output_layer: Any, output_weight: Any) -> None:
        from megatron.core import parallel_state as ps

        rows, labels, owners = self._scored(batch)
        if not rows:
            return
        group, here = collectives.tensor_parallel_group(), hidden_states.device
        head = Head.of(hidden_states, output_layer, output_weight, group)
        wanted = torch.tensor(labels, device=here)
        nll = CrossEntropy(wanted, vocab_size=self.vocab_size, group=group)

        def terms(logits: torch.Tensor, some: slice, weight: torch.Tensor | None) -> Terms:
            said = vocab_parallel_argmax(logits, vocab_size=self.vocab_size, group=group)
            return {"nll": nll(logits, some, None)["loss"], "greedy": (said == wanted[some]).float()}

        chosen = Head(head.rows[torch.tensor(rows, device=here)][:, None], head.weight)
        found = terms_of(chosen, terms)
        if ps.get_tensor_model_parallel_rank() == 0:
            both = torch.cat((-found["nll"], found["greedy"]), 1).double()
            self.table.index_add_(0, torch.tensor(owners, device=here), both)

    def _scored(self, batch: Batch) -> tuple[list[int], list[int], list[int]]:
        """Of every scored token on this rank: its row of [s · b], its id, and the request it belongs to."""
        # A context-parallel rank has a share of the positions, the same of every sample.
        places = {position: place for place, position in enumerate(batch["position_ids"][0].tolist())}
        count = len(batch["number"])
        found = [
            (places[position] * count + column, request.tokens[position + 1], number)
            for column, sample in enumerate(batch["number"].tolist())
            if sample >= 0
            for number in self.numbers[sample]
            for request in [self.requests[number]]
            for position in range(len(request.tokens) - 1 - request.scored, len(request.tokens) - 1)
            if position in places
        ]
        rows, labels, owners = zip(*found, strict=True) if found else ((), (), ())
        return list(rows), list(labels), list(owners)
