"""What a chain is asked for: what is a command and what is none, its rounds, and the shapes and text that they meet."""

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from minitron_megatron import compress_given, compress_plan, compress_rounds, compress_source
from minitron_megatron.chosen import Choices, Text
from minitron_megatron.composing import Stage
from minitron_megatron.compress_given import check_asked, given_limits, is_rehearsal, name_of, own_options
from minitron_megatron.compress_rounds import Round, check_round, plan_rounds, read_rounds
from minitron_megatron.compress_source import Source
from minitron_megatron.config import BudgetConfig, CompressConfig, ModelConfig, RoundConfig, TargetConfig
from minitron_megatron.errors import UserError
from tests.test_bounds import SMALL_SHAPE

STUDENT = SMALL_SHAPE.resized(num_layers=2)


def stage(command: str, output: Path, config: object = None, processes: int = 1) -> Stage:
    return Stage(command, (f"a={command}",), output, processes, config)


def a_round(root: Path, name: str, commands: str) -> Round:
    at = root / name
    trains = SimpleNamespace(data=SimpleNamespace(sequence_length=8), trainer=SimpleNamespace(steps=3, tokens=None,
                                                                                              global_batch_size=4))  # fmt: skip
    configs = {"distill": trains, "evaluate": SimpleNamespace(split="validation")}
    stages = {one: stage(one, at / one, configs.get(one), 2 if one == "distill" else 1) for one in commands.split()}
    return Round(name, SMALL_SHAPE, SMALL_SHAPE, STUDENT, stages)


# What is asked for

GIVEN = {"hf": "h", "input": "t", "budget": BudgetConfig(parameters=5)}


def asks(**options) -> CompressConfig:
    return CompressConfig(output="x", **{**GIVEN, **options})


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, None),
        ({"hf": None, "model": ModelConfig(path="m")}, None),
        ({"model": ModelConfig(path="m")}, "hf= and model=: give one of them"),
        ({"model": ModelConfig(family="llama")}, "hf= and model=: give one of them"),
        ({"hf": None}, "no model: give hf=FOLDER"),
        ({"input": None}, "no text: give input=FILE"),
        ({"hf": None, "input": None, "dry_run": True}, None),
        ({"hf": None, "input": None, "dry_run": True, "model": ModelConfig(path="m")}, "no text"),
        ({"rounds": [1]}, "budget.parameters= is for one round, and chain= or rounds="),
        ({"rounds": [1], "budget": BudgetConfig()}, "rounds"),
        (
            {"rounds": [1], "budget": BudgetConfig(), "target": TargetConfig(hidden_size=8)},
            "target.hidden_size= is for one round",
        ),
        ({"target": TargetConfig(hidden_size=8)}, "budget.parameters= and target.hidden_size=: give one of them"),
        ({"target": TargetConfig(hidden_size=8), "budget": BudgetConfig()}, None),
        ({"budget": BudgetConfig()}, "how small is not said"),
        ({"budget": BudgetConfig(), "prune": {"target.hidden_size": 8}}, None),
        ({"prepare_data": {"text_key": "x"}}, None),
        ({"search": {"keep": 3}}, None),
        (
            {"search": {"keep": 3}, "budget": BudgetConfig(), "target": TargetConfig(hidden_size=8)},
            "search.keep= is of a stage",
        ),
        (
            {"export_hf": {"license": "x"}, "export": False},
            "export_hf.license= is of a stage that does not run without export",
        ),
        ({"export_hf": {"license": "x"}}, None),
        ({"search": {"budget.parameters": 3}}, "search.budget.parameters= would be a second budget"),
    ],
)
def test_what_is_a_command_and_what_is_none(options, says):
    cfg = asks(**options)
    if says is None or says == "rounds":
        assert check_asked(cfg) is (says is None)
    else:
        with pytest.raises(UserError, match=says):
            check_asked(cfg)
    assert is_rehearsal(cfg) is (cfg.dry_run and cfg.hf is None and cfg.model.path is None)


@pytest.mark.parametrize(
    "name", "parameters non_embedding_parameters memory_gib flops_per_token latency_ms tokens_per_second table".split()
)
def test_every_limit_is_a_budget(name):
    assert given_limits(BudgetConfig(**{name: 1})) == [name]


def test_what_says_how_is_no_budget():
    assert given_limits(BudgetConfig(batch=9, context=9, at_least=0.5)) == []


@pytest.mark.parametrize(
    "key", "model hf input teacher student scores plan folders output resume dry_run hydra model.path".split()
)
def test_what_a_chain_sets_itself_is_not_the_users(key):
    with pytest.raises(UserError, match=f"{key} is set by the chain: leave it out"):
        own_options(asks(importance={"seed": 1, key: 1}), "importance")
    assert own_options(asks(importance={"seed": 1, "data": {"path": 2}}), "importance") == {"seed": 1, "data.path": 2}


def test_stages_are_called_by_their_rounds():
    assert [name_of("", "prune"), name_of("a", "prune"), name_of("a"), name_of("")] == [
        "prune",
        "round a, prune",
        "round a",
        "",
    ]


@pytest.mark.parametrize(
    ("name", "fine"),
    [("a", True), ("teachers", True), ("a/b", False), (".a", False), ("..", False), ("", False), (None, False),
     *((name, False) for name in ("stages.json", "chain.json", "chosen.json", "teacher", "data", "hf", "report"))],
)  # fmt: skip
def test_names_of_rounds_are_those_of_folders(name, fine):
    if fine:
        assert [one.name for one in read_rounds([{"name": name}, {"name": "b", "teacher": "first"}])] == [name, "b"]
    else:
        with pytest.raises(UserError):
            read_rounds([{"name": name}])
    for odd in (
        {},
        "x",
        [],
        None,
        [3],
        [{"name": "b"}, {"name": "b"}],
        [{"name": "b", "teacher": "none"}],
        [{"name": "b", "x": 1}],
    ):
        with pytest.raises(UserError):
            read_rounds(odd)
    assert read_rounds([{"name": 3}])[0] == RoundConfig(name="3")


# Shapes and sizes that follow


def test_each_round_is_of_the_student_before_and_taught_by_it_or_by_the_first(monkeypatch):
    composed = []
    config = SimpleNamespace(target=SimpleNamespace(), drop_layers=[3], prune=None, plan=None)

    def compose(cfg, command, inputs, own, output):
        composed.append((command, dict(inputs), dict(own), output))
        return Stage(command, (), output, 1, config)

    monkeypatch.setattr(compress_rounds, "compose_stage", compose)
    monkeypatch.setattr(
        compress_rounds, "target_shape", lambda shape, *_: shape.resized(num_layers=shape.num_layers - 1)
    )
    rounds = [
        {"name": "a", "prune": {"target.hidden_size": 8}, "importance": {"samples": 6}},
        {"name": "b", "prune": {"x": 1}, "teacher": "source"}, {"name": "c", "prune": {"x": 1}, "teacher": "first"},
    ]  # fmt: skip
    source = Source("first", SMALL_SHAPE, None, True, (), {})
    cfg = CompressConfig(output="o", rounds=rounds, importance={"samples": 4, "seed": 1})
    a, b, c = plan_rounds(cfg, source)
    assert [one.source.num_layers for one in (a, b, c)] == [4, 3, 2] and [
        one.target.num_layers for one in (a, b, c)
    ] == [3, 2, 1]
    assert [one.teacher.num_layers for one in (a, b, c)] == [4, 3, 4] and list(a.stages) == [
        "importance", "prune", "distill", "evaluate",
    ]  # fmt: skip
    at, ao = Path("o/a/distilled"), Path("o/b/distilled")
    assert [one[:2] for one in composed] == [
        ("importance", {"model": "first"}), ("prune", {"model": "first", "scores": Path("o/a/scores")}),
        ("distill", {"teacher": "first", "student": Path("o/a/pruned")}), ("evaluate", {"model": at, "teacher": "first"}),
        ("importance", {"model": str(at)}), ("prune", {"model": str(at), "scores": Path("o/b/scores")}),
        ("distill", {"teacher": str(at), "student": Path("o/b/pruned")}), ("evaluate", {"model": ao, "teacher": str(at)}),
        ("importance", {"model": str(ao)}), ("prune", {"model": str(ao), "scores": Path("o/c/scores")}),
        ("distill", {"teacher": "first", "student": Path("o/c/pruned")}),
        ("evaluate", {"model": Path("o/c/distilled"), "teacher": "first"}),
    ]  # fmt: skip
    assert [one[2] for one in composed if one[0] == "importance"] == [
        {"samples": 6, "seed": 1}, {"samples": 4, "seed": 1}, {"samples": 4, "seed": 1},
    ]  # fmt: skip
    del composed[:]
    chosen = Choices({"distill": {"optim.lr": 1.0}, "prune": {"prune.heads": 1}})
    (one,) = plan_rounds(
        CompressConfig(output="o", perplexity=False, target=TargetConfig(hidden_size=8)), source, chosen
    )
    assert list(one.stages) == ["importance", "prune", "distill"] and one.stages["prune"].output == Path("o/pruned")
    assert [one[2] for one in composed] == [{}, {"target.hidden_size": 8, "prune.heads": 1}, {"optim.lr": 1.0}]


@pytest.mark.parametrize(
    ("train", "exact", "tokens", "most", "fine"),
    [(100, True, 100, 1.0, True), (100, True, 101, 1.0, True),
     (100, True, 120, 1.0, True), (100, True, 121, 1.0, False), (100, False, 150, 1.0, True), (100, False, 151, 1.0, False),
     (100, True, 480, 4.0, True), (100, True, 481, 4.0, False), (0, True, 1, 1.0, True), (0, True, 2, 1.0, False)],
)  # fmt: skip
def test_text_that_is_not_prepared_may_be_a_little_off(caplog, train, exact, tokens, most, fine):
    """Which is said where it counts."""
    if fine:
        compress_rounds._check_epochs(Text(train, 0, exact), tokens, most)
        above = tokens > most * max(1, train)
        said = rf"distill may be refused once the text is tokenised, for data.max_epochs={most:g}: the run takes {tokens} tokens"
        assert [message.startswith(said) for message in caplog.messages] == [True] * above
    else:
        with pytest.raises(
            UserError, match=rf"data.max_epochs={math.ceil(tokens / max(1, train) * (1.2 if exact else 1.5))}$"
        ):
            compress_rounds._check_epochs(Text(train, 0, exact), tokens, most)


@pytest.mark.parametrize(
    ("train", "validation", "splits", "samples", "says"),
    [
        (81, 0, ["train"], 8, None), (80, 0, ["train"], 8, "importance.samples=8 at most, or lower"),
        (9, 0, ["train"], 8, "80 needed|give more text, or lower"), (10, 0, ["train"], 1, "give more text, or lower"),
        (11, 11, ["train", "validation"], 1, None),
        (11, 10, ["train", "validation"], 1, "10 tokens for the validation split, 1 samples of 10 .*: give more text, a larger"),
    ],
)  # fmt: skip
def test_text_has_a_token_more_than_its_samples(train, validation, splits, samples, says):
    text = Text(train, validation, True)
    if says is None:
        compress_rounds._check_text(text, 10, splits, samples)
    else:
        with pytest.raises(UserError, match=says):
            compress_rounds._check_text(text, 10, splits, samples)
        with pytest.raises(UserError, match=r"input= has about \d"):
            compress_rounds._check_text(replace(text, exact=False), 10, splits, samples)


def test_stages_are_checked_with_the_models_and_the_data_that_they_meet(monkeypatch):
    seen = []
    for name in ("check_pair", "check_layout", "check_sequence", "number_of_steps", "check_data", "check_enough"):
        monkeypatch.setattr(compress_rounds, name, lambda *given, name=name: seen.append((name, *given)) or "data")
    for name in ("_check_text", "_check_epochs"):
        monkeypatch.setattr(compress_rounds, name, lambda *given, name=name: seen.append((name, *given[1:])))
    monkeypatch.setattr(compress_rounds.Layout, "from_config", lambda parallel, processes: f"layout of {processes}")
    monkeypatch.setattr(Round, "tokens", 960)
    data = SimpleNamespace(sequence_length=8, max_epochs=2.0)
    cfg = SimpleNamespace(parallel=None, data=data, first_sample=3, samples=5, split="test",
                          trainer=SimpleNamespace(validation_samples=4))  # fmt: skip
    teacher = SMALL_SHAPE.resized(num_layers=3)
    one = a_round(Path("o"), "a", "importance prune distill evaluate")
    one = replace(one, teacher=teacher, stages={k: replace(s, config=cfg) for k, s in one.stages.items()})
    check_round(one, Source("m", SMALL_SHAPE, None, True, (), {}))
    assert seen == [
        ("check_layout", SMALL_SHAPE, "layout of 1"), ("check_sequence", 8, "layout of 1"),
        ("check_data", cfg, ["train"], STUDENT, 8),
        ("number_of_steps", cfg), ("check_pair", teacher, STUDENT, cfg, "layout of 2"),
        ("check_data", cfg, ["train", "validation"], STUDENT, 1), ("check_enough", "data", 960, 2.0),
        ("check_layout", STUDENT, "layout of 1"), ("check_layout", teacher, "layout of 1"), ("check_sequence", 8, "layout of 1"),
        ("check_data", cfg, ["test"], STUDENT, 1),
    ]  # fmt: skip
    seen.clear()
    cfg.trainer.validation_samples = 0
    check_round(one, Source("m", SMALL_SHAPE, Text(1, 1, True), False, (), {}))
    assert [call for call in seen if call[0].startswith("_")] == [
        ("_check_text", 8, ["train"], 8), ("_check_text", 8, ["train"], 1), ("_check_epochs", 960, 2.0),
        ("_check_text", 8, ["test"], 1),
    ]  # fmt: skip
    seen.clear()
    check_round(one, Source("m", SMALL_SHAPE, None, False, (), {}))
    assert not [call for call in seen if call[0] in ("check_data", "_check_text", "check_enough", "_check_epochs")]


def test_the_largest_shape_within_the_budget_stands_for_the_one_that_is_searched():
    """Of several limits the one counts of which most is used."""
    costs = {"a": [10.0, 8.0, 9.0, 3.0], "b": [1.0, 5.0, 2.0, 4.0]}
    space = SimpleNamespace(numbers=lambda: np.array([[0, 1], [2, 3]]), lengths=list, target=lambda number: number)

    def largest(**limits: float) -> int:
        budget = SimpleNamespace(
            limits=limits, cost=lambda name, numbers: compress_given.np.array([costs[name][n] for n in numbers])
        )
        space.numbers = lambda: iter(compress_given.np.array([[0, 1], [2, 3]]))
        return int(compress_given._largest(space, budget))

    assert [largest(a=10), largest(a=9), largest(a=8.5), largest(b=4)] == [0, 2, 1, 3]
    assert [largest(a=10, b=2), largest(a=9, b=4)] == [0, 2]


@pytest.mark.parametrize(("size", "fraction"), [(7_999_999, 0.1), (8_000_000, 0.05)])
def test_of_little_text_more_is_for_validation(monkeypatch, tmp_path, size, fraction):
    text = tmp_path / "text.jsonl"
    with open(text, "wb") as file:
        file.truncate(size)
    own = {}
    monkeypatch.setattr(compress_source, "find_inputs", lambda _: [text])
    monkeypatch.setattr(compress_source, "stamp_of_files", lambda _: "stamp")
    monkeypatch.setattr(compress_source, "check_fraction", lambda _: None)

    def compose(cfg, command, inputs, options, output):
        own.update(options, command=command, **inputs)
        return Stage(command, (), output, 1, SimpleNamespace(validation_fraction=options["validation_fraction"]))

    monkeypatch.setattr(compress_source, "compose_stage", compose)
    cfg = CompressConfig(output="o", input=str(text), dry_run=True, model=ModelConfig(path=None))
    monkeypatch.setattr(compress_source, "_open_model", lambda _: (compress_given.NO_MODEL, SMALL_SHAPE, {}, ()))
    source = compress_source.open_source(cfg)
    assert own == {
        "validation_fraction": fraction, "processes": 1, "command": "prepare_data", "model": "MODEL", "input": str(text),
    }  # fmt: skip
    assert (source.ready, source.text, source.files, source.inputs) == (False, None, (text,), {"data": "stamp"})
    assert compress_source.count_text(cfg, source) is source
    given = compress_source.open_source(replace(cfg, prepare_data={"validation_fraction": 0.5}))
    assert given.stages[-1].config.validation_fraction == 0.5


def test_the_data_are_where_they_are_or_are_going_to_be():
    for options, path in (({"input": None}, "DATA"), ({}, "x/data")):
        assert compress_plan._with_data(asks(**options)).data.path == path
    given = asks(input=None)
    assert compress_plan._with_data(replace(given, data=replace(given.data, path="d"))).data.path == "d"
    assert compress_plan._with_epochs(given).data.max_epochs == 1.0
    assert compress_plan._with_epochs(replace(given, data=replace(given.data, max_epochs=2.5))).data.max_epochs == 2.5
