"""Rows of a throughput measurement with their ratios, as results.json, as a Markdown table and as bars."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from minitron_megatron.checkpoints.folder import RESULTS
from minitron_megatron.console import markdown_table

TABLE, PLOT = "table.md", "throughput.svg"
COLUMNS = ("engine", "batch", "model", "tokens/s", "ratio", "seconds", "GiB")
Row = dict[str, Any]


def add_ratios(rows: Sequence[Row], models: Sequence[str]) -> list[Row]:
    """Rows by engine, batch and model, each with its tokens/s over those of the first model, None where there are none."""
    engines = list(dict.fromkeys(row["engine"] for row in rows))
    reference = {(row["engine"], row["batch"]): row["tokens_per_second"] for row in rows if row["model"] == models[0]}
    for row in rows:
        over, rate = reference.get((row["engine"], row["batch"])), row["tokens_per_second"]
        row["ratio"] = rate / over if over and rate else None
    return sorted(rows, key=lambda row: (engines.index(row["engine"]), row["batch"], models.index(row["model"])))


def best_rows(rows: Sequence[Row]) -> dict[str, dict[str, Row]]:
    """By engine and model: the batch size with most tokens/s, and these over the first model's at its own best."""
    best: dict[str, dict[str, Row]] = {}
    for row in rows:
        models = best.setdefault(row["engine"], {})
        rate = row["tokens_per_second"]
        if rate and (row["model"] not in models or rate > models[row["model"]]["tokens_per_second"]):
            models[row["model"]] = {"batch": row["batch"], "tokens_per_second": rate, "ratio": None}
    first = rows[0]["model"] if rows else None
    for models in best.values():
        for found in models.values() if first in models else ():
            found["ratio"] = found["tokens_per_second"] / models[first]["tokens_per_second"]
    return best


def write_results(folder: Path, rows: list[Row], models: Sequence[str]) -> None:
    """Write results.json, table.md and throughput.svg; `models` in their order, the first being the reference."""
    rows[:] = add_ratios(rows, models)
    (folder / RESULTS).write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    (folder / TABLE).write_text(markdown_table(COLUMNS, table_rows(rows)) + "\n", encoding="utf-8")
    (folder / PLOT).write_text(_plot(rows, models), encoding="utf-8")


def table_rows(rows: Sequence[Row]) -> list[list[Any]]:
    """Rows as people read them, in COLUMNS."""
    return [
        [
            row["engine"],
            row["batch"],
            row["model"],
            _figure(row["tokens_per_second"], ",.1f", row.get("error", "")),
            _figure(row["ratio"], ".2f"),
            _figure(row.get("seconds"), ".3f"),
            _figure(row.get("memory_gib"), ".1f"),
        ]
        for row in rows
    ]


def _figure(value: float | None, form: str, otherwise: str = "") -> str:
    return otherwise if value is None else format(value, form)


def _plot(rows: Sequence[Row], models: Sequence[str]) -> str:
    """A group of bars for each engine and batch, a bar a model, its ratio over it."""
    from minitron_megatron.report.plots import grouped_bars

    groups = list(dict.fromkeys((row["engine"], row["batch"]) for row in rows))
    found = {(row["engine"], row["batch"], row["model"]): row for row in rows}
    values, labels = {}, {}
    for model in models:
        of_model = [found.get((*group, model), {}) for group in groups]
        values[model] = [row.get("tokens_per_second") or 0.0 for row in of_model]
        labels[model] = [f"{row['ratio']:.2f}×" if row.get("ratio") else "" for row in of_model]
    names = [f"{engine}\nbatch {batch}" for engine, batch in groups]
    return grouped_bars(names, values, labels, "tokens a second")
