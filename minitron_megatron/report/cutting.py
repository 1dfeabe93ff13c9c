"""Sections about what was cut: importance, layer analyses, searches, what prunings kept and what they dropped."""

from typing import Any

import numpy as np

from minitron_megatron.errors import UserError
from minitron_megatron.importance.layers import FILE as LAYERS_FILE
from minitron_megatron.importance.layers import load_layer_analysis
from minitron_megatron.importance.scores import FILE as SCORES_FILE
from minitron_megatron.importance.scores import Scores, check_scores, load_scores
from minitron_megatron.models.shape import ModelShape
from minitron_megatron.prune.plan import FILE as PLAN_FILE
from minitron_megatron.prune.plan import ranges, read_plan
from minitron_megatron.prune.select import TARGETS, Kept
from minitron_megatron.report import plots
from minitron_megatron.report.folders import RunFolder
from minitron_megatron.report.layers import block_sections
from minitron_megatron.report.lineage import Lineage
from minitron_megatron.report.page import Figure, Section, Table

CANDIDATES_FILE = "candidates.yaml"
_COSTS = {
    "parameters": "parameters",
    "non_embedding_parameters": "parameters in layers",
    "memory_gib": "GiB",
    "flops_per_token": "operations a token",
    "latency_ms": "milliseconds",
}


def importance_sections(lineage: Lineage) -> list[Section]:
    """Maps of the scores of each axis over the layers."""
    return [_importance(folder, load_scores(folder.path)) for folder in lineage.folders if folder.has(SCORES_FILE)]


def _importance(folder: RunFolder, scores: Scores) -> Section:
    how = folder.results
    hidden = sum(np.asarray(t, np.float64) for name, t in scores.tensors.items() if name.startswith("hidden."))
    by_rank = np.sort(scores.ffn, axis=1)[:, ::-1]
    figures = [
        Figure(
            "Feed-forward neurons: spread of their scores in each layer",
            plots.importance_over_layers(scores.ffn, "neurons"),
        ),
        Figure(
            "Feed-forward neurons of each layer, the most important lowest",
            plots.heat_map(by_rank, "neurons by importance"),
        ),
        Figure("Attention heads of each layer", plots.heat_map(scores.heads, "head")),
        Figure("Hidden channels, as each layer sees them", plots.heat_map(hidden, "hidden channel")),
        Figure("Layers by Block Influence", plots.bars(scores.layers, "layer", "1 − cosine(input, output)")),
    ]
    text = ""
    if "samples" in how:
        text = (
            f"Measured on {how['samples']:,} samples ({how['tokens']:,} tokens); aggregation: {how['sequence_aggregation']} over "
            f"tokens, {how['batch_aggregation']} over samples."
        )
    return Section(f"Importance: {folder.name}", text, figures=figures)


def layer_sections(lineage: Lineage) -> list[Section]:
    """The curves of each layer analysis."""
    return [
        section
        for folder in lineage.folders
        if folder.has(LAYERS_FILE)
        for section in block_sections(load_layer_analysis(folder.path), f"{folder.name}: ")
    ]


def search_sections(lineage: Lineage) -> list[Section]:
    """Candidates and fronts of each search."""
    return [_search(folder) for folder in lineage.folders if folder.has(CANDIDATES_FILE)]


def _search(folder: RunFolder) -> Section:
    file = folder.path / CANDIDATES_FILE
    values = folder.read_yaml(CANDIDATES_FILE)
    try:
        listed = values["candidates"]
        limits = [name for name in _COSTS if name in values["budget"]]
        shown = list(dict.fromkeys(("parameters", *limits)))
        rows = [
            [
                str(one["rank"]),
                f"{one['num_layers']} × {one['hidden_size']} × {one['ffn_hidden_size']}",
                f"{one['num_attention_heads']}/{one['num_query_groups']}",
                *(f"{one[name]:,}" if isinstance(one[name], int) else f"{one[name]:.4g}" for name in shown),
                *(f"{lost:.4f}" for lost in (one["predicted_loss"], *one["predicted_loss_by_axis"].values())),
            ]
            for one in listed
            if "rank" in one
        ]
        axes = list(listed[0]["predicted_loss_by_axis"])
        figures = [
            Figure(f"Pareto front: predicted damage against {_COSTS[name]}", _front(listed, name)) for name in limits
        ]
        text = (
            f"The best of {values['fitting']:,} shapes that fit the budget, of {values['shapes']:,}, by predicted damage and its "
            "parts by axis: a heuristic of importance scores, not a measurement."
        )
    except (KeyError, TypeError, IndexError, ValueError, AttributeError) as error:
        raise UserError(f"{file} is damaged ({error!r}): search again") from None
    columns = ["rank", "layers × hidden × ffn", "heads/kv", *(_COSTS[name] for name in shown), "damage", *axes]
    return Section(f"Candidates: {folder.name}", text, [Table(columns, rows)], figures)


def _front(listed: list[dict[str, Any]], quantity: str) -> str:
    points = sorted((one[quantity], one["predicted_loss"]) for one in listed if quantity in one["on_front_of"])
    ranked = [(one[quantity], one["predicted_loss"]) for one in listed if "rank" in one]
    return plots.front(points, ranked, _COSTS[quantity], "predicted damage")


def cut_sections(lineage: Lineage) -> list[Section]:
    """What each pruning kept of every axis; with the scores at hand, what they say of the rest."""
    return [
        _cut(lineage, folder, lineage.source(folder, "model")) for folder in lineage.models() if folder.has(PLAN_FILE)
    ]


def _cut(lineage: Lineage, folder: RunFolder, source: RunFolder | None) -> Section:
    title, target = f"What was cut: {folder.name}", folder.shape
    losses = folder.results.get("loss_around_the_cut")
    tables = []
    if losses:
        rows = [[name, f"{value:.4g}"] for name, value in losses.items()]
        tables.append(Table(["", "nats a token"], rows, "Loss right after the cut"))
    if source is None:
        rows = [[name.replace("_", " "), _size(getattr(target, name))] for name in TARGETS]
        return Section(
            title, "The model it was cut from is not in the report.", [Table(["axis", "kept"], rows), *tables]
        )
    before, (_, kept) = source.shape, read_plan(folder.path / PLAN_FILE, source.shape, source.digest)
    rows = [
        [
            name.replace("_", " "),
            _size(getattr(before, name)),
            _size(getattr(target, name)),
            _share(before, target, name),
        ]
        for name in TARGETS
    ]
    tables.insert(0, Table(["axis", source.name, folder.name, "kept"], rows))
    scores = _scores_of(lineage, folder, source)
    return Section(title, _words(kept, before), tables, _cut_figures(kept, before, scores) if scores else [])


def _scores_of(lineage: Lineage, folder: RunFolder, source: RunFolder) -> Scores | None:
    """The scores that a model was cut by: others of the same source would show another choice."""
    chosen = lineage.source(folder, "scores")
    if chosen is None or not chosen.has(SCORES_FILE) or chosen.inputs.get("model") != source.digest:
        return None
    scores = load_scores(chosen.path)
    check_scores(scores, source.shape, source.digest, str(chosen.path))
    return scores


def _size(size: int | tuple[int, ...]) -> str:
    return f"{min(size):,} to {max(size):,}" if isinstance(size, tuple) else f"{size:,}"


def _share(source: ModelShape, target: ModelShape, name: str) -> str:
    before, after = (
        sum(shape.ffn_of_layers) / shape.num_layers if name == "ffn_hidden_size" else getattr(shape, name)
        for shape in (source, target)
    )
    return f"{100 * after / before:.1f} %"


def _words(kept: Kept, source: ModelShape) -> str:
    gone = sorted(set(range(source.num_layers)) - set(kept.layers.tolist()))
    words = f"Layers dropped: {ranges(np.asarray(gone))}." if gone else "Every layer stays."
    if kept.partners is not None:
        words += " The residual of dropped heads was merged into those that stay."
    if kept.kv_groups is not None and kept.kv_groups.shape[-1] > 1:
        words += " Key-value groups are averages of neighbours."
    return words


def _cut_figures(kept: Kept, source: ModelShape, scores: Scores) -> list[Figure]:
    figures = []
    if kept.hidden is not None:
        mask = _mask(source.hidden_size, kept.hidden)
        figures.append(
            Figure("Hidden channels: kept and cut", plots.kept_curve(scores.hidden, mask, "hidden channels"))
        )
    if kept.ffn is not None:
        stays = {
            f"{power} of the scores": (kept.layers, [_stays(scores.ffn[i], kept.ffn[i], p) for i in kept.layers])
            for power, p in (("sum", 1), ("sum of squares", 2))
        }
        caption = "Feed-forward neurons: share of a layer's importance that stays"
        figures.append(Figure(caption, plots.curves(stays, "layer", "share that stays")))
    if kept.heads is not None:
        cut = np.ones(scores.heads.shape, bool)
        for i in kept.layers:
            cut[i, np.unique(kept.heads[i])] = False
        figures.append(
            Figure("Attention heads: those that went are crossed out", plots.heat_map(scores.heads, "head", cut))
        )
    if len(kept.layers) < source.num_layers:
        gone = ~_mask(source.num_layers, kept.layers)
        caption = "Layers by Block Influence: kept and cut"
        figures.append(Figure(caption, plots.bars(scores.layers, "layer", "1 − cosine(input, output)", gone)))
    return figures


def _mask(size: int, chosen: np.ndarray) -> np.ndarray:
    mask = np.zeros(size, bool)
    mask[chosen] = True
    return mask


def _stays(scores: np.ndarray, kept: np.ndarray, power: int) -> float:
    worth = np.asarray(scores, np.float64) ** power
    return float(worth[kept].sum() / max(worth.sum(), 1e-300))
