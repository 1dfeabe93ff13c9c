"""What plots draw: every point, colour, name and scale of each, read from matplotlib's own axes."""

import math

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.colors import LogNorm, Normalize, to_hex

from minitron_megatron.report import plots
from minitron_megatron.report.plots import BLUE, GREY, ORANGE


@pytest.fixture
def drawn(monkeypatch):
    """Gives the axes that a plot was drawn on, and its size in inches, which is that of others where none is given."""
    figures = []

    def draw_on(draw, *, width=5.4, height=3.2):
        figure, axes = plt.subplots()
        figures.append(figure)
        draw(axes)
        return axes, (width, height)

    monkeypatch.setattr(plots, "svg", draw_on)
    yield
    for figure in figures:
        plt.close(figure)


def points(line) -> list[tuple[float, float]]:
    return [tuple(point) for point in line.get_xydata().tolist()]


def colours(artists) -> list[str]:
    return [to_hex(one.get_color()) for one in artists]


def legend(axes) -> list[str] | None:
    found = axes.get_legend()
    return [text.get_text() for text in found.get_texts()] if found else None


def words(axes) -> tuple[str, str]:
    return axes.get_xlabel(), axes.get_ylabel()


def test_a_plot_is_one_element_of_its_size_with_text_the_same_each_time_and_leaves_nothing_open():
    found = [plots.svg(lambda axes: axes.set_xlabel("a step"), width=3.0, height=2.0) for _ in range(2)]
    assert found[0] == found[1] and found[0].startswith("<svg") and found[0].rstrip().endswith("</svg>")
    assert 'width="216pt" height="144pt"' in found[0] and ">a step</text>" in found[0] and "<metadata>" not in found[0]
    assert "#ffffff" not in found[0] and "#000000" not in found[0] and GREY in found[0] and not plt.get_fignums()
    assert 'width="388.8pt" height="230.4pt"' in plots.svg(lambda axes: None)
    assert plots.CSS_COLOURS == {BLUE: "plot-blue", ORANGE: "plot-orange", GREY: "plot-text"}


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_curves_have_a_colour_each_and_names_where_there_are_several(drawn, count, log):
    series = {f"s{i}": ([1, 2, 3], [i + 1.0, i + 4.0, i + 2.0]) for i in range(count)}
    axes, size = plots.curves(series, "step", "loss", log=log)
    assert [points(line) for line in axes.lines] == [
        [(1, i + 1), (2, i + 4), (3, i + 2)] for i in range(count)
    ] and size == (5.4, 3.2)
    assert colours(axes.lines) == [BLUE, ORANGE, GREY, BLUE][:count] and words(axes) == ("step", "loss")
    assert legend(axes) == (list(series) if count > 1 else None) and axes.get_yscale() == ("log" if log else "linear")
    assert all(float(tick).is_integer() for tick in axes.get_xticks())


@pytest.mark.parametrize(("count", "mark"), [(20, "o"), (21, "None")])
def test_points_of_short_curves_are_marked(drawn, count, mark):
    axes, _ = plots.curves({"a": (list(range(count)), [1.0] * count)}, "x", "y")
    assert axes.lines[0].get_marker() == mark


def test_logarithmic_numbers_are_plain(drawn):
    axes, _ = plots.curves({"a": ([1, 2], [0.5, 700.0])}, "x", "y", log=True)
    axes.figure.canvas.draw()
    said = [label.get_text() for label in axes.get_yticklabels()]
    assert {"1", "10", "100"} <= set(said) and not any("e" in one or "$" in one for one in said)


@pytest.mark.parametrize("low", [0.0, 1.0])
def test_a_spread_has_its_median_its_middle_half_and_its_ends(drawn, low):
    scores = np.array([[low, 2.0, 3.0, 4.0, 9.0], [9.0, 6.0, 7.0, 5.0, 8.0]])
    axes, _ = plots.importance_over_layers(scores, "neurons")
    assert points(axes.lines[0]) == [(0, 3), (1, 7)] and colours(axes.lines) == [BLUE]
    bands = [{tuple(point) for point in one.get_paths()[0].vertices.tolist()} for one in axes.collections]
    assert bands == [{(0, low), (0, 9), (1, 5), (1, 9)}, {(0, 2), (0, 4), (1, 6), (1, 8)}]
    assert legend(axes) == ["all", "middle half", "median"] and words(axes) == ("layer", "importance of neurons")
    assert axes.get_yscale() == ("log" if low else "linear")


def test_maps_are_relative_to_the_highest_of_each_layer_from_below(drawn):
    scores = np.array([[2.0, 1.0, 4.0], [30.0, 60.0, 15.0]])
    axes, _ = plots.heat_map(scores, "head", np.array([[False, True, False], [False, False, True]]))
    image = axes.images[0]
    assert np.array(image.get_array()).T.tolist() == [[0.5, 0.25, 1.0], [0.5, 1.0, 0.25]]
    assert tuple(image.get_extent()) == (-0.5, 1.5, -0.5, 2.5) and image.origin == "lower"
    assert points(axes.lines[0]) == [(0, 1), (1, 2)] and axes.lines[0].get_linestyle() == "None"
    assert colours(axes.lines) == [ORANGE] and words(axes) == ("layer", "head")
    assert axes.figure.axes[1].get_ylabel() == "share of the layer's highest"
    plain, _ = plots.heat_map(scores, "head")
    assert not plain.lines and not np.any(np.isnan(plots.heat_map(0 * scores, "head")[0].images[0].get_array()))


@pytest.mark.parametrize(
    ("lowest", "kind", "least"),
    [(0.05, Normalize, 0), (0.04, LogNorm, 0.04), (1e-4, LogNorm, 1e-3), (0, LogNorm, 1e-3)],
)
def test_colours_of_a_map_are_logarithmic_where_it_is_wide(drawn, lowest, kind, least):
    axes, _ = plots.heat_map(np.array([[lowest, 1.0]]), "head")
    norm = axes.images[0].norm
    assert type(norm) is kind and (norm.vmin, norm.vmax) == (pytest.approx(least), 1)


@pytest.mark.parametrize("low", [0.0, 1.0])
def test_what_was_kept_and_cut_stands_by_importance(drawn, low):
    axes, _ = plots.kept_curve(np.array([low, 4.0, 2.0, 4.0]), np.array([True, False, True, True]), "channels")
    kept, cut = (one.get_data() for one in axes.patches)
    np.testing.assert_equal(kept.values, [math.nan, 4, 2, low])
    np.testing.assert_equal(cut.values, [4, math.nan, math.nan, math.nan])
    assert kept.edges.tolist() == cut.edges.tolist() == [0, 1, 2, 3, 4]
    assert kept.baseline == cut.baseline == (0.8 if low else 0.0)
    assert [to_hex(one.get_facecolor()) for one in axes.patches] == [BLUE, ORANGE]
    assert legend(axes) == ["kept: 3", "cut: 1"] and axes.get_yscale() == ("log" if low else "linear")
    assert words(axes) == ("channels, by importance", "importance")


def test_of_many_channels_a_stretch_is_kept_where_half_of_it_is(drawn):
    scores, kept = np.repeat(np.arange(400.0, 0, -1), 2), np.zeros(800, bool)
    kept[0] = kept[2] = kept[3] = True
    axes, _ = plots.kept_curve(scores, kept, "channels")
    values = axes.patches[0].get_data()
    assert np.flatnonzero(~np.isnan(values.values)).tolist() == [0, 1] and values.edges[-1] == 800
    assert legend(axes) == ["kept: 3", "cut: 797"]


def test_bars_that_went_have_another_colour(drawn):
    values = np.array([3.0, 1.0, 2.0])
    axes, _ = plots.bars(values, "layer", "worth", np.array([False, True, False]))
    found = [(bar.get_x() + bar.get_width() / 2, bar.get_height(), to_hex(bar.get_facecolor())) for bar in axes.patches]
    assert found == [(0, 3, BLUE), (2, 2, BLUE), (1, 1, ORANGE)] and legend(axes) == ["kept: 2", "cut: 1"]
    assert words(axes) == ("layer", "worth")
    plain, _ = plots.bars(values, "layer", "worth")
    assert [bar.get_height() for bar in plain.patches] == [3, 1, 2] and legend(plain) is None


def test_rates_go_down_in_order_with_their_values(drawn):
    axes, size = plots.rates({"a": 1234.0, "b": 2.5}, "tokens")
    assert [(bar.get_y() + bar.get_height() / 2, bar.get_width()) for bar in axes.patches] == [
        (pytest.approx(0), 1234), (pytest.approx(1), 2.5),
    ]  # fmt: skip
    assert [text.get_text() for text in axes.texts] == ["1,234", "2.5"] and axes.yaxis_inverted()
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["a", "b"] and axes.get_xlabel() == "tokens"
    assert size == (5.4, pytest.approx(0.9 + 2 * 0.32))


@pytest.mark.parametrize("series", [1, 2, 3])
def test_bars_of_a_group_stand_beside_one_another_around_its_place(drawn, series):
    values = {f"s{i}": [1.0 + i, 2.0 + i] for i in range(series)}
    labels = {f"s{i}": [f"a{i}", f"b{i}"] for i in range(series)}
    axes, _ = plots.grouped_bars(["g", "h"], values, labels, "points")
    middles = [[bar.get_x() + bar.get_width() / 2 for bar in group] for group in axes.containers]
    np.testing.assert_allclose(np.mean(middles, axis=0), [0, 1], atol=1e-12)
    np.testing.assert_allclose(np.diff(middles, axis=0), 0.8 / series)
    assert all(bar.get_width() < 0.8 / series for bar in axes.patches)
    assert [[bar.get_height() for bar in group] for group in axes.containers] == list(values.values())
    assert [to_hex(group[0].get_facecolor()) for group in axes.containers] == [BLUE, ORANGE, GREY][:series]
    assert [text.get_text() for text in axes.texts] == [one for both in labels.values() for one in both]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["g", "h"] and axes.get_ylabel() == "points"
    assert legend(axes) == list(values)


@pytest.mark.parametrize(("groups", "series", "width"), [(1, 2, 4.0), (4, 2, 6.3), (4, 1, 6.3), (4, 4, 11.1)])
def test_groups_have_room(drawn, groups, series, width):
    values = {str(i): [1.0] * groups for i in range(series)}
    _, size = plots.grouped_bars(list("abcd")[:groups], values, {name: ["x"] * groups for name in values}, "")
    assert size == (pytest.approx(width), 3.2)


@pytest.mark.parametrize("whole", [None, 0.0, 1.5])
def test_blocks_stand_beside_the_whole_model(drawn, whole):
    axes, _ = plots.curve_over_blocks([3.0, 2.0], whole, "loss")
    assert points(axes.lines[0]) == [(0, 3), (1, 2)] and words(axes) == ("first layer of the block", "loss")
    assert colours(axes.lines) == ([BLUE] if whole is None else [BLUE, ORANGE])
    assert legend(axes) == (None if whole is None else ["block removed", "whole model"])
    if whole is not None:
        assert set(axes.lines[1].get_ydata()) == {whole}


def test_a_front_is_a_line_and_ranked_shapes_are_rings(drawn):
    axes, _ = plots.front([(1, 0.3), (3, 0.1)], [(3, 0.1), (2, 0.4)], "parameters", "damage")
    assert [points(line) for line in axes.lines] == [[(1, 0.3), (3, 0.1)], [(3, 0.1), (2, 0.4)]]
    assert [line.get_linestyle() for line in axes.lines] == ["-", "None"] and colours(axes.lines) == [BLUE, ORANGE]
    assert legend(axes) == ["front", "ranked"] and words(axes) == ("parameters", "damage")


def test_an_order_leads_from_each_place_before_to_the_place_after(drawn):
    axes, size = plots.rankings(["a", "b", "c"], ["c", "a", "b"])
    assert [points(line) for line in axes.lines] == [[(0, 3), (1, 1)], [(0, 1), (1, 2)], [(0, 2), (1, 3)]]
    assert colours(axes.lines) == [BLUE, GREY, GREY] and axes.yaxis_inverted() and not axes.axison
    said = [(text.get_text(), text.get_position()[0] > 0.5, text.get_ha()) for text in axes.texts]
    assert said == [
        ("c   3", False, "right"), ("1   c", True, "left"), ("a   1", False, "right"), ("2   a", True, "left"),
        ("b   2", False, "right"), ("3   b", True, "left"),
        ("before, by prediction", False, "right"), ("after, by KL", True, "left"),
    ]  # fmt: skip
    assert [text.get_position()[1] for text in axes.texts[:6]] == [3, 1, 1, 2, 2, 3]
    low, high = sorted(axes.get_ylim())
    assert low < 0.4 and high > 3 and size == (5.4, 2.0)
    names = [str(i) for i in range(10)]
    assert plots.rankings(names, names)[1] == (5.4, pytest.approx(4.2))


def test_runs_have_their_places_at_their_ends_and_the_best_is_coloured(drawn):
    axes, _ = plots.curves_by_name({"x": {1: 0.5, 2: 0.2}, "y": {}, "z": {1: 0.9}}, "KL")
    assert [points(line) for line in axes.lines] == [[(1, 0.5), (2, 0.2)], [(1, 0.9)]]
    assert colours(axes.lines) == [BLUE, GREY] and legend(axes) == ["x"] and words(axes) == ("step", "KL")
    assert [(text.get_text(), text.xy) for text in axes.texts] == [("1", (2, 0.2)), ("3", (1, 0.9))]


def test_lines_of_a_tree_run_beside_the_rows_that_they_pass(drawn):
    rows = [("a", "import"), ("bb", "prune"), ("c", "distill")]
    axes, size = plots.tree(rows, [(0, 1, False), (1, 2, True), (0, 2, False)])
    texts = {text.get_text(): text.get_position() for text in axes.texts}
    assert {name: y for name, (_, y) in texts.items()} == {
        "a": 0, "import": 0, "bb": 1, "prune": 1, "c": 2, "distill": 2,
    }  # fmt: skip
    lane, letter = plots._LANE, plots._CHARACTER
    left = 2 * lane + 0.1
    assert {texts[name][0] for name in ("a", "bb", "c")} == {left}
    middle = left + 0.25 + 2 * letter
    assert [texts[name][0] for name in ("import", "prune", "distill")] == [pytest.approx(middle)] * 3
    assert size == (pytest.approx(middle + 0.4 + 7 * letter), pytest.approx(0.2 + 3 * plots._ROW))
    dots = [points(line) for line in axes.lines if line.get_marker() == "o"]
    assert dots == [[(0, 0)], [(0, 1)], [(0, 2)]] and axes.yaxis_inverted() and not axes.axison
    lines = [(points(line), line.get_linestyle()) for line in axes.lines if line.get_marker() == "None"]
    assert lines == [
        ([(0, 0), (0, 0), (0, 1), (0.06, 1)], "-"),
        ([(0, 1), (0, 1), (0, 2), (0.06, 2)], ":"),
        ([(0, 0), (lane, 0.3), (lane, 1.7), (0.06, 2)], "-"),
    ]
    heads = [(points(line)[0], line.get_marker()) for line in axes.lines if line.get_marker() in (4, 7)]
    assert heads == [((0.09, 1), 7), ((0.09, 2), 7), ((0.09, 2), 4)]
    assert plots.tree([("a", "x")], [])[1][1] == pytest.approx(0.2 + plots._ROW)


@pytest.mark.parametrize(
    ("arrows", "lanes"),
    [
        ([], {}),
        ([(0, 1)], {}),
        ([(0, 2)], {0: 1}),
        ([(0, 2), (2, 4)], {0: 1, 2: 1}),  # one ends where the other begins
        ([(0, 3), (2, 4)], {0: 2, 2: 1}),  # the shorter one is nearer
        ([(0, 2), (1, 3)], {0: 1, 1: 2}),
        ([(0, 2), (0, 5), (3, 5)], {0: 2, 3: 1}),  # one lane for all lines of a row
        ([(0, 5), (0, 2), (3, 5)], {0: 2, 3: 1}),
        ([(0, 9), (1, 3), (3, 6), (4, 7)], {0: 3, 1: 1, 3: 1, 4: 2}),
    ],
)
def test_lines_that_pass_the_same_rows_have_lanes_of_their_own(arrows, lanes):
    assert plots._lanes([(i, j, False) for i, j in arrows]) == lanes
