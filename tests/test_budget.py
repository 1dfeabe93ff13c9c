"""What shapes of a search cost and lose, in figures worked out by hand, and what a search hands on."""

import json
import math

import numpy as np
import pytest

from minitron_megatron.config import BudgetConfig, PruneOptions
from minitron_megatron.errors import UserError
from minitron_megatron.models.axes import cached_values, count_parameters
from minitron_megatron.search import found as search_folder
from minitron_megatron.search.budget import Budget, _ceil
from minitron_megatron.search.found import Source
from minitron_megatron.search.latency import read_latency
from minitron_megatron.search.predict import lost
from minitron_megatron.search.space import SIZES
from tests.test_bounds import SMALL_SHAPE, refused


@pytest.mark.parametrize(
    ("value", "taken"), [("1e-9", True), ("0", False), ("-1", False), ("inf", False), ("nan", False)]
)
def test_measurements_are_above_zero_and_five_at_least(tmp_path, value, taken):
    file = tmp_path / "table.csv"
    rows = [f"{layers},{layers}" for layers in (1, 2, 3, 4)]
    file.write_text("\n".join(["num_layers,latency_ms", *rows, f"2,{value}"]))
    assert refused(read_latency, file, SMALL_SHAPE) != taken
    file.write_text("\n".join(["num_layers,latency_ms", *rows]))
    with pytest.raises(UserError, match="has 4 shapes: measure 5 or more"):
        read_latency(file, SMALL_SHAPE)


def test_memory_is_of_weights_and_of_the_cache_of_every_sequence():
    options = BudgetConfig(memory_gib=1.0, batch=3, context=7, weight_bytes=0.5, cache_bytes=2.0)
    found = Budget.of(SMALL_SHAPE, options).cost_of("memory_gib", SMALL_SHAPE) * 2**30
    assert cached_values(SMALL_SHAPE, {}) == 2 * 4 * 4 * 4
    assert found == pytest.approx(0.5 * count_parameters(SMALL_SHAPE) + 2 * 128 * 3 * 7)


@pytest.mark.parametrize("figures", [3, 4])
@pytest.mark.parametrize("value", [0.0, 1.0, 1.234, 1.2345, 99.95, 999.9, 1234.5, 3.0001e-7, -1.234, -1234.5])
def test_what_is_typed_is_the_least_of_so_many_figures_that_is_not_below(value, figures):
    found = _ceil(value, figures)
    unit = 10.0 ** (math.floor(math.log10(abs(value))) - figures + 1) if value else 1.0
    assert value <= found < value + unit * (1 + 1e-9) and float(f"{found:.{figures}g}") == found


@pytest.mark.parametrize(("power", "shares"), [(1, [0.5, 1 / 6, 0]), (2, [5 / 14, 1 / 14, 0])])
def test_what_is_lost_is_what_the_best_do_not_carry(power, shares):
    found = lost(np.array([[1.0, 3.0, -2.0], [0.0, 0.0, 0.0]]), np.array([1, 2, 3]), power)
    np.testing.assert_allclose(found, [shares, [1, 1, 1]], atol=1e-12)


def test_a_layer_analysis_goes_with_shapes_that_lose_layers_alone():
    for analysis, layers, given in (("a", 3, True), ("a", 4, False), (None, 3, False)):
        source = Source("m", "s", analysis, PruneOptions())
        assert ("layers" in source.options({"num_layers": layers}, 4)) == given


@pytest.mark.parametrize(
    ("ranks", "files", "says"),
    [
        ((1, 2), (1, 2), None),
        ((1, 2), (1,), "has no targets/rank_02.yaml"),
        ((1, 2), (), "has no targets/rank_01.yaml"),
        ((), (1,), "has no ranked shape"),
    ],
)
def test_every_ranked_shape_has_its_target(tmp_path, monkeypatch, ranks, files, says):
    sizes = dict.fromkeys(SIZES, 4)
    listed = [{**sizes, "predicted_loss": 0.5}, *({**sizes, "rank": rank, "predicted_loss": 0.1} for rank in ranks)]
    (tmp_path / search_folder.FILE).write_text(json.dumps({"candidates": listed}))
    manifest = {
        "config": {"model": {"path": "m"}, "scores": "s", "layers": None, "prune": {}},
        "inputs": {"model": "a", "scores": "b", "data": "c"},
        "files": [search_folder.target_file(rank) for rank in files],
        "digest": "d",
    }
    monkeypatch.setattr(search_folder, "read_output", lambda *_: manifest)
    if says:
        with pytest.raises(UserError, match=f"{says}: run search again"):
            search_folder.read_search(tmp_path)
        return
    read = search_folder.read_search(tmp_path)
    assert [one.rank for one in read.ranked] == [1, 2] and read.inputs == {"model": "a", "scores": "b"}
    assert read.model_digest == "a" and read.target(read.ranked[1]) == tmp_path / "targets/rank_02.yaml"
