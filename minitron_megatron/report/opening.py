"""The sentence at the head of a page: how large the model is, what it kept of its teacher, how fast it is, what it took."""

from collections.abc import Sequence

from minitron_megatron.checkpoints.folder import RESULTS
from minitron_megatron.console import format_value
from minitron_megatron.models.axes import count_parameters
from minitron_megatron.report.folders import RunFolder
from minitron_megatron.report.lineage import Lineage
from minitron_megatron.report.models import evaluations, rows_of, same_measure, teacher_of
from minitron_megatron.report.training import seconds_by_device


def opening(lineage: Lineage, model: RunFolder) -> str:
    """Size, quality kept, speed gained and cost, each of which says so where it was not measured."""
    teacher = teacher_of(lineage, model)
    parts = (
        _size(model, teacher),
        _quality(lineage, model, teacher),
        _speed(lineage, model, teacher),
        _cost(lineage, model),
    )
    return "; ".join(part for part in parts if part) + "."


def _size(model: RunFolder, teacher: RunFolder) -> str:
    count = count_parameters(model.shape)
    if teacher is model:
        return f"{model.name} has {count:,} parameters"
    whole = count_parameters(teacher.shape)
    return f"{model.name} has {count:,} parameters, {count / whole:.0%} of the {whole:,} of {teacher.name}".replace(
        "%", " %"
    )


def forms_of(lineage: Lineage, model: RunFolder) -> list[RunFolder]:
    """A model, and its exports: what is measured of one holds for all."""
    return [model, *(one for one in lineage.folders if not one.shape and "max_shard_gb" in one.config and
                     lineage.source(one, "model") is model)]  # fmt: skip


def _quality(lineage: Lineage, model: RunFolder, teacher: RunFolder) -> str:
    """Perplexity of both on the same data, from the evaluation that has most to say."""
    best = ""
    for one in _of(lineage, model):
        value, beside = one.read_json(RESULTS).get("perplexity"), _perplexity_of_teacher(lineage, one, teacher)
        if not isinstance(value, int | float):
            continue
        data = lineage.source(one, "data")
        on = f"perplexity {value:,.4g}" + (f" on {data.name}" if data else "")
        if beside is not None and teacher is not model:
            return f"{on}, where {teacher.name} has {beside:,.4g}"
        best = best or on
    return best or "its quality was not measured (evaluate does it)"


def _of(lineage: Lineage, model: RunFolder) -> Sequence[RunFolder]:
    forms = forms_of(lineage, model)
    return [one for one in reversed(evaluations(lineage)) if lineage.source(one, "model", "hf") in forms]


def _perplexity_of_teacher(lineage: Lineage, evaluation: RunFolder, teacher: RunFolder) -> float | None:
    """From the same evaluation, or one of the teacher that measured alike."""
    if lineage.source(evaluation, "teacher") is teacher:
        return evaluation.read_json(RESULTS).get("teacher_perplexity")
    for one in _of(lineage, teacher):
        if same_measure(one) == same_measure(evaluation):
            return one.read_json(RESULTS).get("perplexity")
    return None


def _speed(lineage: Lineage, model: RunFolder, teacher: RunFolder) -> str:
    """Tokens a second over the teacher's, each at its best batch, in the engine where the model is fastest."""
    if teacher is model:
        return ""
    digests = [{one.digest for one in forms_of(lineage, of)} for of in (model, teacher)]
    best: tuple[float, str] | None = None
    for folder in lineage.folders:
        names = [{key.partition(" ")[2] for key, value in folder.inputs.items() if value in of} for of in digests]
        by_engine: dict[str, list[list[float]]] = {}
        for row in rows_of(folder):
            for i, own in enumerate(names):
                if row.get("model") in own and isinstance(row.get("tokens_per_second"), int | float):
                    by_engine.setdefault(str(row.get("engine")), [[], []])[i].append(row["tokens_per_second"])
        for engine, (ours, theirs) in by_engine.items():
            if ours and theirs and (best is None or max(ours) > best[0]):
                best = max(ours), f"{max(ours) / max(theirs):.2f} times as many tokens a second ({engine})"
    return best[1] if best else "its speed was not measured (throughput does it)"


def _cost(lineage: Lineage, model: RunFolder) -> str:
    """Hours of all processes, and tokens, of the model and of all that it was made from."""
    made = [model]
    for one in made:
        made += [source for source in lineage.made_from[one.name].values() if source not in made]
    spent, of_all = seconds_by_device(made), seconds_by_device(lineage.folders)
    tokens = sum(one.results["tokens"] for one in made if one.shape and "steps" in one.results)
    words = [f"{_time(seconds)} of {device} processes" for device, seconds in spent.items()]
    if not words:
        return ""
    took = f"making it and what it was made from took {' and '.join(words)}"
    took += f", training on {format_value(tokens)} tokens" if tokens else ""
    everything = " and ".join(f"{_time(seconds)} of {device} processes" for device, seconds in of_all.items())
    return took + (f" (all folders of this page: {everything})" if of_all != spent else "")


def _time(seconds: float) -> str:
    for size, unit in ((3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:.0f} seconds"
