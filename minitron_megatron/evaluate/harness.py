"""Multiple-choice tasks of lm-evaluation-harness: its requests out, log-likelihoods back into its own metrics.

Only data that lies on this machine is used (the Hugging Face cache, or files that a task names). The harness is imported
where a task is asked for, not before.
"""

import contextlib
import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from minitron_megatron.data.questions import lengths, margin
from minitron_megatron.errors import UserError

_METRICS = {"none": "acc", "characters": "acc_norm", "bytes": "acc_bytes"}


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


def load_tasks(names: Sequence[str], *, fewshot: int | None, limit: int | None, seed: int) -> list[HarnessTask]:
    """Tasks by name (a group gives all of its tasks) or by the path of a task file. Raises UserError.

    Args:
        names: names of lm-evaluation-harness, or paths of .yaml task files.
        fewshot: examples before each question; None for the task's own number.
        limit: at most so many questions of each task.
        seed: draws the examples.
    """
    from lm_eval.tasks import TaskManager

    # Reading the index of its 14,000 tasks takes seconds.
    manager = TaskManager(include_defaults=not all(Path(name).is_file() for name in names))
    tasks = []
    for name in names:
        for task in _load(manager, name):
            if task.OUTPUT_TYPE != "multiple_choice" or "acc" not in task.aggregation():
                raise UserError(f"tasks=[{name}]: {task.task_name} is not multiple choice judged by acc: leave it out")
            # As the harness's own command does: a task that says 0 means it.
            own = task.get_config("num_fewshot")
            task.set_config(key="num_fewshot", value=(own or 0) if fewshot is None or own == 0 else fewshot)
            task.set_fewshot_seed(seed=seed)
            tasks.append(_build(task, name, limit))
    return tasks


def _load(manager: Any, name: str) -> list[Any]:
    if not Path(name).is_file() and name not in manager.all_tasks:
        near = difflib.get_close_matches(name, manager.all_tasks, n=1)
        hint = f"did you mean {near[0]}?" if near else "give a name of lm-evaluation-harness, or a task file"
        raise UserError(f"tasks=[{name}] is no task of lm-evaluation-harness: {hint}")
    try:
        with _offline():
            return list(manager.load([name])["tasks"].values())
    except Exception as error:  # tasks are programs of their own, with as many ways to fail
        raise UserError(
            f"tasks=[{name}]: the task or its data cannot be loaded here ({' '.join(str(error).split())[:160]}): put the "
            "dataset into the Hugging Face cache of this machine, or give questions="
        ) from None


def _build(task: Any, name: str, limit: int | None) -> HarnessTask:
    try:
        return HarnessTask(task, limit)
    except Exception as error:  # see _load
        raise UserError(
            f"tasks=[{name}]: its questions cannot be made ({' '.join(str(error).split())[:160]}): mend the task or its "
            "data, or lower fewshot="
        ) from None


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    """Without it a missing dataset is looked for on the hub, with retries, by a job that holds its processes meanwhile."""
    import datasets
    import huggingface_hub.constants as hub

    before = datasets.config.HF_HUB_OFFLINE, hub.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = hub.HF_HUB_OFFLINE = True
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE, hub.HF_HUB_OFFLINE = before
