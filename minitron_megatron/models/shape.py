"""The sizes of a decoder, as plain data: what ``model.yaml`` in a model folder holds and what presets in ``conf/model`` give.

A ModelShape knows nothing of tensors or ranks; the axis table (axes.py) says which parameters have which of its axes.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from minitron_megatron.config import FAMILY_NAMES
from minitron_megatron.errors import UserError

# Padding is a property of the model folder, not of a run's layout: any tensor-parallel size up to 8 divides it
# and each shard stays a multiple of 128, which tensor cores like.
VOCAB_MULTIPLE = 128 * 8
DTYPES = ("float32", "bfloat16")
# The most of each: far above any decoder there is, so that a slip of the hand is a mistake and no work without an end.
SIZES = {
    "num_layers": 2**14,
    "hidden_size": 2**20,
    "ffn_hidden_size": 2**24,
    "num_attention_heads": 2**16,
    "num_query_groups": 2**16,
    "head_dim": 2**16,
    "vocab_size": 2**26,
    "max_position_embeddings": 2**31 - 1,
}


# The largest number that is one: whole numbers of a text may be larger than any float.
LARGEST = 1e300


def _check_numbers(owner: object, names: tuple[str, ...]) -> None:
    for name in names:
        value = getattr(owner, name)
        if type(value) not in (int, float) or not 0 < value <= LARGEST:
            raise UserError(f"{name}={value!r} in the model's shape: must be a number above 0")


def padded_size(vocab_size: int) -> int:
    """Rows of an embedding with so many tokens."""
    return math.ceil(vocab_size / VOCAB_MULTIPLE) * VOCAB_MULTIPLE


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3's scaling of rotary frequencies (``rope_type: llama3`` in Hugging Face configs)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def __post_init__(self) -> None:
        """All four must be numbers above 0, and the bounds of the ramp in order. Raises UserError."""
        _check_numbers(self, tuple(f.name for f in fields(self)))
        if self.low_freq_factor >= self.high_freq_factor:
            raise UserError(
                f"low_freq_factor={self.low_freq_factor} must be below high_freq_factor={self.high_freq_factor}: rotary "
                "frequencies are scaled along a ramp from one to the other"
            )


@dataclass(frozen=True)
class ModelShape:
    """Sizes of one decoder. Raises UserError when they contradict each other."""

    family: str
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int | tuple[int, ...]
    num_attention_heads: int
    num_query_groups: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    rope_theta: float
    norm_eps: float
    tied_embeddings: bool
    dtype: str
    rope_scaling: RopeScaling | None = None
    # Share of a head's channels, its first ones, that are rotated.
    rotary_percent: float = 1.0

    def __post_init__(self) -> None:
        """Check what no layout and no checkpoint could repair."""
        if isinstance(self.ffn_hidden_size, list | tuple):
            self._set_ffn_of_layers(tuple(self.ffn_hidden_size))
        for name in SIZES:
            value = getattr(self, name)
            for size in value if isinstance(value, tuple) else (value,):
                if type(size) is not int or size < 1:
                    raise UserError(f"{name}={value!r} in the model's shape: must be a whole number of at least 1")
                if size > SIZES[name]:
                    raise UserError(f"{name}={size} in the model's shape: must be at most {SIZES[name]}")
        _check_numbers(self, ("rope_theta", "norm_eps", "rotary_percent"))
        if type(self.tied_embeddings) is not bool:
            raise UserError(f"tied_embeddings={self.tied_embeddings!r} in the model's shape: must be true or false")
        if self.family not in FAMILY_NAMES:
            raise UserError(f"family={self.family!r} in the model's shape is not one of {', '.join(FAMILY_NAMES)}")
        if self.num_attention_heads % self.num_query_groups:
            raise UserError(
                f"num_attention_heads={self.num_attention_heads} is not a multiple of num_query_groups="
                f"{self.num_query_groups}: every key-value group needs the same number of query heads"
            )
        if self.head_dim % 2:
            raise UserError(f"head_dim={self.head_dim} is odd: rotary embeddings turn pairs of channels")
        rotated = int(self.head_dim * self.rotary_percent)
        if self.rotary_percent > 1 or rotated % 2 or not rotated:
            raise UserError(
                f"rotary_percent={self.rotary_percent} of head_dim={self.head_dim} rotates {rotated} channels: "
                "they must be an even number, at most the head's"
            )
        if self.dtype not in DTYPES:
            raise UserError(f"dtype={self.dtype!r} in the model's shape: use one of {', '.join(DTYPES)}")

    def _set_ffn_of_layers(self, sizes: tuple[int, ...]) -> None:
        if len(sizes) != self.num_layers:
            raise UserError(
                f"ffn_hidden_size has {len(sizes)} sizes for num_layers={self.num_layers}: give one a layer"
            )
        object.__setattr__(self, "ffn_hidden_size", sizes[0] if len(set(sizes)) == 1 else sizes)

    @property
    def uniform(self) -> bool:
        """Whether every layer has the same sizes."""
        return not isinstance(self.ffn_hidden_size, tuple)

    @property
    def ffn_of_layers(self) -> tuple[int, ...]:
        """Feed-forward neurons of each layer."""
        sizes = self.ffn_hidden_size
        return sizes if isinstance(sizes, tuple) else (sizes,) * self.num_layers

    @property
    def heads_per_group(self) -> int:
        """Query heads that share one key-value head."""
        return self.num_attention_heads // self.num_query_groups

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding on disk and in memory; rows from vocab_size on are padding and masked in every loss."""
        return padded_size(self.vocab_size)

    def lengths(self, layer: int | None = None) -> dict[str, int]:
        """Length of every named axis (``vocab`` with its padding) in a layer; without one, ffn is that of the widest."""
        return {
            "layers": self.num_layers,
            "hidden": self.hidden_size,
            "ffn": max(self.ffn_of_layers) if layer is None else self.ffn_of_layers[layer],
            "kv_groups": self.num_query_groups,
            "q_heads": self.heads_per_group,
            "head_dim": self.head_dim,
            "vocab": self.padded_vocab_size,
        }

    def resized(self, **sizes: Any) -> "ModelShape":
        """The same architecture with other sizes."""
        return replace(self, **sizes)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for YAML."""
        values = asdict(self)
        if self.rotary_percent == 1:
            # It came later: without it, the digests of older folders stay what they are.
            del values["rotary_percent"]
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str) -> "ModelShape":
        """Build from YAML or config values; `where` names the source in errors."""
        names = {f.name for f in fields(cls)}
        unknown = sorted(str(key) for key in set(values) - names)
        optional = {"rope_scaling", "rotary_percent"}
        missing = sorted(n for n in names - optional if values.get(n) is None)
        if unknown or missing:
            what = f"unknown {', '.join(unknown)}" if unknown else f"missing {', '.join(missing)}"
            raise UserError(f"{where}: {what} in the model's shape")
        scaling = values.get("rope_scaling")
        try:
            rope_scaling = RopeScaling(**scaling) if scaling else None
        except TypeError as error:
            raise UserError(f"{where}: rope_scaling is malformed ({error})") from None
        try:
            given = {name: value for name, value in values.items() if value is not None}
            return cls(**{**given, "rope_scaling": rope_scaling})
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
