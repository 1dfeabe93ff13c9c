"""Which contiguous layers a model can lose, by three judges: Block Influence, loss, and accuracy on a downstream task.

[B] (arXiv 2408.11796) cuts depth by a contiguous block and finds that a downstream task (Winogrande) with the block removed
judges better than the loss, and that the last layer should stay. layers.json in the output of launch/layers.py:

    base      {loss, perplexity, accuracy, margin, tasks}            the whole model
    blocks    [{length, start, bi, loss, …}, …]                      without layers start … start + length - 1
    samples, tokens, questions, layer_passes, seconds
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minitron_megatron.checkpoints.folder import read_output
from minitron_megatron.errors import UserError
from minitron_megatron.importance.scores import model_digest
from minitron_megatron.plain_files import read_json

FILE = "layers.json"
JUDGES = ("bi", "loss", "task")
# Float32 sums differ in the seventh digit from layout to layout: what is closer than this is a tie.
_DIGITS = 6


@dataclass(frozen=True)
class Judged:
    """What a model is worth, whole or without one block.

    `bi` is the block's influence 1 − E[cos(X_start, X_start+length)] (0 for the whole model); `loss` nats a token;
    `accuracy` over all questions and `margin` (mean of the right choice's log-likelihood over the best other's) are None where
    none were asked; `tasks` has both of each source of questions.
    """

    loss: float
    bi: float = 0.0
    accuracy: float | None = None
    margin: float | None = None
    tasks: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(min(self.loss, 700))

    def badness(self, judge: str) -> tuple[float, ...]:
        """What sorts by a judge, the best to remove first; what is not a finite number comes last."""
        if judge == "task":
            return tuple(map(_comparable, (-(self.accuracy or 0.0), -(self.margin or 0.0))))
        return (_comparable(self.bi if judge == "bi" else self.loss),)


def _comparable(value: float) -> float:
    return round(value, _DIGITS) if math.isfinite(value) else math.inf


@dataclass(frozen=True)
class LayerAnalysis:
    """The whole model, and the model without each block: `blocks[length][start]`."""

    path: str
    model_digest: str
    num_layers: int
    base: Judged
    blocks: Mapping[int, Sequence[Judged]]
    counts: Mapping[str, Any]

    def check_model(self, digest: str) -> None:
        """Raise UserError unless this very model was analysed."""
        if self.model_digest != digest:
            raise UserError(f"layers={self.path} is the analysis of another model (digest differs): analyse this one")

    def ranked(self, count: int, judge: str, keep_last: int = 1) -> list[int]:
        """First layers of the blocks of `count`, the best to remove first: lowest Block Influence or loss, highest accuracy.

        Equal accuracies are told apart by the margin; what is equal still, lower start first.

        Args:
            count: layers to remove.
            judge: bi, loss or task.
            keep_last: blocks that touch the last so many layers are left out ([B]: the last layer should stay).

        Raises:
            UserError: this length was not measured, no questions were asked, or no block is left.
        """
        if judge not in JUDGES:
            raise UserError(f"judge={judge} is not one of {', '.join(JUDGES)}")
        if count not in self.blocks:
            lengths = ", ".join(map(str, sorted(self.blocks)))
            raise UserError(
                f"layers={self.path} has blocks of {lengths} layers, not {count}: analyse with block={count}"
            )
        if judge == "task" and self.base.accuracy is None:
            raise UserError(f"layers={self.path} was measured without questions= or tasks=: take judge bi or loss")
        starts = range(self.num_layers - keep_last - count + 1)
        if not starts:
            raise UserError(
                f"layers={self.path}: without the last {keep_last} of {self.num_layers} layers no block of {count} is left"
            )
        measured = self.blocks[count]
        order = sorted(starts, key=lambda start: (*measured[start].badness(judge), start))
        if not math.isfinite(measured[order[0]].badness(judge)[0]):
            raise UserError(
                f"layers={self.path}: {judge} is not a finite number without any block of {count}: take another judge, or "
                "analyse with precision=fp32"
            )
        return order

    def best_block(self, count: int, judge: str, keep_last: int = 1) -> range:
        """The `count` layers to remove, numbered from 0; see `ranked`."""
        first = self.ranked(count, judge, keep_last)[0]
        return range(first, first + count)

    def to_json(self) -> dict[str, Any]:
        """As it stands in layers.json."""
        blocks = [
            {"length": length, "start": start, "bi": judged.bi, **_plain(judged)}
            for length, all_starts in sorted(self.blocks.items())
            for start, judged in enumerate(all_starts)
        ]
        return {"num_layers": self.num_layers, **self.counts, "base": _plain(self.base), "blocks": blocks}


def _plain(judged: Judged) -> dict[str, Any]:
    values = {"loss": judged.loss, "perplexity": judged.perplexity}
    if judged.accuracy is not None:
        values |= {"accuracy": judged.accuracy, "margin": judged.margin, "tasks": judged.tasks}
    return values


def _judged(values: Mapping[str, Any]) -> Judged:
    names = ("loss", "bi", "accuracy", "margin", "tasks")
    for name in names[:-1]:
        if values.get(name) is not None and type(values[name]) not in (int, float):
            raise ValueError(f"{name} is no number")
    return Judged(**{name: values[name] for name in names if name in values})


def load_layer_analysis(path: Path | str) -> LayerAnalysis:
    """Read a layer analysis, the output of launch/layers.py. Raises UserError when it is not a whole one."""
    path = Path(path)
    manifest = read_output(path, FILE, "layers", "layers=")
    try:
        values = read_json(path / FILE)
        blocks: dict[int, list[Judged]] = {}
        for block in values.pop("blocks"):
            found = blocks.setdefault(block["length"], [])
            if block["start"] != len(found):
                raise ValueError(f"blocks of {block['length']} layers are not in order")
            found.append(_judged(block))
        num_layers, base = values.pop("num_layers"), _judged(values.pop("base"))
        if type(num_layers) is not int or not all(type(n) is int and 0 < n < num_layers for n in blocks):
            raise ValueError("num_layers or the length of a block is no such number")
        if any(len(found) != num_layers - length + 1 for length, found in blocks.items()):
            raise ValueError("blocks are missing")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path / FILE} is damaged ({error!r}): analyse the layers again") from None
    return LayerAnalysis(str(path), model_digest(manifest, path), num_layers, base, blocks, values)


def check_blocks(block: Any, num_layers: int) -> list[int]:
    """The lengths that `block=` asks for, ascending. Raises UserError."""
    lengths = block if isinstance(block, list) else [block]
    if not lengths or not all(type(n) is int and n > 0 for n in lengths):
        raise UserError(f"block={block} must be a number of layers above 0, or a list of them such as [1,2,16]")
    too_long = [n for n in lengths if n >= num_layers]
    if too_long:
        raise UserError(f"block={too_long[0]} is not below the model's {num_layers} layers: at least one must stay")
    return sorted(set(lengths))
