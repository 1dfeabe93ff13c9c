"""Sections about training runs: their recipe, their curves, and what every step of the work cost."""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

from minitron_megatron.checkpoints.card import RECIPE, as_reached, counts
from minitron_megatron.checkpoints.lineage import beginning_in_words
from minitron_megatron.config import flat
from minitron_megatron.console import format_value
from minitron_megatron.report import plots
from minitron_megatron.report.folders import RunFolder, UnfinishedRun
from minitron_megatron.report.lineage import Lineage
from minitron_megatron.report.page import Figure, Section, Table

_ALWAYS = {"skipped": "skipped steps"}
_FOUND = {
    "steps": "steps",
    "tokens": "tokens",
    "published_step": "step that is published",
    "loss": "loss of its last step",
}
_FOUND |= {"validation_loss": "validation loss", "validation_perplexity": "validation perplexity"}
# Terms of a step that have a plot of their own, or none.
_NOT_TERMS = frozenset(
    """step loss agreement lr grad_norm skipped tokens tokens_per_second tokens_per_second_per_gpu tflops_per_gpu mfu step_seconds
    data_seconds memory_gib memory_peak_gib resident_gib validation_loss validation_perplexity run_seconds""".split()
)


def runs(lineage: Lineage) -> list[RunFolder]:
    """Models that were trained."""
    return [one for one in lineage.models() if "steps" in one.results and one.results.get("tokens")]


def recipe_section(lineage: Lineage) -> Section | None:
    """How each run trained, and what it came to."""
    trained = runs(lineage)
    if not trained:
        return None
    options = [flat(one.config) for one in trained]
    rows = [
        [name, *(_of_recipe(key, one.get, run) for one, run in zip(options, trained, strict=True))]
        for key, name in RECIPE.items()
    ]
    rows += [[name, *(_value(one.results.get(key)) for one in trained)] for key, name in _FOUND.items()]
    shown = [row for row in rows if any(cell not in ("–", "none", "0") for cell in row[1:])]
    # What interrupted a run is said where nothing did, too.
    shown += [[name, *(_value(one.results.get(key)) for one in trained)] for key, name in _ALWAYS.items()]
    shown.append(["restarts", *(_value(None if one.starts is None else one.starts - 1) for one in trained)])
    return Section("Recipe", tables=[Table(["", *(one.name for one in trained)], shown)], card=True)


def _of_recipe(key: str, of: Callable[[str], Any], run: RunFolder) -> str:
    """An option that did something in a run, with rates as it reached them."""
    return _value(as_reached(key, of, run.results.get("steps")) if counts(key, of) else None)


def unfinished_section(found: Sequence[UnfinishedRun]) -> Section | None:
    """Runs that have no model yet: how far they are, and why they stand where they do."""
    if not found:
        return None
    rows, figures = [], []
    for one in found:
        lines = [line for line in one.metrics if "loss" in line]
        last = lines[-1] if lines else {}
        rows.append(
            [
                one.name,
                f"{last.get('step', 0):,} of {_steps(one)}",
                _value(last.get("loss")),
                _value(last.get("skipped")),
                _value(None if one.starts is None else one.starts - 1),
                one.diverged or "trains, or was stopped: the same command continues it",
            ]
        )
        if len(lines) > 1:
            series = {"training": ([line["step"] for line in lines], [line["loss"] for line in lines])}
            figures.append(Figure(f"{one.name}: loss so far", plots.curves(series, "step", "loss")))
    columns = ["run", "steps", "loss", "skipped steps", "restarts", "state"]
    text = "These have no model yet. No other section counts them, nor does the cost."
    return Section("Runs that have not ended", text, [Table(columns, rows)], figures)


def _steps(run: UnfinishedRun) -> str:
    trainer, data = run.config["trainer"], run.config.get("data") or {}
    steps, tokens = trainer.get("steps"), trainer.get("tokens")
    per_step = (trainer.get("global_batch_size") or 0) * (data.get("sequence_length") or 0)
    if steps is None and tokens and per_step:
        steps = math.ceil(tokens / per_step)
    return f"{steps:,}" if isinstance(steps, int) else "?"


def _value(value: Any) -> str:
    return (
        "–" if value is None else format_value(int(value) if isinstance(value, float) and value.is_integer() else value)
    )


def training_sections(lineage: Lineage) -> list[Section]:
    """The curves of each run whose metrics are there."""
    return [
        Section(f"Training of {one.name}", _summary(lineage, one), figures=_curves(one))
        for one in runs(lineage)
        if any("loss" in line for line in one.metrics)
    ]


def _summary(lineage: Lineage, run: RunFolder) -> str:
    teacher, before = lineage.source(run, "teacher"), lineage.source(run, "student", "model")
    words = f"{before.name} " if before else ""
    words += f"taught by {teacher.name}, " if teacher else ""
    words += f"{run.results['tokens']:,} tokens in {run.results['steps']:,} steps"
    if skipped := run.results.get("skipped"):
        words += f", of which {skipped:,} were skipped"
    if run.starts and run.starts > 1:
        words += f", started {run.starts} times"
    if began := beginning_in_words(run.manifest):
        words += f"; it began with {began}"
    return words + "."


def _curves(run: RunFolder) -> list[Figure]:
    teaches = "teacher" in run.inputs
    loss = (
        "KL to the teacher, nats a token"
        if teaches and flat(run.config).get("distill.loss") == "forward_kl"
        else "loss"
    )
    lines = [line for line in run.metrics if "loss" in line]
    steps = [line["step"] for line in lines]
    series = {"training": (steps, [line["loss"] for line in lines])}
    judged = [line for line in run.metrics if "validation_loss" in line]
    if judged:
        series["validation"] = ([line["step"] for line in judged], [line["validation_loss"] for line in judged])
    log = all(value > 0 for _, values in series.values() for value in values)
    figures = [Figure("Loss over steps", plots.curves(series, "step", loss, log=log))]
    if all("agreement" in line for line in lines):
        shares = {"agreement": (steps, [line["agreement"] for line in lines])}
        caption = "Share of tokens whose most probable next token is the teacher's"
        figures.append(Figure(caption, plots.curves(shares, "step", "agreement")))
    terms = [name for name in lines[0] if name not in _NOT_TERMS and all(name in line for line in lines)]
    if terms:
        both = {name.replace("_", " "): (steps, [line[name] for line in lines]) for name in terms}
        figures.append(Figure("What else was watched: " + ", ".join(both), plots.curves(both, "step", "nats a token")))
    rate = {"learning rate": (steps, [line["lr"] for line in lines])}
    norm = {"gradient norm": (steps, [line["grad_norm"] for line in lines])}
    figures.append(Figure("Gradient norm before clipping", plots.curves(norm, "step", "gradient norm", log=True)))
    figures.append(Figure("Learning rate", plots.curves(rate, "step", "learning rate")))
    return figures


def process_seconds(folder: RunFolder) -> float | None:
    """Seconds of all processes together: by the manifest, and of a run also those of its starts before the last.

    None where the manifest does not say how many processes there were. An older run, whose metrics do not say how long its
    starts ran, counts by its steps, wherever and with however many processes they ran, without what is between them.
    """
    lines = [line for line in folder.metrics if line.get("tokens_per_second_per_gpu")]
    last = folder.manifest.get("seconds")
    if lines and last is not None and folder.processes is not None and all("run_seconds" in line for line in lines):
        ends = [a for a, b in itertools.pairwise(lines) if b["run_seconds"] < a["run_seconds"]]
        before = (line["run_seconds"] * line["tokens_per_second"] / line["tokens_per_second_per_gpu"] for line in ends)
        return sum(before) + last * folder.processes
    if lines:
        spent = sum(
            line["step_seconds"] * line["tokens_per_second"] / line["tokens_per_second_per_gpu"] for line in lines
        )
        # Steps between two lines of metrics are counted as those that have one.
        return spent * folder.results.get("tokens", 0) / max(1, sum(line["tokens"] for line in lines))
    seconds = folder.manifest.get("seconds", folder.results.get("seconds"))
    return None if seconds is None or folder.processes is None else seconds * folder.processes


def seconds_by_device(folders: Sequence[RunFolder]) -> dict[str, float]:
    """Seconds of all processes of all folders, by what each process ran on."""
    sums: dict[str, float] = {}
    for one in folders:
        if (seconds := process_seconds(one)) is not None and one.device is not None:
            sums[one.device] = sums.get(one.device, 0) + seconds
    return sums


def cost_section(lineage: Lineage) -> Section:
    """Time of all processes and tokens of every folder, and their sums for each kind of device."""
    rows: list[list[str]] = []
    sums = seconds_by_device(lineage.folders)
    for folder in lineage.folders:
        device, tokens = folder.device, folder.results.get("tokens")
        on = "–" if device is None else f"{folder.processes or '?'} × {device}"
        rows.append(
            [folder.name, folder.command or "–", on, _hours(process_seconds(folder)), f"{tokens:,}" if tokens else "–"]
        )
    trained = sum(one.results["tokens"] for one in runs(lineage))
    for i, (device, spent) in enumerate(sums.items()):
        rows.append([f"all on {device}", "", "", _hours(spent), f"{trained:,}" if not i and trained else ""])
    columns = ["folder", "made by", "processes", "device hours", "tokens"]
    text = (
        "Hours of every process together, so GPU hours where each has a GPU, from the beginning of the output to its end; – "
        "where a manifest does not say. Starts of a training run before its last count with their steps that stayed. "
        "The start of the program is not in it: what compress and status show of whole stages has that, too. "
        "Tokens of all: those that were trained on."
    )
    return Section("Cost", text, [Table(columns, rows)], card=True)


def _hours(seconds: float | None) -> str:
    return "–" if seconds is None else f"{seconds / 3600:,.4f}" if seconds < 3600 else f"{seconds / 3600:,.1f}"
