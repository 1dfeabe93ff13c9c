"""The demo's report: what happened to the model, in one table and a few plots."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from minitron_megatron.checkpoints.folder import open_model_folder, read_manifest
from minitron_megatron.importance.scores import load_scores
from minitron_megatron.report import plots
from minitron_megatron.report.page import Section, Table, write_page

MODELS = ("teacher", "pruned", "distilled")


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line]


def demo_report(
    file: Path, summary: dict[str, Any], samples: dict[str, str], commands: list[str], folders: dict[str, Path]
) -> None:
    """Write report.html from the demo's summary, sample completions, commands and output folders."""
    before, after = summary["parameters"]["teacher"], summary["parameters"]["distilled"]
    seconds = sum(summary["seconds"].values())
    write_page(
        file,
        f"SmolLM2-135M cut to {after / before:.0%} of its parameters",
        f"Width pruning by activation importance, then distillation, on CPUs, in {seconds / 60:.0f} minutes.",
        [
            _models(summary),
            _learning(folders["distilled"]),
            _importance(folders["scores"], folders["pruned"]),
            Section("What each says", quotes=list(samples.items())),
            Section(
                "Time", table=Table(["stage", "seconds"], [[k, f"{v:.0f}"] for k, v in summary["seconds"].items()])
            ),
            Section("Commands", text="Each stage, as a user would run it:", commands=commands),
        ],
    )


def _models(summary: dict[str, Any]) -> Section:
    rows = [[name, f"{summary['parameters'][name]:,}", f"{summary['perplexity'][name]:,.1f}"] for name in MODELS]
    return Section(
        "Models",
        "Perplexity on the validation split, over the full vocabulary. A demo distils over a hundred thousand tokens; "
        "the published recipe uses about 100 billion.",
        Table(["model", "parameters", "perplexity"], rows),
    )


def _learning(run: Path) -> Section:
    lines = [line for line in read_metrics(run / "metrics.jsonl")]
    train = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    validation = {line["step"]: line["validation_loss"] for line in lines if "validation_loss" in line}
    steps, losses = zip(*train, strict=True)
    curve = plots.loss_curve(steps, losses, validation)
    return Section("Distillation", plots=[("Forward KL divergence from student to teacher, per token", curve)])


def _importance(scores_folder: Path, pruned: Path) -> Section:
    scores, target = load_scores(scores_folder), open_model_folder(pruned).shape
    measured = read_manifest(scores_folder)["results"]
    spread = plots.importance_over_layers(scores.ffn, "ffn neurons")
    return Section(
        "Importance over layers",
        f"Measured on {measured['samples']} samples ({measured['tokens']:,} tokens).",
        plots=[
            ("Feed-forward neurons: spread of their scores in each layer", spread),
            ("Attention heads, relative to the most important of the layer", plots.heat_map(scores.heads, "head")),
            ("Hidden channels: kept and cut", plots.kept_curve(scores.hidden, target.hidden_size, "hidden channels")),
            ("Layers by Block Influence", plots.bars(np.asarray(scores.layers), "layer", "1 − cosine(input, output)")),
        ],
    )
