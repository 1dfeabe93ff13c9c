"""Beside lm-evaluation-harness: figures of its tasks, how it is asked, what is refused, and what is shown. Without a model."""

import contextlib
import json
import math
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from minitron_megatron.config import EvaluateConfig, EvaluateDataConfig, ModelConfig, ParallelConfig
from minitron_megatron.errors import UserError
from minitron_megatron.evaluate import checks, evaluate, harness, hf, run_tasks, task_files
from minitron_megatron.evaluate.answers import Rule, finite, not_finite
from minitron_megatron.evaluate.checks import check_folder
from minitron_megatron.evaluate.harness import HarnessTask, Loaded, load_tasks, offline
from minitron_megatron.evaluate.hf_tasks import _check_logits
from minitron_megatron.evaluate.perplexity import loss_figures


def config(**options) -> EvaluateConfig:
    return EvaluateConfig(**{"output": "out", "model": ModelConfig(path="model"), **options})


# Figures of a multiple-choice task


def question(*choices: str, gold, end=None) -> dict:
    return {"choices": list(choices), "gold": gold, "end": end}


class Task:
    """A task of the harness: requests in any order, values of the likeliest choice and of the likeliest a letter."""

    task_name, multiple_input = "t", False

    def __init__(self, documents: dict[int, dict], metrics=("acc", "acc_norm"), order: int = 1) -> None:
        pairs = [(n, i) for n, document in documents.items() for i in range(len(document["choices"]))][::order]
        self.documents, self.metrics = documents, metrics
        self.instances = [SimpleNamespace(doc_id=n, idx=i, args=("c", documents[n]["choices"][i])) for n, i in pairs]

    def build_all_requests(self, limit):
        self.limits = [limit]

    def doc_iterator(self, limit):
        self.limits.append(limit)
        return iter(self.documents.items())

    def apply_filters(self):
        for instance in self.instances:
            instance.filtered_resps["none"] = instance.resps[0]

    def process_results(self, document, answers):
        scores = np.array([score for score, _ in answers])
        letters = scores / [len(choice) for choice in document["choices"]]
        found = {"acc": scores, "acc_norm": letters}
        return {name: float(found[name].argmax() == document["gold"]) for name in self.metrics}

    def aggregation(self):
        return dict.fromkeys(self.metrics, lambda values: sum(values) / len(values))

    def doc_to_choice(self, document):
        return document["choices"]

    def doc_to_target(self, document):
        return document["end"] if self.multiple_input else document["gold"]

    def doc_to_text(self, document):
        return document["gold"] if self.multiple_input else ""


DOCUMENTS = {3: question("aa", "bbbb", gold=1), 5: question("a", "b", "c", gold=2)}
# By document and choice: the second is the likelier a letter, not as a whole.
SCORES = {(3, 0): -3.0, (3, 1): -4.0, (5, 0): -1.0, (5, 1): -9.0, (5, 2): -2.5}


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize(("normalization", "metrics", "accuracy", "margin"), [
    ("none", ("acc", "acc_norm"), 0.0, (-1.0 - 1.5) / 2),
    ("characters", ("acc", "acc_norm"), 0.5, (0.5 - 1.5) / 2),
    ("characters", ("acc",), 0.0, (0.5 - 1.5) / 2),
    ("bytes", ("acc", "acc_norm"), 0.0, (0.5 - 1.5) / 2),
])  # fmt: skip
def test_figures_of_a_task_are_by_document_and_by_choice(order, normalization, metrics, accuracy, margin):
    """In whatever order its requests stand; accuracy is acc where the task has none of the kind that is asked for."""
    source = HarnessTask(Task(DOCUMENTS, metrics, order), 7)
    assert source.name == "t" and source.task.limits == [7, 7]
    values = np.array([SCORES[i.doc_id, i.idx] for i in source.task.instances])
    found = source.figures(values, normalization)
    assert found == {"questions": 2, "accuracy": accuracy, "margin": pytest.approx(margin)}
    first = source.task.instances[0]
    assert source.texts()[0] == ("c", first.args[1], f"tasks=[t], document {first.doc_id}")


@pytest.mark.parametrize(("document", "text", "margin"), [
    (question("a", "b", gold=0), False, 1.0),
    (question("a", "b", gold=1), False, -1.0),
    (question("a", "b", gold="b"), False, -1.0),
    (question("a", "b", gold="c"), False, None),
    (question("a", "b", gold=[0, 1]), False, None),
    (question("a", "b", gold=2), False, None),
    (question("a", "b", gold=-1), False, None),
    (question("a", gold=0), False, None),
    (question("a", "b", gold=1, end=" is it"), True, -1.0),
])  # fmt: skip
def test_a_margin_is_over_the_best_other_choice_where_one_is_right(document, text, margin):
    """Log-likelihoods behind those of the choices are of the choices alone."""
    task = Task({0: document})
    task.multiple_input = text
    found = HarnessTask(task, None)._margin(document, np.array([-1.0, -2.0, 50.0]), "none")
    assert found == margin


def test_a_margin_is_of_all_questions_or_of_none():
    documents = {**DOCUMENTS, 7: question("a", "b", gold="neither")}
    source = HarnessTask(Task(documents), None)
    found = source.figures(np.zeros(len(source.task.instances)), "none")
    assert found.keys() == {"questions", "accuracy"} and found["questions"] == 3


# How it is asked


def loading(monkeypatch, tasks: dict) -> list[dict]:
    """Have the harness know these tasks; gives the options that its index is read with."""
    read = []
    monkeypatch.setattr("lm_eval.tasks.TaskManager", lambda **how: read.append(how))
    monkeypatch.setattr(harness, "_load", lambda manager, name, unsafe: {"tasks": {name: tasks[name]}, "groups": {}})
    return read


def plain_task(name: str, drawn: list, **more) -> SimpleNamespace:
    return SimpleNamespace(
        task_name=name,
        get_config={"num_fewshot": None}.get,
        set_config=lambda key, value: drawn.append((name, value)),
        set_fewshot_seed=lambda seed: drawn.append((name, seed, random.random(), np.random.random())),
        **more,
    )


def test_tasks_draw_by_the_seed_and_only_names_need_the_index(monkeypatch, tmp_path):
    file = tmp_path / "own.yaml"
    file.touch()
    drawn = []
    tasks = {name: plain_task(name, drawn) for name in (str(file), "named")}
    read = loading(monkeypatch, tasks)
    for seed in (5, 5, 6):
        assert list(harness.load({str(file): None}, fewshot=3, seed=seed).tasks) == [str(file)]
    first, second, other = ([drawn[i], drawn[i + 1]] for i in (0, 2, 4))
    assert first == second and first[0] == (str(file), 3) and first[1][1] == 5
    assert other[1][2] != first[1][2] and other[1][3] != first[1][3]
    harness.load({str(file): 1, "named": 2}, fewshot=3, seed=5)
    assert [how["include_defaults"] for how in read] == [False, False, False, True]
    assert {how["include_path"] for how in read} == {harness.OWN}
    assert [one for one in drawn[6:] if len(one) == 2] == [(str(file), 1), ("named", 2)]


@pytest.mark.parametrize(("kind", "metrics", "taken"), [
    ("multiple_choice", ("acc", "acc_norm"), True),
    ("multiple_choice", ("f1",), False),
    ("generate_until", ("acc",), False),
])  # fmt: skip
def test_layers_are_judged_by_tasks_of_choices_with_acc(monkeypatch, kind, metrics, taken):
    task = Task(DOCUMENTS, metrics)
    for name, value in vars(plain_task("t", [])).items():
        setattr(task, name, value)
    task.OUTPUT_TYPE, task.eval_docs = kind, range(4)
    loading(monkeypatch, {"n": task})
    if taken:
        (found,) = load_tasks(["n"], fewshot=None, limit=4, seed=1)
        assert found.task is task and task.limits == [4, 4]
        task.build_all_requests = lambda limit: 1 / 0
        with pytest.raises(UserError, match=r"tasks=\[n\]: its questions cannot be made \(division by zero\)"):
            load_tasks(["n"], fewshot=None, limit=4, seed=1)
    else:
        with pytest.raises(UserError, match=r"tasks=\[n\]: t is not multiple choice judged by acc"):
            load_tasks(["n"], fewshot=None, limit=4, seed=1)


@pytest.mark.parametrize("unsafe", [True, False])
def test_a_task_that_runs_code_is_refused_however_it_says_so(monkeypatch, unsafe):
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "0")
    loading(monkeypatch, {"n": plain_task("n", [], UNSAFE_CODE=True)})
    if unsafe:
        assert list(harness.load({"n": 0}, fewshot=None, seed=1, unsafe=True).tasks) == ["n"]
        return
    with pytest.raises(UserError, match="runs code that the model writes: set confirm_run_unsafe_code=true"):
        harness.load({"n": 0}, fewshot=None, seed=1)


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_looked_for_on_the_hub_meanwhile(monkeypatch, fails):
    """Afterwards as before, each switch as it was."""
    import datasets
    import evaluate as metrics
    import huggingface_hub.constants as hub

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(metrics.config, "HF_EVALUATE_OFFLINE", False)

    def switches():
        return [datasets.config.HF_HUB_OFFLINE, hub.HF_HUB_OFFLINE, metrics.config.HF_EVALUATE_OFFLINE]

    with pytest.raises(KeyError) if fails else contextlib.nullcontext(), offline():
        assert switches() == [True, True, True]
        if fails:
            raise KeyError
    assert switches() == [False, True, False]


def test_functions_of_trusted_task_files_alone_and_only_meanwhile(tmp_path, monkeypatch):
    from lm_eval.tasks import _yaml_loader

    monkeypatch.setattr(_yaml_loader, "_import_func_in_yml", lambda name, folder: f"{folder.name}.{name}")
    before, own = _yaml_loader._import_func_in_yml, tmp_path / "own"
    (own / "deeper").mkdir(parents=True)
    (tmp_path / "ownly").mkdir()
    with task_files.functions_of(own, unsafe=False):
        for folder in (own, own / "deeper"):
            assert _yaml_loader._import_func_in_yml("f", folder) == f"{folder.name}.f"
        for folder in (tmp_path, tmp_path / "ownly", own / ".."):
            with pytest.raises(UserError, match="names the function f, which is code of its own"):
                _yaml_loader._import_func_in_yml("f", folder)
    assert _yaml_loader._import_func_in_yml is before
    with pytest.raises(KeyError), task_files.functions_of(own, unsafe=True):
        assert _yaml_loader._import_func_in_yml("f", tmp_path / "ownly") == "ownly.f"
        raise KeyError
    assert _yaml_loader._import_func_in_yml is before


def test_the_harness_is_asked_as_the_options_say_and_groups_are_told(monkeypatch):
    asked = []
    said = {
        "results": {"a": {"acc,none": 0.5}, "b": {"acc,none": 1}, "g": {"acc,none": 0.75}},
        "n-shot": {"a": 0, "b": 2},
        "n-samples": {name: {"effective": 3} for name in "ab"},
        "group_subtasks": {"g": ["a"]},
    }
    monkeypatch.setattr("lm_eval.evaluator.evaluate", lambda *given, **how: asked.append((*given, how)) or said)
    group = SimpleNamespace(
        has_aggregation=True, get_all_tasks=lambda: [SimpleNamespace(task_name="a")], get_all_groups=list
    )
    loaded = Loaded({"a": 1, "b": 2}, {"g": group})
    found = run_tasks.run_tasks("model", loaded, config(limit=5, confirm_run_unsafe_code=True))
    how = {"limit": 5, "bootstrap_iters": 1000, "log_samples": False, "confirm_run_unsafe_code": True}
    assert asked == [("model", {"tasks": {"a": 1, "b": 2}, "groups": {"g": group}}, how)]
    assert found["tasks"] == {
        "a": {"acc": 0.5, "fewshot": 0, "questions": 3, "part_of": "g"},
        "b": {"acc": 1.0, "fewshot": 2, "questions": 3},
        "g": {"acc": 0.75, "questions": 3},
    }
    assert found["lm_eval"] and found.keys() == {"tasks", "lm_eval"}


@pytest.mark.parametrize("raised", [UserError("u"), RuntimeError("r"), MemoryError("m"), KeyError("k"), OSError("o")])
def test_what_a_task_cannot_do_is_named_and_what_a_device_cannot_is_its_own_error(monkeypatch, raised):
    def evaluate(*_, **__):
        raise raised

    monkeypatch.setattr("lm_eval.evaluator.evaluate", evaluate)
    ours = isinstance(raised, UserError | RuntimeError | MemoryError)
    with pytest.raises(type(raised) if ours else UserError) as found:
        run_tasks.run_tasks("model", Loaded({"a": 1}, {}), config())
    assert (found.value is raised) == ours
    if not ours:
        assert str(found.value).startswith(f"tasks=['a']: {type(raised).__name__} (")


# Answers


@pytest.mark.parametrize(("value", "taken"), [
    (-1.0, True), ((-1.0, True), True), (math.nan, False), ((math.nan, True), False), (-math.inf, False),
    ((math.inf, False), False),
])  # fmt: skip
def test_answers_are_finite(value, taken):
    requests = [SimpleNamespace(task_name="t", doc_id=n) for n in (4, 5)]
    values = [-2.0, value]
    if taken:
        assert finite(requests, values) is values
        return
    with pytest.raises(UserError, match=r"tasks=\[t\], document 5: the model's logits are not finite"):
        finite(requests, values)


def test_requests_without_an_answer_are_named_by_task_and_one_by_its_document():
    requests = [SimpleNamespace(task_name=name, doc_id=3) for name in "bab"]
    assert str(not_finite(requests)).startswith("tasks=[a, b]: the model's")
    assert str(not_finite(requests[:1])).startswith("tasks=[b], document 3: the model's")


@pytest.mark.parametrize(("logits", "taken"), [
    ([[0.0, -math.inf], [1.0, 2.0]], True), ([[0.0, 1.0], [-math.inf, -math.inf]], False), ([[0.0, math.inf]], False),
    ([[math.nan, 0.0]], False),
])  # fmt: skip
def test_a_row_of_logits_has_a_highest(logits, taken):
    logits = torch.tensor(logits)
    if taken:
        assert _check_logits(torch.zeros(1), logits) is logits
    else:
        with pytest.raises(FloatingPointError):
            _check_logits(torch.zeros(1), logits)


@pytest.mark.parametrize(("said", "line"), [
    ('{"eos_token_id": 3, "transformers_version": "5", "use_cache": true, "_own": 1, "top_k": null}', None),
    ('{"top_k": 7}', "top_k=7 is left out: text is generated greedily, or as a task says"),
    ('{"top_k": 7, "temperature": 0.0}', "top_k=7, temperature=0.0 are left out"),
])  # fmt: skip
def test_what_is_left_out_of_a_folders_way_to_generate_is_said_once(tmp_path, caplog, said, line):
    caplog.set_level("INFO", "minitron_megatron")
    (tmp_path / "generation_config.json").write_text(said)
    # Of config.json nothing is said: there it means nothing else than an end.
    (tmp_path / "config.json").write_text('{"num_layers": 3, "eos_token_id": 9}')
    rule = Rule(tmp_path, 5)
    assert rule.stops == ([3, 5] if "eos" in said else [5, 9])
    rule.say()
    rule.say()
    assert [line in one for one in caplog.messages] == [True] * bool(line)


@pytest.mark.parametrize(("precision", "stored", "dtype"), [
    ("bf16", {"dtype": "float32"}, "bfloat16"),
    ("fp32", {"dtype": "bfloat16"}, "float32"),
    ("auto", {"dtype": "float32"}, "float32"),
    ("auto", {"torch_dtype": "float32"}, "float32"),
    ("auto", {"dtype": "float32", "torch_dtype": "bfloat16"}, "float32"),
    ("auto", {}, "auto"),
])  # fmt: skip
def test_a_folder_of_transformers_is_computed_in_what_was_asked_for_or_in_its_own(tmp_path, precision, stored, dtype):
    (tmp_path / "config.json").write_text(json.dumps(stored))
    assert hf._dtype(tmp_path, precision) == dtype


def test_a_loss_beyond_any_number_has_a_perplexity():
    assert loss_figures(8000.0, 10, "m") == {"loss": 800.0, "perplexity": math.exp(700)}
    assert loss_figures(6990.0, 10, "m")["perplexity"] == math.exp(699)


# What is checked and shown


@pytest.mark.parametrize(("config_file", "weights", "says"), [
    ('{"vocab_size": 9, "max_position_embeddings": 1}', True, None),
    (None, True, "has no config.json with .safetensors weights"),
    ('{"vocab_size": 9, "max_position_embeddings": 1}', False, "has no config.json with .safetensors weights"),
    ('{"vocab_size": 0, "max_position_embeddings": 1}', True, "vocab_size must be a whole number above 0, not 0"),
    ('{"vocab_size": true, "max_position_embeddings": 1}', True, "vocab_size must be a whole number above 0, not True"),
    ('{"vocab_size": 9}', True, "max_position_embeddings must be a whole number above 0, not None"),
    ('{"vocab_size": 9, "max_position_embeddings": 1, "auto_map": {}}', True, "brings code of its own (auto_map in config.json)"),
])  # fmt: skip
def test_a_folder_of_transformers_has_weights_and_sizes(tmp_path, monkeypatch, config_file, weights, says):
    looked = []
    monkeypatch.setattr(checks, "check_tokenizer", looked.append)
    if config_file:
        (tmp_path / "config.json").write_text(config_file)
    if weights:
        (tmp_path / "model.safetensors").touch()
    if says:
        with pytest.raises(UserError) as refused:
            check_folder(tmp_path, tokenizer=False)
        assert says in str(refused.value)
        return
    for tokenizer in (False, True):
        found = check_folder(tmp_path, tokenizer=tokenizer)
        assert (found.vocab_size, found.max_position_embeddings) == (9, 1) and looked == [tmp_path] * tokenizer


@pytest.mark.parametrize("ours", [True, False])
def test_what_is_judged_is_compared_with_the_output_that_is_there(monkeypatch, ours):
    """Before anything runs: a folder's digest with the data's; of a Hugging Face folder, whose digest takes long, the data's."""
    asked, data = [], SimpleNamespace(digest="of d")
    folder = SimpleNamespace(path="m", shape="s", digest="of m")
    for name, found in (
        ("open_model_folder", folder), ("check_folder", "sizes"), ("_open_data", (data, 3)), ("_windows", (data, 3)),
        ("check_layout", None), ("check_weights", None), ("check_same_tokenizer", None), ("check_command_output", None),
    ):  # fmt: skip
        monkeypatch.setattr(
            checks, name, lambda *given, name=name, found=found, **_: asked.append((name, given)) or found
        )
    given = {} if ours else {"model": ModelConfig(), "hf": "h"}
    cfg = config(data=EvaluateDataConfig(path="d"), **given)
    found = checks.check_evaluate(cfg)
    inputs = {"model": "of m", "data": "of d"} if ours else {"data": "of d"}
    tokenizers = {"model": "m", "teacher": None} if ours else {"hf": "h"}
    assert asked[-2:] == [("check_same_tokenizer", (data, tokenizers)), ("check_command_output", (cfg, inputs))]
    assert (found.count, found.inputs) == (3, inputs) and (str(found.hf) == "h") == (not ours)
    assert ("check_weights", (folder,)) in asked or not ours


@pytest.mark.parametrize(("kinds", "context", "taken"), [
    (["multiple_choice", "loglikelihood"], 2, True),
    (["multiple_choice", "generate_until"], 1, True),
    (["multiple_choice", "generate_until"], 2, False),
])  # fmt: skip
def test_text_is_not_generated_with_context_parallelism(monkeypatch, kinds, context, taken):
    loaded = Loaded({str(n): SimpleNamespace(OUTPUT_TYPE=kind) for n, kind in enumerate(kinds)}, {})
    asked = []
    monkeypatch.setattr(harness, "load", lambda wanted, **how: asked.append((wanted, how)) or loaded)
    cfg = config(
        tasks=["0", "1"], fewshot=4, seed=8, confirm_run_unsafe_code=True, parallel=ParallelConfig(context=context)
    )
    if taken:
        assert evaluate._load(cfg) is loaded
    else:
        with pytest.raises(UserError, match=r"tasks=\[1\] generates text, which parallel\.context=2 cannot"):
            evaluate._load(cfg)
    assert asked == [({"0": None, "1": None}, {"fewshot": 4, "seed": 8, "unsafe": True, "limit": None})]


@pytest.mark.parametrize(("limit", "questions"), [(None, 12), (4, 8), (5, 10), (6, 11), (7, 12)])
@pytest.mark.parametrize("speaks", [True, False])
def test_a_dry_run_counts_the_questions_that_will_be_asked(monkeypatch, limit, questions, speaks):
    shown = []
    tasks = {"a": SimpleNamespace(eval_docs=range(5)), "b": SimpleNamespace(eval_docs=range(7))}
    monkeypatch.setattr(evaluate, "print_table", lambda *table: shown.append(table))
    monkeypatch.setattr(evaluate, "_load", lambda _: Loaded(tasks, {}))
    monkeypatch.setattr(evaluate, "speaks", lambda: speaks)
    evaluate._dry_run(config(tasks=["x"], limit=limit), {"model": "m", "windows": 3})
    ((_, _, rows),) = shown
    of_tasks = [["tasks", "a, b"], ["questions", questions]] if speaks else []
    assert rows == [["model", "m"], ["windows", 3], *of_tasks]
    shown.clear()
    evaluate._dry_run(config(data=EvaluateDataConfig(path="d")), {"model": "m"})
    assert shown[0][2] == [["model", "m"]]


def test_what_is_shown_is_each_figure_and_each_task_that_stands_alone(monkeypatch):
    shown = []
    monkeypatch.setattr(evaluate, "print_table", lambda *table: shown.append(table))
    plain = {"loss": 2.0, "perplexity": 7.4, "tokens": 9, "seconds": 1.5}
    evaluate._show("t", {**plain, "tasks": {}})
    assert shown == [("t", ["", "value"], [[name, value] for name, value in plain.items()])]
    shown.clear()
    tasks = {
        "a": {"acc": 0.5, "acc_stderr": 0.1, "acc_norm": 0.25, "fewshot": 3, "questions": 8},
        "b": {"acc": 0.1, "fewshot": 0, "questions": 2, "part_of": "g"},
        "g": {"acc": 0.75, "questions": 9},
    }
    evaluate._show(
        "t", {**plain, "kl": 0.3, "teacher_loss": 1.0, "teacher_perplexity": 2.7, "tasks": tasks, "lm_eval": "0.4"}
    )
    figures, of_tasks = shown
    rows = [["loss", 2.0, 1.0], ["perplexity", 7.4, 2.7], ["tokens", 9, ""], ["seconds", 1.5, ""], ["kl", 0.3, ""]]
    assert figures[1:] == (["", "model", "teacher"], [*rows, ["lm_eval", "0.4", ""]])
    assert of_tasks == (
        "tasks",
        ["task", "examples", "questions", "metric", "value", "±"],
        [["a", 3, 8, "acc", 0.5, 0.1], ["a", 3, 8, "acc_norm", 0.25, ""], ["g", "", 9, "acc", 0.75, ""]],
    )
