"""The named-axis table: for every parameter, which axes its dimensions run along. Everything else is derived from it.

A decoder has the axes layers, hidden, ffn, kv_groups, q_heads (per group), head_dim and vocab. A dimension is written as
products and sums of them, and named parts are what Hugging Face keeps as tensors of their own:

    "hidden"                                                      a norm's gain, an embedding's width
    "gate: ffn + up: ffn"                                         linear_fc1: all gate rows, then all up rows
    "kv_groups * (q: q_heads * head_dim + k: head_dim + v: head_dim)"   linear_qkv, interleaved by group:

        group 0                         group 1
        | q0 .. q0 | q1 .. q1 | k | v | | q2 .. q2 | q3 .. q3 | k | v | ...      (each cell: head_dim rows)

Sharding and pruning are the same act on this table: keep some indices of an axis, in every parameter that has the axis.
A tensor-parallel shard keeps one contiguous range of the axis in TENSOR_PARALLEL_AXES that the parameter has; a
parameter with none of them is replicated. That gives the rank's [gate_r; up_r] order of linear_fc1 with no special case.

This is the only file of the package that knows parameter and module names.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from types import MappingProxyType
from typing import Any

import numpy as np

from minitron_megatron.models.shape import ModelShape

AXES = ("layers", "hidden", "ffn", "kv_groups", "q_heads", "head_dim", "vocab")
TENSOR_PARALLEL_AXES = ("vocab", "kv_groups", "ffn")


@dataclass(frozen=True)
class Selection:
    """What becomes of an axis: entry i is Σ_t weights[t, i] · old[sources[t, i]].

    Plain pruning is one term of weight 1. Averaged key-value groups have a term a merged group, residual head merging has
    two; an entry whose weights are all 0 is zeros (padding of the vocabulary).

    sources: int64 [terms, kept]; weights: float64, the same shape. An axis that stands inside another (query heads in
    their group) may have one more dimension, [terms, kept of the outer axis, kept]: sources then count through both axes.
    """

    sources: np.ndarray
    weights: np.ndarray

    @classmethod
    def of(cls, indices: "np.ndarray | Selection") -> "Selection":
        """Kept indices as they are, one term of weight 1."""
        if isinstance(indices, Selection):
            return indices
        sources = np.asarray(indices, np.int64)[None]
        return cls(sources, np.ones(sources.shape))

    @property
    def plain(self) -> bool:
        """Whether entries are copies of old ones."""
        return len(self.sources) == 1 and bool((self.weights == 1).all())

    def part(self, entries: np.ndarray) -> "Selection":
        """Some of the entries."""
        return Selection(self.sources[:, entries], self.weights[:, entries])

    @property
    def unmerged(self) -> "Selection":
        """The first term alone: what consumes an axis follows the heads that stay, however they were merged."""
        return Selection.of(self.sources[0])


# What stays of each axis: ascending indices, or a selection; an axis that is absent is kept whole.
Keep = Mapping[str, "np.ndarray | Selection"]


@dataclass(frozen=True)
class Part:
    """One addend of a dimension: a product of axes, outermost first."""

    name: str
    axes: tuple[str, ...]


@dataclass(frozen=True)
class Dim:
    """One dimension of a parameter: `outer` axes times the concatenation of `parts`."""

    outer: str | None
    parts: tuple[Part, ...]

    @classmethod
    def parse(cls, text: str) -> "Dim":
        """Read the notation of the module docstring."""
        nested = re.fullmatch(r"(\w+) \* \((.+)\)", text)
        outer, body = nested.groups() if nested else (None, text)
        parts = []
        for addend in body.split(" + "):
            name, _, product = addend.rpartition(": ")
            parts.append(Part(name, tuple(product.split(" * "))))
        if outer is None and len(parts) == 1 and len(parts[0].axes) > 1:
            # A plain product nests in its first axis, so that inner indices may depend on it (heads on their group).
            outer, parts = parts[0].axes[0], [Part(parts[0].name, parts[0].axes[1:])]
        dim = cls(outer, tuple(parts))
        unknown = set(dim.axes) - set(AXES)
        if unknown:
            raise ValueError(f"unknown axes {sorted(unknown)} in {text!r}")
        return dim

    @property
    def axes(self) -> tuple[str, ...]:
        """Every axis that this dimension has, once each."""
        inner = [axis for part in self.parts for axis in part.axes]
        return tuple(dict.fromkeys(([self.outer] if self.outer else []) + inner))

    def size(self, lengths: "Sizes") -> Any:
        """Length of the dimension, or of many at once where `lengths` has arrays."""
        outer = lengths[self.outer] if self.outer else 1
        return outer * sum(_product(part.axes, lengths) for part in self.parts)

    def indices(self, lengths: Mapping[str, int], keep: Keep, part: str | None = None) -> np.ndarray:
        """Flat positions in the whole dimension of what `keep` leaves, in stored order: int64 [kept positions].

        For plain selections; the arguments are those of `select`.
        """
        return self.select(lengths, keep, part).sources[0]

    def select(self, lengths: Mapping[str, int], keep: Keep, part: str | None = None) -> Selection:
        """What `keep` makes of the dimension, as a selection of flat positions, in stored order.

        Args:
            lengths: axis lengths of the whole (source) parameter.
            keep: what stays of each axis.
            part: only the positions of this part, in the order of its own (Hugging Face) tensor.
        """
        outer = Selection.of(np.zeros(1, np.int64))
        if self.outer:
            outer = Selection.of(keep.get(self.outer, np.arange(lengths[self.outer])))
        block = sum(_product(p.axes, lengths) for p in self.parts)
        columns, offset = [], 0
        for p in self.parts:
            if part is None or p.name == part:
                columns.append(_place(p.axes, lengths, keep, outer, block, offset))
            offset += _product(p.axes, lengths)
        terms = max(len(sources) for sources, _ in columns)
        whole = (np.concatenate([_with_terms(c[i], terms) for c in columns], axis=2) for i in (0, 1))
        return Selection(*(a.reshape(terms, -1) for a in whole))


def _product(axes: tuple[str, ...], lengths: "Sizes") -> Any:
    # Of numbers or of arrays: math.prod only multiplies.
    return math.prod(lengths[axis] for axis in axes)


def _with_terms(array: np.ndarray, terms: int) -> np.ndarray:
    """Pad the first dimension with zeros: terms of no weight."""
    return np.concatenate([array, np.zeros((terms - len(array), *array.shape[1:]), array.dtype)])


def _place(
    axes: tuple[str, ...], lengths: Mapping[str, int], keep: Keep, outer: Selection, block: int, offset: int
) -> tuple[np.ndarray, np.ndarray]:
    """Flat positions and weights of one part: two arrays [terms, kept of the outer axis, kept inside a block]."""
    first = Selection.of(keep[axes[0]]) if axes[0] in keep else None
    if first is not None and first.sources.ndim == 3:
        # Counted through both axes: the part says itself which block of the outer axis each entry comes from.
        groups, inside = np.divmod(first.sources, lengths[axes[0]])
        weights, rest = first.weights, axes[1:]
    else:
        groups, weights, rest = outer.sources[:, :, None], outer.weights[:, :, None], axes
        inside = np.zeros_like(groups)
    for axis in rest:
        chosen = Selection.of(keep.get(axis, np.arange(lengths[axis])))
        inside = (inside[..., None] * lengths[axis] + chosen.sources[0]).reshape(*inside.shape[:2], -1)
        weights = (weights[..., None] * chosen.weights[0]).reshape(*weights.shape[:2], -1)
    if first is not None and first.sources.ndim == 3:
        groups = np.repeat(groups, inside.shape[2] // groups.shape[2], axis=2)
    return groups * block + offset + inside, np.broadcast_to(weights, inside.shape)


def tensor_parallel_keep(shape: ModelShape, rank: int, size: int, layer: int | None = None) -> Keep:
    """What tensor-parallel rank `rank` of `size` holds of a layer: a contiguous range of every sharded axis."""
    lengths = shape.lengths(layer)
    per_rank = {axis: lengths[axis] // size for axis in TENSOR_PARALLEL_AXES}
    return {axis: np.arange(rank * n, (rank + 1) * n) for axis, n in per_rank.items()}


class Place(Enum):
    """Which pipeline stages hold a parameter."""

    FIRST = "first stage"
    LAYER = "the stage of its layer"
    LAST = "last stage"


@dataclass(frozen=True)
class Row:
    """One parameter of the architecture (one per layer where place is LAYER).

    `path` is its name in Megatron's local engine, `te_path` in Transformer Engine where that differs; `{layer}` stands for
    the layer. `hf` maps each part to its Hugging Face tensor. A tied embedding is one row: Megatron's last stage holds a
    copy under the same checkpoint key, named `tied_path` there.
    """

    name: str
    place: Place
    dims: tuple[Dim, ...]
    path: str
    hf: Mapping[str, str]
    te_path: str | None = None
    tied_path: str | None = None
    # What a fresh parameter's values lie around: 1 for gains, 0 for weights, biases and zero-centred gains.
    mean: float = 0.0

    def parameter[T](self, parameters: Mapping[str, T], layer: int = 0) -> T | None:
        """It among a chunk's named parameters, whichever engine made them; `layer` counts inside the chunk."""
        names = [path.format(layer=layer) for path in (self.path, self.te_path, self.tied_path) if path]
        return next((parameters[name] for name in names if name in parameters), None)

    @property
    def stacked(self) -> bool:
        """Whether the parameter exists once a layer."""
        return self.place is Place.LAYER

    @property
    def axes(self) -> tuple[str, ...]:
        """All axes of all dimensions, once each."""
        return tuple(dict.fromkeys(axis for dim in self.dims for axis in dim.axes))

    @property
    def tensor_parallel_axis(self) -> str | None:
        """The axis along which tensor parallelism shards it; None where it is replicated."""
        return next((axis for axis in TENSOR_PARALLEL_AXES if axis in self.axes), None)

    def shape(self, shape: ModelShape, layer: int | None = None) -> tuple[int, ...]:
        """Global shape of one layer's parameter."""
        lengths = shape.lengths(layer)
        return tuple(dim.size(lengths) for dim in self.dims)

    def indices(self, shape: ModelShape, keep: Keep, layer: int | None = None) -> tuple[np.ndarray | None, ...]:
        """For each dimension the kept positions in the whole parameter; None where the dimension is kept whole."""
        return tuple(s if s is None else s.sources[0] for s in self.select(shape, keep, layer))

    def select(self, shape: ModelShape, keep: Keep, layer: int | None = None) -> tuple[Selection | None, ...]:
        """For each dimension what `keep` makes of it; None where the dimension is kept whole.

        Merges act where a projection makes heads, on its output (the first dimension); inputs follow the heads that stay.
        """
        lengths = shape.lengths(layer)
        follows = {axis: Selection.of(kept).unmerged for axis, kept in keep.items()}
        return tuple(
            dim.select(lengths, follows if i else keep) if any(axis in keep for axis in dim.axes) else None
            for i, dim in enumerate(self.dims)
        )


@dataclass(frozen=True)
class Traits:
    """What an engine must know of a family besides its parameters and sizes. The table below follows from it."""

    activation: str = "silu"  # or "squared_relu"
    gated: bool = True
    normalization: str = "RMSNorm"  # or "LayerNorm", which has biases
    zero_centered_gain: bool = False  # a norm multiplies by gain + 1
    qkv_bias: bool = False
    qk_norm: bool = False  # norms of each query and key head, learned along head_dim, shared by the heads of a layer


TRAITS: dict[str, Traits] = {
    "llama": Traits(),
    "mistral": Traits(),
    "qwen2": Traits(qkv_bias=True),
    "qwen3": Traits(qk_norm=True),
    "nemotron": Traits(activation="squared_relu", gated=False, normalization="LayerNorm", zero_centered_gain=True),
}

_BLOCK, _HF = "decoder.layers.{layer}.", "model.layers.{layer}."
_QKV = "kv_groups * (q: q_heads * head_dim + k: head_dim + v: head_dim)"


def _row(name: str, place: Place, dims: list[str], path: str, hf: str | dict[str, str], **others: Any) -> Row:
    return Row(name, place, tuple(map(Dim.parse, dims)), path, {"": hf} if isinstance(hf, str) else hf, **others)


def _norm(
    traits: Traits, name: str, place: Place, path: str, hf: str, *, along: str = "hidden", fused_into: str | None = None
) -> list[Row]:
    """Gain and, where the family has one, bias of a norm. Transformer Engine holds most norms in the linear after them."""
    parts = {"weight": 0.0 if traits.zero_centered_gain else 1.0}
    if traits.normalization == "LayerNorm":
        parts["bias"] = 0.0
    return [
        _row(
            name if part == "weight" else f"{name}_{part}",
            place,
            [along],
            f"{path}.{part}",
            f"{hf}.{part}",
            te_path=f"{fused_into}.layer_norm_{part}" if fused_into else None,
            mean=mean,
        )
        for part, mean in parts.items()
    ]


def _attention(traits: Traits) -> list[Row]:
    linear, hf = _BLOCK + "self_attention.linear_qkv", _HF + "self_attn."
    rows = _norm(
        traits, "attention_norm", Place.LAYER, _BLOCK + "input_layernorm", _HF + "input_layernorm", fused_into=linear
    )
    for kind, dims in {"weight": [_QKV, "hidden"], "bias": [_QKV]}.items():
        if kind == "weight" or traits.qkv_bias:
            name = "qkv" if kind == "weight" else "qkv_bias"
            parts = {part: f"{hf}{part}_proj.{kind}" for part in "qkv"}
            rows.append(_row(name, Place.LAYER, dims, f"{linear}.{kind}", parts))
    if traits.qk_norm:
        for part in "qk":
            path = f"{_BLOCK}self_attention.{part}_layernorm"
            rows += _norm(traits, f"{part}_norm", Place.LAYER, path, f"{hf}{part}_norm", along="head_dim")
    output = ["hidden", "kv_groups * q_heads * head_dim"]
    proj = _BLOCK + "self_attention.linear_proj.weight"
    return [*rows, _row("attention_output", Place.LAYER, output, proj, hf + "o_proj.weight")]


def _mlp(traits: Traits) -> list[Row]:
    linear, hf = _BLOCK + "mlp.linear_fc1", _HF + "mlp."
    norm, hf_norm = _BLOCK + "pre_mlp_layernorm", _HF + "post_attention_layernorm"
    inner = "gate: ffn + up: ffn" if traits.gated else "up: ffn"
    parts = {part.name: f"{hf}{part.name}_proj.weight" for part in Dim.parse(inner).parts}
    return [
        *_norm(traits, "mlp_norm", Place.LAYER, norm, hf_norm, fused_into=linear),
        _row("fc1", Place.LAYER, [inner, "hidden"], linear + ".weight", parts),
        _row("fc2", Place.LAYER, ["hidden", "ffn"], _BLOCK + "mlp.linear_fc2.weight", hf + "down_proj.weight"),
    ]


def _table(traits: Traits) -> tuple[Row, ...]:
    matrix = ["vocab", "hidden"]
    return (
        _row(
            "embedding",
            Place.FIRST,
            matrix,
            "embedding.word_embeddings.weight",
            "model.embed_tokens.weight",
            tied_path="output_layer.weight",
        ),
        *_attention(traits),
        *_mlp(traits),
        *_norm(traits, "final_norm", Place.LAST, "decoder.final_layernorm", "model.norm"),
        _row("output", Place.LAST, matrix, "output_layer.weight", "lm_head.weight"),
    )


TABLES: dict[str, tuple[Row, ...]] = {family: _table(traits) for family, traits in TRAITS.items()}


def axis_table(shape: ModelShape) -> tuple[Row, ...]:
    """The rows of a model; a tied model has no output row of its own, an untied one no copy of its embedding."""
    rows = TABLES[shape.family]
    if shape.tied_embeddings:
        copies = {row.tied_path for row in rows}
        return tuple(row for row in rows if row.path not in copies)
    return tuple(replace(row, tied_path=None) for row in rows)


@dataclass(frozen=True)
class Slot:
    """One tensor of one layer: a row and, where it exists once a layer, its layer."""

    row: Row
    layer: int | None

    def hf_names(self) -> dict[str, str]:
        """Hugging Face tensor of each part."""
        return {part: name.format(layer=self.layer) for part, name in self.row.hf.items()}

    def shape(self, shape: ModelShape) -> tuple[int, ...]:
        """Global shape of the tensor."""
        return self.row.shape(shape, self.layer)

    def stacked(self, shape: ModelShape) -> bool:
        """Whether the checkpoint has all layers of the row under one key, along a leading dimension [layers, …]."""
        return self.row.stacked and shape.uniform

    def key(self, shape: ModelShape) -> str:
        """Key in the distributed checkpoint, which both engines share and which follows Transformer Engine's names.

        Layers are stacked under one key; where their sizes differ each has a key with its number, as Megatron writes it.
        """
        path = self.row.te_path or self.row.path
        return path.replace(".{layer}", "") if shape.uniform else path.format(layer=self.layer)

    def numbered_key(self) -> str:
        """Key of this layer's tensor alone, as Megatron writes it where layers are not stacked though they could be."""
        return (self.row.te_path or self.row.path).format(layer=self.layer)

    def stored_shape(self, shape: ModelShape) -> tuple[int, ...]:
        """Global shape of what is stored under the key."""
        return (*((shape.num_layers,) if self.stacked(shape) else ()), *self.shape(shape))

    def lead(self, shape: ModelShape) -> tuple[int, ...]:
        """Leading offset of the tensor under its key: (layer,) where layers are stacked."""
        return (self.layer,) if self.stacked(shape) else ()


def slots(shape: ModelShape) -> Iterator[Slot]:
    """Every tensor of a model, in the order of its data flow: embedding, layer 0, layer 1, …, head."""
    rows = axis_table(shape)
    yield from (Slot(row, None) for row in rows if row.place is Place.FIRST)
    for layer in range(shape.num_layers):
        yield from (Slot(row, layer) for row in rows if row.place is Place.LAYER)
    yield from (Slot(row, None) for row in rows if row.place is Place.LAST)


def output_slot(shape: ModelShape) -> Slot:
    """The matrix that makes logits of final hidden states: the embedding's, where they are tied."""
    return Slot([row for row in axis_table(shape) if "vocab" in row.axes][-1], None)


def distinct_slots(shape: ModelShape) -> Iterator[tuple[Slot, int]]:
    """One tensor for all that have its size, and how many they are: counting does not walk every layer of a large model."""
    if not shape.uniform:
        yield from ((slot, 1) for slot in slots(shape))
        return
    for row in axis_table(shape):
        yield (Slot(row, 0), shape.num_layers) if row.stacked else (Slot(row, None), 1)


@dataclass(frozen=True)
class Probe:
    """Where activation importance of an axis is read: the input or the output of one module of every layer.

    `module` is the path inside a layer (empty: the layer itself); `fused_into` the linear that has taken it in where
    layers are Transformer Engine's: that one gives the module's output beside its own when asked. `heads` says that channels
    are to be joined to one score a head by their L2 norm over head_dim before anything else (2407.14679, section 2.2).
    """

    score: str
    axis: str
    module: str
    side: str
    heads: bool = False
    sequence_sharded: bool = field(default=False)
    fused_into: str | None = None


# The MLP score is read after the gate, at the input of the second linear, as NVIDIA's own code does; the paper writes it
# for the first linear's output. Hidden channels are read at the output of both norms of a block.
PROBES = (
    Probe("ffn", "ffn", "mlp.linear_fc2", "input"),
    Probe("heads", "kv_groups", "self_attention.linear_proj", "input", heads=True),
    Probe(
        "hidden.attention_norm",
        "hidden",
        "input_layernorm",
        "output",
        sequence_sharded=True,
        fused_into="self_attention.linear_qkv",
    ),
    Probe(
        "hidden.mlp_norm",
        "hidden",
        "pre_mlp_layernorm",
        "output",
        sequence_sharded=True,
        fused_into="mlp.linear_fc1",
    ),
)


# Modules whose extra state (scales of FP8) is part of a live model's checkpoint in Megatron, though it is empty without FP8: all
# linears, and in Transformer Engine attention and norms that are not fused.
_EXTRA_STATE = (
    *(_BLOCK + f"self_attention.{module}" for module in ("linear_qkv", "core_attention", "linear_proj")),
    *(_BLOCK + f"self_attention.{part}_layernorm" for part in "qk"),
    _BLOCK + "mlp.linear_fc1",
    _BLOCK + "mlp.linear_fc2",
    "decoder.final_layernorm",
)


def extra_state_keys(shape: ModelShape) -> dict[str, bool]:
    """Checkpoint keys of all extra state that either engine may ask for, and whether there is one a layer, stacked."""
    if not shape.uniform:
        raise ValueError("layers of several sizes have keys of their own")
    modules = {module.replace(".{layer}", ""): "{layer}" in module for module in _EXTRA_STATE}
    return {f"{module}._extra_state": stacked for module, stacked in modules.items()}


# Lengths of axes that stand for a shape's own: numbers, or arrays that broadcast, to count many shapes at once.
Sizes = Mapping[str, "int | np.ndarray"]


def _counted(shape: ModelShape, sizes: Sizes) -> Iterator[tuple[Row, Any, Sizes]]:
    """Rows of tensors that have one size, how many tensors they are, and the lengths of their axes."""
    for slot, count in distinct_slots(shape):
        lengths = {**shape.lengths(slot.layer), **sizes}
        yield slot.row, lengths["layers"] if slot.stacked(shape) else count, lengths


def count_parameters(shape: ModelShape, *, embedding: bool = True, sizes: Sizes = MappingProxyType({})) -> Any:
    """Parameters without vocabulary padding; `embedding=False` leaves out every parameter with the vocab axis.

    With arrays in `sizes`, an integer array: the parameters of every shape that has these lengths. The shape itself must then
    be uniform.
    """
    return sum(
        count * math.prod(dim.size(lengths) for dim in row.dims)
        for row, count, lengths in _counted(shape, {"vocab": shape.vocab_size, **sizes})
        if embedding or "vocab" not in row.axes
    )


def flops_per_token(shape: ModelShape, sequence_length: int, sizes: Sizes = MappingProxyType({})) -> Any:
    """Floating-point operations of one token's forward pass: 2 a matrix weight, and causal attention's two products.

    With arrays in `sizes`, an array, as in `count_parameters`.
    """
    matrices = sum(
        count * math.prod(dim.size(lengths) for dim in row.dims)
        for row, count, lengths in _counted(shape, sizes)
        if len(row.dims) == 2 and row.place is not Place.FIRST
    )
    whole = {**shape.lengths(), **sizes}
    head = whole["vocab"] * whole["hidden"] if shape.tied_embeddings else 0
    products = _product(("layers", "kv_groups", "q_heads", "head_dim"), whole)
    return 2.0 * (matrices + head) + products * 2 * sequence_length


def cached_values(shape: ModelShape, sizes: Sizes = MappingProxyType({})) -> Any:
    """Numbers that the key-value cache holds of one token: a key and a value of every group in every layer.

    With arrays in `sizes`, an array, as in `count_parameters`.
    """
    return 2 * _product(("layers", "kv_groups", "head_dim"), {**shape.lengths(), **sizes})
