"""The whole road on a laptop: SmolLM2-135M to a student of 60 % of its size, each stage as a user would run it, to a report.

What it does depends on the machine (demo_plan.py): that is measured first, and the plan is kept in `plan.json`. Every stage is a
command of its own in a process of its own, printed before it runs; its outputs are whole or not there, so a second run
continues where the first stopped. What is done is remembered in `stages.json`.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from minitron_megatron.checkpoints.folder import load_json, load_results
from minitron_megatron.composing import check_root
from minitron_megatron.config import CommandConfig, DemoConfig
from minitron_megatron.console import console, print_table
from minitron_megatron.demo_plan import FULL, SHORT, VALIDATED_SHARE, Plan, make_plan, measure_machine
from minitron_megatron.errors import UserError
from minitron_megatron.plain_files import read_json
from minitron_megatron.search.found import read_search
from minitron_megatron.stages import STAGES_FILE, Stages, alone_in, write_json

PLAN_FILE = "plan.json"
PROMPT = "A list in Python is"
TITLE = "SmolLM2-135M cut to 60 % of its parameters"
MODELS = ("teacher", "pruned", "distilled")


def options_of_distillation(plan: Plan) -> list[str]:
    """Options of the distillation."""
    level = plan.of
    return [
        f"trainer.steps={plan.steps}",
        f"data.sequence_length={level.sequence_length}",
        "data.max_epochs=2",  # one has 98 thousand tokens
        f"trainer.global_batch_size={level.batch}",
        f"trainer.micro_batch_size={min(4, level.batch // plan.processes)}",
        f"trainer.save_interval={max(10, plan.steps // 4)}",
        f"trainer.validation_samples={level.validation_samples // VALIDATED_SHARE}",
        # A continued demo has the same processes; without gathering the optimizer's state 4 GiB are enough for one.
        "trainer.checkpoint_format=dp_reshardable",
        "distill.logits_mib=256",
        "optim.lr=6e-4",
        "optim.min_lr=6e-5",
        f"optim.warmup_steps={max(1, plan.steps // 8)}",
    ]


def write_text(folder: Path) -> None:
    """The text that every Python carries: the reference topics of `pydoc`, one document each."""
    from pydoc_data.topics import topics

    lines = (json.dumps({"text": text.strip(), "source": name}) for name, text in sorted(topics.items()))
    text, file = "\n".join(lines) + "\n", folder / "python_topics.jsonl"
    # The prepared data remember the file's time: an equal one stays as it is.
    if not file.is_file() or file.read_text(encoding="utf-8") != text:
        folder.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")


def check_demo(cfg: DemoConfig) -> Plan | None:
    """The output; gives the plan of the demo that is continued there. Raises UserError."""
    root = Path(cfg.output)
    check_root(root, STAGES_FILE, "a demo", cfg.resume)
    if not (root / PLAN_FILE).is_file():
        return None
    try:
        plan = Plan.from_json(read_json(root / PLAN_FILE))
    except ValueError:
        raise UserError(f"{root / PLAN_FILE} cannot be read: remove {root}, or choose another output=") from None
    if (plan.of is SHORT) != cfg.short:
        begun = "short" if plan.of is SHORT else "whole"
        raise UserError(f"output={root} was begun with the {begun} demo: go on with that, or choose another output=")
    return plan


def run_demo(cfg: DemoConfig, begun: Plan | None) -> None:
    """`launch/demo.py`: a plan, every stage, a table, summary.json and a report. Raises UserError."""
    root = Path(cfg.output)
    if cfg.dry_run:
        _plan(cfg, begun)
        return
    with alone_in(root):
        stages = Stages(root / STAGES_FILE, words=[] if cfg.seed == CommandConfig.seed else [f"seed={cfg.seed}"])
        plan = _plan(cfg, begun)
        # A continued demo keeps the plan that it began with, whatever else runs on the machine now.
        write_json(root / PLAN_FILE, asdict(plan))
        _run(cfg, root, stages, plan)


def _plan(cfg: DemoConfig, begun: Plan | None) -> Plan:
    """What is going to be done, said."""
    plan = begun or make_plan(measure_machine(), cfg.minutes, short=cfg.short)
    _say(plan, "Continuing what takes" if begun else "This takes")
    return plan


def _run(cfg: DemoConfig, root: Path, stages: Stages, plan: Plan) -> None:
    """Every stage that is not done, and what came of it."""
    folders = {
        name: root / name for name in ("smollm2", "teacher", "text", "data", "scores", "found", "pruned", "distilled")
    }
    plan = _make_models(stages, folders, plan, cfg.minutes)
    _judge(stages, root, folders, plan)
    _show(stages, root, folders, plan)


def _say(plan: Plan, verb: str) -> None:
    """What is going to be done, and how long that takes."""
    minutes = f"about {max(1, round(plan.total / 60))} minutes"
    what = f"{plan.seconds['distill'] / 60:.0f} of them distillation over {plan.tokens:,} tokens"
    console().print(f"Machine: {plan.machine}", highlight=False)
    more = "" if plan.of in (FULL, SHORT) else "; a faster machine does more"
    console().print(f"{verb} {minutes}, {what}{more}", highlight=False)


def _make_models(stages: Stages, at: dict[str, Path], plan: Plan, minutes: float) -> Plan:
    """From the packaged model to the distilled student; gives the plan as the stages before the distillation have left it."""
    level = plan.of
    stages.command("source", at["smollm2"], "smollm2")
    stages.command("import", at["teacher"], "import_hf", f"hf={at['smollm2']}")
    write_text(at["text"])
    stages.command(
        "data",
        at["data"],
        "prepare_data",
        f"input={at['text']}",
        f"model={at['teacher']}",
        "validation_fraction=0.1",
    )
    stages.command(
        "importance",
        at["scores"],
        "importance",
        f"model={at['teacher']}",
        f"data.path={at['data']}",
        f"data.sequence_length={level.sequence_length}",
        f"samples={level.calibration_samples}",
        "trainer.micro_batch_size=4",
        f"parallel.pipeline={plan.processes}",
        processes=plan.processes,
    )
    stages.command("search", at["found"], "search", f"model={at['teacher']}", f"scores={at['scores']}", *level.search)
    stages.command(
        "prune",
        at["pruned"],
        "prune",
        f"model={at['teacher']}",
        f"scores={at['scores']}",
        *(f"{name}={size}" for name, size in read_search(at["found"]).ranked[0].options.items()),
        processes=plan.processes,
    )
    plan = _planned_again(stages, plan, minutes)
    stages.command(
        "distill",
        at["distilled"],
        "distill",
        f"teacher={at['teacher']}",
        f"student={at['pruned']}",
        f"data.path={at['data']}",
        *options_of_distillation(plan),
        processes=plan.processes,
    )
    return plan


def _planned_again(stages: Stages, plan: Plan, minutes: float) -> Plan:
    """Fewer steps where the stages so far took longer than planned; a continued demo knows their times and finds the same."""
    done = [name for name in plan.seconds if name in stages.seconds]
    before = done[: done.index("prune") + 1]
    spent = sum(stages.seconds[name] for name in before)
    # The stage that computes as the distillation does.
    fewer = plan.fewer(stages.seconds["importance"] / plan.seconds["importance"], spent, minutes)
    if fewer.steps < plan.steps:
        console().print(
            f"\nSlower than planned (other work on this machine?): {fewer.steps} steps rather than {plan.steps}"
        )
    left = sum(seconds for name, seconds in fewer.seconds.items() if name not in before)
    if spent + left > 60 * minutes:
        console().print(
            f"\nThis is going to take {(spent + left) / 60:.0f} minutes, more than planned; fewer steps would show too little"
        )
    return fewer


def _judge(stages: Stages, root: Path, at: dict[str, Path], plan: Plan) -> None:
    """Perplexity of the three models, and the pruned and distilled ones as Hugging Face folders."""
    for name in ("pruned", "distilled"):
        stages.command(
            f"evaluate {name}",
            root / f"evaluate_{name}",
            "evaluate",
            f"model={at[name]}",
            f"data.path={at['data']}",
            f"data.sequence_length={plan.of.sequence_length}",
            f"samples={plan.of.validation_samples}",
            "split=validation",
            "trainer.micro_batch_size=4",
            *([f"teacher={at['teacher']}"] if name == "distilled" else []),
            processes=plan.processes,
        )
    for name in ("pruned", "distilled"):
        stages.command(f"export {name}", root / f"{name}_hf", "export_hf", f"model={at[name]}")


def complete(folder: Path, prompt: str = PROMPT, tokens: int = 32) -> str:
    """A greedy completion by plain transformers."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    inputs = tokenizer(prompt, return_tensors="pt")
    with torch.no_grad():
        ids = model.generate(**inputs, max_new_tokens=tokens, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    return " ".join(str(tokenizer.decode(ids[0], skip_special_tokens=True)).split())


def _show(stages: Stages, root: Path, at: dict[str, Path], plan: Plan) -> None:
    """The report, the table and summary.json."""
    from minitron_megatron.checkpoints.folder import open_model_folder
    from minitron_megatron.models.axes import count_parameters

    shown = {"teacher": at["smollm2"], "pruned": root / "pruned_hf", "distilled": root / "distilled_hf"}
    samples: dict[str, str] = {}
    file = root / "samples.json"
    stages.run(
        "completions", file, lambda: write_json(file, {name: complete(folder) for name, folder in shown.items()})
    )
    samples = load_json(file)
    stages.command("report", root / "report", "report", f"folders={root}", f"title={TITLE}")
    pruned, distilled = (load_results(root / f"evaluate_{name}", "evaluate") for name in ("pruned", "distilled"))
    perplexity = (distilled["teacher_perplexity"], pruned["perplexity"], distilled["perplexity"])
    summary: dict[str, Any] = {
        "parameters": {name: count_parameters(open_model_folder(at[name]).shape) for name in MODELS},
        "perplexity": dict(zip(MODELS, perplexity, strict=True)),
        "agreement": distilled["agreement"],
        "seconds": stages.seconds,
        "seconds_starting": stages.starting,
        "plan": asdict(plan),
    }
    write_json(root / "summary.json", summary)
    print_table(
        "What became of SmolLM2-135M",
        ["model", "parameters", "perplexity", "completion"],
        [[n, summary["parameters"][n], round(summary["perplexity"][n], 1), samples[n]] for n in MODELS],
    )
    total = sum(stages.seconds.values())
    rows = [
        [name, round(plan.seconds.get(name, 0)), seconds, stages.starting.get(name, "")]
        for name, seconds in stages.seconds.items()
    ]
    whole = ["all", round(plan.total), round(total, 1), round(sum(stages.starting.values()), 1)]
    print_table("Time", ["stage", "planned", "seconds", "of these, to start"], [*rows, whole])
    console().print(f"Written: {root / 'summary.json'}, {root / 'report' / 'report.html'}")
