"""What an option stands beside in config.py: whether it may change when a run continues, and when it has an effect at all.
And what a command needs beside its required options (Need).

    top_k: int = option(1000, "topk_kl: how many …", decides=ARITHMETIC, when=only_with("distill.loss", "topk_kl"))
                                                     │                   └─ idle.py says or refuses what has no effect
                                                     └─ changing.py knows what a continued run keeps

Nothing is imported: config.py is made of this.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

# What an option decides. Samples and arithmetic stay those that a run or an output began with; what is free may change at any
# time. The length may grow, and what is published may be another, until the model is published.
SAMPLES, ARITHMETIC, LENGTH, PUBLISHED, FREE = "samples", "arithmetic", "length", "published", "free"


@dataclass(frozen=True)
class Effect:
    """When an option has an effect: `lacks` gives of a config what it lacks for that, in words, or None.

    An option that was given without one is said; with `refused` it is a mistake, since what was meant cannot be known.
    """

    lacks: Callable[[Any], str | None]
    refused: bool = False


@dataclass(frozen=True)
class Need:
    """Options of which a command needs one, by their dotted names or that of their group, and how that is told.

    What is needed `always` stops a command without it; other needs are told along with those.
    """

    names: tuple[str, ...]
    told: str
    always: bool = True


def value_of(config: Any, name: str) -> Any:
    """An option of a config by its dotted name."""
    for part in name.split("."):
        config = getattr(config, part)
    return config


def is_set(value: Any) -> bool:
    """Whether an option asks for anything: not null, false, 0, none, or empty."""
    return value is not None and value is not False and value != 0 and value not in ("none", [], {})


def only_with(name: str, *values: Any) -> Effect:
    """An option for certain values of another one."""

    def lacks(config: Any) -> str | None:
        now = value_of(config, name)
        if now in values:
            return None
        return f"it is for {' or '.join(f'{name}={typed(value)}' for value in values)}, and here {name}={typed(now)}"

    return Effect(lacks)


def including(name: str, *values: Any) -> Effect:
    """An option for certain members of a list."""

    def lacks(config: Any) -> str | None:
        now = value_of(config, name)
        if any(value in now for value in values):
            return None
        return f"it is for {' or '.join(map(str, values))} in {name}=, and here {name}={typed(now)}"

    return Effect(lacks)


def beside(*names: str) -> Effect:
    """An option that needs one of others to be set."""

    def lacks(config: Any) -> str | None:
        if any(is_set(value_of(config, name)) for name in names):
            return None
        return (
            f"it is for {' or '.join(f'{name}=' for name in names)}, which {'are' if names[1:] else 'is'} not set here"
        )

    return Effect(lacks)


def without(*names: str, refused: bool = False) -> Effect:
    """An option in whose place others stand, where they are set."""

    def lacks(config: Any) -> str | None:
        there = next((name for name in names if is_set(value_of(config, name))), None)
        return there and f"{there}={typed(value_of(config, there))} stands in its place: leave one of them out"

    return Effect(lacks, refused)


def typed(value: Any) -> str:
    """A value as it stands on a command line."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
