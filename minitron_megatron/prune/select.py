"""From scores and a target shape to what stays: pure functions of arrays, the same on every rank.

Kept indices are always in ascending source order; ties go to the lower index. Heads, groups and neurons are chosen in each
layer, hidden channels and tokens once for the whole model (the residual stream is one axis).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from minitron_megatron.config import PruneOptions
from minitron_megatron.errors import UserError
from minitron_megatron.importance.scores import Scores
from minitron_megatron.models.axes import Keep, Selection
from minitron_megatron.models.shape import ModelShape, padded_size

# Target options and the shape fields they set.
TARGETS = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "vocab_size",
)


@dataclass(frozen=True)
class Kept:
    """What stays of a model, in source indices. An axis that is None is kept whole.

    layers [kept]; hidden [kept]; vocab [kept] token ids; ffn: for each source layer its kept neurons, as many as the target
    has there; kv_groups [L, groups, m], where m source groups are averaged into one (1: none are); heads [L, groups, heads of a
    group] as query heads of the source, counted over its groups; partners, like heads: the head whose residual is merged into
    the kept one, -1 for none.
    """

    layers: np.ndarray
    hidden: np.ndarray | None = None
    vocab: np.ndarray | None = None
    ffn: Mapping[int, np.ndarray] | None = None
    kv_groups: np.ndarray | None = None
    heads: np.ndarray | None = None
    partners: np.ndarray | None = None

    def of_layer(self, source: ModelShape, source_layer: int | None) -> Keep:
        """What the axis table needs to cut one tensor: what stays of every pruned axis, in this layer."""
        keep: dict[str, np.ndarray | Selection] = {}
        if self.hidden is not None:
            keep["hidden"] = self.hidden
        if source_layer is None:
            return keep if self.vocab is None else {**keep, "vocab": _padded(self.vocab)}
        if self.ffn is not None:
            keep["ffn"] = self.ffn[source_layer]
        if self.heads is not None:
            keep |= self._attention(source_layer, plain=source.heads_per_group == 1)
        return keep

    def _attention(self, layer: int, *, plain: bool) -> Keep:
        """Groups and heads of a layer. A plain head is its own group: what is merged into it goes for k and v too."""
        heads = Selection.of(self.heads[layer])
        groups = self.kv_groups[layer].T
        kv_groups = Selection(groups, np.full(groups.shape, 1 / len(groups)))
        if self.partners is not None:
            heads = _with_residual(self.heads[layer], self.partners[layer])
            if plain and len(groups) == 1:
                kv_groups = _with_residual(self.heads[layer][:, 0], self.partners[layer][:, 0])
        return {"kv_groups": kv_groups, "q_heads": heads}


def _with_residual(kept: np.ndarray, partners: np.ndarray) -> Selection:
    """head_i + (head_i − head_j) where there is a partner j ([A], section 2.3)."""
    merged = partners >= 0
    sources = np.stack([kept, np.where(merged, partners, kept)])
    return Selection(sources, np.stack([np.where(merged, 2.0, 1.0), np.where(merged, -1.0, 0.0)]))


def _padded(vocab: np.ndarray) -> Selection:
    """Kept tokens, then rows of zeros up to the padded vocabulary."""
    weights = np.zeros((1, padded_size(len(vocab))))
    weights[0, : len(vocab)] = 1
    sources = np.zeros(weights.shape, np.int64)
    sources[0, : len(vocab)] = vocab
    return Selection(sources, weights)


def top(scores: np.ndarray, count: int) -> np.ndarray:
    """The `count` highest along the last dimension, ascending; ties to the lower index."""
    return np.sort(_ranked(scores)[..., :count], axis=-1)


def _ranked(scores: np.ndarray) -> np.ndarray:
    """Indices along the last dimension, highest score first; ties to the lower index."""
    return np.argsort(-np.asarray(scores, np.float64), axis=-1, kind="stable")


def target_shape(
    source: ModelShape, target: Mapping[str, Any], drop_layers: list[int], options: PruneOptions | None = None
) -> ModelShape:
    """The pruned model's shape; sizes that are not given stay. Raises UserError for an impossible target."""
    options = options or PruneOptions()
    sizes = {name: target[name] for name in TARGETS if target.get(name) is not None}
    if drop_layers:
        _check_dropped(source, drop_layers, sizes)
        sizes["num_layers"] = source.num_layers - len(drop_layers)
    for name in TARGETS:
        if name in sizes and name != "ffn_hidden_size":
            _check_size(name, sizes[name], getattr(source, name))
    _check_neurons(source, sizes)
    _check_heads(source, sizes, options)
    return source.resized(**sizes)


def _check_size(name: str, size: Any, whole: int) -> None:
    if type(size) is not int or not 1 <= size <= whole:
        raise UserError(f"target.{name}={size} must be a whole number from 1 to the source model's {whole}")


def _check_neurons(source: ModelShape, sizes: dict[str, Any]) -> None:
    """One size for all layers, or one a kept layer."""
    wanted, layers = sizes.get("ffn_hidden_size"), sizes.get("num_layers", source.num_layers)
    if wanted is None:
        if not source.uniform and layers < source.num_layers:
            raise UserError(
                "target.ffn_hidden_size is needed: the source's layers have sizes of their own, and some go"
            )
        return
    if isinstance(wanted, list | tuple):
        if len(wanted) != layers:
            raise UserError(
                f"target.ffn_hidden_size has {len(wanted)} sizes for {layers} layers: give one, or one a layer"
            )
        sizes["ffn_hidden_size"] = tuple(wanted)
    for size in wanted if isinstance(wanted, list | tuple) else [wanted]:
        _check_size("ffn_hidden_size", size, max(source.ffn_of_layers))


def _check_heads(source: ModelShape, sizes: Mapping[str, Any], options: PruneOptions) -> None:
    heads = sizes.get("num_attention_heads", source.num_attention_heads)
    groups = sizes.get("num_query_groups", source.num_query_groups)
    if heads % groups:
        raise UserError(
            f"target.num_attention_heads={heads} is not a multiple of num_query_groups={groups}: "
            "every key-value group needs the same number of query heads"
        )
    merged = options.groups == "mean" and groups < source.num_query_groups
    if merged and source.num_query_groups % groups:
        raise UserError(
            f"target.num_query_groups={groups} does not divide the source's {source.num_query_groups}: "
            "prune.groups=mean averages as many groups into each"
        )
    available = source.heads_per_group * (source.num_query_groups // groups if merged else 1)
    if heads // groups > available:
        raise UserError(
            f"target with {heads} heads in {groups} groups needs {heads // groups} heads a group, the source has "
            f"{available}: lower target.num_attention_heads, raise target.num_query_groups"
            + ("" if merged else ", or merge groups (prune.groups=mean)")
        )
    left, whole = _merging_sizes(source, heads, groups, merged)
    if options.heads == "merge" and 2 * left < whole:
        raise UserError(
            f"prune.heads=merge needs at least half of the heads: the target keeps {left} of {whole}"
            + (" in each group" if source.heads_per_group > 1 else "")
        )


def _merging_sizes(source: ModelShape, heads: int, groups: int, merged: bool) -> tuple[int, int]:
    """(kept heads, heads they are kept out of): of the model where heads are plain, else of a group."""
    if source.heads_per_group == 1 and not merged:
        return heads, source.num_attention_heads
    return heads // groups, source.heads_per_group * (source.num_query_groups // groups if merged else 1)


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
    if left == 0:
        raise UserError(f"drop_layers={drop_layers} leaves no layer")
    if sizes.get("num_layers", left) != left:
        raise UserError(
            f"drop_layers leaves {left} layers, target.num_layers is {sizes['num_layers']}: give one of them"
        )


def needs_scores(source: ModelShape, target: ModelShape, drop_layers: list[int]) -> bool:
    """Whether the target leaves anything to choose."""
    by_hand = {"num_layers"} if drop_layers else set()
    if target.ffn_of_layers == tuple(n for i, n in enumerate(source.ffn_of_layers) if i not in drop_layers):
        by_hand.add("ffn_hidden_size")
    return any(getattr(source, n) != getattr(target, n) for n in TARGETS if n not in by_hand)


def choose(
    source: ModelShape,
    target: ModelShape,
    scores: Scores | None,
    drop_layers: list[int],
    options: PruneOptions | None = None,
    vocab: np.ndarray | None = None,
) -> Kept:
    """The most important indices of every axis that shrinks; `vocab` are the kept tokens, chosen with the tokenizer.

    Query heads are chosen inside each key-value group, so that the result is a valid grouped-query model; a group's
    score is the sum over its query heads.
    """
    options = options or PruneOptions()
    layers = np.arange(source.num_layers)
    if drop_layers:
        layers = np.setdiff1d(layers, drop_layers)
    elif target.num_layers < source.num_layers:
        influence = scores.layers.astype(np.float64)
        influence[source.num_layers - min(options.keep_last_layers, target.num_layers) :] = np.inf
        layers = top(influence, target.num_layers)
    kept: dict[str, Any] = {"vocab": vocab}
    if target.hidden_size < source.hidden_size:
        kept["hidden"] = top(scores.hidden, target.hidden_size)
    wanted = dict(zip(layers.tolist(), target.ffn_of_layers, strict=True))
    if any(size != source.ffn_of_layers[layer] for layer, size in wanted.items()):
        _check_neurons_of(source, wanted)
        kept["ffn"] = {i: top(scores.ffn[i, : source.ffn_of_layers[i]], size) for i, size in wanted.items()}
    if (target.num_query_groups, target.heads_per_group) != (source.num_query_groups, source.heads_per_group):
        kept |= _choose_heads(source, target, scores.heads, options)
    return Kept(layers, **kept)


def _check_neurons_of(source: ModelShape, wanted: Mapping[int, int]) -> None:
    for layer, size in wanted.items():
        if size > source.ffn_of_layers[layer]:
            raise UserError(
                f"target.ffn_hidden_size={size} for source layer {layer}, which has {source.ffn_of_layers[layer]} neurons"
            )


def _choose_heads(source: ModelShape, target: ModelShape, scores: np.ndarray, options: PruneOptions) -> dict[str, Any]:
    """Groups, their heads and what is merged into them.

    8 heads in 4 groups, 2 groups wanted:    drop: the two best groups       0 [0 1]   3 [6 7]
                                             mean: neighbours are averaged   0+1 [0 1 2 3]   2+3 [4 5 6 7], of which the best stay
    """
    n, groups, per_group = source.num_layers, source.num_query_groups, source.heads_per_group
    heads = scores.reshape(n, groups, per_group)
    if target.num_query_groups == groups:
        kv_groups = np.tile(np.arange(groups)[:, None], (n, 1, 1))
    elif options.groups == "mean":
        kv_groups = np.tile(np.arange(groups).reshape(target.num_query_groups, -1), (n, 1, 1))
    else:
        kv_groups = top(heads.sum(-1, dtype=np.float64), target.num_query_groups)[..., None]
    # The heads of each new group: [layers, new groups, heads of its groups].
    there = (kv_groups[..., None] * per_group + np.arange(per_group)).reshape(n, target.num_query_groups, -1)
    of_group = np.take_along_axis(scores[:, None, :], there, axis=-1)
    order = np.take_along_axis(there, _ranked(of_group), axis=-1)
    chosen = np.sort(order[..., : target.heads_per_group], axis=-1)
    found: dict[str, Any] = {"kv_groups": kv_groups, "heads": chosen}
    if options.heads == "merge":
        plain = per_group == 1 and kv_groups.shape[-1] == 1
        partner_of = _partners(_ranked(scores)[:, None, :] if plain else order, target, plain)
        found["partners"] = np.stack([partner_of[i][chosen[i]] for i in range(n)])
    return found


def _partners(order: np.ndarray, target: ModelShape, plain: bool) -> np.ndarray:
    """For each layer and source head the head merged into it, -1 for none: int64 [layers, source heads].

    order: heads by falling importance, [layers, sets, L]. With K of L kept, the kept head of rank i = 2K−L+1 … K (from 1) takes
    that of rank 2K−i+1: the last kept the first cut, and so on outwards.
    """
    kept, whole = target.num_attention_heads if plain else target.heads_per_group, order.shape[-1]
    out = np.full((len(order), order.max() + 1), -1)
    for rank in range(2 * kept - whole + 1, kept + 1):
        layers = np.arange(len(order))[:, None]
        out[layers, order[..., rank - 1]] = order[..., 2 * kept - rank]
    return out
