"""Sections about models: their sizes, how they were judged beside their teacher, what was published of such models, how fast
they are."""

import json
import os
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from minitron_megatron.checkpoints.folder import RESULTS
from minitron_megatron.checkpoints.stamps import of_tokenizer
from minitron_megatron.config import flat
from minitron_megatron.console import format_value
from minitron_megatron.errors import UserError
from minitron_megatron.launcher import CONF
from minitron_megatron.models.axes import count_parameters
from minitron_megatron.models.shape import ModelShape
from minitron_megatron.plain_files import read_yaml
from minitron_megatron.report import plots
from minitron_megatron.report.folders import RunFolder
from minitron_megatron.report.lineage import Lineage, short
from minitron_megatron.report.page import Figure, Section, Table
from minitron_megatron.report.trials import Trial

_SIZES = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "vocab_size")
# Figures of an evaluation that are no score, and options that do not say what was measured.
_NOT_SCORES = ("tokens", "windows", "seconds", "tasks")
_OF_TASKS = ("fewshot", "questions")
# Figures of the teacher in an evaluation of its student begin so.
_OF_TEACHER = "teacher_"
_HOW_NOT_WHAT = tuple("output model. hf teacher. parallel. device resume verify dry_run trainer. prompts seed".split())
_NAMES = {"kl": "KL from the teacher", "agreement": "agreement with the teacher", "loss": "loss, nats a token"}


def teacher_of(lineage: Lineage, model: RunFolder) -> RunFolder:
    """Whom a model is compared with: the one that it was made from in the end, whoever taught it on the way.

    Where it was made from none that is here, its teacher; itself where that is not here either.
    """
    root = lineage.origin(model)
    return root if root is not model else lineage.source(model, "teacher") or model


def student(lineage: Lineage, trials: Sequence[Trial] = (), given: str | None = None) -> RunFolder | None:
    """The model that the page is about: `given` by folder or name, else the last distilled, else the last pruned or made.

    Candidates of a trial count where there is nothing else, and then the best of them. Raises UserError for a name of none.
    """
    models = lineage.models()
    if given is not None:
        path = Path(os.path.expanduser(given)).resolve()
        named = [one for one in models if one.name == given or one.path.resolve() in (path, path / "model")]
        if not named:
            raise UserError(
                f"student={given} is no model of folders=: give one of {', '.join(one.name for one in models)}"
            )
        return named[0]
    others = [one for one in models if not any(trial.has(one) for trial in trials)]
    winners = [one for one in models if any(trial.won(one) for trial in trials)]
    for option in ("student", "plan"):
        for among in (others, winners):
            if chosen := [one for one in among if option in one.inputs]:
                return chosen[-1]
    return models[-1] if models else None


def models_section(lineage: Lineage) -> Section | None:
    """Sizes of every model folder; one with the sizes and digest of another is the same model."""
    models = lineage.models()
    if not models:
        return None
    largest = max(count_parameters(one.shape) for one in models)
    rows = []
    for one in models:
        sizes, count = one.shape, count_parameters(one.shape)
        ffn = sizes.ffn_hidden_size if sizes.uniform else f"{min(sizes.ffn_of_layers)} to {max(sizes.ffn_of_layers)}"
        made_from = teacher_of(lineage, one)
        rows.append(
            [
                one.name,
                one.command or "–",
                f"{count:,}",
                f"{count / largest:.1%}".replace("%", " %"),
                f"{sizes.num_layers} × {sizes.hidden_size} × {ffn}",
                f"{sizes.num_attention_heads}/{sizes.num_query_groups}",
                f"{sizes.vocab_size:,}",
                "–" if made_from is one else made_from.name,
            ]
        )
    columns = [
        "model",
        "made by",
        "parameters",
        "of the largest",
        "layers × hidden × ffn",
        "heads/kv",
        "vocabulary",
        "out of",
    ]
    return Section("Models", tables=[Table(columns, rows)], card=True)


def evaluations(lineage: Lineage) -> list[RunFolder]:
    """Folders of launch/evaluate.py."""
    return [one for one in lineage.folders if one.has(RESULTS) and {"model", "hf"} & set(one.inputs) and _scores(one)]


def results_section(lineage: Lineage, about: RunFolder | None = None) -> Section | None:
    """Figures of every evaluated model beside its teacher's, a table for each way of measuring; `about` has the page's model."""
    setups: dict[str, list[RunFolder]] = {}
    for one in evaluations(lineage):
        setups.setdefault(same_measure(one), []).append(one)
    if not setups:
        return None
    tables = [_beside_teacher(lineage, measured, about) for measured in setups.values()]
    return Section("Results", tables=[*tables, *_published_tables(lineage)], card=True)


def same_measure(folder: RunFolder) -> str:
    """What two evaluations must share to stand in one table."""
    options = {k: v for k, v in flat(folder.config).items() if not k.startswith(_HOW_NOT_WHAT)}
    # What belongs to the model is not what it is measured by.
    inputs = {k: v for k, v in folder.inputs.items() if k not in ("model", "hf", "teacher") and not of_tokenizer(k)}
    return json.dumps([options, inputs], default=str)


def _scores(folder: RunFolder) -> dict[str, tuple[float, float | None]]:
    """(value, standard error) by name, of loss and the like, and of each metric of each task. Raises UserError."""
    values = folder.read_json(RESULTS)
    if not isinstance(values, dict):
        return {}
    found = {k: (v, None) for k, v in values.items() if k not in _NOT_SCORES and isinstance(v, int | float)}
    tasks = values.get("tasks") or {}
    if not isinstance(tasks, dict) or not all(isinstance(metrics, dict) for metrics in tasks.values()):
        raise UserError(f"{folder.path / RESULTS} is damaged (tasks are odd): evaluate the model again")
    for task, metrics in tasks.items():
        shots = f" ({metrics['fewshot']})" if "fewshot" in metrics else ""
        for name, value in metrics.items():
            if name not in _OF_TASKS and not name.endswith("_stderr") and isinstance(value, int | float):
                found[f"{task}, {name}{shots}"] = (value, metrics.get(f"{name}_stderr"))
    return found


def _name_of_evaluated(lineage: Lineage, folder: RunFolder) -> str:
    model = lineage.source(folder, "model", "hf")
    return model.name if model else short(folder.inputs.get("model") or folder.inputs["hf"])


Columns = dict[str, dict[str, tuple[float, float | None]]]


def _columns(lineage: Lineage, measured: Sequence[RunFolder]) -> tuple[Columns, dict[str, RunFolder]]:
    """Scores of each model that was measured, by its name, teachers of evaluations too; and those models that are here."""
    columns: Columns = {}
    models: dict[str, RunFolder] = {}
    for one in measured:
        name, scores = _name_of_evaluated(lineage, one), _scores(one)
        own = {score: value for score, value in scores.items() if not score.startswith(_OF_TEACHER)}
        columns.setdefault(name, {}).update(own)
        if (model := lineage.source(one, "model", "hf")) is not None:
            models[name] = model
    for one in measured:
        # Measured beside a student, and of no more account than an evaluation of its own.
        found = {k.removeprefix(_OF_TEACHER): v for k, v in _scores(one).items() if k.startswith(_OF_TEACHER)}
        if found:
            teacher = lineage.source(one, "teacher")
            column = columns.setdefault(teacher.name if teacher else short(one.inputs["teacher"]), {})
            column.update({score: value for score, value in found.items() if score not in column})
    return columns, models


def _beside_teacher(lineage: Lineage, measured: Sequence[RunFolder], about: RunFolder | None) -> Table:
    """A column for each model that was measured, its teacher's first; where that was not measured, it says so by dashes."""
    columns, models = _columns(lineage, measured)
    last = models[about.name] if about and about.name in models else next(reversed(models.values()), None)
    teacher = teacher_of(lineage, last) if last else None
    compares = last is not None and teacher is not last
    if compares:
        columns.setdefault(teacher.name, {})
    order = sorted(columns, key=lambda name: not compares or name != teacher.name)
    rows = []
    for score in dict.fromkeys(name for scores in columns.values() for name in scores):
        row = [_cell(columns[name].get(score)) for name in order]
        if compares:
            both = [columns[name].get(score, (0, None))[0] for name in (last.name, teacher.name)]
            row.append(f"{both[0] / both[1]:.3g}×" if all(both) else "–")
        rows.append([_NAMES.get(score, score), *row])
    extra = [f"{last.name} over {teacher.name}"] if compares else []
    return Table(["", *order, *extra], rows, _caption(lineage, measured[0]))


def _caption(lineage: Lineage, folder: RunFolder) -> str:
    options, data = flat(folder.config), lineage.source(folder, "data")
    words = []
    if options.get("data.path"):
        # `samples` is only how many at most; what was measured is in the results, in those of older evaluations as tokens alone.
        measured, length = folder.read_json(RESULTS), options.get("data.sequence_length")
        tokens = f"{measured['tokens']:,} tokens" if isinstance(measured.get("tokens"), int) else "tokens"
        if isinstance(measured.get("windows"), int):
            words.append(f"{tokens} in {measured['windows']:,} windows of at most {length}")
        else:
            words.append(f"{tokens} in windows of at most {length}")
        words.append(f"{options.get('split', 'validation')} split of {data.name if data else options['data.path']}")
    if folder.read_json(RESULTS).get("tasks"):
        limit = options.get("limit")
        words.append("tasks: examples before each question in brackets, ± standard error")
        words += [f"the first {limit} questions of each at most"] if limit else []
    return "; ".join(words)


def _cell(score: tuple[float, float | None] | None) -> str:
    if score is None:
        return "–"
    value, error = score
    return f"{value:,.4g}" + (f" ± {error:.2g}" if isinstance(error, int | float) else "")


def _published() -> dict[str, Any]:
    return read_yaml(files(__package__).joinpath("published.yaml"))


def _sizes(shape: ModelShape | Mapping[str, Any]) -> tuple[Any, ...]:
    values = shape.to_dict() if isinstance(shape, ModelShape) else shape
    return tuple(values[name] for name in _SIZES)


def _published_tables(lineage: Lineage) -> list[Table]:
    """Published figures of models of the same sizes, and of others out of the same teacher, beside those measured here."""
    known = _published()
    presets = {one["model"]: read_yaml(CONF / "model" / f"{one['model']}.yaml") for one in known["models"]}
    ours = {_sizes(model.shape) for model in lineage.models()}
    here = {name for name, preset in presets.items() if _sizes(preset) in ours}
    shown = [one for one in known["models"] if one["model"] in here or one.get("teacher") in here]
    measured = {
        _name_of_evaluated(lineage, one): one.read_json(RESULTS).get("tasks") or {} for one in evaluations(lineage)
    }
    measured = {name: tasks for name, tasks in measured.items() if tasks}
    rows = []
    for task, how in known["tasks"].items():
        figures = [str(one["scores"].get(task, "–")) for one in shown]
        rows.append(
            [
                f"{task} ({how['fewshot']})",
                *(_in_percent(tasks.get(task), how) for tasks in measured.values()),
                *figures,
            ]
        )
    if not shown:
        return []
    columns = ["task (examples before a question)", *measured, *(f"{one['name']}, published" for one in shown)]
    return [Table(columns, rows, f"Beside published figures, percent ({known['source']})")]


def _in_percent(metrics: Mapping[str, Any] | None, how: Mapping[str, Any]) -> str:
    """Our figure of a published task, with the number of examples where it is another."""
    value = next((v for k, v in (metrics or {}).items() if how["metric"] in (k, k.partition(",")[0])), None)
    if value is None:
        return "–"
    shots = metrics.get("fewshot", how["fewshot"])
    return f"{100 * value:.1f}" + (f" with {shots}" if shots != how["fewshot"] else "")


def rows_of(folder: RunFolder) -> list[dict[str, Any]]:
    """The rows of a results.json that is a list of measurements, or has one under `rows`; none of any other."""
    values = folder.read_json(RESULTS) if folder.has(RESULTS) else None
    rows = values.get("rows") if isinstance(values, dict) else values
    return rows if isinstance(rows, list) and all(isinstance(row, dict) for row in rows) else []


def throughput_section(lineage: Lineage) -> Section | None:
    """Tokens a second of the models, as launch/throughput.py measured them."""
    tables, figures = [], []
    for folder in lineage.folders:
        rows = [row for row in rows_of(folder) if "tokens_per_second" in row]
        if not rows:
            continue
        columns = [
            c for c in dict.fromkeys(key for row in rows for key in row) if any(_is_plain(row.get(c)) for row in rows)
        ]
        cells = [[_plain(row.get(column)) for column in columns] for row in rows]
        tables.append(Table([column.replace("_", " ") for column in columns], cells, folder.name))
        rates = {_row_name(row): row["tokens_per_second"] for row in rows if row["tokens_per_second"]}
        if rates:
            figures.append(Figure(f"{folder.name}: tokens a second", plots.rates(rates, "tokens a second")))
    return Section("Throughput", tables=tables, figures=figures, card=True) if tables else None


def _row_name(row: Mapping[str, Any]) -> str:
    sizes = " ".join(f"{name} {row[name]}" for name in ("batch", "input", "output") if name in row)
    return " ".join(filter(None, (str(row.get("model", "")).rpartition("/")[2], str(row.get("engine", "")), sizes)))


def _is_plain(value: object) -> bool:
    return isinstance(value, int | float | str)


def _plain(value: object) -> str:
    return format_value(value) if _is_plain(value) else "–"


def measurements_section(lineage: Lineage) -> Section | None:
    """Figures of launch/benchmark.py, a table a folder."""
    tables = []
    for folder in lineage.folders:
        if folder.command == "benchmark" and folder.has(RESULTS):
            values = flat(folder.read_json(RESULTS))
            rows = [[name, _plain(value)] for name, value in values.items() if _is_plain(value)]
            tables.append(Table(["", "value"], rows, f"{folder.name}: {folder.config.get('measure', '')}"))
    return Section("Measurements", tables=tables) if tables else None
