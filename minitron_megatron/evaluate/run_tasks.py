"""Tasks of lm-evaluation-harness on any of its language models, by its own evaluator; figures as plain values."""

from importlib.metadata import version
from typing import Any

from minitron_megatron.config import EvaluateConfig
from minitron_megatron.errors import UserError, in_one_line
from minitron_megatron.evaluate.harness import Loaded, offline

# Draws for the standard error of metrics that are no means; the harness's own 100,000 take minutes a metric.
_BOOTSTRAPS = 1000


def run_tasks(lm: Any, loaded: Loaded, cfg: EvaluateConfig) -> dict[str, Any]:
    """`tasks` with the figures of each task and group, and `lm_eval` with the harness's version.

    A figure's name is the metric's, with the filter behind a comma where there is one; beside it its standard error. Raises
    UserError where a task cannot make its questions or judge the answers.
    """
    from lm_eval.evaluator import evaluate

    found = {"tasks": loaded.tasks, "groups": loaded.groups}
    how = {"bootstrap_iters": _BOOTSTRAPS, "log_samples": False, "confirm_run_unsafe_code": cfg.confirm_run_unsafe_code}
    try:
        with offline():
            said = evaluate(lm, found, limit=cfg.limit, **how)
    except (UserError, RuntimeError, MemoryError):  # ours; a device's
        raise
    except Exception as error:  # tasks are programs of their own, with as many ways to fail
        raise UserError(
            f"tasks={list(loaded.tasks)}: {type(error).__name__} ({in_one_line(error, 200)}): mend the task or its "
            "data, lower fewshot=, or leave it out"
        ) from error
    parts = loaded.part_of
    named = {name: {"part_of": parts[name]} if name in parts else {} for name in said["results"]}
    tasks = {name: {**_figures(said, name), **part} for name, part in named.items()}
    return {"tasks": tasks, "lm_eval": version("lm-eval")}


def _figures(said: dict[str, Any], name: str) -> dict[str, Any]:
    """{metric: value, metric_stderr: value, fewshot, questions} of a task or a group."""
    found: dict[str, Any] = {}
    for key, value in said["results"][name].items():
        metric, comma, how = key.partition(",")
        if comma and isinstance(value, int | float):
            base, is_error = metric.removesuffix("_stderr"), metric.endswith("_stderr")
            found[base + (f",{how}" if how != "none" else "") + ("_stderr" if is_error else "")] = float(value)
    shots = said["n-shot"].get(name)
    return {**found, **({} if shots is None else {"fewshot": shots}), "questions": _questions(said, name)}


def _questions(said: dict[str, Any], name: str) -> int:
    """Questions that were asked of a task, or of all tasks of a group."""
    if name in said["n-samples"]:
        return int(said["n-samples"][name]["effective"])
    return sum(_questions(said, part) for part in said["group_subtasks"][name])
