"""Search: the planted optimum, costs and fronts against plain Python, laziness, targets that prune takes, and errors."""

import itertools
import math
import re
import time
from dataclasses import asdict

import numpy as np
import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from minitron_megatron.checkpoints.folder import open_model_folder, output_folder, read_manifest
from minitron_megatron.config import BudgetConfig, PruneOptions, RankConfig, RankWeightsConfig, SpaceConfig
from minitron_megatron.errors import UserError
from minitron_megatron.importance.layers import Judged, LayerAnalysis
from minitron_megatron.importance.scores import Scores
from minitron_megatron.launcher import CONF, compose
from minitron_megatron.models.axes import count_parameters, flops_per_token
from minitron_megatron.models.shape import ModelShape
from minitron_megatron.prune.named import Named, named_target
from minitron_megatron.prune.select import choose, target_shape
from minitron_megatron.report.folders import find
from minitron_megatron.report.lineage import lineage_section, trace
from minitron_megatron.search.budget import Budget
from minitron_megatron.search.latency import fit, read_latency
from minitron_megatron.search.predict import AXES, make_predictor
from minitron_megatron.search.scan import pareto_front, scan
from minitron_megatron.search.search import candidates, search_shapes
from minitron_megatron.search.space import SIZES, frozen_axes, make_space, settle_space
from tests.test_commands import error_of, run
from tests.test_prune import random_scores, write_scores
from tests.tiny import hf_model, imported

TINY = SpaceConfig(multiple=4, tensor=1)
OPTIONS = [PruneOptions(), PruneOptions(groups="mean"), PruneOptions(groups="mean", heads="merge")]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return imported(hf_model(), tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def scores_folder(source, tmp_path_factory):
    return write_scores(random_scores(source), tmp_path_factory.mktemp("scores") / "scores")


@pytest.fixture(scope="module")
def shape(source) -> ModelShape:
    return open_model_folder(source).shape


def llama() -> ModelShape:
    values = yaml.safe_load((CONF / "model" / "llama3_1_8b.yaml").read_text())
    return ModelShape.from_dict({**values, "rope_scaling": None}, "llama3_1_8b")


def scores_of(shape: ModelShape, seed: int = 0) -> Scores:
    draw, layers = np.random.default_rng(seed), shape.num_layers
    tensors = {
        "ffn": draw.random((layers, max(shape.ffn_of_layers))),
        "heads": draw.random((layers, shape.num_attention_heads)),
        "hidden.attention_norm": draw.random((layers, shape.hidden_size)),
        "hidden.mlp_norm": draw.random((layers, shape.hidden_size)),
        "layers": draw.random(layers),
    }
    return Scores({k: v.astype(np.float32) for k, v in tensors.items()}, "")


def every_number(space) -> np.ndarray:
    return np.concatenate(list(space.numbers()))


def shapes_by_hand(shape: ModelShape, options: PruneOptions) -> list[ModelShape]:
    """The tiny space in plain loops: what prune takes and transformers can load, every size a multiple of 4."""
    sizes = itertools.product(range(2, 5), range(16, 33, 4), range(24, 49, 4), range(4, 9), range(2, 5))
    found = []
    for values in sizes:
        target = dict(zip(SIZES, values, strict=True))
        try:
            resized = target_shape(shape, target, [], options)
        except UserError:
            continue
        if not resized.hidden_size % resized.num_attention_heads:
            found.append(resized)
    return found


def parameters_by_hand(s: ModelShape) -> int:
    attention = s.hidden_size * s.head_dim * (2 * s.num_attention_heads + 2 * s.num_query_groups)
    layer = attention + 3 * s.hidden_size * s.ffn_hidden_size + 2 * s.hidden_size
    return 2 * s.vocab_size * s.hidden_size + s.num_layers * layer + s.hidden_size


def loss_by_hand(source: ModelShape, target: ModelShape, scores: Scores, options: PruneOptions) -> dict[str, float]:
    """The documented formula, over the indices that prune itself keeps."""
    kept = choose(source, target, scores, [], options)

    def gone(values, indices) -> float:
        return 1 - sum(float(values[i]) ** 2 for i in indices) / sum(float(v) ** 2 for v in values)

    layers = kept.layers.tolist()
    influence = scores.layers.astype(float)
    of_layer = {
        "ffn": lambda i: gone(scores.ffn[i], kept.ffn[i]) if kept.ffn else 0.0,
        "heads": lambda i: gone(scores.heads[i], kept.heads[i].reshape(-1)) if kept.heads is not None else 0.0,
    }
    return {
        "layers": 2 * sum(influence[i] for i in range(source.num_layers) if i not in layers),
        "hidden": gone(scores.hidden, kept.hidden) if kept.hidden is not None else 0.0,
        **{axis: sum(map(lost, layers)) / len(layers) for axis, lost in of_layer.items()},
    }


@pytest.mark.parametrize("options", OPTIONS, ids=["drop", "mean", "mean and merge"])
def test_the_order_is_that_of_plain_loops_over_what_prune_keeps(shape, options):
    scores, weights = scores_of(shape), {"layers": 0.5, "hidden": 1.0, "ffn": 2.0, "heads": 0.25}
    budget = Budget.of(shape, BudgetConfig(parameters=40_000, at_least=0.8))
    space = make_space(shape, TINY, options)
    predictor = make_predictor(shape, scores, space, RankConfig(weights=RankWeightsConfig(**weights)), options)
    found = scan(space, budget, predictor, keep=25)
    every = shapes_by_hand(shape, options)
    assert found.shapes == len(every)
    fitting = [s for s in every if 32_000 <= parameters_by_hand(s) <= 40_000]
    assert found.fitting == len(fitting)
    losses = {}
    for target in fitting:
        parts = loss_by_hand(shape, target, scores, options)
        losses[tuple(getattr(target, n) for n in SIZES)] = sum(weights[axis] * parts[axis] for axis in AXES)
    ranked = [one for one in candidates(budget, predictor, found) if one.rank]
    assert [one.loss for one in ranked] == pytest.approx(sorted(losses.values())[:25], abs=1e-9)
    assert [losses[tuple(one.target.values())] for one in ranked] == pytest.approx(
        [one.loss for one in ranked], abs=1e-9
    )


def test_a_planted_shape_is_found(shape):
    """Channels, neurons, heads and layers that count for nothing: the shape without them costs nothing, and is the best."""
    planted = {"layers": 3, "hidden": 20, "ffn": 28, "heads": 4}
    tensors = {name: np.ones_like(t) for name, t in scores_of(shape).tensors.items()}
    for name in tensors:
        tensors[name][..., planted[name.partition(".")[0]] :] = 0
    tensors["layers"][-1], tensors["layers"][1] = 1, 0
    scores = Scores(tensors, "")
    space = make_space(shape, TINY, PruneOptions())
    predictor = make_predictor(shape, scores, space, RankConfig(), PruneOptions())
    best = target_shape(shape, dict(zip(SIZES, (3, 20, 28, 4, 2), strict=True)), [])
    budget = Budget.of(shape, BudgetConfig(parameters=count_parameters(best)))
    first = candidates(budget, predictor, scan(space, budget, predictor))[0]
    assert first.target == {n: getattr(best, n) for n in SIZES} and first.loss == 0


@pytest.mark.parametrize("family", ["llama", "qwen2", "nemotron"])
@pytest.mark.parametrize("tied", [False, True])
def test_costs_of_many_shapes_are_those_of_each(shape, family, tied):
    of_family = shape.resized(family=family, tied_embeddings=tied)
    options = BudgetConfig(memory_gib=1.0, batch=3, context=100, weight_bytes=1.0, cache_bytes=2.0)
    space, budget = make_space(of_family, TINY, PruneOptions()), Budget.of(of_family, options)
    numbers = every_number(space)
    costs = {name: budget.cost(name, space.lengths(numbers)) for name in budget.quantities}
    for i, number in enumerate(numbers.tolist()):
        one = of_family.resized(**space.target(number))
        assert costs["parameters"][i] == count_parameters(one)
        assert costs["non_embedding_parameters"][i] == count_parameters(one, embedding=False)
        assert costs["flops_per_token"][i] == flops_per_token(one, 100)
        cache = 3 * 100 * one.num_layers * 2 * one.num_query_groups * one.head_dim * 2
        assert costs["memory_gib"][i] * 2**30 == pytest.approx(count_parameters(one) + cache)


def test_memory_of_a_published_model():
    """Llama-3.1 8B in bf16: 8,030,261,248 weights of 2 bytes; 128 KiB of cache a token (32 layers · 2 · 8 groups · 128 · 2)."""
    shape = llama()
    space = make_space(shape, SpaceConfig(num_layers=32, hidden_size=4096, ffn_hidden_size=14336), PruneOptions())
    budget = Budget.of(shape, BudgetConfig(memory_gib=80.0, batch=4, context=8192))
    first = space.lengths(np.zeros(1, np.int64))
    assert budget.cost("memory_gib", first)[0] == pytest.approx((8_030_261_248 * 2 + 4 * 8192 * 131_072) / 2**30)


def test_millions_of_shapes_take_seconds():
    shape = llama()
    space = make_space(
        shape,
        SpaceConfig(hidden_size={"from": 2048, "to": 4096, "step": 16}, multiple=16, tensor=2, exportable=False),
        PruneOptions(),
    )
    assert space.size > 2_000_000
    began = time.monotonic()
    predictor = make_predictor(shape, scores_of(shape), space, RankConfig(), PruneOptions())
    budget = Budget.of(shape, BudgetConfig(parameters=4.5e9, memory_gib=12.0))
    found = scan(space, budget, predictor)
    assert time.monotonic() - began < 10
    assert found.shapes == space.size and len(found.best) == 10 and found.fitting > 10_000


def test_fronts_are_what_nothing_beats(shape):
    scores = scores_of(shape)
    budget = Budget.of(shape, BudgetConfig(parameters=50_000, flops_per_token=120_000, context=64, at_least=0.0))
    space = make_space(shape, TINY, PruneOptions())
    predictor = make_predictor(shape, scores, space, RankConfig(), PruneOptions())
    found = scan(space, budget, predictor, keep=3)
    numbers = every_number(space)
    costs = {name: budget.cost(name, space.lengths(numbers)) for name in budget.limits}
    within = np.all([costs[name] <= limit for name, limit in budget.limits.items()], axis=0)
    loss = predictor.loss(numbers)
    for name, cost in costs.items():
        points = [(c, p) for c, p, w in zip(cost.tolist(), loss.tolist(), within, strict=True) if w]
        unbeaten = {p for p in points if not any(a <= p[0] and b <= p[1] and (a, b) != p for a, b in points)}
        front = found.fronts[name]
        position = np.searchsorted(numbers, front)
        assert [(cost[i], loss[i]) for i in position] == sorted(unbeaten)


def test_the_front_does_not_depend_on_how_the_space_is_cut_up(shape, monkeypatch):
    budget = Budget.of(shape, BudgetConfig(parameters=50_000, at_least=0.0))
    space = make_space(shape, TINY, PruneOptions())
    predictor = make_predictor(shape, scores_of(shape), space, RankConfig(), PruneOptions())
    whole = scan(space, budget, predictor)
    monkeypatch.setattr("minitron_megatron.search.space._TOGETHER", 7)
    parts = scan(space, budget, predictor)
    assert (whole.best == parts.best).all() and (whole.fronts["parameters"] == parts.fronts["parameters"]).all()
    assert (whole.shapes, whole.fitting) == (parts.shapes, parts.fitting)


def test_equal_points_are_on_a_front_once():
    cost, loss = np.array([2, 1, 1, 2, 3]), np.array([1.0, 2.0, 2.0, 1.0, 1.0])
    assert pareto_front(cost, loss).tolist() == [1, 0]
    assert pareto_front(cost[:0], loss[:0]).tolist() == []


def analysis_of(shape: ModelShape, digest: str = "") -> LayerAnalysis:
    def judged(length, start):
        return Judged(loss=3.0 + 0.1 * length + 0.01 * start, bi=0.02 * length, accuracy=0.5 - 0.1 * length)

    n = shape.num_layers
    blocks = {length: [judged(length, start) for start in range(n - length + 1)] for length in (1, 2)}
    return LayerAnalysis("analysis", digest, n, Judged(loss=3.0, accuracy=0.6), blocks, {})


@pytest.mark.parametrize(
    ("judge", "expected"),
    [("bi", [0, 0.04, 0.08]), ("loss", [0, 0.1, 0.2]), ("task", [0, 1 / 3, 0.5])],
)
def test_a_layer_analysis_prices_the_block_that_goes(shape, judge, expected):
    options, scores, analysis = PruneOptions(judge=judge), scores_of(shape), analysis_of(shape)
    space = make_space(shape, TINY, options, judged={4, 3, 2})
    predictor = make_predictor(shape, scores, space, RankConfig(), options, analysis)
    if judge == "loss":
        expected = [lost / (math.log(shape.vocab_size) - 3.0) for lost in expected]
    assert predictor.layers.tolist() == pytest.approx(expected)
    # The layers that stay are the ones whose neurons count.
    lost = 1 - np.sort(scores.ffn.astype(float) ** 2, axis=1)[:, -24:].sum(1) / (scores.ffn.astype(float) ** 2).sum(1)
    assert predictor.ffn[1, -1] == pytest.approx(lost[1:].mean())
    with pytest.raises(UserError, match="blocks of 1, 2 layers, not 3"):
        make_predictor(
            shape, scores, make_space(shape, SpaceConfig(num_layers=1), options), RankConfig(), options, analysis
        )


def test_layers_that_differ_are_searched_up_to_the_narrowest(shape):
    uneven = shape.resized(ffn_hidden_size=(48, 40, 48, 44))
    space = make_space(uneven, TINY, PruneOptions())
    assert space.ffn.tolist() == [40, 36, 32, 28, 24, 20]
    scores = scores_of(uneven)
    scores.ffn[1, 40:] = 0
    predictor = make_predictor(uneven, scores, space, RankConfig(), PruneOptions())
    assert predictor.ffn.shape == (3, 6) and (np.diff(predictor.ffn, axis=1) > 0).all()


def test_latency_comes_back_out_of_a_table(shape, tmp_path):
    """Measured by a law of the fitted kind: any other shape's is exact. And no term is ever negative."""
    law = {"layers": 0.2, "parameters": 3e-6, "cache": 1e-4}

    def milliseconds(s):
        cache = 2 * s.num_layers * s.num_query_groups * s.head_dim
        return 0.5 + law["layers"] * s.num_layers + law["parameters"] * count_parameters(s) + law["cache"] * cache

    measured = [(4, 32, 4), (3, 32, 4), (4, 16, 4), (2, 24, 2), (4, 32, 2), (3, 20, 4)]
    shapes = [shape.resized(num_layers=n, hidden_size=h, num_query_groups=g) for n, h, g in measured]
    rows = [f"{s.num_layers},{s.hidden_size},{s.num_query_groups},{milliseconds(s)!r}" for s in shapes]
    file = tmp_path / "table.csv"
    file.write_text("\n".join(["num_layers,hidden_size,num_query_groups,latency_ms", *rows]) + "\n")
    latency = read_latency(file, shape)
    assert latency.error < 1e-6
    options = BudgetConfig(latency_ms=2.0, table=str(file))
    budget, space = Budget.of(shape, options), make_space(shape, TINY, PruneOptions())
    numbers = every_number(space)
    expected = [milliseconds(shape.resized(**space.target(n))) for n in numbers.tolist()]
    assert budget.cost("latency_ms", space.lengths(numbers)) == pytest.approx(expected, rel=1e-6)
    # The same as tokens a second: a faster shape is within the limit, a slower one is not.
    rates = [f"{row.rpartition(',')[0]},{1000 / float(row.rpartition(',')[2])!r}" for row in rows]
    file.write_text("\n".join(["num_layers,hidden_size,num_query_groups,tokens_per_second", *rates]) + "\n")
    as_rate = Budget.of(shape, BudgetConfig(tokens_per_second=500.0, table=str(file)))
    assert as_rate.limits == {"latency_ms": 2.0}
    assert as_rate.cost("latency_ms", space.lengths(numbers)) == pytest.approx(expected, rel=1e-6)
    noisy = np.abs(np.random.default_rng(0).normal(1, 0.5, 6))
    assert (fit(np.random.default_rng(1).random((6, 4)), noisy) >= 0).all()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("num_layers\n4\n", "must have the columns latency_ms and sizes"),
        ("layers,latency_ms\n4,1\n", "must have the columns latency_ms and sizes"),
        ("num_layers,latency_ms\n4,1\n", "has 1 shapes: measure 5 or more"),
        ("num_layers,latency_ms\n" + "4,1\n" * 4 + "4,\n", "line 6: every column needs a number"),
        ("num_layers,latency_ms\n" + "4,1\n" * 4 + "4,-1\n", "line 6: latency_ms=-1.0 must be a number above 0"),
        ("num_attention_heads,latency_ms\n" + "7,1\n" * 5, "line 2: num_attention_heads=7 is not a multiple"),
        (None, "cannot be read"),
    ],
)
def test_wrong_tables_are_refused(shape, tmp_path, text, says):
    file = tmp_path / "table.csv"
    if text is not None:
        file.write_text(text)
    with pytest.raises(UserError, match=says):
        read_latency(file, shape)


# No size of the model varies.
FIXED = [
    f"space.{name}={size}"
    for name, size in {
        "num_layers": 4, "hidden_size": 32, "ffn_hidden_size": 48, "num_attention_heads": 8, "num_query_groups": 4
    }.items()
]  # fmt: skip


def words_of(source, scores_folder, *own: str) -> list[str]:
    tiny = ["budget.parameters=40000", "space.multiple=4", "space.tensor=1"]
    return [f"model={source}", f"scores={scores_folder}", *tiny, *own]


def test_a_target_that_is_no_longer_what_was_ranked_is_said(tmp_path, caplog):
    """Its file edited, an option over it, a size left out; where nothing can be known nothing is claimed."""
    sizes = dict.fromkeys(SIZES, 4)
    with output_folder(
        tmp_path / "found",
        command="minitron search x=1",
        config={"output": str(tmp_path / "found")},
        inputs={},
        resume=True,
    ) as out:
        (out.path / "targets").mkdir()
        for rank in (1, 2):
            (out.path / "targets" / f"rank_{rank:02d}.yaml").write_text(yaml.safe_dump(sizes))
        listed = [{"rank": 1, **sizes}, {"rank": 2, **sizes, "hidden_size": 8}, dict(sizes)]
        (out.path / "candidates.yaml").write_text(yaml.safe_dump({"candidates": listed}))
    file, search = f"{tmp_path}/found/targets/rank_01.yaml", read_manifest(tmp_path / "found")["digest"]
    asked = {**sizes, "vocab_size": None}
    ranked = named_target(["model=m", f"target={file}"], asked)
    assert ranked == Named(file, 1, search, {})
    ranked.say()
    assert not caplog.records
    edited = named_target([f"target={file}"], {**asked, "hidden_size": 3, "num_layers": None, "vocab_size": 9})
    assert edited.others == {"hidden_size": [4, 3], "num_layers": [4, None], "vocab_size": [None, 9]}
    edited.say()
    (said,) = (record.getMessage() for record in caplog.records)
    assert (
        "is not what the search ranked 1 (num_layers=None, not 4, hidden_size=3, not 4, vocab_size=9, not None)" in said
    )
    assert named_target([f"target={file.replace('01', '02')}"], asked).others == {"hidden_size": [8, 4]}
    for other in (
        "target=mine.yaml",
        "target=llama3_1_minitron_4b_width",
        "target.hidden_size=4",
        f"target={file.replace('01', '07')}",
    ):
        assert named_target([other], asked) is None
    pruned = {
        "command": f"minitron prune target={file}",
        "inputs": {},
        "config": {"output": str(tmp_path / "m")},
        "resume": True,
    }
    for name, target in (("as_ranked", ranked), ("edited", edited)):
        with output_folder(tmp_path / name, **pruned) as out:
            (out.path / "x").write_text(name)
            out.results = {"target": asdict(target)}
    told = {row[0]: row[2] for row in lineage_section(trace(find([str(tmp_path)])[0])).tables[0].rows}
    assert (told["as_ranked"], told["edited"]) == ("target=found", "target=found (by path, not as it was ranked)")
    (tmp_path / "found" / "candidates.yaml").write_text("[]")
    assert named_target([f"target={file}"], asked) is None


def test_the_command_of_a_target_makes_a_model_of_these_sizes(source, scores_folder, tmp_path):
    words = words_of(source, scores_folder, "keep=2", "prune.groups=mean", f"output={tmp_path / 'found'}")
    search_shapes(compose_in_test("search", words))
    lines = (tmp_path / "found" / "targets" / "rank_01.yaml").read_text().splitlines()
    command = next(line.partition(" prune ")[2].split() for line in lines if " prune " in line)
    assert "prune.groups=mean" in command and f"target={tmp_path / 'found'}/targets/rank_01.yaml" in command
    done = run("prune", *command)
    assert done.returncode == 0, done.stderr
    pruned = open_model_folder(tmp_path / "found_rank_01")
    values = yaml.safe_load((tmp_path / "found" / "candidates.yaml").read_text())
    first = values["candidates"][0]
    assert first["rank"] == 1 and {n: getattr(pruned.shape, n) for n in SIZES} == {n: first[n] for n in SIZES}
    assert count_parameters(pruned.shape) == first["parameters"]
    manifest = read_manifest(tmp_path / "found")
    target = read_manifest(pruned.path)["results"]["target"]
    assert target["search"] == manifest["digest"] and (target["rank"], target["others"]) == (1, {})
    assert manifest["results"]["best"] == first and manifest["results"]["fitting"] == values["fitting"]
    files = {"candidates.yaml", "parameters.svg", "targets/rank_01.yaml", "targets/rank_02.yaml"}
    assert set(manifest["files"]) == files
    search_shapes(compose_in_test("search", words))
    with pytest.raises(UserError, match="was made with other options"):
        search_shapes(compose_in_test("search", [*words, "rank.weights.ffn=2"]))


def compose_in_test(name: str, words: list[str]):
    import hydra

    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        return compose(name, words)


def test_a_target_file_can_be_written_by_hand(source, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("# a cut by hand\nffn_hidden_size: [48, 40, 48, 44]\nnum_attention_heads: 4\n")
    words = [f"model={source}", f"target={file}", "target.hidden_size=16", "output=x"]
    target = compose_in_test("prune", words).target
    assert (target.ffn_hidden_size, target.num_attention_heads, target.hidden_size) == ([48, 40, 48, 44], 4, 16)
    for text, says in (
        ("hiden_size: 4\n", "hiden_size"),
        ("hidden_size: much\n", "hidden_size=much must be a whole number"),
        ("4", "mapping"),
    ):
        file.write_text(text)
        with pytest.raises(UserError, match=says):
            compose_in_test("prune", words)
    with pytest.raises(UserError, match="does not exist: give a YAML file of your own, or a preset"):
        compose_in_test("prune", [*words[:1], f"target={tmp_path / 'none.yaml'}", *words[2:]])


def test_a_dry_run_counts_and_writes_nothing(source, scores_folder, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    caplog.set_level("INFO", "minitron_megatron")
    search_shapes(compose_in_test("search", words_of(source, scores_folder, "dry_run=true", "output=found")))
    shape = open_model_folder(source).shape
    every = shapes_by_hand(shape, PruneOptions())
    fitting = [s for s in every if 36_000 <= parameters_by_hand(s) <= 40_000]
    assert caplog.messages == [f"{len(every):,} shapes, of which {len(fitting):,} fit the budget"]
    words = ["model=llama3_1_8b", "budget.parameters=4.5e9", "dry_run=true", "output=found"]
    search_shapes(compose_in_test("search", words))
    assert caplog.messages[1] == "space.multiple=128 and space.tensor=8, by the model's sizes"
    assert "shapes, of which" in caplog.messages[-1]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("own", "says"),
    [
        (
            ["budget.parameters=null"],
            "no budget: give at least one of budget.parameters=, budget.non_embedding_parameters=",
        ),
        (["budget.parameters=100"], "nothing fits: the smallest possible shape has 15,"),
        (
            ["budget.parameters=100"],
            "budget.parameters is 100: use budget.parameters=15",
        ),
        (
            ["budget.parameters=1e6"],
            "the budget is above the model's 62,496 parameters, so nothing need be pruned: give less, such as "
            "budget.parameters=37498 (60% of it)",
        ),
        (
            ["budget.parameters=1e6", *FIXED],
            "the model has no smaller shape in this space: none has less than its 62,496 p",
        ),
        (["budget.parameters=1", *FIXED], "the model has no smaller shape in this space"),
        (
            ["budget.parameters=6e4", "space.hidden_size=16"],
            "of it at most, budget.at_least is 90%: use budget.at_least=0.",
        ),
        (["budget.parameters=4e4", "budget.at_least=2"], "budget.at_least=2.0 must be from 0 to 1"),
        (["space.hidden_size=[]"], "the space is empty: space.hidden_size=[] has no size"),
        (["space.hidden_size={from:32,to:16,step:4}"], "the space is empty: space.hidden_size={from:32,to:16,step:4}"),
        (["space.hidden_size={from:16,to:32,stp:4}"], "must be a size, a list of sizes, or {from:…,to:…,step:…}"),
        (["space.hidden_size=[18]"], "space.hidden_size: 18 is no multiple of 4 (space.multiple)"),
        (["space.ffn_hidden_size=[64]"], "space.ffn_hidden_size: 64 must be a whole number from 1 to the model's 48"),
        (["space.num_layers=[two]"], "space.num_layers: 'two' must be a whole number"),
        (["space.num_attention_heads=[7]"], "the space is empty: no space.num_attention_heads (7) goes with"),
        (
            ["space.num_attention_heads=[6]", "space.hidden_size=[20]"],
            "give space.exportable=false, which has them exported as Mistral",
        ),
        (["space.widths=3"], "unknown option 'space.widths' of minitron search"),
        (["rank.weights.hiden=3"], "did you mean rank.weights.hidden?"),
        (["rank.weights={layers:0,hidden:0,ffn:0,heads:0}"], "rank.weights are all 0"),
        (["budget.latency_ms=3"], "budget.table= and budget.latency_ms= (or tokens_per_second=) go together"),
        (["budget.latency_ms=3", "budget.tokens_per_second=9"], "say the same: give one of them"),
        (["keep=0"], "keep=0 must be above 0"),
        (["scores=null"], "scores= is missing: give the output of importance"),
        (["layers=nowhere"], "nowhere does not exist"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_are_refused_before_anything(source, scores_folder, tmp_path, monkeypatch, own, says):
    monkeypatch.chdir(tmp_path)
    given = {word.partition("=")[0] for word in own}
    words = [w for w in words_of(source, scores_folder) if w.partition("=")[0] not in given]
    with pytest.raises(UserError) as refused:
        search_shapes(compose_in_test("search", [*words, *own, "output=found"]))
    assert says in str(refused.value) and "\n" not in str(refused.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("axis", range(5))
def test_what_is_proposed_is_a_budget_that_a_shape_is_within(source, scores_folder, tmp_path, monkeypatch, axis):
    """Also where the space has few shapes, all of them above the usual share."""
    monkeypatch.chdir(tmp_path)
    free = ["space.num_layers=[4,3]", "space.hidden_size=[32,24]", "space.ffn_hidden_size=[48,44]"]
    free += ["space.num_attention_heads=[8,4]", "space.num_query_groups=[4,2]"]
    one = [*FIXED[:axis], free[axis], *FIXED[axis + 1 :]]
    if axis == 4:
        # Fewer groups need fewer heads.
        one[3] = free[3]
    for name in ("parameters", "memory_gib", "flops_per_token"):
        words = [
            word for word in words_of(source, scores_folder, *one, "dry_run=true", "output=x") if "budget" not in word
        ]
        with pytest.raises(UserError) as refused:
            search_shapes(compose_in_test("search", [*words, f"budget.{name}=1e15"]))
        proposed = re.search(rf"give less, such as (budget\.{name}=\S+) ", str(refused.value))
        search_shapes(compose_in_test("search", [*words, proposed[1], "budget.at_least=0"]))


@pytest.mark.slow
def test_scores_of_another_model_are_one_line(source, tmp_path):
    write_scores(Scores(random_scores(source).tensors, "sha256:another"), tmp_path / "s")
    done = run("search", *words_of(source, tmp_path / "s"), "output=found", cwd=tmp_path)
    assert "were measured on another model (digest differs)" in error_of(done)
    assert not (tmp_path / "found").exists()


# Of every preset of conf/model: what is taken where nothing is given.
OF_PRESETS = {
    "llama3_1_70b": (128, 8),
    "llama3_1_8b": (128, 8),
    "llama3_2_1b": (128, 8),
    "llama3_2_3b": (128, 8),
    "mistral_nemo_12b": (128, 8),
    "qwen2_5_7b": (128, 4),
    "qwen3_8b": (128, 8),
    "smollm2_135m": (32, 1),
}


@pytest.mark.parametrize("preset", OF_PRESETS)
def test_multiples_follow_the_model(preset):
    source = ModelShape.from_dict(yaml.safe_load((CONF / "model" / f"{preset}.yaml").read_text()), preset)
    settled = settle_space(source, SpaceConfig())
    assert (settled.multiple, settled.tensor) == OF_PRESETS[preset]
    assert settle_space(source, SpaceConfig(multiple=7, tensor=3)) == SpaceConfig(multiple=7, tensor=3)
    space = make_space(source, settled, PruneOptions())
    assert min(len(space.layers), len(space.hidden), len(space.ffn)) > 4


@settings(max_examples=60)
@given(hidden=st.integers(2, 5000), ffn=st.integers(1, 20000), groups=st.integers(1, 9), heads=st.integers(1, 8))
@example(hidden=34, ffn=100, groups=9, heads=8)  # a multiple of 2 that no heads divide
@example(hidden=32, ffn=52, groups=4, heads=1)  # neurons in steps of 4 for tensor parallelism, where the multiple is 2
def test_a_space_of_any_model_keeps_to_its_multiples(hidden, ffn, groups, heads):
    source = llama().resized(
        hidden_size=hidden, ffn_hidden_size=ffn, num_query_groups=groups, num_attention_heads=groups * heads
    )
    settled = settle_space(source, SpaceConfig())
    assert ffn % settled.tensor == groups % settled.tensor == 0
    assert settled.multiple in (1, 2, 4, 8, 16, 32, 64, 128) and settled.tensor in (1, 2, 4, 8)
    space = make_space(source, SpaceConfig(exportable=False), PruneOptions())
    for sizes, whole, of in ((space.hidden, hidden, 1), (space.ffn, ffn, settled.tensor)):
        assert all(size % settled.multiple == 0 for size in sizes if size != whole)
        # Eight steps of the multiple; where tensor parallelism asks for a larger one there are fewer.
        assert settled.multiple in (1, 128) or settled.multiple % of or len(sizes) > 8
    # An axis of one size is one that is explained.
    varied = dict(zip(SIZES, (space.layers, space.hidden, space.ffn, *map(np.unique, space.heads.T)), strict=True))
    assert set(frozen_axes(source, settled, space)) == {name for name, sizes in varied.items() if len(sizes) == 1}
    # It is the multiple where no smaller size is one of it, and only there; else the heads, where exports want them.
    for one in (space, make_space(source, SpaceConfig(), PruneOptions())):
        why = frozen_axes(source, settled, one)
        for name, whole, of in (("hidden_size", hidden, 1), ("ffn_hidden_size", ffn, settled.tensor)):
            step, half = math.lcm(settled.multiple, of), -(-whole // 2)
            if name in why and half < whole:
                assert ("no size is a multiple of" in why[name]) == (-(-half // step) * step >= whole), why


def test_a_search_says_what_does_not_vary_and_why(source, scores_folder, tmp_path, caplog):
    caplog.set_level("INFO", "minitron_megatron")
    words = [w for w in words_of(source, scores_folder) if not w.startswith("space.")]
    search_shapes(
        compose_in_test("search", [*words, "space.multiple=64", "space.tensor=2", f"output={tmp_path / 'a'}"])
    )
    assert caplog.messages[:2] == [
        "hidden_size stays 32: down to half of it no size is a multiple of space.multiple=64, which a smaller value changes",
        "ffn_hidden_size stays 48: down to half of it no size is a multiple of space.multiple=64 and space.tensor=2, which a "
        "smaller value changes",
    ]
    caplog.clear()
    search_shapes(compose_in_test("search", [*words, f"output={tmp_path / 'b'}"]))
    assert caplog.messages[0] == "space.multiple=2 and space.tensor=4, by the model's sizes"
    space = read_manifest(tmp_path / "b")["config"]["space"]
    assert (space["multiple"], space["tensor"]) == (2, 4)
