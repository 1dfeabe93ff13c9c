"""Successive halving (Jamieson and Talwalkar, arXiv 1502.07943): who goes on, and what that saves. Pure functions.

    rung      1        2        3          6 candidates, factor 2, rungs at 10, 20 and 40 steps of 40
    steps   0 … 10   … 20     … 40
    in        6        3        2          after the last one the best is told
    run      60   +   30   +   40  = 130 steps of 240

The candidate that is best in the end stays in as long as it is among those that go on after every rung: always, where its curve
crosses no other one after the first rung.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from minitron_megatron.errors import UserError


def kept(candidates: int, factor: int) -> int:
    """How many of so many go on."""
    return math.ceil(candidates / factor)


def rungs(candidates: int, factor: int, steps: int, given: Sequence[int] | None = None) -> list[int]:
    """The steps after which candidates are judged, ascending; the last is the whole budget.

    Args:
        candidates: how many begin.
        factor: one in so many goes on.
        steps: the budget of a candidate.
        given: the steps before the end, if they are given; else the budget is divided by the factor as often as it takes for
            the last rung to leave one candidate.

    Raises:
        UserError: given ones are no ascending numbers from 1 to below the budget.
    """
    if given is not None:
        ok = all(type(n) is int and n >= 1 for n in given) and list(given) == sorted(set(given))
        if not ok or (given and given[-1] > steps):
            raise UserError(
                f"halving.steps={list(given)} must be whole numbers that rise from 1 to the {steps} steps of distill.trainer"
            )
        return [*(n for n in given if n < steps), steps]
    found, left = [steps], candidates
    while factor > 1 and (left := kept(left, factor)) > 1:
        found.append(math.ceil(found[-1] / factor))
    return sorted(set(found))


def sizes(candidates: int, factor: int, count: int) -> list[int]:
    """How many candidates each of so many rungs trains."""
    found = [candidates]
    while len(found) < count:
        found.append(kept(found[-1], factor))
    return found


def survivors(losses: Mapping[int, float], factor: int) -> list[int]:
    """Those that go on, best first: by their loss after the rung, equal ones by their rank before. Keys are those ranks.

    A loss that is not a number is the worst of all.
    """
    order = sorted(losses, key=lambda rank: (_comparable(losses[rank]), rank))
    return order[: kept(len(order), factor)]


def final_order(reached: Mapping[int, Sequence[float]]) -> list[int]:
    """Ranks from the best to the worst: who got further first, then by the loss there, then by the rank before.

    Args:
        reached: of each candidate, by its rank before, the loss after every rung that it was trained to.
    """
    return sorted(reached, key=lambda rank: (-len(reached[rank]), _comparable(reached[rank][-1]), rank))


def steps_run(sizes_of_rungs: Sequence[int], steps_of_rungs: Sequence[int]) -> int:
    """Optimizer steps of all candidates together."""
    own = np.diff([0, *steps_of_rungs])
    return int(np.dot(sizes_of_rungs, own))


def rank_correlation(one: Sequence[float], other: Sequence[float]) -> float | None:
    """Spearman's: 1 where both order alike, −1 where they order the other way round; None for fewer than 3, or all equal."""
    if len(one) < 3:
        return None
    a, b = (_average_ranks(list(map(_comparable, values))) for values in (one, other))
    if a.std() == 0 or b.std() == 0:
        return None
    return float(np.corrcoef(a, b)[0, 1])


def _comparable(loss: float) -> float:
    return loss if math.isfinite(loss) else math.inf


def _average_ranks(values: Sequence[float]) -> np.ndarray:
    """Equal values share the mean of their places."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[inverse]
