"""launch/evaluate.py: the same figures in every layout, and the same answers as lm-evaluation-harness's own backend."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from minitron_megatron.checkpoints.folder import open_model_folder
from minitron_megatron.checkpoints.hf import export_hf
from minitron_megatron.config import BatchConfig, EvaluateConfig, EvaluateDataConfig, ExportHfConfig, ModelConfig
from minitron_megatron.data.datasets import Windows, open_data
from minitron_megatron.errors import UserError
from minitron_megatron.evaluate.evaluate import evaluate
from minitron_megatron.evaluate.harness import wanted_tasks
from tests.test_commands import error_of, run
from tests.test_layers import TASK, WORDS, question
from tests.test_models import names
from tests.tiny import data_folder, hf_model, imported, model_option

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
LAYOUTS = [
    (2, {"tensor": 2, "sequence": True}),
    (2, {"pipeline": 2}),
    (2, {}),
    (2, {"pipeline": 2, "virtual_pipeline": 2}),
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
    """Task files: choices of a word, of single tokens, generated text (some answers right), perplexity of whole texts."""
    (student, _), (path, _), _ = made
    folder = tmp_path_factory.mktemp("tasks")
    from minitron_megatron.data.tokenizer import load_tokenizer

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
    documents = {"words": questions, "letters": letters, "write": written, "read": long}
    templates = {"words": TASK, "letters": TASK, "write": WRITE, "read": READ}
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
    return {
        "loss": float(-(q.gather(-1, labels[..., None])[..., 0] * mask).sum() / count),
        "kl": float(((p.exp() * (p - q)).sum(-1) * mask).sum() / count),
        "agreement": float(((p.argmax(-1) == q.argmax(-1)) * mask).sum() / count),
        "tokens": int(count),
    }


@pytest.mark.parametrize(("ranks", "layout"), LAYOUTS, ids=names)
def test_loss_and_divergence_are_those_of_whole_logits_in_every_layout(gloo, made, wanted, tmp_path, ranks, layout):
    _, (path, teacher), data = made
    found = run_in(gloo, ranks, layout, config(path, tmp_path / "out", data, teacher=ModelConfig(path=str(teacher))))
    for name, value in wanted.items():
        assert found[name] == pytest.approx(value, rel=1e-5), name
    assert found["perplexity"] == pytest.approx(np.exp(wanted["loss"]), rel=1e-5) and found["kl"] > 0.01


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


@pytest.mark.parametrize(("ranks", "layout"), [(1, {}), *LAYOUTS[:3]], ids=names)
def test_tasks_say_what_the_harness_says_of_the_exported_folder(
    gloo, made, tasks, by_transformers, tmp_path, ranks, layout
):
    _, (path, _), data = made
    cfg = config(path, tmp_path / "out", data, tasks=list(tasks.values()), fewshot=1, prompts=2)
    found = run_in(gloo, ranks, layout, cfg)
    assert {**found["tasks"], "read": 0} == {**by_transformers["tasks"], "read": 0}
    read = found["tasks"]["read"]["word_perplexity"]
    assert read == pytest.approx(by_transformers["tasks"]["read"]["word_perplexity"], rel=1e-5)
    assert 0 < found["tasks"]["write"]["exact_match"] < 1 and found["tasks"]["words"]["fewshot"] == 1
    assert found["lm_eval"] == by_transformers["lm_eval"] and found["loss"] > 0
