"""Measures activation importance in any parallel layout: one forward pass over calibration samples collects every axis.

each rank: its layers, its channels, its samples     ──sum over data-parallel ranks──▶
──join channels over tensor-parallel ranks──▶  ──collect layers over pipeline stages──▶  scores in global order
"""

import logging
import time
from typing import Any

import numpy as np
import torch

from minitron_megatron.checkpoints.folder import ModelFolder
from minitron_megatron.checkpoints.weights import load_model
from minitron_megatron.config import ImportanceConfig
from minitron_megatron.console import print_table, progress
from minitron_megatron.data.datasets import MicroBatches, Samples, training_samples
from minitron_megatron.data.folder import Data
from minitron_megatron.importance.checks import aggregation, check_importance
from minitron_megatron.importance.hooks import Recorder
from minitron_megatron.importance.scores import save_scores
from minitron_megatron.importance.statistics import BatchStatistic
from minitron_megatron.importance.sums import Statistics, finish_scores, save_statistics
from minitron_megatron.measuring import measuring
from minitron_megatron.models.axes import PROBES, TENSOR_PARALLEL_AXES
from minitron_megatron.models.build import build_model_chunks, foretell_dtype, model_dtype, pick_engine
from minitron_megatron.models.forward import forward_only
from minitron_megatron.models.guessing import warn_of_guessing
from minitron_megatron.models.loss import FirstLoss
from minitron_megatron.over_data import OverData
from minitron_megatron.parallel import collectives
from minitron_megatron.parallel.job import pick_device
from minitron_megatron.parallel.layout import Layout

log = logging.getLogger(__name__)


def measure_importance(cfg: ImportanceConfig, checked: OverData | None = None) -> None:
    """`launch/importance.py`: calibration samples through a model into a scores folder."""
    checked = checked or check_importance(cfg)
    layout, folder, data, inputs = checked.layout, checked.folder, checked.data, checked.inputs
    device = pick_device(cfg.device)
    if cfg.dry_run:
        rows = [["samples", cfg.samples], ["tokens", cfg.samples * cfg.data.sequence_length], ["layout", str(layout)]]
        print_table("would be measured", ["", "value"], rows)
        foretell_dtype(cfg.precision, device, folder.shape)
        return
    pick_engine(cfg.model.engine, layout, model_dtype(folder.shape, cfg.precision), device)
    with measuring(cfg, layout, folder, data, inputs) as out:
        if out.done:
            return
        began = time.monotonic()
        part = {"data": data.digest, "seed": cfg.seed, "first_sample": cfg.first_sample, "samples": cfg.samples}
        statistics = measure_statistics(folder, data, layout, cfg)
        seconds = time.monotonic() - began
        out.results = {
            **aggregation(cfg, folder.shape.head_dim),
            "samples": cfg.samples,
            "tokens": cfg.samples * cfg.data.sequence_length,
            "parts": [part],
            "seconds": round(seconds, 2),
            "tokens_per_second": round(cfg.samples * cfg.data.sequence_length / seconds),
        }
        scores = None
        if statistics is not None:
            scores = finish_scores(statistics, out.results)
            save_scores(out.path, scores)
            save_statistics(out.path, statistics)
    if scores is not None:
        _print(cfg.output, scores, out.results)


def measure_statistics(folder: ModelFolder, data: Data, layout: Layout, cfg: ImportanceConfig) -> Statistics | None:
    """Load the model, run the calibration samples, and give every statistic on rank 0 (None elsewhere)."""

    chunks = build_model_chunks(folder.shape, layout, model_dtype(folder.shape, cfg.precision), cfg.model.engine)
    load_model(chunks, folder)
    length, last = cfg.data.sequence_length, cfg.first_sample + cfg.samples
    samples = training_samples(data, "train", sequence_length=length, seed=cfg.seed, count=last)
    batches = MicroBatches.of_this_rank(samples, range(cfg.first_sample, last), cfg.trainer.micro_batch_size, layout)
    recorder = Recorder(
        chunks,
        head_dim=folder.shape.head_dim,
        sequence=cfg.importance.sequence,
        heads=cfg.importance.heads,
        sequence_parallel=layout.sequence and layout.tensor > 1,
    )
    first_loss = FirstLoss(folder.shape.vocab_size)
    with progress("importance", len(batches) * len(chunks), unit="micro-batches") as advance:

        def before(batch: dict[str, torch.Tensor]) -> None:
            recorder.begin(batch)
            advance(1)

        forward_only(
            chunks,
            batches,
            num_micro_batches=len(batches),
            micro_batch_size=cfg.trainer.micro_batch_size,
            sequence_length=length,
            collect=first_loss,
            before=before,
        )
    recorder.close()
    recorder.check_finite()
    warn_of_guessing(f"model={folder.path}", first_loss.mean(), folder.shape.vocab_size)
    statistics = gather_statistics(recorder)
    if statistics is not None:
        statistics.vocab = count_tokens(samples, range(cfg.first_sample, last), folder.shape.vocab_size)
    return statistics


def count_tokens(samples: Samples, numbers: range, vocab_size: int) -> torch.Tensor:
    """How often each token stands in the calibration samples: int64 [vocab_size]."""
    counts = torch.zeros(vocab_size, dtype=torch.int64)
    for number in numbers:
        counts += torch.bincount(samples[number]["tokens"], minlength=vocab_size)
    return counts


def gather_statistics(recorder: Recorder) -> Statistics | None:
    """Join what all ranks have seen: per score, sums [layers, channels] in global order on rank 0; None elsewhere."""
    from megatron.core import parallel_state as ps

    sharded = {p.score for p in PROBES if p.axis in TENSOR_PARALLEL_AXES}
    local: dict[tuple[str, int], tuple[np.ndarray, np.ndarray, float]] = {}
    for (name, layer), statistic in sorted(recorder.statistics.items()):
        packed = statistic.packed()
        torch.distributed.all_reduce(packed, group=ps.get_data_parallel_group())
        parts = [packed]
        if name in sharded:
            parts = [torch.empty_like(packed) for _ in range(ps.get_tensor_model_parallel_world_size())]
            torch.distributed.all_gather(parts, packed, group=ps.get_tensor_model_parallel_group())
        shards = [BatchStatistic.unpacked(part.cpu()) for part in parts]
        total, squares = (torch.cat([getattr(s, sums) for s in shards]).numpy() for sums in ("total", "squares"))
        local[(name, layer)] = total, squares, float(shards[0].count)
    speaks_for_stage = (
        ps.get_tensor_model_parallel_rank() == 0 and ps.get_data_parallel_rank(with_context_parallel=True) == 0
    )
    gathered = collectives.gather_objects(local if speaks_for_stage else {})
    if gathered is None:
        return None
    whole = {key: sums for part in gathered for key, sums in part.items()}
    by_score: dict[str, list[tuple[np.ndarray, np.ndarray, float]]] = {}
    for name, layer in sorted(whole):
        by_score.setdefault(name, []).append(whole[name, layer])
    stacked = {name: [_stack([s[i] for s in layers]) for i in (0, 1)] for name, layers in by_score.items()}
    return Statistics(
        {name: tuple(sums) for name, sums in stacked.items()},
        torch.tensor(next(iter(whole.values()))[2], dtype=torch.float64),
    )


def _stack(layers: list[np.ndarray]) -> torch.Tensor:
    """[layers, channels]; where layers have sizes of their own, narrow ones end in zeros."""
    widest = max(map(len, layers))
    return torch.from_numpy(np.stack([np.pad(layer, (0, widest - len(layer))) for layer in layers]))


def _print(output: str, scores: dict[str, np.ndarray], results: dict[str, Any]) -> None:
    rows = [[name, str(s.shape), float(s.min()), float(np.median(s)), float(s.max())] for name, s in scores.items()]
    title = f"{output}: {results['samples']} samples, {results['tokens_per_second']:,} tokens/s"
    print_table(title, ["score", "shape", "lowest", "median", "highest"], rows)
