"""launch/evaluate.py: the same figures in every layout, and the same answers as lm-evaluation-harness's own backend."""

import json
import math
import os
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from minitron_megatron.checkpoints.folder import open_model_folder, read_manifest
from minitron_megatron.checkpoints.hf import export_hf, import_hf
from minitron_megatron.config import (
    BatchConfig,
    EvaluateConfig,
    EvaluateDataConfig,
    ExportHfConfig,
    ImportHfConfig,
    LayersConfig,
    ModelConfig,
)
from minitron_megatron.console import format_value
from minitron_megatron.data.datasets import Windows
from minitron_megatron.data.folder import open_data
from minitron_megatron.data.questions import QuestionFile
from minitron_megatron.data.tokenizer import load_tokenizer
from minitron_megatron.errors import UserError
from minitron_megatron.evaluate.answers import Rule
from minitron_megatron.evaluate.checks import check_evaluate
from minitron_megatron.evaluate.evaluate import evaluate
from minitron_megatron.evaluate.harness import Loaded, _set_examples, load, load_tasks, wanted_tasks
from minitron_megatron.evaluate.hf import digest_of, hf_perplexity, load_model
from minitron_megatron.evaluate.hf_tasks import TransformersLM
from minitron_megatron.evaluate.perplexity import loss_figures
from minitron_megatron.importance.layer_checks import check_layers
from tests.pool import WorkerError
from tests.test_commands import error_of, run
from tests.test_layers import TASK, WORDS, question
from tests.test_models import names
from tests.tiny import data_folder, hf_model, imported, model_option, save_hf

WRITE = """task: write
dataset_path: json
dataset_kwargs: {{data_files: {{train: {file}, validation: {file}}}}}
output_type: generate_until
training_split: train
validation_split: validation
doc_to_text: "{{{{text}}}}"
doc_to_target: "{{{{target}}}}"
metric_list: [{{metric: exact_match, aggregation: mean}}]
generation_kwargs: {{until: [{stop}], max_gen_toks: 12, do_sample: false}}
"""
READ = """task: read
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {file}}}}}
output_type: loglikelihood_rolling
validation_split: validation
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: word_perplexity}}]
"""
NEXT = TASK.replace("multiple_choice", "loglikelihood").replace(
    "{{metric: acc}}, {{metric: acc_norm}}", "{{metric: perplexity}}, {{metric: acc}}"
)
NEXT += "num_fewshot: 0\n"
LAYOUTS = [
    (2, {"tensor": 2, "sequence": True}),
    (2, {"pipeline": 2}),
    pytest.param(2, {}, marks=pytest.mark.slow),
]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(student and teacher of transformers, their folders, data): the teacher is another model of other sizes."""
    folder = tmp_path_factory.mktemp("evaluate")
    student, teacher = hf_model(1), hf_model(2, hidden_size=48, num_hidden_layers=5)
    paths = imported(student, folder / "student"), imported(teacher, folder / "teacher")
    return (student, teacher), paths, data_folder(folder / "data", paths[0])


@pytest.fixture(scope="module")
def tasks(made, tmp_path_factory):
    """Task files: choices of words, of single tokens, what follows, generated text (some right), perplexity of whole texts."""
    (student, _), (path, _), _ = made
    folder = tmp_path_factory.mktemp("tasks")
    tokenizer = load_tokenizer(path)
    questions = [question(i) for i in range(1, 9)]
    texts = [" ".join(WORDS[: 4 + 3 * i]) for i in range(5)]
    answers = []
    for text in texts:
        ids = torch.tensor([tokenizer.encode(text)])
        out = student.generate(ids, do_sample=False, max_new_tokens=12, pad_token_id=1)[0, ids.shape[1] :]
        answers.append(tokenizer.decode(out, skip_special_tokens=True))
    # A stop that is in an answer, over tokens' borders.
    stop = next(
        a[i : i + 2] for a in answers for i in range(3, len(a) - 1) if a[i : i + 2].isascii() and a[i : i + 2].isalnum()
    )
    written = [
        {"text": t, "target": a.split(stop)[0] if i % 2 else "no"}
        for i, (t, a) in enumerate(zip(texts, answers, strict=True))
    ]
    letters = [{**q, "choices": ["a", "b", "c", "d"], "answer": i % 4} for i, q in enumerate(questions)]
    long = [{"text": " ".join(WORDS * n)} for n in (1, 8)]
    # What is most probable comes out as such, and what is not does not.
    following = [{"context": t, "choices": [], "answer": a[:2]} for t, a in zip(texts, answers, strict=True)]
    following += [{"context": q["context"], "choices": [], "answer": q["choices"][0]} for q in questions]
    documents = {"words": questions, "letters": letters, "write": written, "read": long, "next": following}
    templates = {"words": TASK, "letters": TASK, "write": WRITE, "read": READ, "next": NEXT}
    files = {}
    for name, lines in documents.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        file = folder / f"{name}.yaml"
        file.write_text(templates[name].format(name=name, file=folder / f"{name}.jsonl", stop=json.dumps(stop)))
        files[name] = str(file)
    return files


def config(path, output, data=None, **options) -> EvaluateConfig:
    options = {"trainer": BatchConfig(micro_batch_size=2), **options}
    given = EvaluateDataConfig(path=None if data is None else str(data), sequence_length=32)
    return EvaluateConfig(output=str(output), model=model_option(path), data=given, **options)


def results(folder) -> dict:
    return json.loads((folder / "results.json").read_text())


def run_in(gloo, ranks, layout, cfg) -> dict:
    for name, value in layout.items():
        setattr(cfg.parallel, name, value)
    gloo(ranks, evaluate, cfg)
    return results(Path(cfg.output))


@pytest.fixture(scope="module")
def wanted(made):
    """Loss, KL and agreement out of transformers' whole logits, in float64."""
    (student, teacher), (path, _), data = made
    windows = Windows(open_data(str(data), "validation", open_model_folder(path).shape, 32), "validation", 32)
    samples = [windows[i] for i in range(len(windows))]
    tokens, labels, mask = (torch.stack([s[n] for s in samples]) for n in ("tokens", "labels", "loss_mask"))
    with torch.no_grad():
        q, p = (m(tokens).logits.double().log_softmax(-1) for m in (student, teacher))
    count = mask.sum()
    loss, of_teacher = (float(-(of.gather(-1, labels[..., None])[..., 0] * mask).sum() / count) for of in (q, p))
    return {
        "loss": loss,
        "teacher_loss": of_teacher,
        "teacher_perplexity": float(np.exp(of_teacher)),
        "kl": float(((p.exp() * (p - q)).sum(-1) * mask).sum() / count),
        "agreement": float(((p.argmax(-1) == q.argmax(-1)) * mask).sum() / count),
        "tokens": int(count),
    }


@pytest.mark.parametrize(
    ("ranks", "layout"),
    [*LAYOUTS, pytest.param(2, {"pipeline": 2, "virtual_pipeline": 2}, marks=pytest.mark.slow)],
    ids=names,
)
def test_loss_and_divergence_are_those_of_whole_logits_in_every_layout(gloo, made, wanted, tmp_path, ranks, layout):
    _, (path, teacher), data = made
    found = run_in(gloo, ranks, layout, config(path, tmp_path / "out", data, teacher=ModelConfig(path=str(teacher))))
    for name, value in wanted.items():
        assert found[name] == pytest.approx(value, rel=1e-5), name
    assert found["perplexity"] == pytest.approx(np.exp(wanted["loss"]), rel=1e-5) and found["kl"] > 0.01


@pytest.mark.parametrize("samples", [None, 3])
@pytest.mark.parametrize("micro_batch_size", [1, 4])
def test_an_exported_folder_has_the_loss_of_the_folder_it_is_of(gloo, made, tmp_path, samples, micro_batch_size):
    """The last window is padded and 4 does not divide the windows: the same windows and masks on both roads."""
    _, (path, _), data = made
    how = {"samples": samples, "trainer": BatchConfig(micro_batch_size=micro_batch_size)}
    ours = run_in(gloo, 1, {}, config(path, tmp_path / "ours", data, **how))
    export_hf(ExportHfConfig(model=model_option(path), output=str(tmp_path / "hf")))
    cfg = config(path, tmp_path / "theirs", data, hf=str(tmp_path / "hf"), **how)
    cfg.model = ModelConfig()
    evaluate(cfg)
    theirs = results(tmp_path / "theirs")
    assert theirs["loss"] == pytest.approx(ours["loss"], rel=1e-6) and theirs["tokens"] == ours["tokens"]
    assert theirs["perplexity"] == pytest.approx(ours["perplexity"], rel=1e-5)
    assert read_manifest(tmp_path / "theirs")["inputs"].keys() == {"hf", "data"}


CODE = "import pathlib\npathlib.Path({marker!r}).touch()\nfrom transformers import LlamaForCausalLM as Own\n"


def test_nothing_of_a_folder_of_transformers_runs_code(made, tmp_path, monkeypatch):
    """Neither by the model's own file, which its config names, nor by a pickle of weights."""
    (student, _), _, _ = made
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder, marker = save_hf(student, tmp_path / "hf"), tmp_path / "it ran"
    values = json.loads((folder / "config.json").read_text())
    (folder / "own.py").write_text(CODE.format(marker=str(marker)))
    (folder / "config.json").write_text(
        json.dumps({**values, "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}})
    )
    cfg = config(folder, tmp_path / "out", hf=str(folder), device="cpu", precision="fp32")
    for opening in (load_model, TransformersLM):
        opening(folder, cfg)
        assert not marker.exists()
    torch.save(student.state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    for opening in (load_model, TransformersLM):
        with pytest.raises(UserError, match="cannot be loaded by transformers") as refused:
            opening(folder, cfg)
        assert "\n" not in str(refused.value)


def changed(student, folder: Path, change) -> Path:
    """A Hugging Face folder whose tensors were changed after it was written."""
    save_hf(student, folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("way", [
    (lambda t: t.pop("lm_head.weight"), "lm_head.weight is missing"),
    (lambda t: t.update(odd=torch.ones(1)), "odd is not of this model"),
    (lambda t: [t.pop("lm_head.weight"), t.pop("model.norm.weight")], "lm_head.weight and 1 more are missing"),
    (lambda t: t.update({"model.norm.weight": torch.ones(31)}), "cannot be loaded by transformers"),
], ids=["missing", "unexpected", "two", "shape"])  # fmt: skip
def test_weights_that_a_folder_lacks_are_not_made_up(made, tmp_path, way):
    """transformers draws them at random, with a warning. For perplexity and for tasks alike."""
    change, says = way
    folder = changed(made[0][0], tmp_path / "hf", change)
    cfg = config(folder, tmp_path / "out", hf=str(folder), device="cpu", precision="fp32")
    for opening in (load_model, TransformersLM):
        with pytest.raises(UserError, match=says) as refused:
            opening(folder, cfg)
        assert "\n" not in str(refused.value)


@pytest.fixture(scope="module")
def overflowing(made, tmp_path_factory):
    """(A Hugging Face folder, the same as ours): finite weights whose product is not."""
    folder = tmp_path_factory.mktemp("overflowing")

    def larger(tensors):
        for name in ("up_proj", "gate_proj"):
            tensors[f"model.layers.1.mlp.{name}.weight"] *= 1e30

    hf = changed(made[0][0], folder / "hf", larger)
    import_hf(ImportHfConfig(hf=str(hf), output=str(folder / "model")))
    return hf, folder / "model"


@pytest.mark.parametrize("task", ["words", "next", "read", "write"])
@pytest.mark.parametrize("ours", [True, False], ids=["model", "hf"])
def test_logits_that_are_not_finite_are_no_answers(gloo, tasks, overflowing, tmp_path, task, ours):
    """Of NaNs the first choice is the highest: what was asked is named."""
    hf, path = overflowing
    cfg = config(path, tmp_path / "out", tasks=[tasks[task]], fewshot=0, limit=2, device="cpu")
    if not ours:
        cfg.model, cfg.hf = ModelConfig(), str(hf)
    document = "" if task == "write" and not ours else ", document 0"
    with pytest.raises((UserError, WorkerError)) as error:
        gloo(1, evaluate, cfg) if ours else evaluate(cfg)
    assert f"tasks=[{task}]{document}: the model's logits are not finite" in str(error.value)
    assert not (tmp_path / "out").exists()


def test_both_generate_by_one_rule(gloo, made, tasks, tmp_path, caplog):
    """Every end of text that the configs name ends an answer; penalties and sampling are left out, which is said."""
    (student, _), _, _ = made
    folder, lines = save_hf(student, tmp_path / "hf"), Path(tasks["write"]).with_suffix(".jsonl")
    tokenizer = load_tokenizer(folder)
    rows, ends = [json.loads(line) for line in lines.read_text().splitlines()], {1}
    for row in rows:
        ids = torch.tensor([tokenizer.encode(row["text"])])
        out = student.generate(ids, do_sample=False, max_new_tokens=12, pad_token_id=1)[0, ids.shape[1] :].tolist()
        # An ordinary token in the middle of the first answer.
        ends |= {out[5]} if len(ends) == 1 else set()
        stop = next((i for i, token in enumerate(out) if token in ends), len(out)) + 1
        row["target"] = tokenizer.decode(out[:stop], skip_special_tokens=True)
    (tmp_path / "rule.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = tmp_path / "rule.yaml"
    task.write_text(WRITE.format(file=tmp_path / "rule.jsonl", stop='"§§"').replace("task: write", "task: rule"))
    own = {"eos_token_id": sorted(ends), "repetition_penalty": 1.9, "do_sample": True, "temperature": 0.6}
    (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": 0, **own}))
    import_hf(ImportHfConfig(hf=str(folder), output=str(tmp_path / "model")))
    for which in ("model", "hf"):
        cfg = config(tmp_path / "model", tmp_path / f"by_{which}", tasks=[str(task)], fewshot=0, device="cpu")
        if which == "hf":
            cfg.model, cfg.hf = ModelConfig(), str(folder)
            with caplog.at_level("INFO", logger="minitron_megatron.evaluate.answers"):
                evaluate(cfg)
        else:
            gloo(1, evaluate, cfg)
        assert results(tmp_path / f"by_{which}")["tasks"]["rule"]["exact_match"] == 1.0, which
    (said,) = (one.getMessage() for one in caplog.records if one.name.endswith("answers"))
    assert "repetition_penalty=1.9, do_sample=True, temperature=0.6 are left out" in said


def test_ends_of_text_are_those_of_the_configs_and_the_tokenizer(tmp_path):
    assert Rule(tmp_path, 3).stops == [3]
    (tmp_path / "config.json").write_text('{"eos_token_id": 7}')
    assert Rule(tmp_path, 3).stops == [3, 7]
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [3, 5]}')
    assert Rule(tmp_path, 3).stops == [3, 5]
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": ["</s>"]}')
    with pytest.raises(UserError, match="must be token ids"):
        Rule(tmp_path, 3)


def test_a_folder_is_another_with_another_name_or_byte_of_any_file(tmp_path):
    given = {"a": b"1", "b": b"2"}
    others = ({"a": b"2", "b": b"1"}, {"a": b"1", "c": b"2"}, {"a": b"1"}, {**given, "c": b""})
    found = []
    for number, files in enumerate((given, given, *others)):
        (tmp_path / str(number)).mkdir()
        for name, content in files.items():
            (tmp_path / str(number) / name).write_bytes(content)
        found.append(digest_of(tmp_path / str(number)))
    assert found[0] == found[1] and len(set(found)) == 1 + len(others)


def test_logits_in_bfloat16_are_judged_in_float32(made, tmp_path):
    """And of the tokens that count alone, each once."""
    (student, _), (path, _), data = made
    opened = open_data(str(data), "validation", open_model_folder(path).shape, 32)
    cfg = config(path, tmp_path / "out", data)

    class Rounded(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = student

        def forward(self, **given):
            return SimpleNamespace(logits=8 * self.inner(**given).logits.bfloat16())

    windows = Windows(opened, "validation", 32)
    assert windows[len(windows) - 1]["loss_mask"].min() == 0
    nll = tokens = 0.0
    with torch.no_grad():
        for sample in (windows[i] for i in range(len(windows))):
            of = Rounded()(input_ids=sample["tokens"][None]).logits[0].double().log_softmax(-1)
            nll -= float((of.gather(-1, sample["labels"][:, None])[:, 0] * sample["loss_mask"]).sum())
            tokens += float(sample["loss_mask"].sum())
    found = hf_perplexity(Rounded(), opened, cfg, len(windows))
    assert found["loss"] == pytest.approx(nll / tokens, rel=1e-5) and found["tokens"] == tokens


def test_a_table_has_the_teacher_beside_the_model(made, tmp_path, gloo, capfd):
    _, (path, teacher), data = made
    cfg = config(path, tmp_path / "out", data, teacher=ModelConfig(path=str(teacher)))
    evaluate(cfg)
    found, lines = results(tmp_path / "out"), capfd.readouterr().out.splitlines()
    row = next(line for line in lines if "│ perplexity" in line)
    assert [cell.strip() for cell in row.strip("│ ").split("│")] == [
        "perplexity",
        format_value(found["perplexity"]),
        format_value(found["teacher_perplexity"]),
    ]


@pytest.fixture(scope="module")
def by_transformers(made, tasks, tmp_path_factory):
    """What the harness's own backend says of the exported folder, through the same command."""
    _, (path, _), _ = made
    folder = tmp_path_factory.mktemp("by_transformers")
    export_hf(ExportHfConfig(model=model_option(path), output=str(folder / "hf")))
    cfg = config(path, folder / "out", tasks=list(tasks.values()), fewshot=1, hf=str(folder / "hf"))
    cfg.model = ModelConfig()
    evaluate(cfg)
    return results(folder / "out")


@pytest.mark.parametrize(
    ("ranks", "layout"),
    [pytest.param(1, {}, marks=pytest.mark.slow), *LAYOUTS],
    ids=names,
)
def test_tasks_say_what_the_harness_says_of_the_exported_folder(
    gloo, made, tasks, by_transformers, tmp_path, ranks, layout
):
    _, (path, _), data = made
    cfg = config(path, tmp_path / "out", data, tasks=list(tasks.values()), fewshot=1, prompts=2)
    found = run_in(gloo, ranks, layout, cfg)
    theirs = by_transformers["tasks"]
    assert found["tasks"].keys() == theirs.keys() == set(tasks)
    for name, figures in found["tasks"].items():
        # Whatever is no count of right answers comes out of log-likelihoods.
        assert figures == pytest.approx(theirs[name], rel=1e-5), name
        assert {key: figures[key] for key in figures if key.startswith(("acc", "exact"))} == {
            key: theirs[name][key] for key in theirs[name] if key.startswith(("acc", "exact"))
        }
    assert 0 < theirs["write"]["exact_match"] < 1 and 0 < theirs["next"]["acc"] < 1 and theirs["words"]["fewshot"] == 1
    assert found["lm_eval"] == by_transformers["lm_eval"] and found["loss"] > 0


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, "nothing to evaluate: give data.path="),
        ({"tasks": {"winogrande": -1}}, "must be a list of names, or {name: examples"),
        ({"tasks": [["winogrande"]]}, "must be a list of names"),
        ({"tasks": "winogrande", "teacher": ModelConfig(path="x")}, "teacher= is compared on data: give data.path="),
        ({"tasks": "winogrande", "hf": "x"}, "hf=x and model=y name two models: give one of them"),
        (
            {
                "hf": "x",
                "model": ModelConfig(),
                "teacher": ModelConfig(path="t"),
                "data": EvaluateDataConfig(path="d", sequence_length=32),
            },
            "hf=x has no teacher= beside it: evaluate model=t on the same data",
        ),
        (
            {"tasks": "winogrande", "hf": "x", "model": ModelConfig()},
            "hf=x has no config.json with .safetensors weights",
        ),
    ],
)
def test_options_that_do_not_go_together(tmp_path, options, says):
    cfg = EvaluateConfig(**{"output": str(tmp_path / "out"), "model": ModelConfig(path="y"), **options})
    with pytest.raises(UserError, match=says) as error:
        evaluate(cfg)
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_fewer_than_were_asked_for_is_said(made, tmp_path, caplog):
    """Windows of a split and questions of a file; not where there are as many, nor where all are wanted."""
    caplog.set_level("INFO", "minitron_megatron")
    _, (path, _), folder = made
    data, out = EvaluateDataConfig(path=str(folder), sequence_length=32), str(tmp_path / "out")
    there = check_evaluate(EvaluateConfig(model=model_option(path), data=data, output=out)).count
    for asked, count in ((None, there), (there, there), (there - 1, there - 1)):
        assert (
            check_evaluate(EvaluateConfig(model=model_option(path), data=data, output=out, samples=asked)).count
            == count
        )
    assert not caplog.records
    assert check_evaluate(EvaluateConfig(model=model_option(path), data=data, output=out, samples=999)).count == there
    assert check_layers(LayersConfig(model=model_option(path), data=data, output=out, samples=998)).count <= there
    file = tmp_path / "questions.jsonl"
    file.write_text("".join(json.dumps(question(i)) + "\n" for i in range(3)))
    assert [len(QuestionFile(str(file), limit).questions) for limit in (None, 2, 3, 997)] == [3, 2, 3, 3]
    first, second, third = (one.message for one in caplog.records)
    assert first == f"samples=999, and the validation split has {there} windows: all of them are taken"
    assert second.startswith("samples=998, and the validation split has ")
    assert third == f"limit=997, and questions={file} has 3 questions: all of them are taken"


def test_a_limit_that_is_more_than_a_task_has_is_said(tasks, caplog):
    """Of evaluate and of the layer analysis; of the tasks that have fewer alone, and nothing where none has."""
    caplog.set_level("INFO", "minitron_megatron")
    wanted = {tasks["words"]: 0, tasks["write"]: 0}
    load(wanted, fewshot=None, seed=1, limit=6)
    load(wanted, fewshot=None, seed=1, limit=9)
    load_tasks([tasks["words"]], fewshot=0, limit=9, seed=1)
    for limit in (None, 1, 5):
        load(wanted, fewshot=None, seed=1, limit=limit)
    load_tasks([tasks["words"]], fewshot=0, limit=8, seed=1)
    said = (record.getMessage() for record in caplog.records if record.name == "minitron_megatron.evaluate.harness")
    one, both, analysed = (line for line in said if line.startswith("limit="))
    assert one == "limit=6, and write has 5 questions: all of them are taken"
    assert both == "limit=9, and words has 8 questions, write has 5 questions: all of them are taken"
    assert analysed == "limit=9, and words has 8 questions: all of them are taken"


def test_a_task_that_runs_what_a_model_writes_must_be_confirmed(made, tasks, tmp_path, monkeypatch):
    """Before the task's own code runs: here it would fail."""
    monkeypatch.delenv("HF_ALLOW_CODE_EVAL", raising=False)
    file = tmp_path / "code.yaml"
    file.write_text(Path(tasks["write"]).read_text() + "unsafe_code: true\nprocess_results: !function judging.judge\n")
    with pytest.raises(UserError, match="runs code that the model writes: set confirm_run_unsafe_code=true"):
        load({str(file): 0}, fewshot=None, seed=1)
    assert "HF_ALLOW_CODE_EVAL" not in os.environ
    (tmp_path / "judging.py").write_text(
        "import os\nallowed = os.environ['HF_ALLOW_CODE_EVAL']\ndef judge(doc, said): pass\n"
    )
    loaded = load({str(file): 2}, fewshot=None, seed=1, unsafe=True)
    assert loaded.tasks["write"].get_config("num_fewshot") == 2


def test_functions_beside_a_task_file_run_where_that_is_confirmed(tasks, tmp_path):
    file = tmp_path / "code.yaml"
    file.write_text(Path(tasks["write"]).read_text() + "process_results: !function judging.judge\n")
    (tmp_path / "judging.py").write_text(
        f"import os\nos.mkdir({str(tmp_path / 'ran')!r})\ndef judge(doc, said): pass\n"
    )
    with pytest.raises(
        UserError, match=r"names the function judging\.judge, which is code of its own: set confirm_run"
    ):
        load({str(file): 0}, fewshot=None, seed=1)
    assert not (tmp_path / "ran").exists()
    load({str(file): 0}, fewshot=None, seed=1, unsafe=True)
    assert (tmp_path / "ran").exists()


def test_templates_of_a_task_file_reach_no_program(tasks, tmp_path):
    payload = "{{ cycler.__init__.__globals__.os.mkdir('%s') }}" % (tmp_path / "ran")
    text = Path(tasks["words"]).read_text()
    file = tmp_path / "words.yaml"
    changed = re.sub(r"(?m)^doc_to_text:.*$", lambda _: f'doc_to_text: "{payload}"', text)
    assert changed != text
    file.write_text(changed)
    with pytest.raises(UserError, match=r"access to attribute .__init__. .* is unsafe"):
        load_tasks([str(file)], fewshot=0, limit=1, seed=1)
    assert not (tmp_path / "ran").exists()


def test_a_tasks_own_number_of_examples_goes_before_fewshot(tasks):
    loaded = load({tasks["words"]: 3, tasks["write"]: None}, fewshot=1, seed=1)
    assert {name: t.get_config("num_fewshot") for name, t in loaded.tasks.items()} == {"words": 3, "write": 1}


def test_parts_of_a_group_are_told_from_what_stands_alone(tasks):
    from lm_eval.api.group import Group

    loaded = load({tasks["words"]: 0, tasks["write"]: 0}, fewshot=None, seed=1)
    whole, inner = Group("whole", aggregate_metric_list=[{"metric": "acc"}]), Group("inner")
    inner.add(loaded.tasks["words"])
    whole.add(inner)
    found = Loaded(loaded.tasks, {"whole": whole, "inner": inner}).part_of
    assert found == {"words": "whole", "inner": "whole"}


@pytest.mark.slow
def test_the_command_under_torchrun(made, tasks, tmp_path):
    """Data, teacher and tasks at once, planned first; unknown tasks end with one line and status 2."""
    _, (path, teacher), data = made
    words = ("evaluate", f"model={path}", f"teacher={teacher}", f"data.path={data}", "data.sequence_length=32")
    words = (*words, f"tasks={{{tasks['words']}:2,{tasks['write']}:0}}", "limit=4", f"output={tmp_path / 'out'}")
    plan = run(*words, "dry_run=true")
    assert plan.returncode == 0 and "words, write" in plan.stdout and not (tmp_path / "out").exists(), plan.stderr
    done = run(*words, "parallel.pipeline=2", processes=2)
    assert done.returncode == 0, done.stderr
    assert "exact_match" in done.stdout and "agreement" in done.stdout
    found = results(tmp_path / "out")
    assert found["tasks"]["words"]["fewshot"] == 2 and found["tasks"]["words"]["questions"] == 4 and found["kl"] > 0
    inputs = read_manifest(tmp_path / "out")["inputs"].keys()
    assert {name for name in inputs if not name.startswith("file ")} == {"model", "teacher", "data"}
    files = {name.rpartition("/")[2] for name in inputs if name.startswith("file ")}
    assert files == {
        "tokenizer.json",
        "tokenizer_config.json",
        "config.json",
        "generation_config.json",
        "words.yaml",
        "words.jsonl",
        "write.yaml",
        "write.jsonl",
    }
    assert "complete already" in run(*words).stdout
    unknown = run("evaluate", f"model={path}", "tasks=[winograde]", f"output={tmp_path / 'no'}")
    assert "did you mean winogrande?" in error_of(unknown) and not (tmp_path / "no").exists()


@pytest.mark.parametrize(("own", "asked", "taken"), [
    (None, None, 0), (None, 3, 3), (5, None, 5), (5, 3, 3), (5, 0, 0), (0, None, 0), (0, 3, 0), (0, 0, 0),
])  # fmt: skip
def test_examples_of_a_task(caplog, own, asked, taken):
    """What is asked for, else its own number; a task that says 0 has none, and that is said."""
    config = {"num_fewshot": own}
    task = SimpleNamespace(
        task_name="t", get_config=config.get, set_config=lambda key, value: config.update({key: value})
    )
    _set_examples(task, asked)
    assert config["num_fewshot"] == taken and len(caplog.records) == (own == 0 and bool(asked))


@pytest.mark.parametrize("tasks", [{"a": -1}, {"a": 1.5}, {"a": True}, ["a", 1], {1: 2}, 5])
def test_numbers_of_examples_that_cannot_be(tasks):
    with pytest.raises(UserError, match="must be a list of names"):
        wanted_tasks(tasks)
    assert wanted_tasks({"a": 0, "b": None}) == {"a": 0, "b": None} and wanted_tasks("a") == {"a": None}


@pytest.mark.parametrize("sum_of_losses", [math.nan, math.inf])
def test_a_loss_that_is_no_number_is_no_result(sum_of_losses):
    with pytest.raises(UserError, match=r"model=m: the loss is (nan|inf); the weights or"):
        loss_figures(sum_of_losses, 10, "model=m")
    assert loss_figures(20.0, 10, "m", "teacher_") == {"teacher_loss": 2.0, "teacher_perplexity": math.exp(2.0)}
