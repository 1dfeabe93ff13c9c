"""A search's numbers by hand: limits as they are typed, what is proposed where nothing fits, spaces and damage."""

import math
from types import SimpleNamespace

import numpy as np
import pytest

from minitron_megatron.config import BudgetConfig, PruneOptions, SpaceConfig
from minitron_megatron.errors import UserError
from minitron_megatron.importance.layers import Judged, LayerAnalysis
from minitron_megatron.models.axes import cached_values, count_parameters
from minitron_megatron.search import scan
from minitron_megatron.search.budget import Budget
from minitron_megatron.search.latency import _left_out, fit, read_latency
from minitron_megatron.search.predict import _judged
from minitron_megatron.search.scan import Found, _below, _check_found, check_smaller
from minitron_megatron.search.space import SIZES, Space, _few, frozen_axes, make_space
from tests.test_selecting import SOURCE

# Limits


@pytest.mark.parametrize(
    ("options", "limits", "says"),
    [
        ({"parameters": 5.0}, {"parameters": 5.0}, None),
        ({"memory_gib": 1.0, "flops_per_token": 2.0}, {"memory_gib": 1.0, "flops_per_token": 2.0}, None),
        ({"parameters": 5.0, "at_least": 0.0}, {"parameters": 5.0}, None),
        ({"parameters": 5.0, "at_least": 1.0}, {"parameters": 5.0}, None),
        ({"parameters": 5.0, "at_least": -0.01}, None, "budget.at_least=-0.01 must be from 0 to 1"),
        ({"parameters": 5.0, "at_least": 1.01}, None, "budget.at_least=1.01 must be from 0 to 1"),
        ({"parameters": 5.0, "table": "t"}, None, "budget.table= and budget.latency_ms= (or tokens_per_second=) go together"),
        ({"tokens_per_second": 9.0}, None, "go together: measured shapes, and the limit"),
        ({"latency_ms": 2.0, "table": "t"}, {"latency_ms": 2.0}, None),
        ({"tokens_per_second": 500.0, "table": "t"}, {"latency_ms": 2.0}, None),
        ({}, None, "no budget: give at least one of budget.parameters=, budget.non_embedding_parameters=, budget.memory_gib=, "
         "budget.flops_per_token=, budget.latency_ms=, budget.tokens_per_second="),
    ],
)  # fmt: skip
def test_limits_are_those_that_were_given(monkeypatch, options, limits, says):
    read = []
    monkeypatch.setattr("minitron_megatron.search.budget.read_latency", lambda *given: read.append(given) or "fitted")
    if says:
        with pytest.raises(UserError) as refused:
            Budget.of(SOURCE, BudgetConfig(**options))
        assert says in str(refused.value)
        return
    made = Budget.of(SOURCE, BudgetConfig(**options))
    assert made.limits == limits and made.latency == ("fitted" if "table" in options else None)
    column = "tokens_per_second" if "tokens_per_second" in options else "latency_ms"
    assert [(str(file), source, name) for file, source, name in read] == [("t", SOURCE, column)] * ("table" in options)
    assert ("latency_ms" in made.quantities) == ("table" in options) and len(made.quantities) == 4 + (
        "table" in options
    )


@pytest.mark.parametrize(
    ("quantity", "rate", "limit", "below", "option"),
    [
        ("parameters", None, 37497.6, math.inf, "budget.parameters=37498"),
        ("parameters", None, 37498.0, 37499, "budget.parameters=37498"),
        ("flops_per_token", None, 0.5, math.inf, "budget.flops_per_token=1"),
        ("memory_gib", None, 1.23456, math.inf, "budget.memory_gib=1.24"),
        ("memory_gib", None, 1.23456, 1.24, "budget.memory_gib=1.235"),
        ("memory_gib", None, 1.23456, 1.23457, "budget.memory_gib=1.23456"),
        ("latency_ms", None, 3.0, math.inf, "budget.latency_ms=3"),
        ("latency_ms", None, 3.001, math.inf, "budget.latency_ms=3.01"),
        ("latency_ms", 9.0, 3.0, math.inf, "budget.tokens_per_second=333"),
        ("latency_ms", 9.0, 3.0, 3.001, "budget.tokens_per_second=333.3"),
        ("memory_gib", 9.0, 3.001, math.inf, "budget.memory_gib=3.01"),
    ],
)
def test_a_limit_is_typed_so_that_it_is_no_lower_and_below_what_it_must_be(quantity, rate, limit, below, option):
    """Counts are whole; a rate of tokens is lower where the limit is higher."""
    made = Budget(SOURCE, BudgetConfig(tokens_per_second=rate), {})
    assert made.option(quantity, limit, below=below) == option


def test_costs_of_one_shape_are_those_of_its_sizes():
    small = SOURCE.resized(num_layers=2, ffn_hidden_size=3, num_attention_heads=4, num_query_groups=2, hidden_size=4)
    made = Budget(SOURCE, BudgetConfig(context=7, batch=3, weight_bytes=0.5, cache_bytes=4.0), {})
    assert made.cost_of("parameters", small) == count_parameters(small)
    assert made.cost_of("non_embedding_parameters", small) == count_parameters(small) - 2 * 20 * 4
    cache = cached_values(small, {}) * 3 * 7
    assert made.cost_of("memory_gib", small) * 2**30 == pytest.approx(0.5 * count_parameters(small) + 4 * cache)


# Measured shapes


def test_the_error_of_a_fit_is_that_of_a_shape_it_has_not_seen():
    draw = np.random.default_rng(3)
    terms, measured = draw.random((7, 4)) + 0.5, draw.random(7) + 1
    errors = []
    for i in range(7):
        rest = [j for j in range(7) if j != i]
        errors.append(abs(float(terms[i] @ fit(terms[rest], measured[rest])) / measured[i] - 1))
    assert _left_out(terms, measured) == pytest.approx(max(errors)) and max(errors) > 2 * min(errors)


def test_a_fit_is_the_best_of_those_that_make_nothing_faster():
    """By relative errors: of two constants that measure 1 and 3, 1.2 is off by the least squares of shares."""
    ones = np.ones((2, 1))
    assert fit(ones, np.array([1.0, 3.0])) == pytest.approx([1.2])
    # The second term would take a negative weight: it has none.
    terms = np.array([[1.0, 1.0], [1.0, 2.0], [1.0, 3.0]])
    found = fit(terms, np.array([3.0, 2.0, 1.0]))
    assert found[1] == 0 and found[0] == pytest.approx((1 / 3 + 1 / 2 + 1) / (1 / 9 + 1 / 4 + 1))


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        ("num_layers,latency_ms", None),
        ("num_layers,tokens_per_second", "must have the columns latency_ms and sizes: num_layers, hidden_size"),
        ("num_layers,latency_ms,tokens_per_second", "must have the columns latency_ms and sizes"),
        ("num_layers,latency_ms,note", "must have the columns latency_ms and sizes"),
    ],
)
def test_a_table_has_sizes_and_what_was_measured(tmp_path, columns, says):
    file = tmp_path / "t.csv"
    rows = ["1,1,1", "2,2,1", "3,3,1", "4,5,1", "2,2,1"]
    width = columns.count(",") + 1
    file.write_text("\n".join([columns, *(",".join(row.split(",")[:width]) for row in rows)]))
    if says:
        with pytest.raises(UserError, match=says):
            read_latency(file, SOURCE)
        return
    found = read_latency(file, SOURCE)
    assert found.shapes == 5 and found.digest.startswith("sha256:")
    file.write_text(file.read_text() + "\n")
    assert read_latency(file, SOURCE).digest != found.digest


def test_tokens_a_second_are_fitted_as_milliseconds_of_one(tmp_path):
    file = tmp_path / "t.csv"
    file.write_text("\n".join(["num_layers,tokens_per_second", *(f"{n},{1000 / (2 * n)!r}" for n in (1, 2, 3, 4, 1))]))
    found = read_latency(file, SOURCE, "tokens_per_second")
    assert found.milliseconds({"layers": np.array([1, 2, 4])}) == pytest.approx([2, 4, 8])


# Where nothing fits


class Fake:
    """A budget of limits, with what the model and the smallest shapes take of each quantity."""

    source, options = "source", BudgetConfig(at_least=0.9)

    def __init__(self, limits: dict, whole: dict, least: dict) -> None:
        self.limits, self.whole, self.least, self.typed = limits, whole, least, []

    def cost_of(self, name, shape):
        assert shape == "source"
        return self.whole[name]

    def cost(self, name, sizes):
        assert sizes == "smallest"
        return np.array(self.least[name])

    def option(self, name, limit, below=math.inf):
        self.typed.append((name, limit, below))
        return f"budget.{name}=…"


SPACE = SimpleNamespace(smallest=lambda: "smallest")


@pytest.mark.parametrize(
    ("limits", "least", "says", "proposed"),
    [
        ({"parameters": 50}, {"parameters": [40, 60]}, None, None),
        ({"parameters": 99}, {"parameters": [99]}, None, None),
        ({"parameters": 100}, {"parameters": [40]}, "at the model's 100 parameters, .* (60% of it)", 60),
        ({"parameters": 101}, {"parameters": [40]}, "above the model's 100 parameters, .* (60% of it)", 60),
        ({"parameters": 150}, {"parameters": [90, 80]}, "above .* such as budget.parameters=… (80% of it)", 80),
        ({"parameters": 150}, {"parameters": [100]}, "no smaller shape in this space: none has less than its 100 p", None),
        ({"parameters": 50}, {"parameters": [100]}, "no smaller shape in this space", None),
        ({"parameters": 50}, {"parameters": []}, None, None),
        ({"parameters": 150}, {"parameters": []}, "above .* (60% of it)", 60),
        ({"parameters": 150, "memory_gib": 5}, {"parameters": [100], "memory_gib": [4]}, None, None),
        ({"parameters": 150, "memory_gib": 15}, {"parameters": [100], "memory_gib": [7]},
         "above the model's 10 GiB of weights and cache, .* (70% of it)", 7),
    ],
)  # fmt: skip
def test_a_budget_leaves_something_to_prune(limits, least, says, proposed):
    """A model of 100 parameters and 10 GiB; three fifths of it are proposed, or its smallest shape."""
    budget = Fake(limits, {"parameters": 100, "memory_gib": 10}, least)
    if says is None:
        check_smaller(SPACE, budget)
    else:
        with pytest.raises(UserError, match=says.replace("(", r"\(").replace(")", r"\)")):
            check_smaller(SPACE, budget)
    name = "memory_gib" if proposed == 7 else "parameters"
    assert budget.typed == ([(name, proposed, budget.whole[name])] if proposed else [])


@pytest.mark.parametrize(
    ("found", "says"),
    [
        ({"shapes": 9, "within": 2, "fitting": 1}, None),
        ({"shapes": 0}, "the space is empty: no space.hidden_size is a multiple of a space.num_attention_heads"),
        ({"shapes": 9, "smallest": 100}, "no shape of the space is below the model's 100 parameters: widen space"),
        ({"shapes": 9, "smallest": 99},
         "the smallest possible shape has 99 parameters, budget.parameters is 50: use budget.parameters=… or"),
        ({"shapes": 9, "smallest": 51}, "the smallest possible shape has 51 parameters"),
        ({"shapes": 9, "smallest": 50}, "every limit alone leaves shapes, all of them together none"),
        ({"shapes": 9, "smallest": 9, "within": 3, "used": 0.45678},
         "the 3 shapes within the budget use 45.68% of it at most, budget.at_least is 90%: use budget.at_least=0.456 or widen"),
    ],
)  # fmt: skip
def test_what_is_nearest_is_said_where_nothing_fits(found, says):
    budget = Fake({"parameters": 50}, {"parameters": 100}, {})
    smallest = {"parameters": found.pop("smallest", 10)}
    if says is None:
        _check_found(Found(smallest=smallest, **found), budget)
        return
    with pytest.raises(UserError) as refused:
        _check_found(Found(smallest=smallest, **found), budget)
    assert says in str(refused.value)


def test_a_scan_finds_the_share_of_a_limit_that_is_used_most(monkeypatch):
    """Of shapes that are within all limits; the limit that binds counts."""
    costs = {"parameters": np.array([50.0, 90, 120]), "memory_gib": np.array([6.0, 2, 1])}
    space = SimpleNamespace(numbers=lambda: [np.array([0, 1]), np.array([2])], lengths=lambda numbers: numbers)
    budget = SimpleNamespace(
        limits={"parameters": 100, "memory_gib": 10},
        options=BudgetConfig(at_least=0.6),
        cost=lambda name, n: costs[name][n],
    )
    found = scan.scan(space, budget)
    assert (found.shapes, found.within, found.fitting, found.used) == (3, 2, 2, 0.9)
    assert found.smallest == {"parameters": 50, "memory_gib": 1} and len(found.best) == 0 and found.fronts == {}


@pytest.mark.parametrize("share", [1.0, 0.9999, 0.45678, 0.1, 0.05, 0.0123456, 1e-6])
def test_a_share_is_rounded_down_to_three_figures(share):
    found = _below(share)
    assert found <= share * (1 + 1e-12) and share - found < 10 ** (math.floor(math.log10(share)) - 2) * (1 + 1e-9)
    assert float(f"{found:.3g}") == pytest.approx(found, rel=1e-12)


# Spaces


@pytest.mark.parametrize("exportable", [True, False])
def test_the_smallest_shapes_are_one_for_each_of_the_heads_that_go_together(exportable):
    """With the least hidden size that goes with these heads, if any does; every other number is a shape or none."""
    heads = np.array([[8, 4], [6, 3], [7, 7]])
    space = Space(np.array([3, 2]), np.array([32, 24, 20]), np.array([8, 4]), heads, exportable)
    found = {name: values.tolist() for name, values in space.smallest().items()}
    hidden, kv, q = ([24, 24], [4, 3], [2, 2]) if exportable else ([20] * 3, [4, 3, 7], [2, 2, 1])
    assert found == {"layers": [2] * len(kv), "hidden": hidden, "ffn": [4] * len(kv), "kv_groups": kv, "q_heads": q}
    numbers = np.concatenate(list(space.numbers())).tolist()
    taken = [n for n in range(space.size) if not exportable or [32, 24, 20][n // 6 % 3] % heads[n % 3][0] == 0]
    assert numbers == taken and space.dims == (2, 3, 2, 3)
    assert space.target(7) == dict(zip(SIZES, (3, 24, 8, 6, 3), strict=True))
    nothing = Space(np.zeros(0, int), np.array([32]), np.array([8]), heads, exportable)
    assert all(len(values) == 0 for values in nothing.smallest().values()) and list(nothing.numbers()) == []


ALONE = "no smaller one goes together with the heads and groups that are left"


@pytest.mark.parametrize(
    ("sizes", "space", "why"),
    [
        ({}, {}, {}),
        ({"num_layers": 1}, {}, {"num_layers": "there is none smaller down to half of it to try"}),
        ({}, {"num_layers": 4}, {}),
        (
            {"hidden_size": 10, "num_attention_heads": 5, "num_query_groups": 5},
            {"multiple": 2, "num_attention_heads": 5},
            {"hidden_size": "no smaller one is a multiple of the heads, which", "num_query_groups": ALONE},
        ),
        ({}, {"num_attention_heads": 8, "exportable": False}, {"num_query_groups": ALONE}),
        (
            {"ffn_hidden_size": 48},
            {"tensor": 4},
            {
                "num_query_groups": "down to half of it no size is a multiple of space.tensor=4, which a smaller value changes"
            },
        ),
    ],
)
def test_an_axis_that_does_not_vary_has_a_reason(sizes, space, why):
    source, cfg = SOURCE.resized(**sizes), SpaceConfig(**{"multiple": 1, "tensor": 1, **space})
    found = frozen_axes(source, cfg, make_space(source, cfg, PruneOptions()))
    assert found.keys() == why.keys() and all(found[name].startswith(said) for name, said in why.items())


def test_a_few_sizes_stand_for_all():
    assert _few([4, 3, 2, 1]) == "4, 3, 2, 1" and _few([5, 4, 3, 2, 1]) == "5, 4, 3, 2, …"


# Damage


@pytest.mark.parametrize(
    ("judge", "base", "without", "share"),
    [
        ("bi", Judged(1.0), Judged(9.0, bi=0.2), 0.4),
        ("bi", Judged(1.0), Judged(9.0, bi=-0.2), 0.0),
        ("loss", Judged(1.0), Judged(2.0, bi=9.0), 1 / (math.log(20) - 1)),
        ("loss", Judged(1.0), Judged(0.5), 0.0),
        ("loss", Judged(math.log(20)), Judged(math.log(20) + 1e-9), 1.0),
        ("task", Judged(1.0, accuracy=0.8), Judged(1.0, accuracy=0.2), 0.75),
        ("task", Judged(1.0, accuracy=0.8), Judged(1.0, accuracy=0.9), 0.0),
        ("task", Judged(1.0, accuracy=0.8), Judged(1.0, accuracy=None), 1.0),
        ("task", Judged(1.0, accuracy=0.0), Judged(1.0, accuracy=0.0), 1.0),
    ],
)
def test_what_a_judge_says_is_a_share_that_is_never_negative(judge, base, without, share):
    """Of the way to guessing among 20 tokens, or of the whole model's accuracy."""
    analysis = LayerAnalysis("a", "", 4, base, {2: [Judged(7.0, 7.0, 7.0), without]}, {})
    assert _judged(analysis, range(1, 3), judge, 20) == pytest.approx(share, rel=1e-5)
