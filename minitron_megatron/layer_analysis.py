"""Layer analysis: every block of consecutive layers is removed, and Block Influence, loss and questions say what is lost.

Brings the rooms together: samples (data), variants in one pass (importance), lm-evaluation-harness (evaluate), page (report).
"""

import json
import logging
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from minitron_megatron.checkpoints.folder import ModelFolder
from minitron_megatron.cli.spelling import command_line
from minitron_megatron.config import LayersConfig
from minitron_megatron.console import format_value, print_table, speaks
from minitron_megatron.data.questions import QuestionFile, QuestionSource, Request, encode_all
from minitron_megatron.data.tokenizer import load_tokenizer
from minitron_megatron.errors import UserError
from minitron_megatron.importance.blocks import Block, layer_passes
from minitron_megatron.importance.layer_checks import Analysing, check_layers
from minitron_megatron.importance.layer_passes import LayerMeasurement, Measured
from minitron_megatron.importance.layers import FILE, JUDGES, Judged, LayerAnalysis
from minitron_megatron.measuring import measuring
from minitron_megatron.models.build import foretell_dtype, model_dtype, pick_engine
from minitron_megatron.models.guessing import warn_of_guessing
from minitron_megatron.parallel import collectives
from minitron_megatron.parallel.deciding import from_rank_zero
from minitron_megatron.parallel.job import pick_device
from minitron_megatron.report.layers import JUDGE_NAMES, layer_report

log = logging.getLogger(__name__)
REPORT = "report.html"
# Blocks that the table shows for each judge and length.
_SHOWN = 3
_ORDINALS = {1: "1st", 2: "2nd", 3: "3rd"}


def analyse_layers(cfg: LayersConfig, checked: Analysing | None = None) -> None:
    """`launch/layers.py`: a folder with layers.json and report.html."""
    checked = checked or check_layers(cfg)
    layout, folder, data, blocks = checked.layout, checked.folder, checked.data, checked.blocks
    if checked.file or cfg.tasks:
        load_tokenizer(folder.path)
    device = pick_device(cfg.device)
    if cfg.dry_run:
        if speaks():
            _print_plan(cfg, folder, blocks, checked.count, _sources(cfg, folder, checked.file)[1])
            foretell_dtype(cfg.precision, device, folder.shape)
        return
    pick_engine(cfg.model.engine, layout, model_dtype(folder.shape, cfg.precision), device)
    with measuring(cfg, layout, folder, data, checked.inputs) as out:
        if out.done:
            return
        made = from_rank_zero(lambda: _sources(cfg, folder, checked.file))
        sources, requests = made or (None, [])
        requests = collectives.broadcast_object(requests)
        flat = [request for of_source in requests for request in of_source]
        measured = LayerMeasurement(folder, layout, cfg, blocks).measure(data, checked.count, flat)
        _check_finite(measured, folder)
        if sources is not None:
            analysis = _analysis(cfg, folder, blocks, measured, sources)
            warn_of_guessing(f"model={folder.path}", analysis.base.loss, folder.shape.vocab_size)
            (out.path / FILE).write_text(json.dumps(analysis.to_json(), indent=1) + "\n", encoding="utf-8")
            layer_report(out.path / REPORT, analysis, str(folder.path), command_line())
            out.results = {**analysis.counts, "blocks": checked.lengths, "loss": analysis.base.loss}
    if sources is not None:
        _print(cfg.output, analysis)


def _sources(
    cfg: LayersConfig, folder: ModelFolder, file: QuestionFile | None
) -> tuple[list[QuestionSource], list[list[Request]]]:
    """Where questions come from, and the requests of each. Raises UserError."""
    sources: list[QuestionSource] = [file] if file else []
    if cfg.tasks:
        from minitron_megatron.evaluate.harness import load_tasks

        sources += load_tasks(cfg.tasks, fewshot=cfg.fewshot, limit=cfg.limit, seed=cfg.seed)
    if not sources:
        return [], []
    names = [source.name for source in sources]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise UserError(f"questions= and tasks= have {twice} twice: leave one out")
    tokenizer = load_tokenizer(folder.path)
    return sources, [encode_all(tokenizer, source, folder.shape.max_position_embeddings) for source in sources]


def _check_finite(measured: Measured, folder: ModelFolder) -> None:
    if not measured.nll.isfinite().all() or not measured.log_likelihoods.isfinite().all():
        raise UserError(f"model={folder.path}: a loss is not finite; the weights or precision= are at fault")


def _analysis(
    cfg: LayersConfig, folder: ModelFolder, blocks: Sequence[Block], measured: Measured, sources: list[QuestionSource]
) -> LayerAnalysis:
    """Figures of every variant out of sums."""
    samples = len(measured.nll)
    tokens = samples * cfg.data.sequence_length
    losses = (measured.nll.sum(0) / tokens).tolist()
    judged = []
    for slot, loss in enumerate(losses):
        bi = measured.influence[slot - 1].item() if slot else 0.0
        judged.append(
            Judged(loss, bi, **_answers(sources, measured.log_likelihoods[:, slot].numpy(), cfg.normalization))
        )
    by_length: dict[int, list[Judged]] = {}
    # Blocks of one length stand in the order of their starts: ends rise with starts.
    for block, found in zip(blocks, judged[1:], strict=True):
        by_length.setdefault(block.length, []).append(found)
    counts = {
        "split": cfg.split,
        "samples": samples,
        "tokens": tokens,
        "questions": {name: int(figures["questions"]) for name, figures in judged[0].tasks.items()},
        "normalization": cfg.normalization,
        "layer_passes": measured.layer_passes,
        "seconds": round(measured.seconds, 2),
    }
    return LayerAnalysis(cfg.output, folder.digest, folder.shape.num_layers, judged[0], by_length, counts)


def _answers(sources: list[QuestionSource], log_likelihoods: np.ndarray, normalization: str) -> dict[str, Any]:
    """Accuracy and margin over all questions (every question counts the same), and of each source."""
    tasks, first = {}, 0
    for source in sources:
        size = len(source.texts())
        tasks[source.name] = source.figures(log_likelihoods[first : first + size], normalization)
        first += size
    if not tasks:
        return {}
    weights = [figures["questions"] for figures in tasks.values()]
    accuracy = sum(w * f["accuracy"] for w, f in zip(weights, tasks.values(), strict=True)) / sum(weights)
    margins = [f.get("margin", math.nan) for f in tasks.values()]
    margin = sum(w * m for w, m in zip(weights, margins, strict=True)) / sum(weights)
    return {"accuracy": accuracy, "margin": None if math.isnan(margin) else margin, "tasks": tasks}


def _print_plan(
    cfg: LayersConfig, folder: ModelFolder, blocks: Sequence[Block], count: int, requests: list[list[Request]]
) -> None:
    layers = folder.shape.num_layers
    saved = len(blocks) * layers + layers
    rows = [
        ["blocks", len(blocks)],
        ["samples", count],
        ["tokens", count * cfg.data.sequence_length],
        ["requests", sum(map(len, requests))],
        ["layers a sample runs through", f"{layer_passes(layers, blocks):,} of {saved:,}"],
    ]
    print_table("would be analysed", ["", "value"], rows)


def _row(name: str, judged: Judged) -> list[object]:
    asked = [judged.accuracy, "" if judged.margin is None else judged.margin] if judged.accuracy is not None else []
    return [name, judged.bi, judged.loss, judged.perplexity, *asked]


def _block_rows(analysis: LayerAnalysis, length: int, judges: Sequence[str]) -> list[list[object]]:
    """A row for each of the blocks that some judge would remove first, best first; then those that hold the last layer.

    The last column says which place each judge gives it, or why it stays.
    """
    places: dict[int, list[str]] = {}
    for judge in judges:
        for place, start in enumerate(analysis.ranked(length, judge)[:_SHOWN], start=1):
            places.setdefault(start, []).append(f"{_ORDINALS[place]} by {JUDGE_NAMES[judge]}")
    stays = range(analysis.num_layers - length, analysis.num_layers - length + 1)
    said = {start: ", ".join(words) for start, words in places.items()}
    said |= dict.fromkeys(stays, "stays: prune.keep_last_layers=1")
    named = {start: str(start) if length == 1 else f"{start}–{start + length - 1}" for start in said}
    return [[*_row(f"without {named[s]}", analysis.blocks[length][s]), words] for s, words in said.items()]


def _print(output: str, analysis: LayerAnalysis) -> None:
    asked = analysis.base.accuracy is not None
    columns = ["", "BI", "loss", "perplexity", *(["accuracy", "margin"] if asked else []), "goes"]
    rows = [[*_row("whole model", analysis.base), ""]]
    for length in analysis.blocks:
        rows += _block_rows(analysis, length, JUDGES if asked else JUDGES[:2])
    counts = analysis.counts
    title = f"{output}: {counts['samples']} samples, {format_value(counts['seconds'])} s"
    print_table(title, columns, rows)
