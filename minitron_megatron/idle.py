"""Options that were given and cannot have their effect: said, or refused, before the run, from what config.py says beside each.

    optim.decay_steps=100 optim.schedule=cosine    said: the run is what it would be without
    drop_layers=[3] layers=outputs/layers          refused: it cannot be known which was meant

A default that does not fit is adapted where it is used, and said here too. Nothing heavy is imported.
"""

from collections.abc import Collection, Iterator
from typing import Any

from minitron_megatron.config import WARMUP_STEPS, TrainingConfig, model_options, number_of_steps, options, warmup_of
from minitron_megatron.effects import is_set, typed, value_of
from minitron_megatron.errors import UserError

_LONGEST = 80


def given_options(config: Any, typed_names: Collection[str]) -> frozenset[str]:
    """Options that somebody has set, by their dotted names: those that were typed, and those that differ from their default.

    To be asked before anything is settled. Raises UserError for a size that was typed beside a model's folder.
    """
    _check_sizes(config, typed_names)
    values = {one.name: (value_of(config, one.name), one.default) for one in options(type(config))}
    return frozenset(
        n for n, (value, default) in values.items() if value != default or (n in typed_names and is_set(value))
    )


def idle_options(config: Any, given: Collection[str], name: str) -> list[str]:
    """A line for each of the options that were given (`given_options`) and have no effect in a command of this name.

    Raises UserError where two of them contradict each other.
    """
    return list(_idle(config, given, name))


def _idle(config: Any, given: Collection[str], name: str) -> Iterator[str]:
    unread = getattr(config, "unread", ())
    for one in options(type(config)):
        if one.name not in given:
            continue
        value = value_of(config, one.name)
        shown = f"{one.name}={typed(value)[:_LONGEST]}"
        if one.name.partition(".")[0] in unread and one.name != "parallel.world_size":
            yield f"{shown} has no effect: {name} does not use it"
            continue
        for effect in one.when:
            if reason := effect.lacks(config):
                if effect.refused:
                    raise UserError(f"{shown}: {reason}")
                yield f"{shown} has no effect: {reason}"
                break


def _check_sizes(config: Any, given: Collection[str]) -> None:
    """Raise UserError for a size that was typed beside a model's folder, which has its own."""
    for model in model_options(type(config)):
        path, own = getattr(config, model).path, (f"{model}.path", f"{model}.engine")
        sizes = (one for one in given if one.startswith(f"{model}.") and one not in own)
        size = next((one for one in sizes if is_set(value_of(config, one))), None)
        if path is not None and size:
            raise UserError(
                f"{size}={typed(value_of(config, size))}: {model}={path} is a folder, whose sizes are its own; leave it out, or "
                "make a model of that size with prune"
            )


def adapted_defaults(config: Any) -> list[str]:
    """A line for each default that does not fit the other options, and for what it has become."""
    if not isinstance(config, TrainingConfig) or config.optim.warmup_tokens is not None:
        return []
    try:
        steps = number_of_steps(config)
    except (UserError, TypeError):
        return []
    warmup = warmup_of(config.optim, steps)
    if config.optim.warmup_steps is not None or warmup == WARMUP_STEPS:
        return []
    return [f"optim.warmup_steps={warmup}, half of the run's {steps} steps, rather than {WARMUP_STEPS}"]
