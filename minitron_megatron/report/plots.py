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
    """A value over steps for each of several runs, best first; the best is coloured, the others have their places."""

    def draw(axes: Axes) -> None:
        for place, (name, points) in enumerate(curves.items(), start=1):
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
