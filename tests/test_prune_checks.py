"""What pruning decides before and beside the cut: what is measured and opened, what is warned of, what a dry run foresees."""

import contextlib
from dataclasses import fields
from types import SimpleNamespace

import numpy as np
import pytest

from minitron_megatron.config import (
    BatchConfig,
    CalibrationConfig,
    ImportanceConfig,
    ImportanceOptions,
    ModelConfig,
    ParallelConfig,
    PruneConfig,
    PruneOptions,
    TargetConfig,
)
from minitron_megatron.errors import UserError
from minitron_megatron.models.axes import count_parameters, flops_per_token
from minitron_megatron.parallel.layout import Layout
from minitron_megatron.prune import checks, foresee, prune
from minitron_megatron.prune.checks import Goal, check_prune, importance_command
from minitron_megatron.prune.compare import cut_variants
from minitron_megatron.prune.plan import kept_digest
from minitron_megatron.prune.select import TARGETS, Kept
from tests.test_axes import shape
from tests.test_selecting import SOURCE, scores

# As large as tensor parallelism of 4 divides.
WIDE = SOURCE.resized(hidden_size=64, ffn_hidden_size=48)
FOLDER = SimpleNamespace(shape=SOURCE, digest="m", path="model", tokenizer_path="t")


def goal(target=SOURCE, **more) -> Goal:
    given = {"drop_layers": [], "data": None, "kept": None, "measured": False, "inputs": {}}
    return Goal(FOLDER, target, **{**given, **more})


def config(**options) -> PruneConfig:
    return PruneConfig(**{"output": "out", "model": ModelConfig(path="model"), **options})


def said(caplog) -> list[str]:
    found = caplog.messages[:]
    caplog.clear()
    return found


# What is compared, and what a cut is made of


def test_losses_are_of_the_cut_alone_and_with_merged_heads_where_they_could_be():
    kept, plain = Kept(np.arange(2)), Kept(np.arange(3))
    merged = Kept(np.arange(2), heads=np.zeros((4, 2, 1)), partners=np.ones((4, 2, 1)))
    for other in (None, plain):
        found = cut_variants(kept, other)
        assert list(found) == ["pruned"] and found["pruned"] is kept
    found = cut_variants(kept, merged)
    assert list(found) == ["pruned", "pruned, heads merged"] and found["pruned, heads merged"] is merged
    assert found["pruned"].partners is None and found["pruned"].heads is merged.heads


@pytest.mark.parametrize(
    ("sizes", "options", "losses", "partners"),
    [
        ({"num_attention_heads": 4}, PruneOptions(), 0, None),
        ({"num_attention_heads": 4}, PruneOptions(), 2, (4, 4, 1)),
        ({"num_attention_heads": 2, "num_query_groups": 2}, PruneOptions(groups="mean"), 2, None),
        ({"hidden_size": 4}, PruneOptions(), 2, None),
    ],
)
def test_merged_heads_are_chosen_for_their_loss_alone(monkeypatch, sizes, options, losses, partners):
    """None where merging is impossible; what is cut has none of them."""
    read = []
    monkeypatch.setattr(prune, "load_scores", lambda where: read.append(where) or scores())
    monkeypatch.setattr(prune, "check_scores", lambda *given: read.append(given[1:]))
    cfg = config(target=TargetConfig(**sizes), prune=options, scores="s", loss_samples=losses)
    kept, merged = prune.decide(cfg, goal(SOURCE.resized(**sizes)))
    assert read == ["s", (SOURCE, "m", "s")] and kept.partners is None
    assert (None if merged is None or merged.partners is None else merged.partners.shape) == partners
    assert (merged is None) == (not losses or sizes.get("num_query_groups") == 2)
    # A plan is what it says, with whatever it merges; where nothing is left to choose, nothing is read.
    planned = Kept(np.arange(4))
    assert prune.decide(cfg, goal(kept=planned)) == (planned, planned)
    assert prune.decide(config(drop_layers=[1]), goal(SOURCE.resized(num_layers=3), drop_layers=[1]))[1] is None
    assert len(read) == 2


def test_scores_are_measured_where_some_are_needed_and_none_are_given(monkeypatch):
    measured, read = [], []
    monkeypatch.setattr("minitron_megatron.importance.measure.measure_importance", measured.append)
    monkeypatch.setattr(prune, "_by_scores", lambda cfg, goal, where: read.append(where))
    smaller = SOURCE.resized(hidden_size=4)
    prune.decide(config(scores="s"), goal(smaller))
    assert (measured, read) == ([], ["s"])
    prune.decide(config(output="o/"), goal(smaller, measured=True))
    assert [one.output for one in measured] == ["o_scores"] and read[1:] == ["o_scores"]


def test_scores_are_measured_by_the_same_options():
    """Every option that both commands have, but for what each writes and where a run of it begins."""
    cfg = config(
        output="some/where/",
        parallel=ParallelConfig(tensor=2),
        seed=7,
        device="cpu",
        precision="bf16",
        resume=False,
        model=ModelConfig(path="model", engine="local"),
        data=CalibrationConfig(path="data", sequence_length=77),
        samples=5,
        trainer=BatchConfig(micro_batch_size=3),
        importance=ImportanceOptions(sequence="l2", batch="mean", heads="per_channel"),
    )
    found = importance_command(cfg)
    own = {"output", "data", "first_sample", "dry_run", "verify"}
    for name in {field.name for field in fields(ImportanceConfig)} - own:
        assert getattr(found, name) == getattr(cfg, name), name
    assert (found.output, found.first_sample, found.dry_run) == ("some/where_scores", 0, False)
    assert (found.data.path, found.data.sequence_length) == ("data", 77)


# Where it runs


@pytest.mark.parametrize("losses", [0, 4])
@pytest.mark.parametrize("measures", [False, True])
@pytest.mark.parametrize("dry_run", [False, True])
def test_a_device_is_asked_for_where_models_run(monkeypatch, losses, measures, dry_run):
    """A cut by scores that are there runs none; what runs some is refused before anything is read."""

    class Begun(Exception):
        pass

    def begin(*_):
        raise Begun

    def none_here(device):
        raise UserError(f"no {device}")

    monkeypatch.setattr(prune, "pick_device", none_here)
    monkeypatch.setattr(prune, "_one_group", begin)
    monkeypatch.setattr(prune, "_dry_run", begin)
    this = SimpleNamespace(runs_models=measures)
    with pytest.raises(UserError if losses or measures else Begun):
        prune.prune_model(config(loss_samples=losses, device="cuda", dry_run=dry_run), this)


@pytest.mark.parametrize(("losses", "measures", "processes", "group"), [
    (0, False, 1, "tool"), (0, False, 2, "tool"), (4, False, 1, "tool"), (0, True, 1, "tool"), (4, True, 1, "tool"),
    (4, False, 2, "cpu"), (0, True, 2, "cpu"), (4, True, 2, "cpu"),
])  # fmt: skip
def test_several_processes_are_a_group_of_the_device_where_models_run(monkeypatch, losses, measures, processes, group):
    made = []

    @contextlib.contextmanager
    def grouped(device=None):
        made.append(getattr(device, "type", "tool"))
        yield

    monkeypatch.setattr(prune, "tool_job", grouped)
    monkeypatch.setattr(prune, "process_group", grouped)
    monkeypatch.setattr(prune, "pick_device", lambda _: SimpleNamespace(type="cpu"))
    monkeypatch.setattr(prune, "world_size_from_env", lambda: processes)
    with prune._one_group(config(loss_samples=losses), SimpleNamespace(runs_models=measures)):
        assert made == [group]


@pytest.mark.parametrize(("measures", "data", "losses", "calls", "line"), [
    (False, None, 0, ["decide", "output", "foresee"], None),
    (False, "d", 4, ["decide", "output", "foresee", "dtype"], None),
    (True, "d", 0, ["foresee", "dtype"], "importance would be measured first, on 9 samples of d"),
    (True, None, 0, ["foresee", "dtype"], "the run itself needs scores=, or data.path= to measure them"),
])  # fmt: skip
def test_a_dry_run_decides_what_needs_no_model(monkeypatch, caplog, measures, data, losses, calls, line):
    """And looks at an output that is there by it; what would be measured is said."""
    caplog.set_level("INFO", "minitron_megatron")
    made = []
    for name, word in (("check_command_output", "output"), ("foresee", "foresee"), ("foretell_dtype", "dtype")):
        monkeypatch.setattr(prune, name, lambda *_, word=word: made.append(word))
    monkeypatch.setattr(prune, "decide", lambda *_: (made.append("decide") or Kept(np.arange(4)), None))
    monkeypatch.setattr(prune, "_inputs", lambda *_: {})
    monkeypatch.setattr(prune, "pick_device", lambda device: device)
    this = SimpleNamespace(runs_models=measures, folder=FOLDER, target=SOURCE)
    prune._dry_run(config(data=CalibrationConfig(path=data), loss_samples=losses, samples=9), this)
    assert made == calls and said(caplog) == ([line] if line else [])


# What is checked


@pytest.mark.parametrize(
    ("options", "opened", "inputs"),
    [
        ({"scores": "s"}, [], {"model", "scores"}),
        ({"scores": "s", "data": "d"}, [], {"model", "scores"}),
        ({"scores": "s", "data": "d", "loss_samples": 2}, ["train", "validation"], {"model", "scores", "data"}),
        ({"data": "d"}, ["train"], {"model"}),
        ({"data": "d", "loss_samples": 2}, ["train", "validation"], {"model", "data"}),
        ({"drop_layers": [1]}, [], {"model"}),
        ({"scores": "s", "layers": "l"}, [], {"model", "layers"}),
    ],
)
def test_what_is_read_is_opened_and_is_an_input(monkeypatch, options, opened, inputs):
    """Data where losses or scores are measured on them, scores where they choose; the companions of a model always."""
    splits, compared = [], []
    data = SimpleNamespace(digest="of data", tokens=lambda _: 10**9)
    for name, found in (
        ("open_model_folder", FOLDER), ("check_weights", None), ("check_same_tokenizer", None), ("check_scores", None),
        ("companion_stamps", {"file x": "1"}), ("load_scores", scores()), ("read_manifest", {"digest": "of it"}),
        ("data_digest", "of data"),
    ):  # fmt: skip
        monkeypatch.setattr(checks, name, lambda *_, found=found: found)
    monkeypatch.setattr(checks, "open_data", lambda path, split, *_: splits.append(split) or data)
    monkeypatch.setattr(checks, "check_command_output", lambda _, given: compared.append(given))
    analysis = SimpleNamespace(check_model=lambda _: None, best_block=lambda *_: [2])
    monkeypatch.setattr(checks, "load_layer_analysis", lambda _: analysis)
    sizes = {"num_layers": 3} if "layers" in options else {} if "drop_layers" in options else {"hidden_size": 4}
    calibration = CalibrationConfig(path=options.pop("data", None), sequence_length=8)
    found = check_prune(config(target=TargetConfig(**sizes), data=calibration, samples=3, **options))
    assert splits == opened and found.inputs.keys() == inputs | {"file x"} and compared == [found.inputs]
    assert found.measured == ("scores" not in options) and found.drop_layers == options.get(
        "drop_layers", [2] * ("layers" in options)
    )
    assert found.target == SOURCE.resized(**(sizes or {"num_layers": 3}))


@pytest.mark.parametrize(("options", "says"), [
    ({}, None),
    ({"scores": "s"}, "plan= and scores= exclude each other: a plan repeats a pruning without scores"),
    ({"drop_layers": [0]}, "plan= excludes target=, layers= and drop_layers=: edit the plan's own target"),
    ({"layers": "l"}, "plan= excludes target=, layers= and drop_layers="),
    ({"target": TargetConfig(vocab_size=3)}, "plan= excludes target=, layers= and drop_layers="),
])  # fmt: skip
def test_a_plan_stands_alone(options, says):
    if says is None:
        checks._check_plan_alone(config(plan="p"))
        return
    with pytest.raises(UserError) as refused:
        checks._check_plan_alone(config(plan="p", **options))
    assert says in str(refused.value)


@pytest.mark.parametrize(("count", "asked"), [(None, None), (5, None), (4, None), (3, 1), (1, 3)])
def test_an_analysis_names_as_many_layers_as_go(monkeypatch, count, asked):
    calls = []
    analysis = SimpleNamespace(
        check_model=calls.append, best_block=lambda *given: calls.append(given) or range(1, 1 + given[0])
    )
    monkeypatch.setattr(checks, "load_layer_analysis", lambda path: calls.append(path) or analysis)
    options = PruneOptions(judge="bi", keep_last_layers=2)
    cfg = config(layers="l", target=TargetConfig(num_layers=count), prune=options)
    if asked is None:
        with pytest.raises(UserError, match=r"layers=l needs target\.num_layers= below the model's 4"):
            checks._best_block(cfg, FOLDER)
        return
    assert checks._best_block(cfg, FOLDER) == list(range(1, 1 + asked))
    assert calls == ["l", "m", (asked, "bi", 2)]
    assert checks._best_block(config(target=TargetConfig(num_layers=count)), FOLDER) == []


@pytest.mark.parametrize(
    ("options", "target", "measured", "says"),
    [
        ({}, {}, False, None),
        ({}, {"hidden_size": 4}, False, None),
        ({}, {"hidden_size": 4}, True, "scores= is missing: give the output of importance, or data.path= to measure them now"),
        ({"dry_run": True}, {"hidden_size": 4}, True, None),
        ({"loss_samples": 2}, {}, False, "loss_samples= needs data.path=: the loss is measured on its validation split"),
        ({"loss_samples": 2, "data": "d"}, {"vocab_size": 3}, False, "loss_samples= and target.vocab_size= exclude each other"),
        ({"loss_samples": 2, "data": "d"}, {}, False, None),
        ({"tensor": 3}, {"hidden_size": 4}, False, None),
        ({"tensor": 3, "data": "d"}, {"hidden_size": 4}, True, "parallel.tensor=3 does not divide num_query_groups=4 of"),
        ({"tensor": 3, "loss_samples": 2, "data": "d"}, {}, False, "does not divide num_query_groups=4 of the source model"),
        ({"sequence": True, "tensor": 2, "data": "d", "length": 7}, {"hidden_size": 4}, True, "data.sequence_length=7 is not a"),
    ],
)  # fmt: skip
def test_what_is_measured_can_be(monkeypatch, options, target, measured, says):
    opened, judged = [], []
    monkeypatch.setattr(checks, "open_data", lambda *given: opened.append(given))
    monkeypatch.setattr(checks, "check_calibration", lambda *given: judged.append(given))
    length, path = options.pop("length", 8), options.pop("data", None)
    tensor = options.pop("tensor", 1)
    parallel = ParallelConfig(tensor=tensor, world_size=tensor, sequence=options.pop("sequence", False))
    cfg = config(data=CalibrationConfig(path=path, sequence_length=length), parallel=parallel, **options)
    this = goal(SOURCE.resized(**target), measured=measured, data="opened" if path else None)
    if says:
        with pytest.raises(UserError) as refused:
            checks._check_measuring(cfg, this)
        assert says in str(refused.value)
        return
    checks._check_measuring(cfg, this)
    assert opened == ([("d", "validation", SOURCE, 8)] if cfg.loss_samples else []) and judged == []
    checks._check_measuring(
        config(data=CalibrationConfig(path="d", sequence_length=8)), goal(WIDE, data="o", measured=True)
    )
    assert judged == [(importance_command(config(data=CalibrationConfig(path="d", sequence_length=8))), "o")]


# What is warned of


HEADS_STAY = "prune.heads=merge does nothing: the target keeps all 8 heads"
GROUPS_STAY = "prune.groups=mean does nothing: the target keeps all 4 groups"


@pytest.mark.parametrize(
    ("sizes", "options", "lines"),
    [
        ({}, {"heads": "merge", "groups": "mean"}, [HEADS_STAY, GROUPS_STAY]),
        ({"num_attention_heads": 4}, {"heads": "merge", "groups": "mean"}, [GROUPS_STAY]),
        ({"num_query_groups": 2}, {"heads": "merge", "groups": "mean"}, [HEADS_STAY]),
        ({}, {}, []),
    ],
)
def test_ways_to_merge_that_do_nothing_are_told(caplog, sizes, options, lines):
    """Not of a plan, which says itself what it merges."""
    cfg = config(prune=PruneOptions(**options))
    checks._warn_of_idle_options(cfg, goal(SOURCE.resized(**sizes)))
    assert said(caplog) == lines
    checks._warn_of_idle_options(cfg, goal(SOURCE.resized(**sizes), kept=Kept(np.arange(4))))
    assert said(caplog) == []


MANY = WIDE.resized(num_attention_heads=16, num_query_groups=16)


@pytest.mark.parametrize(
    ("source", "sizes", "neurons", "divides", "before", "would"),
    [
        (WIDE, {}, None, 0, 0, 0),
        (WIDE, {"ffn_hidden_size": 44}, None, 0, 0, 0),
        (WIDE, {"num_query_groups": 2}, None, 0, 0, 0),
        (WIDE, {"ffn_hidden_size": 22}, 22, 2, 4, 24),
        (WIDE, {"ffn_hidden_size": (48, 46, 45, 48)}, 45, 1, 4, 48),
        (MANY, {"ffn_hidden_size": 40}, None, 0, 0, 0),
        (MANY, {"ffn_hidden_size": 44}, 44, 4, 8, 48),
        (WIDE.resized(ffn_hidden_size=45), {"ffn_hidden_size": 44}, None, 0, 0, 0),
    ],
)
def test_layouts_that_a_cut_takes_away_are_told(caplog, source, sizes, neurons, divides, before, would):
    checks._warn_of_layouts(source, source.resized(**sizes))
    line = (
        f"ffn_hidden_size={neurons} divides by parallel.tensor={divides} at most, the source by {before}: "
        f"target.ffn_hidden_size={would} would too"
    )
    assert said(caplog) == ([line] if neurons else [])


def test_what_an_export_would_be_is_told(caplog):
    checks._warn_of_exports(SOURCE)
    assert said(caplog) == []
    checks._warn_of_exports(SOURCE.resized(hidden_size=12, ffn_hidden_size=(1, 2, 3, 4)))
    first, second = said(caplog)
    assert (
        first.startswith("hidden_size=12 is not a multiple of num_attention_heads=8")
        and "as MistralForCausalLM" in first
    )
    assert second.startswith("the target has layers of different ffn_hidden_size")


# What a dry run foresees


def test_sizes_that_layouts_and_tensor_cores_do_not_like():
    assert foresee.layout_problems(WIDE.resized(num_query_groups=8, ffn_hidden_size=128)) == []
    assert foresee.layout_problems(SOURCE.resized(hidden_size=63, ffn_hidden_size=(64, 36, 30, 36))) == [
        "parallel.tensor=4 does not divide ffn_hidden_size=30 of the target: use one of 1, 2",
        "parallel.tensor=8 does not divide num_query_groups=4 of the target: use one of 1, 2",
        "hidden_size=63 is no multiple of 64: tensor cores work on tiles of it",
        "ffn_hidden_size=30 is no multiple of 64: tensor cores work on tiles of it",
        "ffn_hidden_size=36 is no multiple of 64: tensor cores work on tiles of it",
    ]


def test_a_target_is_foreseen_beside_its_source(monkeypatch):
    """Llama-3.1 8B: 129,024 padded rows of embedding and head, 6,979,321,856 weights in matrices of layers, 65 norms."""
    shown = []
    monkeypatch.setattr(foresee, "print_table", lambda *table: shown.append(table))
    source = shape()
    target, cfg = source.resized(ffn_hidden_size=9217), SimpleNamespace(data=SimpleNamespace(sequence_length=64))
    foresee.foresee(source, target, Layout(tensor=2, world_size=2), cfg)
    (title, columns, rows), (_, _, problems) = shown
    assert (title, columns) == ("would be pruned", ["", "source", "target"])
    found = {name: values for name, *values in rows}
    assert [row[0] for row in rows[: len(TARGETS)]] == list(TARGETS) and found["ffn_hidden_size"] == [14336, 9217]
    before, after = count_parameters(source), count_parameters(target)
    assert before == 8_030_261_248 and found["parameters"] == [before, after]
    assert found["share of the source"] == ["", f"{100 * after / before:.1f}%"]
    assert found["without embeddings"] == [n - 2 * 128256 * 4096 for n in (before, after)]
    operations = found["GFLOP a token, forward, at 64 tokens"]
    assert operations == [flops_per_token(one, 64) / 1e9 for one in (source, target)]
    norms = 65 * 4096
    sharded = 2 * 129024 * 4096 + 6_979_321_856
    assert found["weights, GiB"][0] == round((sharded + norms) * 2 / 2**30, 3)
    assert found["weights of a rank, GiB (tensor 2)"] == [round((sharded + 2 * norms) / 2**30, 3), "does not fit"]
    assert found["parallel.tensor can be"] == ["1, 2, 4, 8", "1"]
    assert [row[0] for row in problems] == foresee.layout_problems(target) and len(problems) == 4
    shown.clear()
    foresee.foresee(source, source.resized(ffn_hidden_size=9216), Layout(), cfg)
    assert len(shown) == 1


def test_digests_of_all_that_was_read_and_of_what_is_kept(monkeypatch):
    monkeypatch.setattr(prune, "read_manifest", lambda path: {"digest": f"of {path}"})
    kept, smaller = Kept(np.arange(4)), SOURCE.resized(hidden_size=4)
    given = {"model": "m"}
    assert prune._inputs(config(scores="s"), goal(inputs=given), kept) == {"model": "m", "plan": kept_digest(kept)}
    for options, where in (({"scores": "s"}, "s"), ({"output": "o/"}, "o_scores")):
        found = prune._inputs(config(**options), goal(smaller, inputs=given), kept)
        assert found == {"model": "m", "scores": f"of {where}", "plan": kept_digest(kept)}
