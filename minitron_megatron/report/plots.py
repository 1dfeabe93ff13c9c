"""Plots of a run as inline SVG: loss curves, and importance over layers. Takes plain arrays, gives text for a page."""

import io
from collections.abc import Callable, Mapping, Sequence

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

BLUE, ORANGE, GREY = "#2f6fab", "#c8641b", "#8a8f98"


def svg(draw: Callable[[Axes], None], *, width: float = 7.0, height: float = 3.2) -> str:
    """Draw one plot and return it as an SVG element that works on a light and on a dark page."""
    settings = {
        "svg.fonttype": "none",
        "svg.hashsalt": "minitron",
        "font.family": "sans-serif",
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
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
        plt.close(figure)
    return text.getvalue()[text.getvalue().index("<svg") :]


def loss_curve(steps: Sequence[int], losses: Sequence[float], validation: Mapping[int, float]) -> str:
    """Distillation loss over steps (nats a token), with validation points where there are some."""

    def draw(axes: Axes) -> None:
        axes.plot(steps, losses, color=BLUE, linewidth=1.2, label="training")
        if validation:
            axes.plot(list(validation), list(validation.values()), "o-", color=ORANGE, markersize=4, label="validation")
            axes.legend(frameon=False)
        axes.set_yscale("log")
        axes.set_xlabel("step")
        axes.set_ylabel("KL to the teacher (nats a token)")

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
            axes.set_yscale("log")
        axes.set_xlabel("layer")
        axes.set_ylabel(f"importance of {unit}")
        axes.legend(frameon=False, ncols=3)

    return svg(draw)


def heat_map(scores: np.ndarray, unit: str) -> str:
    """Scores [layers, units] as a map, each layer relative to its highest."""

    def draw(axes: Axes) -> None:
        relative = scores / np.maximum(scores.max(1, keepdims=True), 1e-30)
        image = axes.imshow(relative.T, aspect="auto", origin="lower", cmap="viridis", vmin=0, vmax=1)
        axes.set_xlabel("layer")
        axes.set_ylabel(unit)
        axes.figure.colorbar(image, label="share of the layer's highest")

    return svg(draw)


def kept_curve(scores: np.ndarray, kept: int, unit: str) -> str:
    """Scores in descending order with the cut: what was kept is coloured. scores [units]."""

    def draw(axes: Axes) -> None:
        ordered = np.sort(scores)[::-1]
        rank = np.arange(len(ordered))
        axes.fill_between(rank[:kept], ordered[:kept], color=BLUE, alpha=0.5, linewidth=0, label=f"kept: {kept}")
        cut = len(ordered) - kept
        axes.fill_between(rank[kept:], ordered[kept:], color=ORANGE, alpha=0.5, linewidth=0, label=f"cut: {cut}")
        if (ordered > 0).all():
            axes.set_yscale("log")
        axes.set_xlabel(f"{unit}, by importance")
        axes.set_ylabel("importance")
        axes.legend(frameon=False)

    return svg(draw)


def bars(values: np.ndarray, unit: str, label: str) -> str:
    """One bar a unit. values [units]."""

    def draw(axes: Axes) -> None:
        axes.bar(np.arange(len(values)), values, color=BLUE)
        axes.set_xlabel(unit)
        axes.set_ylabel(label)

    return svg(draw)


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
        axes.set_xlabel("first layer of the block")
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
