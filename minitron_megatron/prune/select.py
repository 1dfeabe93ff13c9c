"""From scores and a target shape to kept indices: pure functions of arrays, the same on every rank.

Kept indices are always in ascending source order; ties go to the lower index. Layers, heads, groups and neurons are
chosen per layer, hidden channels once for the whole model (the residual stream is one axis).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from minitron_megatron.errors import UserError
from minitron_megatron.importance.scores import Scores
from minitron_megatron.models.axes import Keep
from minitron_megatron.models.shape import ModelShape

# Target options and the shape fields they set.
TARGETS = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups")


@dataclass(frozen=True)
class Kept:
    """Kept source indices. An axis that is None is kept whole.

    layers [kept layers]; hidden [kept]; and per source layer: ffn [L, kept], kv_groups [L, kept],
    q_heads [L, source kv_groups, kept heads per group].
    """

    layers: np.ndarray
    hidden: np.ndarray | None = None
    ffn: np.ndarray | None = None
    kv_groups: np.ndarray | None = None
    q_heads: np.ndarray | None = None

    def of_layer(self, source_layer: int | None) -> Keep:
        """What the axis table needs to cut one tensor: kept indices of every pruned axis, for this layer."""
        keep = {} if self.hidden is None else {"hidden": self.hidden}
        if source_layer is not None:
            for axis in ("ffn", "kv_groups", "q_heads"):
                chosen = getattr(self, axis)
                if chosen is not None:
                    keep[axis] = chosen[source_layer]
        return keep


def top(scores: np.ndarray, count: int) -> np.ndarray:
    """The `count` highest along the last dimension, ascending; ties to the lower index."""
    order = np.argsort(-scores, axis=-1, kind="stable")
    return np.sort(order[..., :count], axis=-1)


def target_shape(source: ModelShape, target: Mapping[str, Any], drop_layers: list[int]) -> ModelShape:
    """The pruned model's shape; sizes that are not given stay. Raises UserError for an impossible target."""
    sizes = {name: target[name] for name in TARGETS if target.get(name) is not None}
    if drop_layers:
        _check_dropped(source, drop_layers, sizes)
        sizes["num_layers"] = source.num_layers - len(drop_layers)
    for name, size in sizes.items():
        if not 1 <= size <= getattr(source, name):
            raise UserError(f"target.{name}={size} must be between 1 and the source model's {getattr(source, name)}")
    heads = sizes.get("num_attention_heads", source.num_attention_heads)
    groups = sizes.get("num_query_groups", source.num_query_groups)
    if heads % groups:
        raise UserError(
            f"target.num_attention_heads={heads} is not a multiple of num_query_groups={groups}: "
            "every key-value group needs the same number of query heads"
        )
    if heads // groups > source.heads_per_group:
        raise UserError(
            f"target with {heads} heads in {groups} groups needs {heads // groups} heads a group, the source has "
            f"{source.heads_per_group}: lower target.num_attention_heads or raise target.num_query_groups"
        )
    return source.resized(**sizes)


def _check_dropped(source: ModelShape, drop_layers: list[int], sizes: Mapping[str, int]) -> None:
    wrong = [layer for layer in drop_layers if not 0 <= layer < source.num_layers]
    if wrong or len(set(drop_layers)) != len(drop_layers):
        what = (
            f"{wrong[0]} is not a layer of the source (0 to {source.num_layers - 1})"
            if wrong
            else "a layer is named twice"
        )
        raise UserError(f"drop_layers={drop_layers}: {what}")
    left = source.num_layers - len(drop_layers)
    if sizes.get("num_layers", left) != left:
        raise UserError(
            f"drop_layers leaves {left} layers, target.num_layers is {sizes['num_layers']}: give one of them"
        )


def needs_scores(source: ModelShape, target: ModelShape, drop_layers: list[int]) -> bool:
    """Whether the target leaves anything to choose."""
    by_hand = {"num_layers"} if drop_layers else set()
    return any(getattr(source, n) != getattr(target, n) for n in TARGETS if n not in by_hand)


def choose(source: ModelShape, target: ModelShape, scores: Scores | None, drop_layers: list[int]) -> Kept:
    """The most important indices of every axis that shrinks.

    Query heads are chosen inside each key-value group, so that the result is a valid grouped-query model; a group's
    score is the sum over its query heads.
    """
    layers = np.arange(source.num_layers)
    if drop_layers:
        layers = np.setdiff1d(layers, drop_layers)
    elif target.num_layers < source.num_layers:
        layers = top(scores.layers, target.num_layers)
    kept: dict[str, np.ndarray] = {}
    if target.hidden_size < source.hidden_size:
        kept["hidden"] = top(scores.hidden, target.hidden_size)
    if target.ffn_hidden_size < source.ffn_hidden_size:
        kept["ffn"] = top(scores.ffn, target.ffn_hidden_size)
    if target.num_query_groups < source.num_query_groups or target.heads_per_group < source.heads_per_group:
        heads = scores.heads.reshape(source.num_layers, source.num_query_groups, source.heads_per_group)
        if target.num_query_groups < source.num_query_groups:
            kept["kv_groups"] = top(heads.sum(-1, dtype=np.float64), target.num_query_groups)
        if target.heads_per_group < source.heads_per_group:
            kept["q_heads"] = top(heads, target.heads_per_group)
    return Kept(layers, **kept)
