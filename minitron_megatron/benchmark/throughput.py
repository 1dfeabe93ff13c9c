"""Tokens a second of forward passes, of a model and of its smaller target: what a user of the smaller one gains."""

from dataclasses import replace

import torch

from minitron_megatron.benchmark.importance import live_model, random_batch
from minitron_megatron.benchmark.loss import seconds
from minitron_megatron.config import BenchmarkConfig, ModelConfig
from minitron_megatron.models.forward import forward_only
from minitron_megatron.models.shape import ModelShape
from minitron_megatron.parallel.layout import Layout
from minitron_megatron.prune.select import target_shape


def forward_throughput(cfg: BenchmarkConfig, layout: Layout) -> dict[str, float]:
    """Tokens/s of a GPU, all logits included, of `model=` and of its `target=`, with random weights; and their ratio."""
    source = ModelShape.from_dict(cfg.model.sizes("model"), "model")
    small = target_shape(source, vars(cfg.target), [])
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

    def once() -> None:
        forward_only(
            chunks,
            [batch] * layout.stages,
            num_micro_batches=layout.stages,
            micro_batch_size=cfg.micro_batch_size,
            sequence_length=cfg.sequence_length,
            collect=lambda batch, hidden_states, output_layer, output_weight: output_layer(
                hidden_states, weight=output_weight
            )[0][:0],
        )

    return seconds(once, cfg.repeats)
