"""What several measurements share: which models they are of, a forward pass, and the median time of some work."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from minitron_megatron.config import BenchmarkConfig
from minitron_megatron.models.forward import Batch, forward_only
from minitron_megatron.parallel import collectives
from minitron_megatron.parallel.layout import Layout


def forward_pass(
    chunks: list[torch.nn.Module],
    batch: Batch,
    cfg: BenchmarkConfig,
    layout: Layout,
    collect: Callable[..., Any],
    before: Callable[[Batch], None] = lambda batch: None,
) -> None:
    """A micro-batch through the model, in a pipeline as many of it as there are stages."""
    forward_only(
        chunks,
        [batch] * layout.stages,
        num_micro_batches=layout.stages,
        micro_batch_size=cfg.micro_batch_size,
        sequence_length=cfg.sequence_length,
        collect=collect,
        before=before,
    )


def seconds(work: Callable[[], Any], repeats: int) -> float:
    """Median of some runs, after two to warm up."""
    found = []
    for _ in range(repeats + 2):
        torch.cuda.synchronize()
        collectives.barrier()
        began = time.perf_counter()
        work()
        torch.cuda.synchronize()
        found.append(time.perf_counter() - began)
    return statistics.median(found[2:])
