"""The model card of an export: README.md with Hugging Face's front matter, out of manifests and results alone.

    shape · how it was pruned · how it was distilled · results=FOLDERS of evaluate · lineage with digests · commands

Nothing is guessed: a license or a base model that neither the options nor the import say is left out.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import jinja2
import yaml

from minitron_megatron.checkpoints.folder import RESULTS, ModelFolder, load_json, load_yaml, read_output
from minitron_megatron.checkpoints.lineage import Step, find_step, lineage, teachers
from minitron_megatron.config import ExportHfConfig, OptimConfig
from minitron_megatron.console import format_value, markdown_table
from minitron_megatron.errors import UserError
from minitron_megatron.models.axes import count_parameters
from minitron_megatron.models.families import class_of_export
from minitron_megatron.models.shape import SIZES
from minitron_megatron.train.schedule import reached

FILE, TEMPLATE = "README.md", "model_card.md.jinja"
_PLAN = "plan.yaml"
# A folder of Hugging Face's download cache says which repository it is of.
_HUB_CACHE = re.compile(r"(?:^|/)models--([\w.-]+?)--([\w.-]+)/snapshots/")
_SIZES = (*SIZES, "rope_theta", "tied_embeddings")
# Options of a training run that make its recipe, by what they are called.
RECIPE = {
    "distill.loss": "loss",
    "distill.temperature": "temperature",
    "distill.top_k": "top-K",
    "distill.cross_entropy": "weight of the labels' cross entropy",
    "distill.intermediate": "weight of losses on intermediate states",
    "data.path": "data",
    "data.sequence_length": "sequence length, tokens",
    "trainer.global_batch_size": "samples of a step",
    "optim.lr": "peak learning rate",
    "optim.min_lr": "learning rate at the end",
    "optim.schedule": "schedule",
    "optim.warmup_steps": "warm-up steps",
    "optim.warmup_tokens": "warm-up tokens",
    "optim.weight_decay": "weight decay",
    "optim.adam_beta1": "Adam β₁",
    "optim.adam_beta2": "Adam β₂",
    "optim.clip_grad": "largest gradient norm",
    "trainer.fp8": "FP8",
    "seed": "seed",
}
_AGGREGATION = ("sequence", "batch")
# Shown only where they do something.
_ONLY_IF = {"distill.top_k": ("distill.loss", "topk_kl")}
_IDLE = ("distill.cross_entropy", "distill.intermediate")
_FOUND = {
    "steps": "steps",
    "tokens": "tokens",
    "skipped": "skipped steps",
    "published_step": "step that is published",
    "loss": "loss of its last step",
    "validation_loss": "validation loss",
}


@dataclass(frozen=True)
class Measured:
    """The output of launch/evaluate.py for the model that is exported."""

    path: Path
    digest: str
    config: Mapping[str, Any]
    values: Mapping[str, Any]


def read_results(paths: Sequence[str], folder: ModelFolder) -> list[Measured]:
    """Check that folders are evaluations of this very model. Raises UserError."""
    found = []
    for path in map(Path, paths):
        manifest = read_output(path, RESULTS, "evaluate", "results=")
        digest = (manifest.get("inputs") or {}).get("model")
        if digest is None:
            raise UserError(f"results={path} is not an evaluation: give the output of evaluate")
        if digest != folder.digest:
            raise UserError(f"results={path} is of another model ({digest}), not of {folder.path}: evaluate this one")
        values = load_json(path / RESULTS, ": evaluate the model again")
        found.append(Measured(path, manifest["digest"], manifest.get("config") or {}, values))
    return found


def model_card(cfg: ExportHfConfig, folder: ModelFolder, results: Sequence[Measured]) -> str:
    """The card's text. `results` are of `read_results`."""
    steps = lineage(folder)
    known = [*steps, *teachers(steps)]
    origin = next((step.shape for step in reversed(steps) if step.shape), folder.shape)
    base = cfg.base_model or _hub_name(steps)
    kinds = [step.kind for step in reversed(steps) if step.kind in ("corrected", "pruned", "distilled")]
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("minitron_megatron", "checkpoints"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template(TEMPLATE).render(
        front_matter=_front_matter(cfg, base, folder, kinds),
        title=Path(cfg.output).name,
        source_name=base if "pruned" in kinds else None,
        parameters=f"{count_parameters(folder.shape):,}",
        dtype=folder.shape.dtype,
        architecture=class_of_export(folder.shape).architecture,
        kinds=kinds,
        license=cfg.license,
        tokenizer=folder.tokenizer_path.is_dir(),
        shape=_shape(folder, origin),
        recipe=[section for step in reversed(steps) for section in _recipe(step)],
        results=_results(results),
        lineage=_lineage(known, set(map(id, steps))),
        commands=[step.command for step in reversed(known) if step.command],
    )


def _front_matter(cfg: ExportHfConfig, base: str | None, folder: ModelFolder, kinds: Sequence[str]) -> str:
    values = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        **({"license": cfg.license} if cfg.license else {}),
        **({"base_model": base} if base else {}),
        "tags": [class_of_export(folder.shape).model_type, "minitron", "megatron", *dict.fromkeys(kinds)],
    }
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def _hub_name(steps: Sequence[Step]) -> str | None:
    """The repository that the first ancestor was downloaded from, where its folder is the hub's cache."""
    found = _HUB_CACHE.search(f"{steps[-1].path.absolute()}/")
    return f"{found[1]}/{found[2]}" if found else None


def _shape(folder: ModelFolder, origin: Any) -> str:
    rows = [[name, getattr(folder.shape, name), getattr(origin, name)] for name in _SIZES]
    rows.append(["parameters", count_parameters(folder.shape), count_parameters(origin)])
    if origin == folder.shape:
        return table(["", "this model"], [row[:2] for row in rows])
    return table(["", "this model", "source"], rows)


def _recipe(step: Step) -> list[dict[str, str]]:
    if step.kind == "pruned":
        return [{"title": "Pruning", "table": table(["", "value"], _pruning(step))}]
    if step.kind in ("distilled", "corrected"):
        title = "Distillation" if step.kind == "distilled" else "Correction on the data"
        return [{"title": title, "table": table(["", "value"], _training(step))}]
    return []


def _pruning(step: Step) -> list[list[Any]]:
    plan = load_yaml(step.path / _PLAN) if (step.path / _PLAN).is_file() else {}
    rows = [["parameters of the source", step.results.get("parameters_source")]]
    for axis in ("layers", "hidden", "vocab"):
        rows.append([f"kept of {axis}", plan.get(axis)])
    for axis, what in (("ffn", "neurons"), ("kv_groups", "key-value groups"), ("q_heads", "query heads")):
        if axis in plan:
            rows.append([f"kept {what}", plan[axis] if isinstance(plan[axis], str) else "chosen in each layer"])
    if "merged_heads" in plan:
        rows.append(["merged heads", plan["merged_heads"] if isinstance(plan["merged_heads"], str) else "yes"])
    rows += _calibration(step)
    for name, value in (step.results.get("loss_around_the_cut") or {}).items():
        rows.append([f"loss, {name}", value])
    return [*rows, ["digest of what was kept", step.results.get("kept_digest")]]


def _calibration(step: Step) -> list[list[Any]]:
    """What the choice was made by; what is said of scores is of those that were read, where these are still at hand."""
    if step.of("plan"):
        return [["chosen by", f"a plan ({step.of('plan')})"]]
    rows = [["layers dropped by number", step.of("drop_layers") or None]]
    if step.of("layers"):
        rows.append(["layers chosen by", f"{step.of('layers')}, {step.of('prune.judge')}"])
    digest = step.inputs.get("scores")
    if digest is None:
        return rows
    # Scores that a pruning measures itself lie beside its output.
    measured = find_step(Path(step.of("scores") or f"{str(step.of('output')).rstrip('/')}_scores"), digest)
    if not measured.manifest:
        return [*rows, ["digest of the scores", digest]]
    return [
        *rows,
        ["importance over tokens, over samples", " ".join(str(measured.of(f"importance.{n}")) for n in _AGGREGATION)],
        [
            "calibration",
            f"{measured.results.get('samples', measured.of('samples'))} samples of {measured.of('data.sequence_length')} tokens",
        ],
        ["calibration data", measured.of("data.path")],
        ["digest of the scores", digest],
    ]


def counts(option: str, of: Callable[[str], Any]) -> bool:
    """Whether an option of RECIPE did something in a run, `of` giving the run's options."""
    value, only_if = of(option), _ONLY_IF.get(option)
    if option == "optim.warmup_steps" and of("optim.warmup_tokens") is None:
        return True
    if value in (None, "none") or (option in _IDLE and not value):
        return False
    return only_if is None or of(only_if[0]) == only_if[1]


def as_reached(option: str, of: Callable[[str], Any], steps: Any) -> Any:
    """An option of RECIPE as a run of so many steps had it: rates that it did not reach stand beside what was asked."""
    asked, batch, length = of(option), of("trainer.global_batch_size"), of("data.sequence_length")
    if not all(type(number) is int for number in (steps, batch, length)):
        return asked
    named = {f"optim.{f.name}": of(f"optim.{f.name}") for f in fields(OptimConfig)}
    found = reached({name: value for name, value in named.items() if value is not None}, steps, batch * length)
    if asked is None and option in found:
        return found[option]
    if option not in found or math.isclose(found[option], asked, rel_tol=1e-3):
        return asked
    if option == "optim.warmup_steps" and of("optim.warmup_tokens") is not None:
        return found[option]
    return f"{format_value(found[option])} (asked: {format_value(asked)})"


def _training(step: Step) -> list[list[Any]]:
    teacher = step.of("teacher.path")
    rows = [["teacher", f"{teacher} ({step.inputs.get('teacher')})"]] if teacher else []
    steps = step.results.get("steps")
    rows += [["begun with", step.beginning]] if step.beginning else []
    rows += [[name, as_reached(o, step.of, steps)] for o, name in RECIPE.items() if counts(o, step.of)]
    rows.append(["digest of the data", step.inputs.get("data")])
    return rows + [[name, step.results.get(key)] for key, name in _FOUND.items()]


def _results(results: Iterable[Measured]) -> str:
    """One row a figure; errors are standard errors."""
    rows: list[list[Any]] = []
    for one in results:
        data, split = (one.config.get("data") or {}).get("path"), one.config.get("split")
        where = f"{data}, {split}" if data else str(one.path)
        for name in ("perplexity", "loss", "kl", "agreement"):
            if _is_number(one.values.get(name)):
                of_teacher = one.values.get(f"teacher_{name}")
                beside = _figure(of_teacher) if _is_number(of_teacher) else ""
                rows.append([name, _figure(one.values[name]), beside, "", where])
        for task, metrics in (one.values.get("tasks") or {}).items():
            for metric, value in metrics.items():
                if _is_number(value) and metric != "fewshot" and not metric.endswith("_stderr"):
                    error = metrics.get(f"{metric}_stderr")
                    figure = _figure(value) + (f" ± {_figure(error)}" if _is_number(error) else "")
                    shots = metrics.get("fewshot", "")
                    rows.append([f"{task}, {metric}", figure, "", shots, "lm-evaluation-harness"])
    if not any(row[2] for row in rows):
        rows = [[*row[:2], *row[3:]] for row in rows]
        return table(["", "value", "shots", "measured on"], rows) if rows else ""
    return table(["", "this model", "teacher", "shots", "measured on"], rows)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _figure(value: float) -> str:
    return f"{value:.4g}"


def _lineage(steps: Sequence[Step], main: set[int]) -> str:
    rows = []
    for step in steps:
        versions = step.manifest.get("versions") or {}
        what = step.kind if id(step) in main else f"teacher: {step.kind}"
        rows.append([what, str(step.path), step.digest or "not known", step.manifest.get("made", ""), _words(versions)])
    return table(["", "folder", "digest", "made", "versions"], rows)


def _words(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table; rows without a value are left out."""
    return markdown_table(columns, [row for row in rows if row[1] is not None])
