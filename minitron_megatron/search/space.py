"""The shapes that are tried: a product of sizes, never written out. A shape is a number; many are an array of numbers.

    num_layers [a] × hidden_size [b] × ffn_hidden_size [c] × (num_attention_heads, num_query_groups) [d]

    number = ((i_layers · b + i_hidden) · c + i_ffn) · d + i_heads

Sizes of each axis descend, so of two shapes that are equal otherwise the lower number is the larger.
"""

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from minitron_megatron.config import PruneOptions, SpaceConfig
from minitron_megatron.errors import UserError
from minitron_megatron.models.families import FAMILIES
from minitron_megatron.models.shape import ModelShape
from minitron_megatron.prune.select import target_shape

# What can vary, by the names of `space` and `target`.
SIZES = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups")
# Shapes that are looked at together: some tens of MB of arrays.
_TOGETHER = 2**18
# The largest space.multiple and space.tensor that are taken where none are given, and steps of a multiple that a size should
# have down to half of it.
_MULTIPLE, _TENSOR, _STEPS = 128, 8, 8


@dataclass(frozen=True)
class Space:
    """Sizes of each axis, descending: layers [a], hidden [b], ffn [c], heads [d, 2] as (query heads, groups) that go together."""

    layers: np.ndarray
    hidden: np.ndarray
    ffn: np.ndarray
    heads: np.ndarray
    exportable: bool

    @property
    def dims(self) -> tuple[int, int, int, int]:
        """How many sizes each axis has."""
        return len(self.layers), len(self.hidden), len(self.ffn), len(self.heads)

    @property
    def size(self) -> int:
        """How many numbers there are; those that cannot be exported are not shapes to try."""
        return math.prod(self.dims)

    def numbers(self) -> Iterator[np.ndarray]:
        """The number of every shape to try, ascending, some at a time: int64 [n]."""
        for start in range(0, self.size, _TOGETHER):
            numbers = np.arange(start, min(start + _TOGETHER, self.size))
            if self.exportable:
                _, hidden, _, pair = self.positions(numbers)
                numbers = numbers[self.hidden[hidden] % self.heads[pair, 0] == 0]
            if len(numbers):
                yield numbers

    def positions(self, numbers: np.ndarray) -> tuple[np.ndarray, ...]:
        """Where the sizes of these shapes stand in layers, hidden, ffn and heads."""
        return np.unravel_index(numbers, self.dims)

    def lengths(self, numbers: np.ndarray) -> dict[str, np.ndarray]:
        """Lengths of the axes that vary, by the names of the axis table: int64 [n] each."""
        layers, hidden, ffn, pair = self.positions(numbers)
        heads, groups = self.heads[pair].T
        return {
            "layers": self.layers[layers],
            "hidden": self.hidden[hidden],
            "ffn": self.ffn[ffn],
            "kv_groups": groups,
            "q_heads": heads // groups,
        }

    def smallest(self) -> dict[str, np.ndarray]:
        """Lengths of the smallest shape with each of the heads that go together, as `lengths` has them; of none: no shape."""
        heads, groups = self.heads.T
        fits = self.hidden[None, :] % heads[:, None] == 0 if self.exportable else np.ones((len(heads), 1), bool)
        hidden = np.where(fits, self.hidden[None, :], np.iinfo(np.int64).max).min(
            axis=1, initial=np.iinfo(np.int64).max
        )
        there = (hidden < np.iinfo(np.int64).max) & (self.size > 0)
        count = int(there.sum())
        return {
            "layers": np.full(count, self.layers.min(initial=np.iinfo(np.int64).max)),
            "hidden": hidden[there],
            "ffn": np.full(count, self.ffn.min(initial=np.iinfo(np.int64).max)),
            "kv_groups": groups[there],
            "q_heads": (heads // groups)[there],
        }

    def target(self, number: int) -> dict[str, int]:
        """The options of `target` that make this shape."""
        layers, hidden, ffn, pair = self.positions(np.int64(number))
        sizes = (self.layers[layers], self.hidden[hidden], self.ffn[ffn], *self.heads[pair])
        return dict(zip(SIZES, map(int, sizes), strict=True))


def uniform(source: ModelShape) -> ModelShape:
    """The source, or where its layers differ in neurons one with as many in each as the narrowest has: all can be cut to that."""
    return source.resized(ffn_hidden_size=min(source.ffn_of_layers))


def settle_space(source: ModelShape, cfg: SpaceConfig) -> SpaceConfig:
    """The options with `multiple` and `tensor` of the model where they are not given.

        multiple   largest power of two up to 128 with 8 steps from hidden_size, and from the neurons, down to half of them
        tensor     largest power of two up to 8 that divides groups, heads and neurons: the layouts that the model itself runs in

    A model of 8 B has 128 and 8; hidden_size=128 beside 333 neurons and 2 groups has 8 and 1.
    """
    whole = uniform(source)
    step = min(whole.hidden_size, whole.ffn_hidden_size) / (2 * _STEPS)
    shared = math.gcd(whole.num_query_groups, whole.num_attention_heads, *source.ffn_of_layers)
    multiple = min(_MULTIPLE, 2 ** int(math.log2(max(1, step))))
    tensor = math.gcd(_TENSOR, shared)
    return replace(
        cfg,
        multiple=multiple if cfg.multiple is None else cfg.multiple,
        tensor=tensor if cfg.tensor is None else cfg.tensor,
    )


def frozen_axes(source: ModelShape, cfg: SpaceConfig, space: Space) -> dict[str, str]:
    """Why an axis that nobody fixed has the model's own size alone, by the size's name; `cfg` as `settle_space` gives it."""
    heads, groups = map(np.unique, space.heads.T)
    hidden = space.hidden
    if space.exportable:
        hidden = hidden[(hidden[:, None] % heads[None, :] == 0).any(axis=1)]
    sizes = dict(zip(SIZES, (space.layers, hidden, space.ffn, heads, groups), strict=True))
    multiples = {
        "hidden_size": ("space.multiple",),
        "ffn_hidden_size": ("space.multiple", "space.tensor"),
        "num_attention_heads": ("space.tensor",),
        "num_query_groups": ("space.tensor",),
    }
    values = {"space.multiple": cfg.multiple, "space.tensor": cfg.tensor}
    why = {}
    for name, found in sizes.items():
        whole = getattr(uniform(source), name)
        if len(found) > 1 or getattr(cfg, name) is not None:
            continue
        options = [option for option in multiples.get(name, ()) if values[option] > 1]
        smaller = range(-(-whole // 2), whole)
        if not smaller or name == "num_layers":
            why[name] = "there is none smaller down to half of it to try"
        elif not any(size % math.lcm(1, *map(values.get, options)) == 0 for size in smaller):
            said = " and ".join(f"{option}={values[option]}" for option in options)
            why[name] = f"down to half of it no size is a multiple of {said}, which a smaller value changes"
        elif name == "hidden_size":
            why[name] = (
                "no smaller one is a multiple of the heads, which transformers wants of a Llama and space.exportable=false waives"
            )
        else:
            why[name] = "no smaller one goes together with the heads and groups that are left"
    return why


def make_space(
    source: ModelShape, cfg: SpaceConfig, options: PruneOptions, judged: Collection[int] | None = None
) -> Space:
    """The space that the options describe.

    Args:
        source: the model that is pruned.
        cfg: sizes of each axis, each None (from the source's to half of it), a size, a list or {from, to, step}.
        options: how heads and groups go, which says which of them go together.
        judged: numbers of layers that a layer analysis can judge; they are the default then.

    Raises:
        UserError: a size is not between 1 and the source's or not a multiple of what it must be, or nothing is left.
    """
    whole, cfg = uniform(source), settle_space(source, cfg)
    lcm = math.lcm(cfg.multiple, cfg.tensor)
    layers = _sizes("num_layers", cfg.num_layers, whole.num_layers, 1, "")
    if cfg.num_layers is None and judged is not None:
        layers = [size for size in layers if size in judged]
    both = "space.multiple and space.tensor"
    heads = _sizes(
        "num_attention_heads", cfg.num_attention_heads, whole.num_attention_heads, cfg.tensor, "space.tensor"
    )
    groups = _sizes("num_query_groups", cfg.num_query_groups, whole.num_query_groups, cfg.tensor, "space.tensor")
    pairs = [(h, g) for h in heads for g in groups if _go_together(whole, h, g, options)]
    if not pairs:
        raise UserError(
            f"the space is empty: no space.num_attention_heads ({_few(heads)}) goes with a space.num_query_groups "
            f"({_few(groups)}): heads must be a multiple of groups, with at most as many heads a group as the model has"
        )
    return Space(
        np.asarray(layers),
        np.asarray(_sizes("hidden_size", cfg.hidden_size, whole.hidden_size, cfg.multiple, "space.multiple")),
        np.asarray(_sizes("ffn_hidden_size", cfg.ffn_hidden_size, whole.ffn_hidden_size, lcm, both)),
        np.asarray(pairs),
        cfg.exportable and FAMILIES[source.family].whole_heads,
    )


def _go_together(source: ModelShape, heads: int, groups: int, options: PruneOptions) -> bool:
    """Whether prune would take these heads in these groups."""
    try:
        target_shape(source, {"num_attention_heads": heads, "num_query_groups": groups}, [], options)
    except UserError:
        return False
    return True


def _sizes(name: str, wanted: Any, whole: int, multiple: int, why: str) -> list[int]:
    """The sizes of an axis, descending. The source's own need not be a multiple: it is what runs already."""
    if wanted is None:
        lowest = math.ceil(whole / 2 / multiple) * multiple
        return sorted({whole, *range(lowest, whole + 1, multiple)}, reverse=True)
    sizes = _range(name, wanted) if isinstance(wanted, Mapping) else wanted if isinstance(wanted, list) else [wanted]
    if not sizes:
        raise UserError(f"the space is empty: space.{name}={_text(wanted)} has no size")
    for size in sizes:
        if type(size) is not int or not 1 <= size <= whole:
            raise UserError(f"space.{name}: {size!r} must be a whole number from 1 to the model's {whole}")
        if size % multiple and size != whole:
            raise UserError(f"space.{name}: {size} is no multiple of {multiple} ({why}): change one of them")
    return sorted(set(sizes), reverse=True)


def _range(name: str, wanted: Mapping[str, Any]) -> range:
    """{from, to, step}, both ends included."""
    keys = ("from", "to", "step")
    if set(wanted) != set(keys) or not all(type(wanted[key]) is int and wanted[key] > 0 for key in keys):
        raise UserError(
            f"space.{name}={_text(wanted)} must be a size, a list of sizes, or {{from:…,to:…,step:…}} with numbers above 0"
        )
    return range(wanted["from"], wanted["to"] + 1, wanted["step"])


def _text(wanted: Any) -> str:
    """As it is typed."""
    if isinstance(wanted, Mapping):
        return "{" + ",".join(f"{key}:{value}" for key, value in wanted.items()) + "}"
    return str(wanted)


def _few(sizes: list[int]) -> str:
    return ", ".join(map(str, sizes[:4])) + (", …" if len(sizes) > 4 else "")
