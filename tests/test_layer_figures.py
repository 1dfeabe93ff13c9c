"""Figures of a layer analysis: out of sums, into layers.json and back, and in its tables. Numbers alone, without a model."""

import contextlib
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from minitron_megatron import layer_analysis
from minitron_megatron.config import BatchConfig, DataConfig, LayersConfig, ModelConfig
from minitron_megatron.data.questions import Request
from minitron_megatron.errors import UserError
from minitron_megatron.importance import layer_passes, layers
from minitron_megatron.importance.blocks import Block, contiguous_blocks
from minitron_megatron.importance.layer_passes import LayerMeasurement, Measured
from minitron_megatron.importance.layers import FILE, Judged, LayerAnalysis, check_blocks, load_layer_analysis
from minitron_megatron.parallel.layout import Layout


def config(**options) -> LayersConfig:
    data = DataConfig(path="d", sequence_length=8)
    return LayersConfig(**{"output": "out", "model": ModelConfig(path="m"), "data": data, **options})


# Ranking and the file


def test_what_is_best_to_remove_is_least_bad():
    """By influence and loss the lowest, by tasks the highest accuracy and then margin; six digits tell."""
    one = Judged(loss=2.0, bi=0.3, accuracy=0.5, margin=0.1)
    assert one.badness("bi") == (0.3,) and one.badness("loss") == (2.0,) and one.badness("task") == (-0.5, -0.1)
    assert Judged(loss=1.0000004).badness("loss") == (1.0,) != Judged(loss=1.0000006).badness("loss")
    assert Judged(loss=1.0).badness("task") == (0.0, 0.0) and Judged(loss=math.nan).badness("loss") == (math.inf,)
    assert Judged(loss=-math.inf).badness("loss") == (math.inf,)
    assert Judged(loss=800.0).perplexity == math.exp(700) and Judged(loss=2.0).perplexity == math.exp(2)


@pytest.mark.parametrize(
    ("count", "keep_last", "starts"),
    [(1, 0, [0, 1, 2, 3]), (1, 1, [0, 1, 2]), (1, 3, [0]), (1, 4, None), (2, 0, [0, 1, 2]), (2, 2, [0]), (2, 3, None)],
)
def test_blocks_that_touch_the_last_layers_are_left_out(count, keep_last, starts):
    judged = {n: [Judged(loss=1.0)] * (5 - n) for n in (1, 2)}
    analysis = LayerAnalysis("a", "", 4, Judged(loss=1.0), judged, {})
    if starts is None:
        with pytest.raises(UserError, match=f"without the last {keep_last} of 4 layers no block of {count} is left"):
            analysis.ranked(count, "loss", keep_last)
        return
    assert analysis.ranked(count, "loss", keep_last) == starts
    assert analysis.best_block(count, "loss", keep_last) == range(count)
    with pytest.raises(UserError, match="has blocks of 1, 2 layers, not 3: analyse with block=3"):
        analysis.ranked(3, "loss", keep_last)


TASKS = {"t": {"questions": 3, "accuracy": 0.5}}
BLOCKS = {
    2: [Judged(3.0, 0.25), Judged(4.0, 0.5)],
    1: [Judged(2.0, 0.1, 0.5, 0.75, TASKS), Judged(2.5, 0.2, 0.25, None, TASKS), Judged(1.5, 0.3, 0.0, -1.0, TASKS)],
}
ANALYSIS = LayerAnalysis(
    "path", "of the model", 3, Judged(1.0, 0.0, 0.75, 1.5, TASKS), BLOCKS, {"samples": 4, "seconds": 1.5}
)


def written(length: int, start: int, bi: float, loss: float, **more) -> dict:
    """A block as it stands in the file."""
    return {"length": length, "start": start, "bi": bi, "loss": loss, "perplexity": math.exp(loss), **more}


WRITTEN = {
    "num_layers": 3,
    "samples": 4,
    "seconds": 1.5,
    "base": {"loss": 1.0, "perplexity": math.exp(1), "accuracy": 0.75, "margin": 1.5, "tasks": TASKS},
    "blocks": [
        written(1, 0, 0.1, 2.0, accuracy=0.5, margin=0.75, tasks=TASKS),
        written(1, 1, 0.2, 2.5, accuracy=0.25, margin=None, tasks=TASKS),
        written(1, 2, 0.3, 1.5, accuracy=0.0, margin=-1.0, tasks=TASKS),
        written(2, 0, 0.25, 3.0),
        written(2, 1, 0.5, 4.0),
    ],
}


def read(monkeypatch, folder, values) -> LayerAnalysis:
    monkeypatch.setattr(layers, "read_output", lambda *_: {"inputs": {"model": "of the model"}})
    (folder / FILE).write_text(json.dumps(values))
    return load_layer_analysis(folder)


def test_an_analysis_is_written_block_by_block_and_read_as_it_was(monkeypatch, tmp_path):
    assert ANALYSIS.to_json() == WRITTEN
    found = read(monkeypatch, tmp_path, WRITTEN)
    assert (found.path, found.model_digest, found.num_layers) == (str(tmp_path), "of the model", 3)
    assert found.base == ANALYSIS.base and found.blocks == BLOCKS and found.counts == {"samples": 4, "seconds": 1.5}


def changed(**change) -> dict:
    return {**WRITTEN, **change}


@pytest.mark.parametrize(
    "values",
    [
        changed(num_layers=True),
        changed(num_layers=4),
        changed(num_layers=2),
        changed(num_layers="3"),
        changed(blocks=WRITTEN["blocks"][1:]),
        changed(blocks=WRITTEN["blocks"][:-1]),
        changed(blocks=WRITTEN["blocks"][::-1]),
        changed(blocks=[{**block, "length": 3} for block in WRITTEN["blocks"][:1]]),
        changed(blocks=[{**block, "length": 0} for block in WRITTEN["blocks"][:1]]),
        changed(blocks=[*WRITTEN["blocks"][:2], {**WRITTEN["blocks"][2], "bi": "low"}, *WRITTEN["blocks"][3:]]),
        changed(blocks=[{"length": 1}]),
        changed(base={"loss": True}),
        changed(base=None),
        {key: value for key, value in WRITTEN.items() if key != "base"},
        [],
    ],
)
def test_an_analysis_that_is_not_whole_is_refused(monkeypatch, tmp_path, values):
    with pytest.raises(UserError, match=r"layers\.json is damaged \(.*\): analyse the layers again"):
        read(monkeypatch, tmp_path, values)


@pytest.mark.parametrize(
    ("block", "lengths", "says"),
    [
        (1, [1], None),
        (3, [3], None),
        ([3, 1, 1], [1, 3], None),
        (4, None, "block=4 is not below the model's 4 layers: at least one must stay"),
        ([1, 5, 4], None, "block=5 is not below"),
        (0, None, "block=0 must be a number of layers above 0"),
        (True, None, "block=True must be a number of layers above 0"),
        ([1, -1], None, "must be a number of layers above 0, or a list of them such as"),
        ([], None, "block=[] must be a number"),
        (1.0, None, "block=1.0 must be a number"),
    ],
)
def test_lengths_of_blocks(block, lengths, says):
    if says is None:
        assert check_blocks(block, 4) == lengths
        return
    with pytest.raises(UserError) as refused:
        check_blocks(block, 4)
    assert says in str(refused.value)


# Figures out of sums


class Source:
    """Questions whose accuracy is a request's value; some know no margin."""

    def __init__(self, name: str, questions: int, requests: int, margin: float | None) -> None:
        self.name, self.questions, self.requests, self.margin = name, questions, requests, margin

    def texts(self):
        return [("", "", "")] * self.requests

    def figures(self, log_likelihoods, normalization):
        assert len(log_likelihoods) == self.requests and normalization == "bytes"
        found = {"questions": self.questions, "accuracy": float(log_likelihoods[0])}
        return found if self.margin is None else {**found, "margin": self.margin}


@pytest.mark.parametrize(("margin", "joint"), [(0.5, (3 * 0.2 + 1 * 0.5) / 4), (None, None)])
def test_every_question_counts_the_same_whatever_source_it_is_of(margin, joint):
    sources = [Source("a", 3, 2, 0.2), Source("b", 1, 3, margin)]
    found = layer_analysis._answers(sources, np.array([0.25, 9, 0.75, 9, 9]), "bytes")
    assert found["accuracy"] == (3 * 0.25 + 0.75) / 4
    assert found["margin"] == (None if joint is None else pytest.approx(joint))
    assert {name: one["accuracy"] for name, one in found["tasks"].items()} == {"a": 0.25, "b": 0.75}
    assert layer_analysis._answers([], np.zeros(0), "bytes") == {}


def test_an_analysis_is_made_of_the_sums_of_every_variant():
    """Slot 0 is the whole model; blocks stand in the order of their ends, and lengths among one another in that of starts."""
    blocks = contiguous_blocks(3, [1, 2])
    assert [(block.start, block.length) for block in blocks] == [(0, 1), (0, 2), (1, 1), (1, 2), (2, 1)]
    nll = torch.tensor([[8.0, 16, 24, 32, 40, 48], [16.0, 16, 16, 16, 16, 16]], dtype=torch.float64)
    answers = torch.arange(6, dtype=torch.float64)[None] / 8
    measured = Measured(nll, answers, torch.arange(1, 6, dtype=torch.float64) / 10, 77, 1.2345)
    folder = SimpleNamespace(digest="m", shape=SimpleNamespace(num_layers=3))
    cfg = config(normalization="bytes", split="train")
    found = layer_analysis._analysis(cfg, folder, blocks, measured, [Source("a", 2, 1, 0.5)])
    assert (found.path, found.model_digest, found.num_layers) == ("out", "m", 3)
    assert (found.base.loss, found.base.bi, found.base.accuracy) == (1.5, 0.0, 0.0)
    assert {n: [one.loss for one in of_length] for n, of_length in found.blocks.items()} == {
        1: [2, 3, 4],
        2: [2.5, 3.5],
    }
    assert {n: [one.bi for one in of_length] for n, of_length in found.blocks.items()} == {
        1: [0.1, 0.3, 0.5],
        2: [0.2, 0.4],
    }
    assert [one.accuracy for one in found.blocks[1]] == [1 / 8, 3 / 8, 5 / 8]
    assert found.counts == {
        "split": "train",
        "samples": 2,
        "tokens": 16,
        "questions": {"a": 2},
        "normalization": "bytes",
        "layer_passes": 77,
        "seconds": 1.23,
    }


@pytest.mark.parametrize("odd", [math.nan, math.inf])
@pytest.mark.parametrize("where", [None, "nll", "log_likelihoods"])
def test_sums_are_finite(odd, where):
    sums = {name: torch.zeros(2, 2) for name in ("nll", "log_likelihoods")}
    measured = Measured(**sums, influence=torch.zeros(1), layer_passes=0, seconds=0.0)
    if where is None:
        layer_analysis._check_finite(measured, SimpleNamespace(path="p"))
        return
    sums[where][1, 1] = odd
    with pytest.raises(UserError, match="model=p: a loss is not finite"):
        layer_analysis._check_finite(measured, SimpleNamespace(path="p"))


def test_questions_are_of_the_file_and_of_each_task_once(monkeypatch):
    asked = []
    tasks = [Source("a", 1, 1, None), Source("b", 1, 1, None)]
    monkeypatch.setattr(
        "minitron_megatron.evaluate.harness.load_tasks", lambda names, **how: asked.append((names, how)) or tasks
    )
    monkeypatch.setattr(layer_analysis, "load_tokenizer", lambda path: f"of {path}")
    monkeypatch.setattr(layer_analysis, "encode_all", lambda *given: given)
    folder = SimpleNamespace(path="m", shape=SimpleNamespace(max_position_embeddings=99))
    cfg = config(tasks=["x"], fewshot=3, limit=5, seed=7)
    file = Source("q", 1, 1, None)
    sources, requests = layer_analysis._sources(cfg, folder, file)
    assert sources == [file, *tasks] and requests == [("of m", source, 99) for source in sources]
    assert asked == [(["x"], {"fewshot": 3, "limit": 5, "seed": 7})]
    assert layer_analysis._sources(config(), folder, file)[0] == [file]
    assert layer_analysis._sources(config(), folder, None) == ([], [])
    with pytest.raises(UserError, match="questions= and tasks= have b twice: leave one out"):
        layer_analysis._sources(cfg, folder, Source("b", 1, 1, None))


# How samples run


@pytest.mark.parametrize(
    ("micro", "length", "count", "data", "size"),
    [
        (2, 8, 9, 1, 2),
        (2, 8, 1, 1, 1),
        (4, 8, 5, 2, 3),
        (4, 16, 9, 1, 2),
        (1, 32, 9, 1, 1),
        (4, 4, 9, 1, 8),
        (4, 5, 9, 1, 6),
    ],
)
def test_a_micro_batch_has_as_many_tokens_whatever_their_length(monkeypatch, micro, length, count, data, size):
    """Of data.sequence_length=8; no more samples than there are, and one at least. Every sample's row is its own."""
    runs = []
    this = object.__new__(LayerMeasurement)
    this.layout, this.cfg = Layout(world_size=data), config(trainer=BatchConfig(micro_batch_size=micro))
    this.chunks = ["c"]
    sums = torch.arange(3.0).double()[:, None] + torch.tensor([10.0, 20.0, 30.0])
    this.variants = SimpleNamespace(slots=3, begin=lambda batch: None, negative_log_likelihoods=lambda batch, **_: sums)

    def forward(chunks, batches, *, collect, before, **how):
        runs.append((how["micro_batch_size"], how["sequence_length"], how["num_micro_batches"], len(batches)))
        before({})
        collect({"number": torch.tensor([0, -1, 1 if count > 1 else -1])})

    monkeypatch.setattr(layer_passes, "forward_only", forward)
    monkeypatch.setattr(
        layer_passes.MicroBatches,
        "of_this_rank",
        lambda samples, numbers, size, layout: layer_passes.MicroBatches(samples, numbers, size, 0, layout.data),
    )
    monkeypatch.setattr(layer_passes.collectives, "sum_over_all", lambda table: table)
    monkeypatch.setattr(layer_passes, "progress", lambda *_, **__: contextlib.nullcontext(lambda n: None))
    monkeypatch.setattr("megatron.core.parallel_state.get_tensor_model_parallel_rank", lambda: 0)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: "cpu")
    found = this._run("w", None, count, length)
    ((rows, tokens, number, there),) = runs
    assert (rows, tokens) == (3 * size, length) and number == there
    assert found.shape == (count, 3) and found[0].tolist() == [10, 11, 12]
    assert count == 1 or (found[1].tolist() == [30, 31, 32] and not found[2:].any())


def test_influence_is_of_samples_alone_and_requests_come_back_in_their_order(monkeypatch):
    """Block Influence is 1 less the mean cosine over all tokens; log-likelihoods are of requests, in runs of one length."""
    this, runs = object.__new__(LayerMeasurement), []
    this.layout, this.cfg = Layout(), config(split="train")
    this.variants = SimpleNamespace(slots=3, influence=True, installed=contextlib.nullcontext)

    def run(what, samples, count, length):
        runs.append((what, count, length, this.variants.influence))
        if what == "samples":
            return torch.ones(2, 3, dtype=torch.float64)
        return torch.tensor([[float(len(request.tokens))] * 3 for request in samples.requests], dtype=torch.float64)

    monkeypatch.setattr(layer_passes, "Windows", lambda *given: given)
    monkeypatch.setattr(this, "_run", run, raising=False)
    monkeypatch.setattr(this, "_summed", lambda: (torch.tensor([16.0, 4.0], dtype=torch.float64), 55), raising=False)
    requests = [Request([0] * n, 1) for n in (40, 5, 41, 6)]
    found = this.measure("data", 2, requests)
    assert runs == [
        ("samples", 2, 8, True),
        ("questions, 32 tokens", 2, 32, False),
        ("questions, 64 tokens", 2, 64, False),
    ]
    assert found.log_likelihoods[:, 0].tolist() == [-40, -5, -41, -6] and found.nll.sum() == 6
    assert found.influence.tolist() == [0.0, 0.75] and found.layer_passes == 55 and found.seconds >= 0


# Tables


def test_a_plan_says_what_runs_and_what_would_run_one_by_one(monkeypatch):
    shown = []
    monkeypatch.setattr(layer_analysis, "print_table", lambda *table: shown.append(table))
    folder = SimpleNamespace(shape=SimpleNamespace(num_layers=4))
    layer_analysis._print_plan(config(), folder, [Block(0, 1), Block(1, 3)], 5, [[1, 2], [3]])
    ((title, _, rows),) = shown
    assert title == "would be analysed"
    assert dict(rows) == {
        "blocks": 2, "samples": 5, "tokens": 40, "requests": 3, "layers a sample runs through": "7 of 12"
    }  # fmt: skip


@pytest.mark.parametrize("asked", [True, False])
def test_a_table_has_the_whole_model_and_the_best_three_of_each_judge(monkeypatch, asked):
    shown = []
    monkeypatch.setattr(layer_analysis, "print_table", lambda *table: shown.append(table))
    more = {"accuracy": 0.5, "margin": None} if asked else {}
    judged = [
        Judged(loss=loss, bi=bi, **more)
        for loss, bi in ((5.0, 0.1), (4.0, 0.5), (3.0, 0.4), (2.0, 0.3), (1.0, 0.9), (0.5, 0.0))
    ]
    base = Judged(loss=0.0, **({"accuracy": 1.0, "margin": 2.0} if asked else {}))
    analysis = LayerAnalysis("a", "", 6, base, {1: judged}, {"samples": 3, "seconds": 2.5})
    layer_analysis._print("out", analysis)
    ((title, columns, rows),) = shown
    assert title == "out: 3 samples, 2.5 s"
    assert columns == ["", "BI", "loss", "perplexity", *(["accuracy", "margin"] if asked else []), "goes"]
    assert rows[0] == ["whole model", 0.0, 0.0, 1.0, *([1.0, 2.0] if asked else []), ""]
    # Equal accuracies go by place: 0, 1 and 2.
    places = {row[0]: row[-1] for row in rows[1:]}
    judges = {0: ["1st by Block Influence"], 3: ["2nd by Block Influence"], 2: ["3rd by Block Influence"]}
    for place, start in (("1st", 4), ("2nd", 3), ("3rd", 2)):
        judges.setdefault(start, []).append(f"{place} by loss")
    for place, start in (("1st", 0), ("2nd", 1), ("3rd", 2)) if asked else ():
        judges.setdefault(start, []).append(f"{place} by task")
    assert places == {f"without {start}": ", ".join(words) for start, words in judges.items()} | {
        "without 5": "stays: prune.keep_last_layers=1"
    }
    assert rows[1][1:4] == [0.1, 5.0, math.exp(5.0)] and (not asked or rows[1][4:6] == [0.5, ""])
