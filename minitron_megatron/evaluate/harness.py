"""Tasks of lm-evaluation-harness: the one way to load them, and multiple-choice ones as questions of the layer analysis.

Such a task gives its requests, and takes log-likelihoods back into its own metrics. Only data that lies on this machine is used
(the Hugging Face cache, or files that a task names). The harness is imported where a task is asked for, not before.
"""

import contextlib
import difflib
import logging
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from minitron_megatron.data.questions import lengths, margin
from minitron_megatron.errors import UserError, in_one_line
from minitron_megatron.evaluate.task_files import functions_of, sandbox_templates
from minitron_megatron.launcher import CONF

log = logging.getLogger(__name__)
# Tasks that the harness does not have.
OWN = CONF / "lm_eval"
_METRICS = {"none": "acc", "characters": "acc_norm", "bytes": "acc_bytes"}
# Tasks that one line names.
_NAMED = 4


class HarnessTask:
    """One task of the harness as a QuestionSource."""

    def __init__(self, task: Any, limit: int | None) -> None:
        self.task, self.name = task, str(task.task_name)
        task.build_all_requests(limit=limit)
        self.documents = dict(task.doc_iterator(limit=limit))

    def texts(self) -> list[tuple[str, str, str]]:
        """See QuestionSource."""
        return [(*i.args[:2], f"tasks=[{self.name}], document {i.doc_id}") for i in self.task.instances]

    def figures(self, log_likelihoods: np.ndarray, normalization: str) -> dict[str, float]:
        """See QuestionSource. Accuracy is the harness's acc, or acc_norm or acc_bytes where the task has it."""
        by_document: dict[int, list[Any]] = {}
        for instance, value in zip(self.task.instances, log_likelihoods.tolist(), strict=True):
            # Whether the choice is the greedy one enters none of the metrics read here.
            instance.resps, instance.filtered_resps = [(value, False)], {}
            by_document.setdefault(instance.doc_id, []).append(instance)
        self.task.apply_filters()
        values: dict[str, list[Any]] = {}
        margins: list[float | None] = []
        for number, document in self.documents.items():
            instances = sorted(by_document[number], key=lambda instance: instance.idx)
            answers = [next(iter(instance.filtered_resps.values())) for instance in instances]
            for metric, value in self.task.process_results(document, answers).items():
                values.setdefault(metric, []).append(value)
            margins.append(self._margin(document, np.array([answer[0] for answer in answers]), normalization))
        metric = _METRICS[normalization] if _METRICS[normalization] in values else "acc"
        found = {"questions": len(self.documents), "accuracy": float(self.task.aggregation()[metric](values[metric]))}
        known = [m for m in margins if m is not None]
        return {**found, "margin": sum(known) / len(known)} if len(known) == len(margins) else found

    def _margin(self, document: Any, log_likelihoods: np.ndarray, normalization: str) -> float | None:
        """None where a document has several right answers or the harness finds none."""
        choices = self.task.doc_to_choice(document)
        gold = self.task.doc_to_text(document) if self.task.multiple_input else self.task.doc_to_target(document)
        if isinstance(gold, str):
            gold = choices.index(gold) if gold in choices else None
        if not isinstance(gold, int) or not 0 <= gold < len(choices) or len(choices) < 2:
            return None
        # Tasks that correct by the choices' own probability ask for these after the others.
        return margin(log_likelihoods[: len(choices)] / lengths(choices, normalization), gold)


@dataclass(frozen=True)
class Loaded:
    """Tasks of the harness by name, with their numbers of examples set, and the groups they came by."""

    tasks: dict[str, Any]
    groups: dict[str, Any]

    @property
    def part_of(self) -> dict[str, str]:
        """By task or group the group it enters the figure of, where there is one."""
        whole = {name: group for name, group in self.groups.items() if group.has_aggregation}
        return {
            part: name
            for name, group in whole.items()
            for part in (*(t.task_name for t in group.get_all_tasks()), *(g.name for g in group.get_all_groups()))
        }


def wanted_tasks(tasks: Any) -> dict[str, int | None]:
    """Examples by name for what `tasks=` says: a name, a list of them, or a mapping. Raises UserError."""
    names = [tasks] if isinstance(tasks, str) else tasks or []
    given = dict.fromkeys(names) if isinstance(names, list) and all(isinstance(n, str) for n in names) else names
    fine = isinstance(given, dict) and all(
        isinstance(name, str) and (shots is None or (type(shots) is int and shots >= 0))
        for name, shots in given.items()
    )
    if not fine:
        raise UserError(
            f"tasks={tasks} must be a list of names, or {{name: examples, …}}, as {{winogrande: 5, gsm8k: 5}}"
        )
    return given


def load(
    wanted: Mapping[str, int | None],
    *,
    fewshot: int | None,
    seed: int,
    unsafe: bool = False,
    limit: int | None = None,
) -> Loaded:
    """Tasks by name (a group gives all of its tasks) or by the path of a task file. Raises UserError.

    Args:
        wanted: names of lm-evaluation-harness, or paths of .yaml task files, with the examples before each question.
        fewshot: examples where `wanted` has None; None for the task's own number.
        seed: draws the examples, and whatever else a task draws.
        unsafe: tasks that run what the model writes, or functions of their own, are meant.
        limit: how many questions of each are going to be asked at most; said of those that have fewer.
    """
    found = Loaded({}, {})
    for _, loaded in _each(list(wanted.items()), fewshot, seed, unsafe):
        found.tasks.update(loaded["tasks"])
        found.groups.update(loaded["groups"])
    _say_fewer(found.tasks, limit)
    return found


def load_tasks(names: Sequence[str], *, fewshot: int | None, limit: int | None, seed: int) -> list[HarnessTask]:
    """Multiple-choice tasks as sources of questions, at most `limit` of each; otherwise as `load`. Raises UserError."""
    tasks: list[HarnessTask] = []
    for name, loaded in _each([(name, None) for name in names], fewshot, seed, False):
        for task in loaded["tasks"].values():
            if task.OUTPUT_TYPE != "multiple_choice" or "acc" not in task.aggregation():
                raise UserError(f"tasks=[{name}]: {task.task_name} is not multiple choice judged by acc: leave it out")
            tasks.append(_build(task, name, limit))
    _say_fewer({task.name: task.task for task in tasks}, limit)
    return tasks


def _say_fewer(tasks: Mapping[str, Any], limit: int | None) -> None:
    """Name the tasks that have fewer questions than they are limited to, in one line."""
    counts = {name: len(task.eval_docs) for name, task in tasks.items()} if limit else {}
    fewer = [f"{name} has {count} questions" for name, count in counts.items() if count < (limit or 0)]
    if fewer:
        more = f" and {len(fewer) - _NAMED} more have fewer" if len(fewer) > _NAMED else ""
        log.info("limit=%d, and %s%s: all of them are taken", limit, ", ".join(fewer[:_NAMED]), more)


def _each(
    wanted: Sequence[tuple[str, int | None]], fewshot: int | None, seed: int, unsafe: bool
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each name with what the harness has of it, ready to be asked; see `load`."""
    from lm_eval.tasks import TaskManager

    sandbox_templates()
    random.seed(seed)
    np.random.seed(seed)
    # Reading the index of its 14,000 tasks takes seconds.
    manager = TaskManager(include_path=OWN, include_defaults=not all(Path(name).is_file() for name, _ in wanted))
    for name, shots in wanted:
        loaded = _load(manager, name, unsafe)
        for task in loaded["tasks"].values():
            if getattr(task, "UNSAFE_CODE", False):
                _check_unsafe(name, unsafe)
            _set_examples(task, fewshot if shots is None else shots)
            task.set_fewshot_seed(seed=seed)
        yield name, loaded


def _set_examples(task: Any, shots: int | None) -> None:
    """As the harness's own command does: a task that says 0 means it."""
    own = task.get_config("num_fewshot")
    if own == 0 and shots:
        log.warning("%s says that it has no examples: %d are not taken", task.task_name, shots)
    task.set_config(key="num_fewshot", value=(own or 0) if shots is None or own == 0 else shots)


def _load(manager: Any, name: str, unsafe: bool) -> dict[str, Any]:
    from lm_eval.tasks._yaml_loader import load_yaml

    if not Path(name).is_file() and name not in manager.all_tasks:
        near = difflib.get_close_matches(name, manager.all_tasks, n=1)
        hint = f"did you mean {near[0]}?" if near else "give a name of lm-evaluation-harness, or a task file"
        raise UserError(f"tasks=[{name}] is no task of lm-evaluation-harness: {hint}")
    try:
        entry = manager.task_index.get(name)
        said = entry.cfg if entry else load_yaml(Path(name), resolve_func=False)
        if (said or {}).get("unsafe_code"):
            # Loading such a task runs code already, to see whether it may.
            _check_unsafe(name, unsafe)
        with offline(), functions_of(OWN, unsafe):
            return manager.load([name])
    except UserError:
        raise
    except Exception as error:  # tasks are programs of their own, with as many ways to fail
        raise UserError(
            f"tasks=[{name}]: the task or its data cannot be loaded here ({in_one_line(error, 160)}): put the "
            "dataset into the Hugging Face cache of this machine (docs/evaluation.md), or leave the task out"
        ) from None


def _check_unsafe(name: str, unsafe: bool) -> None:
    if not unsafe:
        raise UserError(
            f"tasks=[{name}] runs code that the model writes: set confirm_run_unsafe_code=true where that may happen, or "
            "leave it out"
        )
    os.environ["HF_ALLOW_CODE_EVAL"] = "1"


def _build(task: Any, name: str, limit: int | None) -> HarnessTask:
    try:
        return HarnessTask(task, limit)
    except Exception as error:  # see _load
        raise UserError(
            f"tasks=[{name}]: its questions cannot be made ({in_one_line(error, 160)}): mend the task or its "
            "data, or lower fewshot="
        ) from None


@contextlib.contextmanager
def offline() -> Iterator[None]:
    """Without it a missing dataset is looked for on the hub, with retries, by a job that holds its processes meanwhile."""
    import datasets
    import evaluate
    import huggingface_hub.constants as hub

    switches = [(datasets.config, "HF_HUB_OFFLINE"), (hub, "HF_HUB_OFFLINE"), (evaluate.config, "HF_EVALUATE_OFFLINE")]
    before = [getattr(*switch) for switch in switches]
    for switch in switches:
        setattr(*switch, True)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        for switch, value in zip(switches, before, strict=True):
            setattr(*switch, value)
