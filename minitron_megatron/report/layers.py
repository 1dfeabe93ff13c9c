"""The page of a layer analysis: the best blocks to remove by each judge, and a curve for each judge over where a block begins."""

from pathlib import Path

from minitron_megatron.importance.layers import JUDGES, Judged, LayerAnalysis
from minitron_megatron.report import plots
from minitron_megatron.report.page import Figure, Section, Table, write_page

JUDGE_NAMES = {"bi": "Block Influence", "loss": "loss", "task": "task"}
# Blocks that are listed for each judge.
_LISTED = 5


def layer_report(file: Path, analysis: LayerAnalysis, model: str, command: str) -> None:
    """Write report.html of an analysis of the model folder `model`, made by `command`."""
    counts, base = analysis.counts, analysis.base
    questions = ", ".join(f"{count:,} questions of {name}" for name, count in counts["questions"].items())
    whole = f"The whole model: loss {base.loss:.4g} nats a token (perplexity {base.perplexity:.4g})"
    if base.accuracy is not None:
        whole += f", accuracy {base.accuracy:.2%}"
    write_page(
        file,
        f"Which layers can go: {analysis.num_layers} layers",
        f"{model}, judged on {counts['samples']:,} samples ({counts['tokens']:,} tokens of the {counts['split']} split)"
        + (f" and {questions}." if questions else "."),
        [
            Section(
                "How to read this",
                f"{whole}. Each point below is the model without one block of consecutive layers, numbered from 0; nothing was "
                "retrained. A block that costs little by all judges can go. Where they disagree, trust the questions before the "
                "loss, and the loss before Block Influence; the last layer should stay (arXiv 2408.11796).",
            ),
            *block_sections(analysis),
            Section("Command", commands=[command]),
        ],
    )


def block_sections(analysis: LayerAnalysis, title: str = "") -> list[Section]:
    """A section for each length of block; `title` stands before its own."""
    return [_blocks(analysis, length, title) for length in analysis.blocks]


def _blocks(analysis: LayerAnalysis, length: int, title: str) -> Section:
    asked = analysis.base.accuracy is not None
    judges = JUDGES if asked else JUDGES[:2]
    ranked = {judge: analysis.ranked(length, judge)[:_LISTED] for judge in judges}
    cells = {judge: [_cell(analysis.blocks[length][s], judge, s, length) for s in ranked[judge]] for judge in judges}
    rows = [[str(place + 1), *row] for place, row in enumerate(zip(*cells.values(), strict=True))]
    measured, base = analysis.blocks[length], analysis.base
    curves = [
        ("Block Influence", [m.bi for m in measured], None),
        ("loss (nats a token)", [m.loss for m in measured], base.loss),
    ]
    if asked:
        curves.append(("accuracy", [m.accuracy for m in measured], base.accuracy))
    return Section(
        title + ("Single layers" if length == 1 else f"Blocks of {length} layers"),
        f"Blocks with the last layer, {analysis.num_layers - 1}, are measured, not proposed: prune.keep_last_layers=1 keeps it.",
        tables=[Table(["best to remove, last layer kept", *(f"by {JUDGE_NAMES[judge]}" for judge in judges)], rows)],
        figures=[Figure(name, plots.curve_over_blocks(values, level, name)) for name, values, level in curves],
    )


def _cell(judged: Judged, judge: str, start: int, length: int) -> str:
    name = str(start) if length == 1 else f"{start} to {start + length - 1}"
    value = {"bi": f"{judged.bi:.4g}", "loss": f"{judged.loss:.4g}", "task": f"{judged.accuracy or 0:.2%}"}[judge]
    return f"{name} ({value})"
