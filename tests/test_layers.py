"""A layer analysis equals a plain model with the layers really deleted, in every layout; its judges find planted layers."""

import copy
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from minitron_megatron.checkpoints.folder import load_yaml, open_model_folder, read_manifest
from minitron_megatron.config import LayersConfig, PruneConfig, TargetConfig
from minitron_megatron.data.datasets import Windows
from minitron_megatron.data.folder import open_data
from minitron_megatron.data.questions import QuestionFile, Request, buckets, encode, encode_all
from minitron_megatron.data.tokenizer import load_tokenizer
from minitron_megatron.errors import UserError
from minitron_megatron.importance import variants
from minitron_megatron.importance.blocks import Block, contiguous_blocks, layer_passes
from minitron_megatron.importance.layers import JUDGES, Judged, LayerAnalysis, load_layer_analysis
from minitron_megatron.layer_analysis import _block_rows, analyse_layers
from minitron_megatron.prune.plan import ranges
from minitron_megatron.prune.prune import prune_model
from tests import jobs, reference
from tests.test_commands import error_of, run
from tests.test_models import names
from tests.tiny import TEXT, data_folder, data_option, hf_model, imported, model_option

LAYERS, SAMPLES = 5, 4
WORDS = TEXT.split()


def question(i: int) -> dict:
    """A question of the form of the data: which word follows in a line of `data_folder`."""
    line = [WORDS[(i * j) % len(WORDS)] for j in range(1, 12)]
    wrong = next(word for word in WORDS if word != line[8 + i % 3])
    before, right = " ".join(line[: 8 + i % 3]), line[8 + i % 3]
    return {"context": before, "choices": [f" {right}", f" {wrong}"], "answer": 0}


def questions_file(folder: Path, count: int = 6) -> Path:
    """Questions with one context, and one whose choices have contexts of their own, of two padded lengths."""
    lines = [question(i) for i in range(1, count)]
    lines.append({"context": ["The quick fox ", TEXT[:60]], "choices": ["jumps over", "jumps over"], "answer": 1})
    path = folder / "questions.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """(transformers model of five layers, its folder, data folder, questions file)."""
    folder = tmp_path_factory.mktemp("layers")
    model = hf_model(num_hidden_layers=LAYERS)
    path = imported(model, folder)
    return model, path, data_folder(folder, path), questions_file(folder)


def requests_of(path: Path, questions: Path) -> list[Request]:
    return encode_all(load_tokenizer(path), QuestionFile(str(questions), None), 128)


@pytest.fixture(scope="module")
def wanted(plain):
    """Reference figures by block (None: the whole model): (NLL of each sample, log-likelihood of each request, BI)."""
    model, path, data, questions = plain
    windows = Windows(open_data(str(data), "validation", open_model_folder(path).shape, 32), "validation", 32)
    samples = [windows[i] for i in range(SAMPLES)]
    requests = requests_of(path, questions)
    found = {}
    for block in [None, *contiguous_blocks(LAYERS, [1, 2, 4])]:
        removed = range(block.start, block.end) if block else range(0)
        cut = reference.without_layers(model, removed)
        nll = [
            -reference.log_likelihood(cut, torch.cat((s["tokens"], s["labels"][-1:])), len(s["tokens"]))
            for s in samples
        ]
        scores = [reference.log_likelihood(cut, torch.tensor(r.tokens), r.scored) for r in requests]
        tokens = [s["tokens"] for s in samples]
        found[block] = nll, scores, reference.block_influence(model, removed, tokens) if block else 0.0
    return found


def compare(measured, wanted, blocks) -> None:
    for slot, block in enumerate([None, *blocks]):
        nll, scores, bi = wanted[block]
        np.testing.assert_allclose(measured.nll[:, slot].numpy(), nll[: len(measured.nll)], rtol=1e-5)
        np.testing.assert_allclose(measured.log_likelihoods[:, slot].numpy(), scores, rtol=1e-5)
        if block is not None and len(measured.nll) == SAMPLES:
            assert measured.influence[slot - 1].item() == pytest.approx(bi, abs=1e-5), block


@pytest.mark.parametrize(
    ("ranks", "layout"),
    [
        (1, {}),
        (2, {"tensor": 2}),
        (2, {"pipeline": 2, "virtual_pipeline": 2}),
        (4, {"tensor": 2, "pipeline": 2, "sequence": True}),
        (4, {"pipeline": 4}),
        (2, {}),
    ],
    ids=names,
)
def test_what_is_measured_equals_deleted_layers_in_every_layout(gloo, plain, wanted, ranks, layout):
    """Five layers, so no pipeline divides them; micro-batches of two samples and as many questions as fill them."""
    _, path, data, questions = plain
    requests = requests_of(path, questions)
    arguments = (str(path), str(data), layout, [1, 2], requests, SAMPLES)
    answers = gloo(ranks, jobs.layers_without, *arguments, layout=layout)
    for measured, _ in answers:
        compare(measured, wanted, contiguous_blocks(LAYERS, [1, 2]))


@pytest.mark.parametrize(
    "options",
    [
        {"micro_batch_size": 1, "rows": 3, "head_positions": 1},
        {"micro_batch_size": 3, "head_positions": 7},
        {"micro_batch_size": 4, "head_positions": 64},
    ],
)
def test_micro_batches_and_slices_change_nothing(gloo, plain, wanted, options):
    """Nor how many positions go through the head at once."""
    _, path, data, questions = plain
    requests = requests_of(path, questions)
    arguments = (str(path), str(data), {}, [1, 4], requests, SAMPLES)
    ((measured, rows),) = gloo(1, with_options, arguments, options, layout={})
    compare(measured, wanted, contiguous_blocks(LAYERS, [1, 4]))
    # A layer sees as many tokens at once as `rows` samples have; padded questions may be longer than a sample.
    assert max(rows) == options.get("rows", 1)


def with_options(arguments: tuple, options: dict):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(variants, "HEAD_POSITIONS", options.pop("head_positions"))
        return jobs.layers_without(*arguments, **options)


@pytest.mark.parametrize(("ranks", "layout"), [(2, {"pipeline": 2}), (2, {}), (2, {"tensor": 2})], ids=names)
def test_a_block_costs_the_layers_after_it(gloo, plain, ranks, layout):
    """Rows that went through feed-forward blocks: L a sample for the whole model, and L − end for each block."""
    _, path, data, _ = plain
    lengths = [1, 3]
    arguments = (str(path), str(data), layout, lengths, [], SAMPLES)
    answers = gloo(ranks, jobs.layers_without, *arguments, layout=layout)
    one, three = sum(LAYERS - end for end in range(1, 6)), sum(LAYERS - end for end in range(3, 6))
    formula = SAMPLES * (LAYERS + one + three)
    assert layer_passes(LAYERS, contiguous_blocks(LAYERS, lengths)) * SAMPLES == formula
    counted = sum(sum(rows) for _, rows in answers) // layout.get("tensor", 1)
    assert counted == formula and {measured.layer_passes for measured, _ in answers} == {formula}


def test_a_model_is_as_it_was_afterwards(gloo, plain):
    _, path, data, _ = plain
    assert gloo(1, measure_and_look, str(path), str(data), layout={}) == [[]]


def measure_and_look(path: str, data: str) -> list[str]:
    """Modules that still have a forward of their own after an error within."""
    from minitron_megatron.importance.variants import Variants

    folder, chunks = jobs.build(path, {})
    variants = Variants(chunks, [Block(0, 1)], tokens=32, vocab_size=folder.shape.vocab_size, sequence_parallel=False)
    with pytest.raises(RuntimeError, match="stopped"), variants.installed():
        assert "forward" in vars(chunks[0].embedding)
        raise RuntimeError("stopped")
    return [name for name, module in chunks[0].named_modules() if "forward" in vars(module)]


def trained(data: Path, shape, steps: int = 120):
    """A tiny model of three layers that has learned the data's lines: each of its layers counts."""
    from minitron_megatron.data.datasets import training_samples

    model = hf_model(num_hidden_layers=3).train()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(0.5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    samples = training_samples(open_data(str(data), "train", shape, 32), "train", sequence_length=32, seed=1, count=64)
    for step in range(steps):
        tokens = torch.stack([samples[(8 * step + i) % 64]["tokens"] for i in range(8)])
        loss = model(tokens, labels=tokens, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


@pytest.fixture(scope="module")
def planted(plain, tmp_path_factory):
    """(folder of a trained model in which layers 1 and 3 of five add nothing, data, questions)."""
    _, path, data, questions = plain
    model = trained(data, open_model_folder(path).shape)
    layers = [copy.deepcopy(layer) for layer in (model.model.layers[i] for i in (0, 0, 1, 1, 2))]
    for layer in (layers[1], layers[3]):
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
        torch.nn.init.zeros_(layer.mlp.down_proj.weight)
    model.model.layers = torch.nn.ModuleList(layers)
    model.config.num_hidden_layers = LAYERS
    return imported(model, tmp_path_factory.mktemp("planted")), data, questions


def config(path, data, output, **options) -> LayersConfig:
    options = {"samples": SAMPLES, "block": [1, 2], **options}
    return LayersConfig(output=str(output), model=model_option(path), data=data_option(data, 32), **options)


def test_all_three_judges_find_layers_that_do_nothing(planted, tmp_path):
    path, data, questions = planted
    analyse_layers(config(path, data, tmp_path / "out", questions=str(questions)))
    analysis = load_layer_analysis(tmp_path / "out")
    for judge in JUDGES:
        assert set(analysis.ranked(1, judge)[:2]) == {1, 3}, judge
        assert analysis.best_block(1, judge) == range(1, 2), judge
    for start in (1, 3):
        removed = analysis.blocks[1][start]
        assert removed.loss == pytest.approx(analysis.base.loss, abs=1e-6) and abs(removed.bi) < 1e-6
        assert removed.accuracy == analysis.base.accuracy
    assert all(m.loss > analysis.base.loss + 1e-3 for m in (analysis.blocks[1][s] for s in (0, 2, 4)))
    # The others, with a layer that does nothing beside them: as without it.
    assert analysis.blocks[2][0].loss == pytest.approx(analysis.blocks[1][0].loss, abs=1e-6)
    assert analysis.base.accuracy > 0.5 and analysis.counts["questions"] == {"questions": 6}
    prune_model(
        PruneConfig(
            model=model_option(path),
            layers=str(tmp_path / "out"),
            target=TargetConfig(num_layers=4),
            output=str(tmp_path / "cut"),
        )
    )
    assert load_yaml(tmp_path / "cut" / "plan.yaml")["layers"] == ranges(np.array([0, 2, 3, 4]))
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("<svg") == 6 and "Blocks of 2 layers" in page


def test_the_whole_models_loss_is_what_evaluate_measures(plain, tmp_path):
    from minitron_megatron.config import EvaluateConfig
    from minitron_megatron.evaluate.evaluate import evaluate

    _, path, data, _ = plain
    analyse_layers(config(path, data, tmp_path / "layers", block=3))
    options = {"model": model_option(path), "data": data_option(data, 32), "samples": SAMPLES}
    evaluate(EvaluateConfig(output=str(tmp_path / "loss"), **options))
    analysis, whole = load_layer_analysis(tmp_path / "layers"), read_manifest(tmp_path / "loss")["results"]
    assert analysis.base.loss == pytest.approx(whole["loss"], rel=1e-6)
    assert list(analysis.blocks) == [3] and len(analysis.blocks[3]) == 3 and analysis.base.accuracy is None
    analyse_layers(config(path, data, tmp_path / "layers", block=3))  # complete already
    with pytest.raises(UserError, match="has blocks of 3 layers, not 2: analyse with block=2"):
        analysis.best_block(2, "bi")
    with pytest.raises(UserError, match="measured without questions= or tasks="):
        analysis.best_block(3, "task")
    with pytest.raises(UserError, match="judge=luck is not one of bi, loss, task"):
        analysis.best_block(3, "luck")
    with pytest.raises(UserError, match="without the last 3 of 5 layers no block of 3 is left"):
        analysis.best_block(3, "loss", keep_last=3)
    with pytest.raises(UserError, match="another model"):
        analysis.check_model("sha256:other")
    analysis.check_model(open_model_folder(path).digest)
    # keep_last leaves out what touches the end, however good it is.
    order = analysis.ranked(3, "bi", keep_last=0)
    assert set(order) == {0, 1, 2} and analysis.ranked(3, "bi", keep_last=1) == [s for s in order if s != 2]
    file = tmp_path / "layers" / "layers.json"
    file.write_text(file.read_text().replace('"start": 1', '"start": 7'))
    with pytest.raises(UserError, match=r"layers is damaged: its files differ"):
        load_layer_analysis(tmp_path / "layers")
    with pytest.raises(UserError, match=r"has no layers.json"):
        load_layer_analysis(tmp_path / "loss")


def test_equal_blocks_go_by_margin_and_then_by_their_place(plain):
    from minitron_megatron.importance.layers import Judged, LayerAnalysis

    base = Judged(1.0, accuracy=1.0, margin=2.0)
    blocks = [Judged(3.0, 0.2, 0.5, 0.1), Judged(3.0 + 1e-9, 0.1, 0.5, 0.3), Judged(2.0, 0.1 + 1e-9, 0.5, 0.3)]
    analysis = LayerAnalysis("x", "", 3, base, {1: blocks}, {})
    assert analysis.ranked(1, "task", 0) == [1, 2, 0]
    assert analysis.ranked(1, "bi", 0) == [1, 2, 0]
    assert analysis.ranked(1, "loss", 0) == [2, 0, 1]


def test_a_block_without_which_a_figure_is_no_number_is_never_the_best(plain):
    from minitron_megatron.importance.layers import Judged, LayerAnalysis

    base, nan = Judged(1.0, accuracy=1.0, margin=2.0), math.nan
    blocks = [Judged(nan, 0.3, 0.5, nan), Judged(3.0, nan, nan, nan), Judged(math.inf, 0.2, 0.4, 0.1)]
    analysis = LayerAnalysis("x", "", 3, base, {1: blocks}, {})
    assert [analysis.ranked(1, judge, 0)[0] for judge in ("loss", "bi", "task")] == [1, 2, 0]
    none = LayerAnalysis("x", "", 3, base, {1: [Judged(nan, 0.3)] * 3}, {})
    with pytest.raises(UserError, match="loss is not a finite number without any block of 1"):
        none.ranked(1, "loss", 0)


def test_accuracy_and_margin_by_each_length(tmp_path):
    """The longer choice is likelier a byte, the shorter one as a whole; é is one character and two bytes."""
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps({"context": "a", "choices": ["éé", "abc"], "answer": 1}))
    file, scores = QuestionFile(str(path), None), np.array([-6.0, -6.6])
    assert file.figures(scores, "none") == {"questions": 1, "accuracy": 0.0, "margin": pytest.approx(-0.6)}
    assert file.figures(scores, "characters") == {"questions": 1, "accuracy": 1.0, "margin": pytest.approx(0.8)}
    assert file.figures(scores, "bytes") == {"questions": 1, "accuracy": 0.0, "margin": pytest.approx(-0.7)}


def test_requests_of_one_length_run_together():
    requests = [Request([1] * n, 1) for n in (33, 2, 34, 65)]
    assert buckets(requests, 1) == {32: [0, 1], 64: [2, 3]}
    assert buckets(requests, 3) == {96: [0, 1, 2, 3]}


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        (["{"], r"q.jsonl:1 is not JSON"),
        (["", "[1]"], r"q.jsonl:2 is not an object"),
        ([{"context": "a", "choices": ["b", "c"], "answer": 2}], r"q.jsonl:1: answer=2 must be .* 0 to 1"),
        ([{"context": "a", "choices": ["b", "c"], "answer": True}], "answer=True"),
        ([{"context": "a", "choices": ["b"], "answer": 0}], "two texts or more"),
        ([{"context": "a", "choices": ["b", ""], "answer": 0}], "none of them empty"),
        ([{"context": ["a"], "choices": ["b", "c"], "answer": 0}], "as many texts as there are choices"),
        ([{"choices": ["b", "c"], "answer": 0}], "context must be a text"),
        ([], "has no question"),
        ([{"context": "z" * 200, "choices": ["b", "c"], "answer": 0}], r"q.jsonl:1: context and choice are .* 128 pos"),
        (None, "cannot be read"),
    ],
)
def test_questions_that_cannot_be_asked(plain, tmp_path, lines, says):
    _, path, data, _ = plain
    file = tmp_path / "q.jsonl"
    if lines is not None:
        file.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    with pytest.raises(UserError, match=says) as error:
        analyse_layers(config(path, data, tmp_path / "out", questions=str(file)))
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"block": [1, 5]}, "block=5 is not below the model's 5 layers"),
        ({"block": 0}, "must be a number of layers above 0"),
        ({"block": []}, "must be a number of layers above 0"),
        ({"block": "two"}, "block=two must be a number"),
        ({"split": "test"}, "has no split"),
    ],
)
def test_options_that_make_no_sense(plain, tmp_path, options, says):
    _, path, data, _ = plain
    with pytest.raises(UserError, match=says):
        analyse_layers(config(path, data, tmp_path / "out", **options))
    assert not (tmp_path / "out").exists()


def test_a_model_without_a_tokenizer(tmp_path, plain):
    from minitron_megatron.checkpoints.random_model import make_random_model
    from minitron_megatron.config import ModelConfig, RandomModelConfig

    _, path, data, questions = plain
    sizes = {k: v for k, v in open_model_folder(path).shape.to_dict().items() if k in ModelConfig.__dataclass_fields__}
    make_random_model(RandomModelConfig(model=ModelConfig(**sizes), output=str(tmp_path / "random")))
    with pytest.raises(UserError, match="has no tokenizer"):
        analyse_layers(config(tmp_path / "random", data, tmp_path / "out", questions=str(questions)))


TASK = """task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{train: {file}, validation: {file}}}}}
output_type: multiple_choice
training_split: train
validation_split: validation
doc_to_text: "{{{{context}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: ""
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
PARTIAL = TASK.replace('"{{{{context}}}}"', '"{{{{answer}}}}"').replace(
    'doc_to_target: "{{{{answer}}}}"', 'doc_to_target: "{{{{end}}}}"'
)


@pytest.fixture(scope="module")
def task_files(tmp_path_factory):
    """Task files of lm-evaluation-harness with data beside them: plain choices, and partial scoring as in Winogrande."""
    folder = tmp_path_factory.mktemp("tasks")
    documents = {"plain": [question(i) for i in range(1, 9)]}
    documents["partial"] = [
        {"choices": [d["context"] + c for c in d["choices"]], "answer": d["answer"], "end": " jumps over"}
        for d in documents["plain"]
    ]
    files = []
    for name, template in (("plain", TASK), ("partial", PARTIAL)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(d) + "\n" for d in documents[name]))
        files.append(folder / f"{name}.yaml")
        files[-1].write_text(template.format(name=name, file=folder / f"{name}.jsonl"))
    return files


def test_lm_evaluation_harness_says_the_same_of_deleted_layers(plain, planted, task_files, tmp_path, monkeypatch):
    """Its own evaluator with its own transformers model, whole and with layers deleted, on its own requests."""
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from transformers import AutoModelForCausalLM

    from minitron_megatron.checkpoints.hf import export_hf
    from minitron_megatron.config import ExportHfConfig

    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    path, data, _ = planted
    analyse_layers(
        config(path, data, tmp_path / "out", tasks=[str(f) for f in task_files], fewshot=1, limit=6, block=2)
    )
    analysis = load_layer_analysis(tmp_path / "out")
    assert analysis.counts["questions"] == {"plain": 6, "partial": 6}
    export_hf(ExportHfConfig(model=model_option(path), output=str(tmp_path / "hf")))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    tasks = TaskManager(include_defaults=False).load([str(f) for f in task_files])
    accuracies = []
    for removed in (range(0), range(0, 2), range(3, 5)):
        cut = reference.without_layers(model, removed)
        lm = HFLM(pretrained=cut, tokenizer=load_tokenizer(path), batch_size=2, device="cpu")
        for task in tasks["tasks"].values():
            task.set_config(key="num_fewshot", value=1)
            task.set_fewshot_seed(seed=1234)
        said = evaluate(lm, tasks, limit=6, bootstrap_iters=0)["results"]
        judged = analysis.blocks[2][removed[0]] if removed else analysis.base
        for name in ("plain", "partial"):
            assert judged.tasks[name]["accuracy"] == said[name]["acc,none"], (removed, name)
        assert judged.accuracy == pytest.approx(sum(said[n]["acc,none"] for n in said) / 2)
        accuracies.append(judged.accuracy)
    assert len(set(accuracies)) > 1


def test_pairs_are_encoded_as_lm_evaluation_harness_does(plain):
    from types import SimpleNamespace

    from lm_eval.api.model import TemplateLM

    _, path, _, _ = plain
    tokenizer = load_tokenizer(path)
    harness = SimpleNamespace(backend="causal", tok_encode=lambda text: tokenizer.encode(text))
    for context, continuation in (
        ("The quick", " brown"), ("The quick ", "brown"), ("The qui", "ck"), ("a  \n", " b"), ("</s>x ", "é"), ("a", "b"),
    ):  # fmt: skip
        before, after = TemplateLM._encode_pair(harness, context, continuation)
        request = encode(tokenizer, context, continuation)
        assert list(request.tokens) == before + after and request.scored == len(after)
    empty = encode(tokenizer, "", "fox")
    assert empty.tokens[0] == tokenizer.bos_token_id and empty.scored == len(empty.tokens) - 1


def test_tasks_that_cannot_be_asked(plain, task_files, tmp_path, monkeypatch):
    _, path, data, _ = plain
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    lost, free = tmp_path / "lost.yaml", tmp_path / "free.yaml"
    lost.write_text(TASK.format(name="lost", file=tmp_path / "nowhere.jsonl"))
    free.write_text(task_files[0].read_text().replace("multiple_choice", "loglikelihood").replace("plain", "free", 1))
    for tasks, says in (
        (["winograde"], "is no task of lm-evaluation-harness: did you mean winogrande"),
        ([lost], "the task or its data cannot be loaded here"),
        ([free], "free is not multiple choice judged by acc"),
        ([task_files[0], task_files[0]], "have plain twice"),
    ):
        with pytest.raises(UserError, match=says) as error:
            analyse_layers(config(path, data, tmp_path / "out", tasks=[str(t) for t in tasks]))
        assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("length", [1, 2, 4])
def test_a_table_has_each_block_once_and_says_why_the_last_stays(length):
    judged = [Judged(loss=3.0 - 0.1 * start, bi=0.1 * start, accuracy=0.5) for start in range(6 - length)]
    analysis = LayerAnalysis("a", "", 5, Judged(loss=2.0, accuracy=0.6), {length: judged}, {})
    rows = _block_rows(analysis, length, ("bi", "loss", "task"))
    names = [row[0] for row in rows]
    assert len(set(names)) == len(names)
    last = "without 4" if length == 1 else f"without {5 - length}–4"
    assert names[-1] == last and rows[-1][-1] == "stays: prune.keep_last_layers=1"
    said = ", ".join(row[-1] for row in rows)
    for name, judge in (("Block Influence", "bi"), ("loss", "loss"), ("task", "task")):
        first = analysis.ranked(length, judge)[0]
        assert f"1st by {name}" in next(row[-1] for row in rows if row[0].startswith(f"without {first}"))
    assert said.count("1st") == 3


@pytest.mark.slow
def test_the_command_under_torchrun(planted, task_files, tmp_path):
    """Two pipeline stages; a dry run says what it will cost; the same command again finds its output."""
    path, data, questions = planted
    words = ("layers", f"model={path}", f"data.path={data}", "data.sequence_length=32", "samples=4", "block=[1,2]")
    words = (*words, f"questions={questions}", f"output={tmp_path / 'out'}", "normalization=characters", "rows=4")
    plan = run(*words, "dry_run=true")
    assert plan.returncode == 0, plan.stderr
    assert "21 of 50" in plan.stdout and not (tmp_path / "out").exists()
    done = run(*words, "parallel.pipeline=2", processes=2)
    assert done.returncode == 0, done.stderr
    assert "whole model" in done.stdout and "1st by Block Influence" in done.stdout
    analysis = load_layer_analysis(tmp_path / "out")
    assert analysis.best_block(1, "task") == range(1, 2) and analysis.counts["normalization"] == "characters"
    assert "complete already" in run(*words).stdout
    assert "block=5 is not below" in error_of(run(*[w.replace("[1,2]", "5") for w in words]))
