"""What measuring importance costs over a plain forward pass: both in turn, on the same fresh random tokens."""

import statistics
import time

import torch

from minitron_megatron.benchmark.common import forward_pass
from minitron_megatron.checkpoints.folder import open_model_folder
from minitron_megatron.checkpoints.random_model import STANDARD_DEVIATION
from minitron_megatron.checkpoints.weights import load_model
from minitron_megatron.config import BenchmarkConfig
from minitron_megatron.data.datasets import on_this_context_rank
from minitron_megatron.importance.hooks import Recorder
from minitron_megatron.models.build import build_model_chunks, model_dtype
from minitron_megatron.models.forward import Batch
from minitron_megatron.models.shape import ModelShape
from minitron_megatron.parallel import collectives
from minitron_megatron.parallel.layout import Layout


def hooks_over_forward(cfg: BenchmarkConfig, layout: Layout) -> dict[str, float]:
    """Seconds of a forward pass with and without the hooks of every axis: medians over `repeats` pairs, and their ratio.

    A preset is given random weights; a folder is loaded.
    """
    shape, chunks = live_model(cfg, layout)
    generator = torch.Generator().manual_seed(cfg.seed)
    pairs = []
    for _ in range(cfg.repeats + 1):
        batch = random_batch(cfg, shape, layout, generator)
        pairs.append(
            (_seconds(chunks, batch, cfg, layout, shape, False), _seconds(chunks, batch, cfg, layout, shape, True))
        )
    plain, hooked = zip(*pairs[1:], strict=True)  # the first pair warms up
    return {
        "tokens": cfg.micro_batch_size * cfg.sequence_length,
        "forward_seconds": statistics.median(plain),
        "forward_with_hooks_seconds": statistics.median(hooked),
        "ratio_of_medians": statistics.median(hooked) / statistics.median(plain),
        "ratio_of_fastest": min(hooked) / min(plain),
    }


def live_model(cfg: BenchmarkConfig, layout: Layout) -> tuple[ModelShape, list[torch.nn.Module]]:
    """Shape and this rank's chunks of `model=`: a folder's weights, or random ones for a preset."""
    folder = open_model_folder(cfg.model.path) if cfg.model.path else None
    shape = folder.shape if folder else ModelShape.from_dict(cfg.model.sizes("model"), "model")
    chunks = build_model_chunks(shape, layout, model_dtype(shape, cfg.precision), cfg.model.engine)
    if folder:
        load_model(chunks, folder)
        return shape, chunks
    with torch.no_grad():
        for parameter in (p for chunk in chunks for p in chunk.parameters()):
            parameter.normal_(1.0 if parameter.dim() == 1 else 0.0, STANDARD_DEVIATION)
    return shape, chunks


def random_batch(cfg: BenchmarkConfig, shape: ModelShape, layout: Layout, generator: torch.Generator) -> Batch:
    """This rank's part of a micro-batch of random tokens."""
    from megatron.core import parallel_state as ps

    size = (cfg.micro_batch_size, cfg.sequence_length)
    tokens = torch.randint(0, shape.vocab_size, size, generator=generator)
    batch = {
        "tokens": tokens,
        "labels": tokens,
        "position_ids": torch.arange(cfg.sequence_length).expand(size),
        "loss_mask": torch.ones(size),
        "valid": torch.ones(cfg.micro_batch_size),
    }
    return on_this_context_rank(batch, ps.get_context_parallel_group() if layout.context > 1 else None)


def _seconds(
    chunks: list[torch.nn.Module], batch: Batch, cfg: BenchmarkConfig, layout: Layout, shape: ModelShape, hooks: bool
) -> float:
    recorder = Recorder(
        chunks if hooks else [],
        head_dim=shape.head_dim,
        sequence="mean",
        heads="per_token",
        sequence_parallel=layout.sequence and layout.tensor > 1,
    )
    torch.cuda.synchronize()
    collectives.barrier()
    began = time.perf_counter()
    forward_pass(chunks, batch, cfg, layout, lambda batch, **_: None, recorder.begin)
    torch.cuda.synchronize()
    collectives.barrier()
    recorder.close()
    return time.perf_counter() - began
