"""What a layer analysis costs over one forward pass for each block: both in turn, on the same fresh random tokens."""

import statistics
import time
from collections.abc import Sequence

import torch

from minitron_megatron.benchmark.importance import live_model, random_batch
from minitron_megatron.config import BenchmarkConfig
from minitron_megatron.importance.blocks import Block, contiguous_blocks, layer_passes
from minitron_megatron.importance.variants import Variants
from minitron_megatron.models.forward import Batch, forward_only
from minitron_megatron.models.shape import ModelShape
from minitron_megatron.parallel import collectives
from minitron_megatron.parallel.layout import Layout

# Tokens of a choice that are scored; a sample's are all scored.
_SCORED = 4


def blocks_over_passes(cfg: BenchmarkConfig, layout: Layout) -> dict[str, float]:
    """Seconds of the whole model's pass and of one with every single layer removed in turn: medians over `repeats` pairs.

    `…_over_passes` is the second over as many passes as there are models to judge (layers + 1), whose layers alone would
    give `layers_run_over_passes`: the head runs for every model on all tokens of samples, on a choice's of questions.
    """
    shape, chunks = live_model(cfg, layout)
    blocks = contiguous_blocks(shape.num_layers, [1])
    generator = torch.Generator().manual_seed(cfg.seed)
    judged = len(blocks) + 1
    found = {
        "tokens": cfg.micro_batch_size * cfg.sequence_length,
        "blocks": len(blocks),
        "layers_run_over_passes": layer_passes(shape.num_layers, blocks) / (judged * shape.num_layers),
    }
    for what in ("samples", "questions"):
        pairs = []
        for _ in range(cfg.repeats + 1):
            batch = random_batch(cfg, shape, layout, generator)
            batch["loss_mask"][:, : -_SCORED if what == "questions" else 0] = 0
            pairs.append([_seconds(chunks, batch, cfg, layout, shape, removed) for removed in ([], blocks)])
        alone, together = (statistics.median(seconds) for seconds in zip(*pairs[1:], strict=True))
        found[f"{what}_pass_seconds"], found[f"{what}_all_blocks_seconds"] = alone, together
        found[f"{what}_over_passes"] = together / (judged * alone)
    return found


def _seconds(
    chunks: list[torch.nn.Module],
    batch: Batch,
    cfg: BenchmarkConfig,
    layout: Layout,
    shape: ModelShape,
    blocks: Sequence[Block],
) -> float:
    variants = Variants(
        chunks,
        blocks,
        tokens=cfg.micro_batch_size * cfg.sequence_length,
        vocab_size=shape.vocab_size,
        sequence_parallel=layout.sequence and layout.tensor > 1,
    )
    torch.cuda.synchronize()
    collectives.barrier()
    began = time.perf_counter()
    with variants.installed():
        forward_only(
            chunks,
            [batch] * layout.stages,
            num_micro_batches=layout.stages,
            micro_batch_size=cfg.micro_batch_size * variants.slots,
            sequence_length=cfg.sequence_length,
            collect=variants.negative_log_likelihoods,
            before=variants.begin,
        )
    torch.cuda.synchronize()
    collectives.barrier()
    return time.perf_counter() - began
