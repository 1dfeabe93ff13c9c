"""What cutting a live model in memory costs: every parameter of the smaller model out of the sharded larger one."""

import statistics
import time

import torch

from minitron_megatron.benchmark.importance import live_model
from minitron_megatron.benchmark.prune import random_scores
from minitron_megatron.config import BenchmarkConfig
from minitron_megatron.models.build import build_model_chunks, model_dtype
from minitron_megatron.parallel import collectives
from minitron_megatron.parallel.layout import Layout
from minitron_megatron.prune.live import Side, cut_live, local_tensors
from minitron_megatron.prune.select import choose, target_shape


def cutting_in_memory(cfg: BenchmarkConfig, layout: Layout) -> dict[str, float]:
    """Seconds of prune.live.cut_live from `model=` to `target=` in one layout, and what it holds beside the two models."""
    source, chunks = live_model(cfg, layout)
    target = target_shape(source, vars(cfg.target), [])
    kept = choose(source, target, random_scores(source, cfg.seed), [])
    smaller = build_model_chunks(target, layout, model_dtype(target, cfg.precision), cfg.model.engine)
    given, wanted = local_tensors(chunks, source), local_tensors(smaller, target)
    cuda = torch.cuda.is_available()
    seconds = []
    for _ in range(cfg.repeats + 1):
        before = torch.cuda.memory_allocated()
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
        collectives.barrier()
        began = time.perf_counter()
        cut_live(Side(source, layout), given, Side(target, layout), wanted, kept)
        torch.cuda.synchronize()
        collectives.barrier()
        seconds.append(time.perf_counter() - began)
    held = torch.cuda.max_memory_allocated() - before if cuda else None
    return {
        "target_bytes_of_a_rank": sum(t.numel() * t.itemsize for t in wanted.values()),
        "cut_seconds": statistics.median(seconds[1:]),  # the first one warms up
        **({"held_beside_both_models": held} if held is not None else {}),
    }
