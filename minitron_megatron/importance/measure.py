"""Measures activation importance in any parallel layout: one forward pass over calibration samples collects every axis.

each rank: its layers, its channels, its samples     ──sum over data-parallel ranks──▶
──join channels over tensor-parallel ranks──▶  ──collect layers over pipeline stages──▶  scores in global order
"""

import logging
import time
from typing import Any

import numpy as np
import torch

from minitron_megatron.checkpoints.folder import ModelFolder, check_output, open_model_folder, output_folder
from minitron_megatron.checkpoints.weights import check_weights, load_model, verify_digest
from minitron_megatron.config import ImportanceConfig
from minitron_megatron.console import print_table, progress
from minitron_megatron.data.datasets import DataFolder, MicroBatches, open_data, training_samples
from minitron_megatron.errors import UserError
from minitron_megatron.importance.hooks import Recorder
from minitron_megatron.importance.scores import save_scores
from minitron_megatron.importance.statistics import finish_batch
from minitron_megatron.launcher import command_line, resolved_config
from minitron_megatron.models.axes import PROBES, TENSOR_PARALLEL_AXES
from minitron_megatron.models.build import build_model_chunks, check_layout, check_sequence, model_dtype
from minitron_megatron.models.forward import forward_only
from minitron_megatron.parallel import collectives
from minitron_megatron.parallel.layout import Layout, parallel_job, pick_device

log = logging.getLogger(__name__)


def measure_importance(cfg: ImportanceConfig) -> None:
    """`launch/importance.py`: calibration samples through a model into a scores folder."""
    layout = Layout.from_config(cfg.parallel)
    folder = open_model_folder(cfg.model.folder("model"))
    check_layout(folder.shape, layout)
    check_sequence(cfg.data.sequence_length, layout)
    check_weights(folder)
    data = open_data(cfg.data.path, "train", folder.shape, cfg.data.sequence_length)
    if data.tokens("train") < cfg.samples * cfg.data.sequence_length:
        raise UserError(
            f"samples={cfg.samples} of {cfg.data.sequence_length} tokens are more than the train split's "
            f"{data.tokens('train')}: lower samples= or data.sequence_length="
        )
    inputs = {"model": folder.digest, "data": data.digest}
    pick_device(cfg.device)
    if cfg.dry_run:
        check_output(cfg.output, config=resolved_config(cfg), inputs=inputs, resume=cfg.resume)
        rows = [["samples", cfg.samples], ["tokens", cfg.samples * cfg.data.sequence_length], ["layout", str(layout)]]
        print_table("would be measured", ["", "value"], rows)
        return
    with parallel_job(layout, seed=cfg.seed, device=cfg.device):
        if cfg.verify:
            verify_digest(folder)
        with output_folder(
            cfg.output, command=command_line(), config=resolved_config(cfg), inputs=inputs, resume=cfg.resume
        ) as out:
            if out.done:
                return
            began = time.monotonic()
            scores = importance_scores(folder, data, layout, cfg)
            if scores is not None:
                save_scores(out.path, scores)
            seconds = time.monotonic() - began
            tokens = cfg.samples * cfg.data.sequence_length
            out.results = {
                "samples": cfg.samples,
                "tokens": tokens,
                "sequence_aggregation": cfg.importance.sequence,
                "batch_aggregation": cfg.importance.batch,
                "seconds": round(seconds, 2),
                "tokens_per_second": round(tokens / seconds),
            }
        if scores is not None:
            _print(cfg.output, scores, out.results)


def importance_scores(
    folder: ModelFolder, data: DataFolder, layout: Layout, cfg: ImportanceConfig
) -> dict[str, np.ndarray] | None:
    """Load the model, run the calibration samples, and give every score on rank 0 (None elsewhere)."""
    from megatron.core import parallel_state as ps

    chunks = build_model_chunks(folder.shape, layout, model_dtype(folder.shape, cfg.precision))
    load_model(chunks, folder)
    length = cfg.data.sequence_length
    samples = training_samples(data, "train", sequence_length=length, seed=cfg.seed, count=cfg.samples)
    batches = MicroBatches(
        samples,
        range(cfg.samples),
        cfg.trainer.micro_batch_size,
        ps.get_data_parallel_rank(),
        ps.get_data_parallel_world_size(),
        multiple_of=layout.pipeline if layout.virtual_pipeline else 1,
    )
    recorder = Recorder(chunks, folder.shape.head_dim, cfg.importance.sequence, layout.sequence and layout.tensor > 1)
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
            collect=lambda batch, **_: None,
            before=before,
        )
    recorder.close()
    return gather_scores(recorder, cfg.importance.batch)


def gather_scores(recorder: Recorder, how: str) -> dict[str, np.ndarray] | None:
    """Join the statistics of all ranks: scores by name, [layers, …], on rank 0; None elsewhere."""
    from megatron.core import parallel_state as ps

    sharded = {p.score for p in PROBES if p.axis in TENSOR_PARALLEL_AXES}
    local: dict[tuple[str, int], np.ndarray] = {}
    for (name, layer), statistic in sorted(recorder.statistics.items()):
        packed = statistic.packed()
        torch.distributed.all_reduce(packed, group=ps.get_data_parallel_group())
        # Block Influence is an expectation over the samples, whatever the aggregation of the other axes.
        score = finish_batch(packed, "mean" if name == "layers" else how)
        if name in sharded:
            parts = [torch.empty_like(score) for _ in range(ps.get_tensor_model_parallel_world_size())]
            torch.distributed.all_gather(parts, score, group=ps.get_tensor_model_parallel_group())
            score = torch.cat(parts)
        local[(name, layer)] = score.cpu().numpy()
    speaks_for_stage = ps.get_tensor_model_parallel_rank() == 0 and ps.get_data_parallel_rank() == 0
    gathered = collectives.all_gather_objects(local if speaks_for_stage else {})
    if not collectives.is_rank_zero():
        return None
    whole: dict[str, dict[int, np.ndarray]] = {}
    for part in gathered:
        for (name, layer), score in part.items():
            whole.setdefault(name, {})[layer] = score
    stacked = {name: np.stack([layers[i] for i in sorted(layers)]) for name, layers in whole.items()}
    stacked["layers"] = stacked["layers"][:, 0]
    return stacked


def _print(output: str, scores: dict[str, np.ndarray], results: dict[str, Any]) -> None:
    rows = [[name, str(s.shape), float(s.min()), float(np.median(s)), float(s.max())] for name, s in scores.items()]
    title = f"{output}: {results['samples']} samples, {results['tokens_per_second']:,} tokens/s"
    print_table(title, ["score", "shape", "lowest", "median", "highest"], rows)
