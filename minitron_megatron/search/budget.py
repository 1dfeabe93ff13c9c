"""What a shape costs, and which shapes are within the limits that were given: arrays of counts from the axis table."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from minitron_megatron.config import BudgetConfig
from minitron_megatron.errors import UserError
from minitron_megatron.models.axes import Sizes, cached_values, count_parameters, flops_per_token
from minitron_megatron.models.shape import ModelShape
from minitron_megatron.search.latency import MILLISECONDS, Latency, read_latency

# Each is an option of budget with the limit; what they are in words.
QUANTITIES = {
    "parameters": "parameters",
    "non_embedding_parameters": "parameters without embeddings",
    "memory_gib": "GiB of weights and cache",
    "flops_per_token": "operations a token",
    "latency_ms": "estimated milliseconds",
}
# Those that are counts.
_WHOLE = ("parameters", "non_embedding_parameters", "flops_per_token")


@dataclass(frozen=True)
class Budget:
    """Limits by quantity, and how to count what a shape of the source's architecture takes of each."""

    source: ModelShape
    options: BudgetConfig
    limits: Mapping[str, float]
    latency: Latency | None = None

    @classmethod
    def of(cls, source: ModelShape, options: BudgetConfig) -> "Budget":
        """The limits that were given; `source` must be uniform. Raises UserError where there is none, or a table is wrong."""
        limits = {name: getattr(options, name) for name in QUANTITIES if getattr(options, name) is not None}
        column, rate = "latency_ms", options.tokens_per_second
        if rate is not None:
            if "latency_ms" in limits:
                raise UserError("budget.latency_ms= and budget.tokens_per_second= say the same: give one of them")
            # As time a token, of which there may be so much at most.
            column, limits["latency_ms"] = "tokens_per_second", MILLISECONDS / rate
        if not limits:
            names = ", ".join(f"budget.{name}=" for name in (*QUANTITIES, "tokens_per_second"))
            raise UserError(f"no budget: give at least one of {names}")
        if not 0 <= options.at_least <= 1:
            raise UserError(f"budget.at_least={options.at_least} must be from 0 to 1: it is a share of the limit")
        if (options.table is None) != ("latency_ms" not in limits):
            raise UserError(
                "budget.table= and budget.latency_ms= (or tokens_per_second=) go together: measured shapes, and the limit"
            )
        table = read_latency(Path(options.table), source, column) if options.table else None
        return cls(source, options, limits, table)

    def cost_of(self, quantity: str, shape: ModelShape) -> float:
        """What one shape of the source's architecture takes."""
        sizes = {
            "layers": shape.num_layers,
            "hidden": shape.hidden_size,
            "ffn": shape.ffn_hidden_size,
            "kv_groups": shape.num_query_groups,
            "q_heads": shape.num_attention_heads // shape.num_query_groups,
        }
        return self.cost(quantity, {name: np.array([size]) for name, size in sizes.items()}).item()

    def option(self, quantity: str, limit: float, below: float = math.inf) -> str:
        """An option as it is typed, whose limit is at least `limit` and `below` that: as tokens a second where those were given.

        Counts are whole; of anything else there are three figures, or as many more as keep it below.
        """
        if quantity in _WHOLE:
            return f"budget.{quantity}={math.ceil(limit)}"
        as_rate = quantity == "latency_ms" and self.options.tokens_per_second is not None
        for figures in range(3, 16):
            # A lower rate is a higher limit.
            typed = -_ceil(-MILLISECONDS / limit, figures) if as_rate else _ceil(limit, figures)
            if (MILLISECONDS / typed if as_rate else typed) < below:
                break
        return f"budget.{'tokens_per_second' if as_rate else quantity}={typed:.{figures}g}"

    @property
    def quantities(self) -> list[str]:
        """What can be counted: latency with measurements only."""
        return [name for name in QUANTITIES if name != "latency_ms" or self.latency]

    def cost(self, quantity: str, sizes: Sizes) -> np.ndarray:
        """What shapes with these axis lengths take of a quantity: [n], in the unit of its option."""
        options = self.options
        if quantity == "latency_ms":
            return self.latency.milliseconds(sizes)
        if quantity == "flops_per_token":
            return flops_per_token(self.source, options.context, sizes)
        parameters = count_parameters(self.source, embedding=quantity != "non_embedding_parameters", sizes=sizes)
        if quantity != "memory_gib":
            return parameters
        cache = cached_values(self.source, sizes) * options.batch * options.context
        return (parameters * options.weight_bytes + cache * options.cache_bytes) / 2**30


def _ceil(value: float, figures: int) -> float:
    """The least number of so many figures that is not below a value."""
    if value == 0:
        return 0.0
    digits = figures - 1 - math.floor(math.log10(abs(value)))
    near = round(value, digits)
    return near if near >= value else round(near + 10.0**-digits, digits)
