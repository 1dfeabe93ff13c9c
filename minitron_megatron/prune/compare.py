"""The loss before and right after a cut, with and without merged heads: what a choice costs before anything is trained.

The source is loaded once, in the job's layout, and each variant is cut from it live (prune/live.py).
"""

from dataclasses import replace

import torch

from minitron_megatron.checkpoints.folder import ModelFolder
from minitron_megatron.checkpoints.weights import load_model
from minitron_megatron.config import PruneConfig
from minitron_megatron.console import progress
from minitron_megatron.data.datasets import MicroBatches, Windows
from minitron_megatron.data.folder import Data
from minitron_megatron.data.windows import taken
from minitron_megatron.models.build import build_model_chunks, model_dtype
from minitron_megatron.models.guessing import warn_of_guessing
from minitron_megatron.models.loss import summed_loss
from minitron_megatron.models.shape import ModelShape
from minitron_megatron.parallel.job import parallel_job
from minitron_megatron.parallel.layout import Layout
from minitron_megatron.prune.live import Side, cut_live, local_tensors
from minitron_megatron.prune.select import Kept


def losses_around_the_cut(
    cfg: PruneConfig,
    layout: Layout,
    folder: ModelFolder,
    data: Data,
    target: ModelShape,
    variants: dict[str, Kept],
) -> dict[str, float]:
    """Mean loss (nats a token) of the source and of each variant of the cut, on the first `loss_samples` validation windows."""
    with parallel_job(layout, seed=cfg.seed, device=cfg.device):
        dtype = model_dtype(folder.shape, cfg.precision)
        source = build_model_chunks(folder.shape, layout, dtype, cfg.model.engine)
        load_model(source, folder)
        batches = _batches(cfg, layout, data)
        losses = {}
        with progress(
            "loss around the cut", len(batches) * len(source) * (1 + len(variants)), unit="micro-batches"
        ) as bar:
            losses["source"] = _loss(cfg, source, batches, folder.shape, bar)
            warn_of_guessing(f"model={folder.path}", losses["source"], folder.shape.vocab_size)
            smaller = build_model_chunks(target, layout, dtype, cfg.model.engine)
            given, wanted = local_tensors(source, folder.shape), local_tensors(smaller, target)
            for name, kept in variants.items():
                cut_live(Side(folder.shape, layout), given, Side(target, layout), wanted, kept)
                losses[name] = _loss(cfg, smaller, batches, target, bar)
        return losses


def cut_variants(kept: Kept, merged: Kept | None) -> dict[str, Kept]:
    """What is compared: the cut alone, and with merged heads where heads are merged or could be."""
    if merged is None or merged.partners is None:
        return {"pruned": kept}
    return {"pruned": replace(merged, partners=None), "pruned, heads merged": merged}


def _batches(cfg: PruneConfig, layout: Layout, data: Data) -> MicroBatches:
    windows = Windows(data, "validation", cfg.data.sequence_length)
    numbers = range(taken("loss_samples", cfg.loss_samples, len(windows), "validation"))
    return MicroBatches.of_this_rank(windows, numbers, cfg.trainer.micro_batch_size, layout)


def _loss(
    cfg: PruneConfig, chunks: list[torch.nn.Module], batches: MicroBatches, shape: ModelShape, advance: object
) -> float:
    nll, tokens = summed_loss(
        chunks,
        batches,
        micro_batch_size=cfg.trainer.micro_batch_size,
        sequence_length=cfg.data.sequence_length,
        vocab_size=shape.vocab_size,
        before=lambda batch: advance(1),
    )
    return nll / tokens
