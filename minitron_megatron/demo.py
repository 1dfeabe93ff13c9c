"""The whole road on a laptop: SmolLM2-135M to a student of 60 % of its size, each stage as a user would run it, to a report.

Every stage is a command of its own in a process of its own, printed before it runs; its outputs are whole or not there,
so a second run continues where the first stopped. What is done is remembered in `stages.json`.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minitron_megatron.checkpoints.folder import RESULTS
from minitron_megatron.config import CommandConfig, DemoConfig
from minitron_megatron.console import console, print_table
from minitron_megatron.errors import UserError
from minitron_megatron.stages import Stages, write_json

STAGES_FILE = "stages.json"
PROMPT = "A list in Python is"
TITLE = "SmolLM2-135M cut to 60 % of its parameters"
MODELS = ("teacher", "pruned", "distilled")
# 60 % of the parameters of SmolLM2-135M; sizes that its 9 heads of 64 channels, in 3 groups, go with.
SEARCH = ("budget.parameters=81e6", "space.multiple=48", "space.tensor=3")


@dataclass(frozen=True)
class Effort:
    """How much the demo does: the whole takes minutes, the short form shows that every stage works."""

    calibration_samples: int
    steps: int
    sequence_length: int
    validation_samples: int

    @property
    def distill(self) -> list[str]:
        """Options of the distillation."""
        warmup = max(1, self.steps // 20)
        return [
            f"trainer.steps={self.steps}",
            f"data.sequence_length={self.sequence_length}",
            "data.max_epochs=2",  # one has 98 thousand tokens
            "trainer.global_batch_size=8",
            "trainer.micro_batch_size=4",
            f"trainer.save_interval={max(10, self.steps // 4)}",
            "optim.lr=1e-3",
            "optim.min_lr=1e-4",
            f"optim.warmup_steps={warmup}",
        ]


WHOLE = Effort(calibration_samples=64, steps=60, sequence_length=256, validation_samples=64)
SHORT = Effort(calibration_samples=8, steps=12, sequence_length=128, validation_samples=8)


def write_text(folder: Path) -> None:
    """The text that every Python carries: the reference topics of `pydoc`, one document each."""
    from pydoc_data.topics import topics

    lines = (json.dumps({"text": text.strip(), "source": name}) for name, text in sorted(topics.items()))
    text, file = "\n".join(lines) + "\n", folder / "python_topics.jsonl"
    # The prepared data remember the file's time: an equal one stays as it is.
    if not file.is_file() or file.read_text(encoding="utf-8") != text:
        folder.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")


def check_demo(cfg: DemoConfig) -> None:
    """The output. Raises UserError."""
    root = Path(cfg.output)
    if root.exists() and not (root / STAGES_FILE).is_file() and any(root.iterdir()):
        raise UserError(f"output={root} exists and is not a demo's folder: choose another output=")


def run_demo(cfg: DemoConfig, _: None = None) -> None:
    """`launch/demo.py`: every stage, a table, summary.json and a report."""
    root, effort = Path(cfg.output), SHORT if cfg.short else WHOLE
    if cfg.dry_run:
        console().print(f"would run the stages of the demo in {root}: {effort}")
        return
    root.mkdir(parents=True, exist_ok=True)
    stages = Stages(root / STAGES_FILE, words=[] if cfg.seed == CommandConfig.seed else [f"seed={cfg.seed}"])
    folders = {
        name: root / name for name in ("smollm2", "teacher", "text", "data", "scores", "found", "pruned", "distilled")
    }
    _make_models(stages, folders, effort)
    _judge(stages, root, folders, effort)
    _show(stages, root, folders)


def _make_models(stages: Stages, at: dict[str, Path], effort: Effort) -> None:
    """From the packaged model to the distilled student."""
    stages.command("source", at["smollm2"], "launch/smollm2.py")
    stages.command("import", at["teacher"], "launch/import_hf.py", f"hf={at['smollm2']}")
    write_text(at["text"])
    stages.command(
        "data",
        at["data"],
        "launch/prepare_data.py",
        f"input={at['text']}",
        f"model={at['teacher']}",
        "validation_fraction=0.1",
    )
    stages.command(
        "importance",
        at["scores"],
        "launch/importance.py",
        f"model={at['teacher']}",
        f"data.path={at['data']}",
        f"data.sequence_length={effort.sequence_length}",
        f"samples={effort.calibration_samples}",
        "trainer.micro_batch_size=4",
        "parallel.pipeline=2",
        processes=2,
    )
    stages.command(
        "search", at["found"], "launch/search.py", f"model={at['teacher']}", f"scores={at['scores']}", *SEARCH
    )
    stages.command(
        "prune",
        at["pruned"],
        "launch/prune.py",
        f"model={at['teacher']}",
        f"scores={at['scores']}",
        f"target={at['found']}/targets/rank_01.yaml",
        processes=2,
    )
    stages.command(
        "distill",
        at["distilled"],
        "launch/distill.py",
        f"teacher={at['teacher']}",
        f"student={at['pruned']}",
        f"data.path={at['data']}",
        *effort.distill,
        processes=2,
    )


def _judge(stages: Stages, root: Path, at: dict[str, Path], effort: Effort) -> None:
    """Perplexity of the three models, and the pruned and distilled ones as Hugging Face folders."""
    for name in MODELS:
        stages.command(
            f"evaluate {name}",
            root / f"evaluate_{name}",
            "launch/evaluate.py",
            f"model={at[name]}",
            f"data.path={at['data']}",
            f"data.sequence_length={effort.sequence_length}",
            f"samples={effort.validation_samples}",
            "split=validation",
            processes=2,
        )
    for name in ("pruned", "distilled"):
        stages.command(f"export {name}", root / f"{name}_hf", "launch/export_hf.py", f"model={at[name]}")


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


def _show(stages: Stages, root: Path, at: dict[str, Path]) -> None:
    """The report, the table and summary.json."""
    from minitron_megatron.checkpoints.folder import open_model_folder
    from minitron_megatron.models.axes import count_parameters

    shown = {"teacher": at["smollm2"], "pruned": root / "pruned_hf", "distilled": root / "distilled_hf"}
    samples: dict[str, str] = {}
    file = root / "samples.json"
    stages.run(
        "completions", file, lambda: write_json(file, {name: complete(folder) for name, folder in shown.items()})
    )
    samples = json.loads(file.read_text(encoding="utf-8"))
    stages.command("report", root / "report", "launch/report.py", f"folders={root}", f"title={TITLE}")
    results = {name: json.loads((root / f"evaluate_{name}" / RESULTS).read_text(encoding="utf-8")) for name in MODELS}
    summary: dict[str, Any] = {
        "parameters": {name: count_parameters(open_model_folder(at[name]).shape) for name in MODELS},
        "perplexity": {name: results[name]["perplexity"] for name in MODELS},
        "seconds": stages.seconds,
        "seconds_starting": stages.starting,
    }
    write_json(root / "summary.json", summary)
    print_table(
        "What became of SmolLM2-135M",
        ["model", "parameters", "perplexity", "completion"],
        [[n, summary["parameters"][n], round(summary["perplexity"][n], 1), samples[n]] for n in MODELS],
    )
    total = sum(stages.seconds.values())
    rows = [[name, seconds, stages.starting.get(name, "")] for name, seconds in stages.seconds.items()]
    whole = ["all", round(total, 1), round(sum(stages.starting.values()), 1)]
    print_table("Time", ["stage", "seconds", "of these, to start"], [*rows, whole])
    console().print(f"Written: {root / 'summary.json'}, {root / 'report' / 'report.html'}")
