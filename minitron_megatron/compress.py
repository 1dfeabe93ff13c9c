"""From a model and text to a smaller model, exported, with a report: each stage a command of its own, continued where it stopped.

    hf= ─import_hf─▶ teacher ─importance─▶ scores ─(search─▶ found)─▶ prune ─▶ pruned ─distill─▶ distilled ─▶ the next round
    input= ─prepare_data─▶ data               └──────────── teaches ──────────────┘                └─evaluate─▶ evaluation
                                                                          the last one ─export_hf─▶ hf, and all of it ─▶ report

    output/{teacher,data,scores,found,pruned,distilled,evaluation,hf,report}      one round, to a budget or a target
    output/ROUND/{scores,pruned,distilled,evaluation}                             a large cut in several rounds (arXiv 2407.14679)
    output/stages.json, chosen.json, chain.json                                   what is done; what was chosen; the result

The stages are commands of their own (stages.py). All of them are composed and checked with the shapes they will meet before the
first one starts (compress_plan.py); where there are no rounds, what was not given is chosen (choosing.py).
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from minitron_megatron.checkpoints.folder import load_results, open_model_folder, read_manifest
from minitron_megatron.cli import spelling
from minitron_megatron.composing import Stage
from minitron_megatron.compress_given import name_of
from minitron_megatron.compress_plan import Checked, Plan, check_compress, make_plan, remember_choices
from minitron_megatron.compress_rounds import EXPORTED, REPORT, SUMMARY, Round
from minitron_megatron.config import CompressConfig
from minitron_megatron.console import console, format_time, print_table
from minitron_megatron.errors import UserError
from minitron_megatron.machine import seconds_to_import_torch
from minitron_megatron.models.axes import count_parameters
from minitron_megatron.stages import STAGES_FILE, Stages, alone_in, stage_words, write_json


def compress(cfg: CompressConfig, checked: Checked | None = None) -> None:
    """`launch/compress.py`: check everything, show the plan, then run what is not done of it."""
    checked = checked or check_compress(cfg)
    if cfg.dry_run:
        _plan(cfg, checked)
        return
    root = Path(cfg.output)
    # Before torch is imported and text is counted: others see at once that there is a run, and keep out.
    with alone_in(root):
        stages = Stages(root / STAGES_FILE, inputs=checked.source.inputs, start=cfg.start)
        cfg, device, plan = _plan(cfg, checked)
        summary = _run(cfg, checked, plan, device, stages)
        write_json(root / SUMMARY, summary)
        _show_results(cfg, summary)


def _plan(cfg: CompressConfig, checked: Checked) -> tuple[CompressConfig, str, Plan]:
    """The config with its processes, the device and the plan, which is shown unless all of it was given."""
    cfg, device = settle_machine(cfg)
    plan = checked.plan or make_plan(cfg, device, checked)
    if plan.chosen or cfg.dry_run:
        _show_plan(cfg, plan)
    return cfg, device, plan


def settle_machine(cfg: CompressConfig) -> tuple[CompressConfig, str]:
    """The config with the number of processes, and the device ("cuda" or "cpu") that stages run on.

    A dry run may be for another machine: with cluster= it plans for its GPUs. Raises UserError.
    """
    seconds_to_import_torch()
    import torch

    from minitron_megatron.parallel.job import pick_device

    device = pick_device(cfg.device).type
    if cfg.cluster.gpu and device == "cpu":
        if not cfg.dry_run:
            raise UserError(
                f"cluster.gpu={cfg.cluster.gpu}, but torch finds no CUDA device here: plan with dry_run=true"
            )
        device = "cuda"
    processes = cfg.processes
    if processes is None:
        here = cfg.cluster.gpus_per_node if cfg.cluster.gpu else torch.cuda.device_count() if device == "cuda" else 1
        processes = here or 1
    return replace(cfg, processes=processes), device


def _run(cfg: CompressConfig, checked: Checked, plan: Plan, device: str, stages: Stages) -> dict[str, Any]:
    """Run the stages that are not done; gives what came of it all."""
    root = Path(cfg.output)
    for stage in plan.source.stages:
        _run_stage(stages, stage.command, stage)
    if not plan.source.ready:
        # The text is counted now.
        plan = make_plan(cfg, device, checked)
        if plan.chosen:
            _show_choices(plan, "now that the text is counted")
    if plan.chosen:
        remember_choices(root, plan)
    results = []
    for number in range(len(plan.rounds)):
        one = plan.rounds[number]
        for command in one.stages:
            _run_stage(stages, name_of(one.name, command), plan.rounds[number].stages[command])
            if command == "search":
                plan = make_plan(cfg, device, checked)
        results.append(_result(plan.rounds[number], stages.seconds))
    for stage in plan.last:
        _run_stage(stages, stage.command, stage)
    first = results[0] if results else {}
    return {
        "model": plan.source.model,
        "parameters": count_parameters(plan.source.shape),
        "loss": first.get("source_loss"),
        "perplexity": _perplexity(first.get("source_loss")),
        "rounds": results,
        **({"hf": str(root / EXPORTED), "report": str(root / REPORT / "report.html")} if plan.last else {}),
        "seconds": stages.seconds,
        **({"planned_seconds": plan.chosen.seconds} if plan.chosen else {}),
    }


def _run_stage(stages: Stages, name: str, stage: Stage) -> None:
    stages.command(name, stage.output, stage.command, *stage.words, processes=stage.processes)


def _perplexity(loss: float | None) -> float | None:
    return None if loss is None else math.exp(min(loss, 700))


def _result(one: Round, seconds: Mapping[str, float]) -> dict[str, Any]:
    """What a finished round gave: sizes, its student's digest, seconds a stage, losses if it was evaluated."""
    student = one.stages["distill"].output / "model"
    manifest, made = read_manifest(student), count_parameters(open_model_folder(student).shape)
    measured: dict[str, Any] = {}
    if "evaluate" in one.stages:
        measured = load_results(one.stages["evaluate"].output, "evaluate")
    return {
        "name": one.name,
        "model": str(student),
        "digest": manifest["digest"],
        "parameters": made,
        "share_of_source": made / count_parameters(one.source),
        "tokens": one.tokens,
        "distillation_loss": manifest["results"].get("loss"),
        "loss": measured.get("loss"),
        "perplexity": measured.get("perplexity"),
        "kl": measured.get("kl"),
        "source_loss": measured.get("teacher_loss"),
        "windows": measured.get("windows"),
        "judged_tokens": measured.get("tokens"),
        "split": one.stages["evaluate"].config.split if measured else None,
        "seconds": {stage: seconds[name_of(one.name, stage)] for stage in one.stages},
    }


def _show_plan(cfg: CompressConfig, plan: Plan) -> None:
    """What is going to run: a table of the rounds, what was chosen, and every command line."""
    about = "at most " if any(one.searched for one in plan.rounds) else ""
    rows = [
        [
            one.name or "student",
            count_parameters(one.source),
            f"{about}{count_parameters(one.target):,}",
            f"{one.share:.1%}",
            one.tokens,
            ", ".join(f"{stage.command} {stage.processes}" for stage in one.stages.values()),
        ]
        for one in plan.rounds
    ]
    would = "would be run" if cfg.dry_run else "to be run"
    columns = ["round", "parameters", "pruned", "share", "tokens", "processes"]
    print_table(f"{would} in {cfg.output}", columns, rows)
    if plan.chosen:
        _show_choices(plan)
    for _, stage in plan.stages:
        words = [*stage_words(cfg.start, stage.processes, stage.command), *stage.words, f"output={stage.output}"]
        console().print(f"$ {spelling.joined(words)}", highlight=False, soft_wrap=True)


def _show_choices(plan: Plan, title: str = "what is chosen, unless it is given") -> None:
    """What was chosen, and why; and how exact the text is known."""
    text = plan.source.text
    counted = (
        []
        if text is None
        else [
            [
                "text",
                f"{'' if plan.source.ready else 'about '}{text.train:,} + {text.validation:,} tokens",
                "to train and to validate on" + ("" if text.exact else ", by its size: counted once it is tokenised"),
            ]
        ]
    )
    print_table(title, ["", "value", ""], [*counted, *map(list, plan.chosen.lines)])


def _show_results(cfg: CompressConfig, summary: Mapping[str, Any]) -> None:
    """The models beside one another, what was kept, and where everything is."""
    columns = ["round", "parameters", "share", "loss", "perplexity", "KL", "seconds of its stages", "model"]
    source = [_or_nothing(summary[name]) for name in ("loss", "perplexity")]
    rows: list[list[Any]] = [["source", summary["parameters"], "", *source, "", "", Path(summary["model"])]]
    for one in summary["rounds"]:
        measured = [_or_nothing(one[name]) for name in ("loss", "perplexity", "kl")]
        seconds = sum(one["seconds"].values())
        share = f"{one['parameters'] / summary['parameters']:.1%}"
        rows.append([one["name"] or "student", one["parameters"], share, *measured, seconds, Path(one["model"])])
    print_table("The chain" if cfg.rounds else "What came of it", columns, rows)
    last, screen = summary["rounds"][-1], console()

    def say(line: str) -> None:
        screen.print(line, highlight=False, soft_wrap=True)

    if summary["loss"] is not None and last["loss"] is not None:
        say(
            f"Kept: {last['parameters'] / summary['parameters']:.1%} of the parameters; perplexity {last['perplexity']:.4g} "
            f"beside the source's {summary['perplexity']:.4g}, {last['loss'] - summary['loss']:+.4f} nats a token"
        )
    if last["windows"]:
        say(f"Judged on: {last['windows']:,} windows, {last['judged_tokens']:,} tokens of the {last['split']} split")
    stages = ", ".join(f"{name} {format_time(seconds)}" for name, seconds in summary["seconds"].items())
    planned = summary.get("planned_seconds")
    beside = f", {format_time(sum(planned.values()))} planned" if planned else ""
    say(
        f"Took: {format_time(sum(summary['seconds'].values()))}{beside}, the start of each stage's program included: {stages}"
    )
    say(f"Student: {last['model']}")
    if "hf" in summary:
        say(f"Hugging Face folder: {summary['hf']}")
        say(f"Report: {summary['report']}")
    say(f"Written: {Path(cfg.output) / SUMMARY}")


def _or_nothing(value: float | None) -> float | str:
    return "" if value is None else value
