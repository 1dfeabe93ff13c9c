"""Perplexity of a model on a split: every token once, over the full vocabulary, the same number in any layout."""

import json
import math
import time

from minitron_megatron.checkpoints.folder import ModelFolder, check_output, open_model_folder
from minitron_megatron.checkpoints.weights import check_weights, load_model
from minitron_megatron.config import EvaluateConfig
from minitron_megatron.console import print_table, progress
from minitron_megatron.data.datasets import Data, MicroBatches, Windows, open_data
from minitron_megatron.errors import UserError
from minitron_megatron.launcher import resolved_config
from minitron_megatron.measuring import measuring
from minitron_megatron.models.build import build_model_chunks, check_layout, check_sequence, model_dtype, pick_engine
from minitron_megatron.models.loss import summed_loss
from minitron_megatron.parallel import collectives
from minitron_megatron.parallel.layout import Layout, pick_device

RESULTS = "results.json"


def evaluate(cfg: EvaluateConfig) -> None:
    """`launch/evaluate.py`: loss and perplexity into results.json of the output folder."""
    layout = Layout.from_config(cfg.parallel)
    folder = open_model_folder(cfg.model.folder("model"))
    check_layout(folder.shape, layout)
    check_sequence(cfg.data.sequence_length, layout)
    check_weights(folder)
    data = open_data(cfg.data.path, cfg.split, folder.shape, cfg.data.sequence_length)
    windows = Windows(data, cfg.split, cfg.data.sequence_length)
    count = min(len(windows), cfg.samples or len(windows))
    inputs = {"model": folder.digest, "data": data.digest}
    device = pick_device(cfg.device)
    if cfg.dry_run:
        check_output(cfg.output, config=resolved_config(cfg), inputs=inputs, resume=cfg.resume)
        print_table("would be evaluated", ["", "value"], [["model", str(folder.path)], ["windows", count]])
        return
    pick_engine(cfg.model.engine, layout, model_dtype(folder.shape, cfg.precision), device)
    with measuring(cfg, layout, folder, data, inputs) as out:
        if out.done:
            return
        out.results = measure(folder, data, layout, cfg, count)
        if collectives.is_rank_zero():
            (out.path / RESULTS).write_text(json.dumps(out.results, indent=2) + "\n", encoding="utf-8")
    print_table(f"{folder.path} on {cfg.data.path}, {cfg.split}", ["", "value"], list(out.results.items()))


def measure(folder: ModelFolder, data: Data, layout: Layout, cfg: EvaluateConfig, count: int) -> dict[str, float]:
    """Mean negative log likelihood (nats a token), perplexity and tokens over the first `count` windows."""

    began = time.monotonic()
    chunks = build_model_chunks(folder.shape, layout, model_dtype(folder.shape, cfg.precision), cfg.model.engine)
    load_model(chunks, folder)
    windows = Windows(data, cfg.split, cfg.data.sequence_length)
    batches = MicroBatches.of_this_rank(windows, range(count), cfg.trainer.micro_batch_size, layout)

    with progress("evaluate", len(batches) * len(chunks), unit="micro-batches") as advance:
        nll, tokens = summed_loss(
            chunks,
            batches,
            micro_batch_size=cfg.trainer.micro_batch_size,
            sequence_length=cfg.data.sequence_length,
            vocab_size=folder.shape.vocab_size,
            before=lambda batch: advance(1),
        )
    if not math.isfinite(nll):
        raise UserError(f"model={folder.path}: the loss is {nll}; the weights or precision= are at fault")
    return {
        "loss": nll / tokens,
        "perplexity": math.exp(min(nll / tokens, 700)),
        "tokens": int(tokens),
        "seconds": round(time.monotonic() - began, 2),
    }
