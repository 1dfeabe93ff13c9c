"""Plots of a run as inline SVG: curves over steps, importance over layers, what stays, candidates, lineage.

Takes plain arrays, gives text for a page. What has many points is thinned out to what can be seen. matplotlib takes seconds to
import: it is imported when something is drawn.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.ticker import LogFormatter

BLUE, ORANGE, GREY = "#2f6fab", "#c8641b", "#8a8f98"
# What these are called in a page, which has others of that name on dark paper.
CSS_COLOURS = {BLUE: "plot-blue", ORANGE: "plot-orange", GREY: "plot-text"}
_SERIES = (BLUE, ORANGE, GREY)
_POINTS = 400
# The lowest share of the highest that a heat map's colours tell apart.
_FLOOR = 1e-3
# Inches between rows and lanes of a drawn lineage, and of a character.
_ROW, _LANE, _CHARACTER = 0.3, 0.22, 0.092


def svg(draw: Callable[[Axes], None], *, width: float = 5.4, height: float = 3.2) -> str:
    """Draw one plot and return it as an SVG element that works on a light and on a dark page."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    settings = {
        "svg.fonttype": "none",
        "svg.hashsalt": "minitron",
        "font.family": "sans-serif",
        "font.size": 11,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "text.color": GREY,
        "axes.labelcolor": GREY,
        "axes.edgecolor": GREY,
        "xtick.color": GREY,
        "ytick.color": GREY,
    }
    with matplotlib.rc_context(settings):
        figure, axes = plt.subplots(figsize=(width, height), layout="constrained")
        draw(axes)
        text = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(text, format="svg", transparent=True, metadata=nothing)
        plt.close(figure)
    return text.getvalue()[text.getvalue().index("<svg") :]


def _thin(values: np.ndarray) -> np.ndarray:
    """Means of equal stretches along the first dimension, where there are more values than can be told apart."""
    values = np.asarray(values, np.float64)
    if len(values) <= _POINTS:
        return values
    edges = np.linspace(0, len(values), _POINTS + 1).astype(int)
    return np.add.reduceat(values, edges[:-1]) / np.diff(edges).reshape(-1, *[1] * (values.ndim - 1))


def _legend_above(axes: Axes) -> None:
    """In a line, where it covers nothing."""
    axes.legend(frameon=False, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0))


def _whole_numbers(axes: Axes, label: str) -> None:
    """An axis of steps, layers or heads."""
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel(label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _plain_numbers(**thresholds: tuple[float, float]) -> LogFormatter:
    """A formatter: 0.6 rather than 6e-01, at the places that matplotlib would mark."""
    from matplotlib.ticker import LogFormatter

    class PlainNumbers(LogFormatter):
        def __call__(self, x: float, pos: int | None = None) -> str:
            return f"{x:g}" if super().__call__(x, pos) else ""

    return PlainNumbers(**thresholds)


def _logarithmic(axes: Axes) -> None:
    """A logarithmic axis with plain numbers."""
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(_plain_numbers())
    axes.yaxis.set_minor_formatter(_plain_numbers(minor_thresholds=(1, 0.4)))


def curves(series: Mapping[str, tuple[Sequence[float], Sequence[float]]], x: str, y: str, *, log: bool = False) -> str:
    """Lines over steps: (steps, values) by name; a series of few points shows each of them."""

    def draw(axes: Axes) -> None:
        for (name, (steps, values)), colour in zip(series.items(), _SERIES * len(series), strict=False):
            marks = {"marker": "o", "markersize": 4} if len(steps) <= 20 else {}
            axes.plot(_thin(steps), _thin(values), color=colour, linewidth=1.2, label=name, **marks)
        if len(series) > 1:
            _legend_above(axes)
        if log:
            _logarithmic(axes)
        _whole_numbers(axes, x)
        axes.set_ylabel(y)

    return svg(draw)


def importance_over_layers(scores: np.ndarray, unit: str) -> str:
    """Spread of an axis's scores in every layer: median, middle half and extremes. scores [layers, units]."""

    def draw(axes: Axes) -> None:
        layers = np.arange(len(scores))
        low, first, middle, third, high = np.quantile(scores, [0, 0.25, 0.5, 0.75, 1], axis=1)
        axes.fill_between(layers, low, high, color=BLUE, alpha=0.15, linewidth=0, label="all")
        axes.fill_between(layers, first, third, color=BLUE, alpha=0.35, linewidth=0, label="middle half")
        axes.plot(layers, middle, color=BLUE, linewidth=1.5, label="median")
        if (scores > 0).all():
            _logarithmic(axes)
        _whole_numbers(axes, "layer")
        axes.set_ylabel(f"importance of {unit}")
        _legend_above(axes)

    return svg(draw)


def heat_map(scores: np.ndarray, unit: str, cut: np.ndarray | None = None) -> str:
    """Scores [layers, units] as a map, each layer relative to its highest; units with `cut` [layers, units] are crossed out."""

    def draw(axes: Axes) -> None:
        relative = _thin((scores / np.maximum(scores.max(1, keepdims=True), 1e-30)).T)
        wide = relative.min() < 0.05
        from matplotlib.colors import LogNorm, Normalize

        norm = LogNorm(max(float(relative.min()), _FLOOR), 1, clip=True) if wide else Normalize(0, 1)
        extent = (-0.5, len(scores) - 0.5, -0.5, scores.shape[1] - 0.5)
        image = axes.imshow(relative, aspect="auto", origin="lower", cmap="viridis", norm=norm, extent=extent)
        if cut is not None:
            axes.plot(*np.nonzero(cut), "x", color=ORANGE, markersize=5, markeredgewidth=1.5)
        _whole_numbers(axes, "layer")
        axes.set_ylabel(unit)
        bar = axes.figure.colorbar(image, label="share of the layer's highest")
        if wide:
            bar.ax.yaxis.set_major_formatter(_plain_numbers())

    return svg(draw)


def kept_curve(scores: np.ndarray, kept: np.ndarray, unit: str) -> str:
    """Scores [units] in descending order; what was kept (a mask) has one colour, the rest another."""

    def draw(axes: Axes) -> None:
        order = np.argsort(-scores, kind="stable")
        height, stays = _thin(scores[order]), _thin(kept[order]) >= 0.5
        rank = np.linspace(0, len(scores), len(height) + 1)
        for where, colour, what in ((stays, BLUE, "kept"), (~stays, ORANGE, "cut")):
            count = int((kept if what == "kept" else ~kept).sum())
            top = np.where(where, height, np.nan)
            axes.stairs(
                top, rank, fill=True, color=colour, alpha=0.6, label=f"{what}: {count:,}", baseline=_base(scores)
            )
        if (scores > 0).all():
            _logarithmic(axes)
        axes.set_xlabel(f"{unit}, by importance")
        axes.set_ylabel("importance")
        _legend_above(axes)

    return svg(draw)


def _base(scores: np.ndarray) -> float:
    """Where filled areas start: on a logarithmic scale, a little below the lowest."""
    return 0.8 * float(scores.min()) if (scores > 0).all() else 0.0


def bars(values: np.ndarray, unit: str, label: str, cut: np.ndarray | None = None) -> str:
    """One bar a unit; those of the mask `cut` in another colour. values [units]."""

    def draw(axes: Axes) -> None:
        gone = np.zeros(len(values), bool) if cut is None else cut
        for where, colour, what in ((~gone, BLUE, "kept"), (gone, ORANGE, "cut")):
            if where.any():
                axes.bar(np.flatnonzero(where), values[where], color=colour, label=f"{what}: {where.sum()}")
        if cut is not None:
            axes.legend(frameon=False)
        _whole_numbers(axes, unit)
        axes.set_ylabel(label)

    return svg(draw)


def rates(values: Mapping[str, float], label: str) -> str:
    """One horizontal bar a name, with its value."""

    def draw(axes: Axes) -> None:
        shown = axes.barh(list(values), list(values.values()), color=BLUE, height=0.6)
        axes.bar_label(shown, fmt="{:,.4g}", padding=3, color=GREY)
        axes.invert_yaxis()
        axes.margins(x=0.15)
        axes.set_xlabel(label)

    return svg(draw, height=0.9 + 0.32 * len(values))


def grouped_bars(
    groups: Sequence[str], values: Mapping[str, Sequence[float]], labels: Mapping[str, Sequence[str]], unit: str
) -> str:
    """For each group a bar of every series, with a label over it; `values` and `labels` have one a group, by series."""

    def draw(axes: Axes) -> None:
        places, width = np.arange(len(groups)), 0.8 / len(values)
        for i, (name, heights) in enumerate(values.items()):
            where = places + (i - (len(values) - 1) / 2) * width
            drawn = axes.bar(where, heights, width * 0.92, color=(BLUE, ORANGE, GREY)[i % 3], label=name)
            axes.bar_label(drawn, labels[name], padding=2, fontsize=8, color=GREY)
        axes.set_xticks(places, groups)
        axes.set_ylabel(unit)
        axes.margins(y=0.12)
        axes.legend(frameon=False)

    return svg(draw, width=max(4.0, 1.2 * len(groups) * max(1, len(values) / 2) + 1.5))


def curve_over_blocks(values: Sequence[float], whole: float | None, label: str) -> str:
    """A value for each first layer of a removed block; `whole` is the whole model's."""

    def draw(axes: Axes) -> None:
        axes.plot(np.arange(len(values)), values, "o-", color=BLUE, linewidth=1.2, markersize=4, label="block removed")
        if whole is not None:
            axes.axhline(whole, color=ORANGE, linewidth=1.0, linestyle="--", label="whole model")
            axes.legend(frameon=False)
        _whole_numbers(axes, "first layer of the block")
        axes.set_ylabel(label)

    return svg(draw)


def front(points: Sequence[tuple[float, float]], ranked: Sequence[tuple[float, float]], label: str, loss: str) -> str:
    """The front of a search, by rising cost, and the ranked shapes; both as (cost, loss)."""

    def draw(axes: Axes) -> None:
        axes.plot(*zip(*points, strict=True), "o-", color=BLUE, linewidth=1.2, markersize=3, label="front")
        axes.plot(*zip(*ranked, strict=True), "o", color=ORANGE, markersize=5, fillstyle="none", label="ranked")
        axes.set_xlabel(label)
        axes.set_ylabel(loss)
        axes.legend(frameon=False)

    return svg(draw)


def rankings(before: Sequence[str], after: Sequence[str]) -> str:
    """How an order became another: a line from each name's place on the left to its place on the right; the best is coloured."""

    def draw(axes: Axes) -> None:
        for place, name in enumerate(after):
            color = BLUE if place == 0 else GREY
            ends = [before.index(name) + 1, place + 1]
            axes.plot([0, 1], ends, "o-", color=color, linewidth=2.0 if place == 0 else 1.0, markersize=5)
            for x, y, side in ((-0.03, ends[0], "right"), (1.03, ends[1], "left")):
                axes.text(
                    x, y, f"{y}   {name}" if side == "left" else f"{name}   {y}", ha=side, va="center", color=color
                )
        axes.set_xlim(-0.9, 1.9)
        axes.set_ylim(len(after) + 0.5, 0.2)
        axes.text(-0.03, 0.4, "before, by prediction", ha="right")
        axes.text(1.03, 0.4, "after, by KL", ha="left")
        axes.set_axis_off()

    return svg(draw, height=max(2.0, 0.6 + 0.36 * len(after)))


def curves_by_name(curves: Mapping[str, Mapping[int, float]], label: str) -> str:
    """A value over steps for each of several runs, best first; the best is coloured, the others have their places.

    A run may have none.
    """

    def draw(axes: Axes) -> None:
        for place, (name, points) in enumerate(curves.items(), start=1):
            if not points:
                continue
            best = place == 1
            axes.plot(
                list(points),
                list(points.values()),
                "o-",
                color=BLUE if best else GREY,
                linewidth=2.0 if best else 1.0,
                markersize=4,
                label=name if best else None,
            )
            step, value = list(points.items())[-1]
            axes.annotate(str(place), (step, value), xytext=(6, 0), textcoords="offset points", va="center")
        axes.set_xlabel("step")
        axes.set_ylabel(label)
        axes.legend(frameon=False)

    return svg(draw)


def tree(rows: Sequence[tuple[str, str]], arrows: Sequence[tuple[int, int, bool]]) -> str:
    """Rows (name, what made it) from top to bottom, joined by lines that run beside them.

    arrows: (from row, to row, dashed), each downwards.
    """
    lanes = _lanes(arrows)
    used = max(lanes.values(), default=0) + 1
    left = _LANE * used + 0.1
    middle = left + 0.25 + _CHARACTER * max(len(name) for name, _ in rows)
    width, height = middle + 0.4 + _CHARACTER * max(len(made) for _, made in rows), 0.2 + _ROW * len(rows)

    def draw(axes: Axes) -> None:
        for i, (name, made) in enumerate(rows):
            axes.plot(0, i, "o", color=BLUE, markersize=6, zorder=3)
            axes.text(left, i, name, va="center", color=BLUE)
            axes.text(middle, i, made, va="center")
        for i, j, dashed in arrows:
            x = _LANE * lanes[i] if j > i + 1 else 0
            style = {"color": GREY, "linewidth": 1.2, "linestyle": ":" if dashed else "-", "solid_joinstyle": "round"}
            axes.plot([0, x, x, 0.06], [i, i + 0.3 * bool(x), j - 0.3 * bool(x), j], **style)
            axes.plot(0.09, j, marker=4 if x else 7, color=GREY, markersize=4)
        axes.set_xlim(-0.15, width - 0.15)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.axis("off")

    return svg(draw, width=width, height=height)


def _lanes(arrows: Sequence[tuple[int, int, bool]]) -> dict[int, int]:
    """The lane, from 1, in which a row's lines to rows further down run: the first that is free to the last of them."""
    last: dict[int, int] = {}
    for i, j, _ in arrows:
        if j > i + 1:
            last[i] = max(j, last.get(i, 0))
    taken: list[set[int]] = []
    lanes: dict[int, int] = {}
    for i, j in sorted(last.items(), key=lambda one: (one[1] - one[0], one[0])):
        between = set(range(i, j))
        lane = next((n for n, rows in enumerate(taken) if not rows & between), len(taken))
        if lane == len(taken):
            taken.append(set())
        taken[lane] |= between
        lanes[i] = lane + 1
    return lanes
