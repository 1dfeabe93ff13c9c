"""What may change where a run continues, or an output is there already: one rule, from what config.py says beside each option.

    decides         unfinished                                  finished
    samples         as they were, or refused by name            the same
    arithmetic      as it was, or refused by name               the same
    length          may grow                                    once output/model is removed
    published       may change                                  once output/model is removed
    free            may change                                  may change: nothing is done again

docs/continuing.md has the table of options; another run may begin with a checkpoint of one with other options (train/begin.py).
"""

from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

from minitron_megatron.config import CommandConfig, flat, options
from minitron_megatron.effects import FREE, typed

# What is free of every command.
_OF_THIS_START = frozenset({"output", "resume", "verify", "dry_run"})


@cache
def free_options(kind: type[CommandConfig]) -> frozenset[str]:
    """Options of a command that decide nothing of its result, by their dotted names.

    Of one that measures seconds, how it runs decides the result.
    """
    if kind.measures_time:
        return _OF_THIS_START
    return frozenset(o.name for o in options(kind) if o.decides == FREE)


class _OfOptions(dict[str, str]):
    """What options say of themselves; what stands inside of one, as rope_scaling.factor, has what it says."""

    def __missing__(self, name: str) -> str:
        option = name.rpartition(".")[0]
        if not option:
            raise KeyError(name)
        return self[option]


@cache
def decided_by(kind: type[CommandConfig]) -> Mapping[str, str]:
    """What each option of a command decides (effects.py), and so what is inside of one whose value is a mapping."""
    return _OfOptions({o.name: o.decides for o in options(kind)})


def decisive(config: Mapping[str, Any], free: frozenset[str]) -> dict[str, Any]:
    """What of a resolved config decides the result, by dotted names; what is inside of a free option is free."""
    return {name: value for name, value in flat(config).items() if free.isdisjoint(_with_parents(name))}


def _with_parents(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """Options that are others now, of two sets by dotted names. What only one of them has is no difference."""
    return (name for name in now if name in before and as_stored(before[name]) != as_stored(now[name]))


def in_words(name: str, before: Any, now: Any) -> str:
    """A difference as it is told."""
    return f"{name}={typed(before)}, not {typed(now)}"


def other_in_words(name: str, before: str | None, now: str | None) -> str:
    """Another input than before, of these digests, as it is told."""
    return f"{'other' if name == 'data' else 'another'} {name} ({shortened(before)}, now {shortened(now)})"


def shortened(digest: str | None) -> str:
    """A digest of which enough is shown to tell it from another."""
    return "none" if digest is None else digest if len(digest) < 24 else f"{digest[:20]}…"


def as_stored(value: Any) -> Any:
    """A value as it is after it was written to a file and read."""
    return [as_stored(one) for one in value] if isinstance(value, list | tuple) else value
