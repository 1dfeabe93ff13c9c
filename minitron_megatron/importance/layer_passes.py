"""A model run over data without each of many blocks of layers at once: what the judges of layers.py are made of."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from minitron_megatron.checkpoints.folder import ModelFolder
from minitron_megatron.checkpoints.weights import load_model
from minitron_megatron.config import LayersConfig
from minitron_megatron.console import progress
from minitron_megatron.data.datasets import MicroBatches, RequestSamples, Samples, Windows
from minitron_megatron.data.folder import Data
from minitron_megatron.data.questions import Request, buckets
from minitron_megatron.importance.blocks import Block
from minitron_megatron.importance.variants import Variants
from minitron_megatron.models.build import build_model_chunks, model_dtype
from minitron_megatron.models.forward import Batch, forward_only
from minitron_megatron.models.limits import sequence_parts
from minitron_megatron.parallel import collectives
from minitron_megatron.parallel.layout import Layout


@dataclass
class Measured:
    """What one run of all variants gives, on every rank; slot 0 is the whole model, slot i the i-th block removed.

    nll: Σ −log p over each LM sample, float64 [samples, slots]; log_likelihoods: of each request, float64 [requests, slots];
    influence: Block Influence, float64 [blocks]; layer_passes: samples × layers that ran, requests' included.
    """

    nll: torch.Tensor
    log_likelihoods: torch.Tensor
    influence: torch.Tensor
    layer_passes: int
    seconds: float


class LayerMeasurement:
    """A model on this job's ranks, with all of its variants."""

    def __init__(self, folder: ModelFolder, layout: Layout, cfg: LayersConfig, blocks: Sequence[Block]) -> None:
        self.layout, self.cfg = layout, cfg
        self.chunks = build_model_chunks(
            folder.shape, layout, model_dtype(folder.shape, cfg.precision), cfg.model.engine
        )
        load_model(self.chunks, folder)
        self.variants = Variants(
            self.chunks,
            blocks,
            tokens=cfg.rows * cfg.data.sequence_length,
            vocab_size=folder.shape.vocab_size,
            sequence_parallel=layout.sequence and layout.tensor > 1,
        )

    def measure(self, data: Data, count: int, requests: Sequence[Request]) -> Measured:
        """Loss and Block Influence over the first `count` windows of the split, then every request."""
        began = time.monotonic()
        length = self.cfg.data.sequence_length
        with self.variants.installed():
            nll = self._run("samples", Windows(data, self.cfg.split, length), count, length)
            self.variants.influence = False
            log_likelihoods = nll.new_zeros(len(requests), self.variants.slots)
            for padded, numbers in buckets(requests, sequence_parts(self.layout)).items():
                samples = RequestSamples([requests[n] for n in numbers], padded)
                log_likelihoods[numbers] = -self._run(f"questions, {padded} tokens", samples, len(numbers), padded)
        influence, passes = self._summed()
        influence = 1 - influence / (count * length)
        return Measured(nll, log_likelihoods, influence, passes, time.monotonic() - began)

    def _run(self, what: str, samples: Samples, count: int, length: int) -> torch.Tensor:
        """Σ −log p of the unmasked labels of every sample, without each block: float64 [count, slots], on every rank."""
        from megatron.core import parallel_state as ps

        # As many tokens at once as in a micro-batch of data.sequence_length, and no more than there are.
        fits = self.cfg.trainer.micro_batch_size * self.cfg.data.sequence_length // length
        size = max(1, min(fits, math.ceil(count / self.layout.data)))
        batches = MicroBatches.of_this_rank(samples, range(count), size, self.layout)
        counts_here = ps.get_tensor_model_parallel_rank() == 0
        table = torch.zeros(count, self.variants.slots, dtype=torch.float64, device=torch.cuda.current_device())

        def collect(batch: Batch, **head: Any) -> None:
            sums = self.variants.negative_log_likelihoods(batch, **head)
            mine = batch["number"] >= 0
            if counts_here:
                table[batch["number"][mine]] = sums[:, mine].t()

        with progress(what, len(batches) * len(self.chunks), unit="micro-batches") as advance:

            def before(batch: Batch) -> None:
                self.variants.begin(batch)
                advance(1)

            forward_only(
                self.chunks,
                batches,
                num_micro_batches=len(batches),
                micro_batch_size=size * self.variants.slots,
                sequence_length=length,
                collect=collect,
                before=before,
            )
        return collectives.sum_over_all(table).cpu()

    def _summed(self) -> tuple[torch.Tensor, int]:
        """Σ cos of every block [blocks] and layer passes, over all ranks: one of each tensor-parallel group counts."""
        from megatron.core import parallel_state as ps

        first = ps.get_tensor_model_parallel_rank() == 0
        cosines = self.variants.cosines * (first or self.variants.sequence_parallel)
        rows = cosines.new_tensor([self.variants.layer_rows * (first and ps.get_context_parallel_rank() == 0)])
        whole = collectives.sum_over_all(torch.cat((cosines, rows))).cpu()
        return whole[:-1], int(whole[-1])
