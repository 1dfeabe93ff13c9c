"""What importance can be measured on, what adds up, and what a recorder sees and shows: numbers alone, without a model."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from minitron_megatron.config import (
    DataConfig,
    ImportanceConfig,
    ImportanceOptions,
    LayersConfig,
    ModelConfig,
    ParallelConfig,
)
from minitron_megatron.errors import UserError
from minitron_megatron.importance import checks, hooks, layer_checks, measure, merge
from minitron_megatron.importance.checks import check_calibration
from minitron_megatron.importance.measure import measure_importance
from minitron_megatron.importance.scores import Scores, check_scores
from minitron_megatron.importance.statistics import BatchStatistic
from minitron_megatron.models.axes import PROBES
from minitron_megatron.parallel.layout import Layout
from tests.test_selecting import SOURCE, UNEVEN


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"samples": 100}, None),
        ({"samples": 10, "first_sample": 90}, None),
        (
            {"samples": 101},
            "samples=101 of 10 tokens are more than the train split's 1,000: use samples=100, or prepare",
        ),
        (
            {"samples": 11, "first_sample": 90},
            "first_sample=90 and samples=11 of 10 tokens are more .*: use samples=10, or",
        ),
        ({"samples": 1, "first_sample": 99}, None),
        ({"samples": 1, "first_sample": 100}, r"lower first_sample= or data\.sequence_length=, or prepare more text"),
        ({"samples": 1, "length": 1001}, r"1,000: lower data\.sequence_length=, or prepare more text"),
        ({"samples": 1, "length": 1000}, None),
        ({"samples": 1, "batch": "variance"}, "needs samples= of at least 2: one sample has no variance"),
        ({"samples": 2, "batch": "variance"}, None),
        ({"samples": 1, "batch": "mean"}, None),
        ({"samples": 1, "length": 9, "tensor": 2}, r"data\.sequence_length=9 is not a multiple of the 2 parts"),
    ],
)
def test_samples_are_within_the_data(options, says):
    """A split of 1,000 tokens, in samples of 10."""
    tensor = options.pop("tensor", 1)
    cfg = ImportanceConfig(
        output="o",
        data=DataConfig(path="d", sequence_length=options.pop("length", 10)),
        importance=ImportanceOptions(batch=options.pop("batch", "l2")),
        parallel=ParallelConfig(tensor=tensor, world_size=tensor, sequence=tensor > 1),
        **options,
    )
    data = SimpleNamespace(tokens={"train": 1000, "validation": 1}.get)
    if says:
        with pytest.raises(UserError, match=says):
            check_calibration(cfg, data)
    else:
        check_calibration(cfg, data)


@pytest.mark.parametrize("module", [checks, layer_checks])
@pytest.mark.parametrize("questions", [False, True])
def test_a_model_and_its_data_are_checked_before_they_meet(monkeypatch, module, questions):
    """Weights, layout, tokenizer and output; of an analysis full windows alone, and the tokenizer where something is asked."""
    asked = []
    folder = SimpleNamespace(path="m", shape=SOURCE, digest="of m")
    data = SimpleNamespace(digest="of d", tokens=lambda _: 10**6)
    for name, found in (
        ("open_model_folder", folder), ("open_data", data), ("check_weights", None), ("check_layout", None),
        ("check_same_tokenizer", None), ("check_tokenizer", None), ("check_command_output", None), ("check_calibration", None),
        ("check_sequence", None),
        ("tokenizer_stamps", {"file t": "1"}), ("task_stamps", {"file x": "2"}),
        ("WindowPlan", SimpleNamespace(whole=5)), ("QuestionFile", SimpleNamespace(digest="of q")),
    ):  # fmt: skip
        if hasattr(module, name):
            monkeypatch.setattr(
                module, name, lambda *given, name=name, found=found: asked.append((name, given)) or found
            )
    given = {"output": "o", "model": ModelConfig(path="m"), "data": DataConfig(path="d", sequence_length=8)}
    inputs = {"model": "of m", "data": "of d"}
    calls = {"check_weights": (folder,), "check_same_tokenizer": (data, {"model": "m"})}
    if module is checks:
        cfg = ImportanceConfig(**given)
        found = checks.check_importance(cfg)
        calls |= {
            "open_data": ("d", "train", SOURCE, 8),
            "check_layout": (SOURCE, Layout()),
            "check_calibration": (cfg, data),
        }
    else:
        cfg = LayersConfig(
            **given, block=[2, 1], split="train", samples=9, limit=3, questions="q.jsonl" if questions else None
        )
        found = layer_checks.check_layers(cfg)
        calls |= {
            "open_data": ("d", "train", SOURCE, 8),
            "check_layout": (SOURCE, Layout()),
            "check_sequence": (8, Layout()),
        }
        assert (found.count, found.lengths, len(found.blocks)) == (5, [1, 2], 7)
        if questions:
            inputs |= {"questions": "of q", "file t": "1", "file x": "2"}
            calls |= {"QuestionFile": ("q.jsonl", 3), "check_tokenizer": ("m",)}
    assert dict(asked) | calls | {"check_command_output": (cfg, inputs)} == dict(asked) and found.inputs == inputs
    assert (
        ("check_tokenizer" in dict(asked)) == ("QuestionFile" in dict(asked)) == (questions and module is layer_checks)
    )


def test_scores_are_as_wide_as_the_widest_layer():
    widths = {"ffn": 6, "kv_groups": 8, "hidden": 8}
    scores = {probe.score: np.ones((4, widths[probe.axis])) for probe in PROBES}
    whole = {**scores, "layers": np.ones(4), "vocab": np.ones(20)}
    check_scores(Scores(whole, "m"), UNEVEN, "m", "s")
    with pytest.raises(UserError, match="ffn is missing, misshapen or not finite"):
        check_scores(Scores({**whole, "ffn": np.ones((4, 4))}, "m"), UNEVEN, "m", "s")


SHARED = dict(zip(merge._SHARED, (32, "mean", "l2", "per_token", 8), strict=True))


def belongs(parts: list, **changes) -> None:
    """Whether three runs add up, of which the last differs in what is given."""
    manifests = [{"inputs": {"model": "m"}, "results": {**SHARED}} for _ in range(3)]
    for name, value in changes.items():
        manifests[-1]["inputs" if name == "model" else "results"][name] = value
    merge._check([Path(name) for name in "abc"], manifests, parts)


def part(first: object, samples: object, seed: object = 1, data: object = "d") -> dict:
    return {"data": data, "seed": seed, "first_sample": first, "samples": samples}


@pytest.mark.parametrize("name", [*SHARED, "model"])
def test_runs_that_add_up_have_everything_in_common(name):
    belongs([])
    with pytest.raises(
        UserError, match=r"scores=c .*another model than a" if name == "model" else f"scores=c have {name}=other, a has"
    ):
        belongs([], **{name: "other"})


@pytest.mark.parametrize(
    ("parts", "twice"),
    [
        ([part(0, 2), part(2, 3), part(5, 1)], None),
        ([part(5, 1), part(0, 2), part(2, 3)], None),
        ([part(5, 1), part(0, 3), part(2, 3)], 2),
        ([part(0, 9), part(3, 1), part(20, 1)], 3),
        ([part(0, 2), part(1, 2, seed=2)], None),
        ([part(0, 2), part(1, 2, data="e")], None),
        ([part(0, 2, seed=2), part(0, 2), part(1, 2, seed=2)], 1),
        ([part(4, 1), part(4, 1)], 4),
    ],
)
def test_no_sample_counts_twice(parts, twice):
    """In whatever order parts are; those of another seed or other data are others."""
    if twice is None:
        belongs(parts)
        return
    with pytest.raises(UserError, match=f"sample {twice} was measured twice"):
        belongs(parts)


@pytest.mark.parametrize(
    "odd", [None, part("0", 1), part(0, True), part(0, 1, seed=None), part(0, 1, data=3), {"data": "d"}]
)
def test_parts_that_are_damaged_are_not_added(odd):
    with pytest.raises(UserError, match="parts in its manifest are damaged: measure again"):
        belongs([part(0, 1), odd])


# What a recorder sees


@pytest.fixture
def recorder(monkeypatch):
    """Of no layer, in a context-parallel group of 3."""
    monkeypatch.setattr(hooks.ps, "get_context_parallel_world_size", lambda: 3)
    return hooks.Recorder([], head_dim=8, sequence="mean", heads="per_token", sequence_parallel=False)


def test_broken_weights_show_after_the_first_micro_batch(recorder, monkeypatch):
    asked = []
    monkeypatch.setattr(recorder, "check_finite", lambda: asked.append(recorder.micro_batches))
    for number in range(4):
        valid = torch.full((2,), float(number))
        recorder.begin({"tokens": torch.zeros(2, 7), "valid": valid})
        assert recorder.tokens == 21 and recorder.valid is valid and recorder.micro_batches == number + 1
    assert asked == [1]


def statistic(value: float) -> BatchStatistic:
    return BatchStatistic(torch.zeros(2), torch.tensor([1.0, value]), torch.tensor(1.0))


@pytest.mark.parametrize("odd", [torch.inf, torch.nan])
def test_the_first_layer_that_is_not_finite_is_named(recorder, odd):
    """Whichever chunk or score it is seen in; a chunk that has seen nothing has nothing to say."""
    seen = {("ffn", 5): odd, ("ffn", 3): 1.0, ("layers", 4): odd, ("heads", 6): odd}
    found = [(key, statistic(value)) for key, value in seen.items()]
    whole = torch.cat([one.squares for _, one in found])
    recorder.chunks = [
        SimpleNamespace(statistic=None, statistics=lambda: []),
        SimpleNamespace(statistic=SimpleNamespace(squares=whole), statistics=lambda: found),
    ]
    with pytest.raises(UserError, match="layer 4: non-finite activations at layers; check the model"):
        recorder.check_finite()
    recorder.chunks[1].statistic.squares = torch.ones(3)
    recorder.check_finite()


def test_a_row_of_sums_has_each_score_of_each_layer_in_its_place():
    """Block Influence at the end, a number a layer."""
    chunk = object.__new__(hooks._Chunk)
    chunk.numbers = [4, 5]
    names = [probe.score for probe in hooks._ORDER]
    chunk.widths = [*(2 + i for i in range(len(names)) for _ in chunk.numbers), 1, 1]
    total = torch.arange(float(sum(chunk.widths)))
    chunk.statistic = BatchStatistic(total, 100 + total, torch.tensor(7.0))
    found, start = dict(chunk.statistics()), 0
    assert list(found) == [(name, number) for name in [*names, "layers"] for number in (4, 5)]
    for width, one in zip(chunk.widths, found.values(), strict=True):
        assert one.total.tolist() == list(range(start, start + width)) and (one.squares == one.total + 100).all()
        assert one.count == 7
        start += width
    chunk.statistic = None
    assert list(chunk.statistics()) == []


def test_nothing_of_a_recorder_stays_on_the_model(recorder):
    removed = []
    chunk = object.__new__(hooks._Chunk)
    chunk.handles = [SimpleNamespace(remove=lambda n=n: removed.append(n)) for n in range(3)]
    chunk.fused = [SimpleNamespace(return_layernorm_output=True) for _ in range(2)]
    recorder.chunks = [chunk, SimpleNamespace(close=lambda: removed.append("other"))]
    recorder.close()
    assert removed == [0, 1, 2, "other"] and not any(linear.return_layernorm_output for linear in chunk.fused)


# What is shown


def test_narrow_layers_end_in_zeros():
    assert measure._stack([np.array([1.0, 2.0]), np.array([3.0]), np.array([4.0, 5.0])]).tolist() == [
        [1, 2],
        [3, 0],
        [4, 5],
    ]


def test_each_score_is_shown_with_its_lowest_middle_and_highest(monkeypatch):
    shown = []
    monkeypatch.setattr(measure, "print_table", lambda *table: shown.append(table))
    scores = {"ffn": np.array([[4.0, 1.0, 2.0], [9.0, 2.0, 2.0]]), "layers": np.array([0.25, 0.75])}
    measure._print("out", scores, {"samples": 5, "tokens_per_second": 1234})
    rows = [["ffn", "(2, 3)", 1.0, 2.0, 9.0], ["layers", "(2,)", 0.25, 0.5, 0.75]]
    assert shown == [("out: 5 samples, 1,234 tokens/s", ["score", "shape", "lowest", "median", "highest"], rows)]
    shown.clear()
    monkeypatch.setattr(measure, "foretell_dtype", lambda precision, device, shape: shown.append((precision, shape)))
    cfg = ImportanceConfig(
        output="o",
        model=ModelConfig(path="m"),
        data=DataConfig(path="d", sequence_length=32),
        samples=7,
        dry_run=True,
        device="cpu",
    )
    checked = SimpleNamespace(layout="as laid out", folder=SimpleNamespace(shape="s"), data=None, inputs={})
    measure_importance(cfg, checked)
    rows = [["samples", 7], ["tokens", 224], ["layout", "as laid out"]]
    assert shown == [("would be measured", ["", "value"], rows), ("auto", "s")]
