"""Rotary embeddings by a Hugging Face config, which has several places to say them.

    transformers 4   rope_theta, partial_rotary_factor at the top; scaling in rope_scaling
    transformers 5   all in rope_parameters; where rope_scaling is there too it stands in its place, and what neither
                     says is taken from the top

Both are read in transformers 5's order. Whatever is said twice must be the same: each program would take another one.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from minitron_megatron.errors import UserError
from minitron_megatron.models.config_keys import mapping, number, shown, whole_number
from minitron_megatron.models.hf_keys import Family
from minitron_megatron.models.shape import SIZES, RopeScaling

THETA = 10000.0
# Older names of partial_rotary_factor, which transformers does not read.
_OTHER_NAMES = ("rope_percent", "rope_percentage", "rotary_percent", "rotary_pct")
_OF_LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor")
_LENGTH = "original_max_position_embeddings"
# Keys of every kind of rope; the length says nothing where nothing is scaled.
_OF_ALL = frozenset(("rope_type", "type", "rope_theta", "partial_rotary_factor", _LENGTH))


@dataclass(frozen=True)
class Rope:
    """What rotary embeddings are: base, share of a head's channels that turn, and scaling."""

    theta: float
    percent: float
    scaling: RopeScaling | None


def rope_of(config: Mapping[str, Any], family: Family, where: str) -> Rope:
    """The rotary embeddings of a config. Raises UserError for kinds that are not computed here, and for contradictions."""
    places = {key: mapping(config, key, where) for key in ("rope_scaling", "rope_parameters")}
    found = {key: _read(key, values, config, family, where) for key, values in places.items() if values}
    if not found:
        return _read("", {}, config, family, where)
    (first, rope), *others = found.items()
    for key, other in others:
        if other != rope:
            raise UserError(
                f"{where}: {first} and {key} differ ({rope}, {other}): transformers 5 takes {first}, others the other one; "
                "leave the one that is right"
            )
    return rope


def _read(key: str, values: Mapping[str, Any], config: Mapping[str, Any], family: Family, where: str) -> Rope:
    """The rotary embeddings where `values`, those of `key`, are taken together with what stands at the top."""
    if any(isinstance(value, Mapping) for value in values.values()):
        raise UserError(f"{where}: {key} that differ between layers are not supported")
    inside = f"{where}, {key}"
    # With a null there, instead of no such key, transformers takes the null, and can make nothing of it.
    for name in ("rope_type", "rope_theta", *(["partial_rotary_factor"] if family.partial_rotary else [])):
        there, place = (values, inside) if name in values or name == "rope_type" else (config, where)
        if name in there and there[name] is None:
            raise UserError(f"{place}: {name}=null is no value of it: write what is meant, or leave the key out")
    kind = _same({"rope_type": values.get("rope_type"), "type": values.get("type")}, inside, "default")
    if kind not in ("default", "llama3"):
        raise UserError(f"{where}: rope scaling {shown(kind)} is not supported: only default and llama3 are")
    _check_keys(values, kind, inside)
    theta = _same(_numbers("rope_theta", key, values, config, where), where, THETA)
    percents = _numbers("partial_rotary_factor", key, values, config, where)
    percents |= {name: number(config, name, where) for name in _OTHER_NAMES if config.get(name) is not None}
    percent = _same(percents, where, family.defaults.get("partial_rotary_factor", 1.0))
    if percent != 1 and not family.partial_rotary:
        name = next(iter(percents))
        raise UserError(f"{where}: {name}={percent} is not supported for {family.architecture}")
    return Rope(theta, percent, _scaling(key, values, config, where) if kind == "llama3" else None)


def _check_keys(values: Mapping[str, Any], kind: str, inside: str) -> None:
    known = _OF_ALL | set(_OF_LLAMA3 if kind == "llama3" else ())
    for name, value in values.items():
        # A factor of 1 scales nothing.
        if name not in known and value is not None and not (name == "factor" and value == 1):
            raise UserError(
                f"{inside}: {name}={shown(value)} is not supported for rope_type {kind}: remove it if it is idle"
            )


def _scaling(key: str, values: Mapping[str, Any], config: Mapping[str, Any], where: str) -> RopeScaling:
    inside = f"{where}, {key}"
    lengths = {}
    for name, there, says in ((f"{key}.{_LENGTH}", values, inside), (_LENGTH, config, where)):
        if there.get(_LENGTH) is not None:
            lengths[name] = whole_number(there, _LENGTH, says, SIZES["max_position_embeddings"])
    positions = config.get("max_position_embeddings")
    length = _same(lengths, where, positions if type(positions) is int and positions > 0 else 1)
    try:
        return RopeScaling(*(number(values, name, inside) for name in _OF_LLAMA3), length)
    except UserError as error:
        raise UserError(str(error) if inside in str(error) else f"{inside}: {error}") from None


def _numbers(name: str, key: str, values: Mapping[str, Any], config: Mapping[str, Any], where: str) -> dict[str, float]:
    """What is said of a number inside and at the top, by where it is said, inside first."""
    found = {}
    for place, there, says in ((f"{key}.{name}", values, f"{where}, {key}"), (name, config, where)):
        if there.get(name) is not None:
            found[place] = number(there, name, says)
    return found


def _same[T](said: Mapping[str, T | None], where: str, default: T) -> T:
    """The one value that is said, by whichever names; the default where none is. Raises UserError where they differ."""
    there = {name: value for name, value in said.items() if value is not None}
    for name, value in there.items():
        first = next(iter(there))
        if value != there[first]:
            raise UserError(
                f"{where}: {first}={shown(there[first])} and {name}={shown(value)} contradict each other: leave the one that is "
                "right"
            )
    return next(iter(there.values()), default)
