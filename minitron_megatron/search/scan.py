"""One pass over a space: which shapes fit, the best of them, and the front of loss against what each costs. Arrays of numbers."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from minitron_megatron.console import format_value
from minitron_megatron.errors import UserError
from minitron_megatron.search.budget import QUANTITIES, Budget
from minitron_megatron.search.predict import Predictor
from minitron_megatron.search.space import Space

# The share of the model that is proposed where a budget leaves nothing to prune.
_SUGGESTED = 0.6


@dataclass
class Found:
    """What a scan has found: counts, and numbers of shapes.

    shapes: that were looked at; within: those of them inside every limit; fitting: those of these that use enough of one limit;
    smallest: the least of each limited quantity over all shapes; used: the highest share of a limit that a shape within them
    uses; best: the fitting shapes of lowest predicted damage, best first; fronts: by quantity, the fitting shapes that no other
    beats in both cost and loss, by rising cost.
    """

    shapes: int = 0
    within: int = 0
    fitting: int = 0
    smallest: dict[str, float] = field(default_factory=dict)
    used: float = 0.0
    best: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    fronts: dict[str, np.ndarray] = field(default_factory=dict)


def scan(space: Space, budget: Budget, predictor: Predictor | None = None, keep: int = 10) -> Found:
    """Look at every shape of the space; without a predictor they are only counted.

    Raises:
        UserError: no shape fits.
    """
    found = Found()
    for numbers in space.numbers():
        found.shapes += len(numbers)
        costs = {name: budget.cost(name, space.lengths(numbers)) for name in budget.limits}
        for name, cost in costs.items():
            found.smallest[name] = min(found.smallest.get(name, np.inf), cost.min().item())
        # The limit that binds: of several, one at least must be made use of.
        used = np.max([costs[name] / limit for name, limit in budget.limits.items()], axis=0)
        within = used <= 1
        found.within += int(within.sum())
        found.used = max(found.used, used[within].max(initial=0.0))
        fits = within & (used >= budget.options.at_least)
        found.fitting += int(fits.sum())
        if predictor is not None and fits.any():
            _take(found, budget, predictor, numbers[fits], {name: cost[fits] for name, cost in costs.items()}, keep)
    _check_found(found, budget)
    return found


def check_smaller(space: Space, budget: Budget) -> None:
    """Raise UserError where there is nothing to prune: the model is within every limit, or the space has no smaller shape."""
    whole = {name: budget.cost_of(name, budget.source) for name in budget.limits}
    least = {name: min(budget.cost(name, space.smallest()).tolist(), default=math.inf) for name in budget.limits}
    smaller = [name for name in budget.limits if least[name] < whole[name]]
    if not smaller and all(map(math.isfinite, least.values())):
        name = next(iter(budget.limits))
        raise UserError(
            f"the model has no smaller shape in this space: none has less than its {format_value(whole[name])} "
            f"{QUANTITIES[name]}; widen space, as with space.num_layers=[…], or give a smaller space.multiple="
        )
    if any(limit < whole[name] for name, limit in budget.limits.items()):
        return
    name = next(iter([*smaller, *budget.limits]))
    above = "above" if budget.limits[name] > whole[name] else "at"
    proposed = max(_SUGGESTED * whole[name], least[name] if smaller else 0.0)
    raise UserError(
        f"the budget is {above} the model's {format_value(whole[name])} {QUANTITIES[name]}, so nothing need be pruned: give "
        f"less, such as {budget.option(name, proposed, below=whole[name])} ({proposed / whole[name]:.0%} of it)"
    )


def _take(
    found: Found,
    budget: Budget,
    predictor: Predictor,
    numbers: np.ndarray,
    costs: Mapping[str, np.ndarray],
    keep: int,
) -> None:
    """Merge fitting shapes into the best and the fronts so far: either only ever needs what it had and what is new."""
    losses = predictor.loss(numbers)
    best = np.concatenate((found.best, numbers))
    found.best = best[np.lexsort((best, np.concatenate((predictor.loss(found.best), losses))))[:keep]]
    for name, of_new in costs.items():
        before = found.fronts.get(name, numbers[:0])
        cost = np.concatenate((budget.cost(name, predictor.space.lengths(before)), of_new))
        front = pareto_front(cost, np.concatenate((predictor.loss(before), losses)))
        found.fronts[name] = np.concatenate((before, numbers))[front]


def pareto_front(cost: np.ndarray, loss: np.ndarray) -> np.ndarray:
    """Entries that no other beats: by rising cost, each with a lower loss than all cheaper ones. Of equals, the first.

    cost, loss: [n]; gives indices, int64.
    """
    order = np.lexsort((loss, cost))
    return order[np.diff(np.minimum.accumulate(loss[order]), prepend=np.inf) < 0]


def _check_found(found: Found, budget: Budget) -> None:
    """Raise UserError where nothing fits, saying what the nearest shape has."""
    if found.fitting:
        return
    if not found.shapes:
        raise UserError(
            "the space is empty: no space.hidden_size is a multiple of a space.num_attention_heads: change them, or give "
            "space.exportable=false, which has them exported as Mistral"
        )
    for name, limit in budget.limits.items():
        whole = budget.cost_of(name, budget.source)
        if found.smallest[name] >= whole:
            raise UserError(
                f"nothing fits: no shape of the space is below the model's {format_value(whole)} {QUANTITIES[name]}: "
                "widen space, as with space.num_layers=[…]"
            )
        if found.smallest[name] > limit:
            raise UserError(
                f"nothing fits: the smallest possible shape has {format_value(found.smallest[name])} {QUANTITIES[name]}, "
                f"budget.{name} is {format_value(limit)}: use {budget.option(name, found.smallest[name])} or more, or "
                "widen space, as with space.num_layers=[…]"
            )
    if not found.within:
        raise UserError(
            "nothing fits: every limit alone leaves shapes, all of them together none: raise one, or widen space"
        )
    raise UserError(
        f"nothing fits: the {found.within:,} shapes within the budget use {found.used:.2%} of it at most, budget.at_least is "
        f"{budget.options.at_least:.0%}: use budget.at_least={_below(found.used):g} or widen space"
    )


def _below(share: float) -> float:
    """Three figures of a share, rounded down."""
    unit = 10.0 ** (math.floor(math.log10(share)) - 2)
    return math.floor(share / unit) * unit
