"""Tokens a second of forward passes, of a model and of its smaller target: what a user of the smaller one gains."""

from dataclasses import replace
from typing import Any

import torch

from minitron_megatron.benchmark.checks import source_and_target
from minitron_megatron.benchmark.common import forward_pass, seconds
from minitron_megatron.benchmark.importance import live_model, random_batch
from minitron_megatron.config import BenchmarkConfig, ModelConfig
from minitron_megatron.models.forward import Batch
from minitron_megatron.models.shape import ModelShape
from minitron_megatron.parallel.layout import Layout


def forward_throughput(cfg: BenchmarkConfig, layout: Layout) -> dict[str, float]:
    """Tokens/s of a GPU, all logits included, of `model=` and of its `target=`, with random weights; and their ratio."""
    source, small = source_and_target(cfg)
    tokens = cfg.micro_batch_size * cfg.sequence_length * layout.stages
    found = {"tokens": tokens}
    for name, shape in (("source", source), ("target", small)):
        found[f"{name}_tokens_per_second_per_gpu"] = tokens / _seconds(cfg, shape, layout) / layout.world_size
    found["target_over_source"] = found["target_tokens_per_second_per_gpu"] / found["source_tokens_per_second_per_gpu"]
    return found


def _seconds(cfg: BenchmarkConfig, shape: ModelShape, layout: Layout) -> float:
    own = replace(cfg, model=ModelConfig(**shape.to_dict(), engine=cfg.model.engine))
    _, chunks = live_model(own, layout)
    batch = random_batch(own, shape, layout, torch.Generator().manual_seed(cfg.seed))

    def logits(batch: Batch, *, hidden_states: torch.Tensor, output_layer: Any, output_weight: Any) -> torch.Tensor:
        return output_layer(hidden_states, weight=output_weight)[0][:0]

    def once() -> None:
        forward_pass(chunks, batch, own, layout, logits)

    return seconds(once, cfg.repeats)
