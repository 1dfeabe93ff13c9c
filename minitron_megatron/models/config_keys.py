"""Keys of other programs' configs: none is passed over unread.

    key ──▶ read into the shape
        ──▶ only: it must have one of the values that are computed here
        ──▶ harmless: it changes nothing of what the model computes
        ──▶ anything else is refused by name

A config may say more than its own program reads, and others read that: a key that nobody here knows is no key to skip.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from minitron_megatron.errors import UserError
from minitron_megatron.models.shape import LARGEST

# Signs of a value, and keys, that an error shows.
_LONGEST_VALUE, _MOST_KEYS = 60, 4


def shown(value: Any) -> str:
    """A value in an error: a few words, however large a structure it is."""
    return repr(value)[:_LONGEST_VALUE] if isinstance(value, str | int | float | bool | None) else f"a {kind_of(value)}"


def kind_of(value: Any) -> str:
    """What a value is, in words: list, mapping, or Python's name of its type."""
    return "mapping" if isinstance(value, Mapping) else type(value).__name__


@dataclass(frozen=True)
class KeyTable:
    """All that is known of a config's keys.

    Attributes:
        read: keys that are read into the shape, where their own rules are.
        only: keys whose value must be one of these. None (null) says the same as False or an empty value.
        harmless: keys that change nothing of what a model computes.
        suffixes: of further harmless keys.
        prefixes: of further harmless keys.
        reasons: why a key is refused, where there is more to say.
    """

    read: frozenset[str]
    only: Mapping[str, tuple[Any, ...]]
    harmless: frozenset[str]
    suffixes: tuple[str, ...] = ()
    prefixes: tuple[str, ...] = ()
    reasons: Mapping[str, str] = field(default_factory=dict)

    def knows(self, key: str) -> bool:
        """Whether a key is in the table at all."""
        listed = key in self.read or key in self.only or key in self.harmless
        return listed or key.startswith(self.prefixes) or key.endswith(self.suffixes)

    def check(self, config: Mapping[str, Any], where: str, model: str, ignored: Collection[str] = ()) -> None:
        """Raise UserError for what the table does not allow.

        Args:
            config: the whole config.
            where: the file, for errors.
            model: the class, for errors.
            ignored: keys that are not known, of which the user says that they change nothing.
        """
        for key in ignored:
            if key not in config or self.knows(key):
                why = "is known, and has its own rules" if key in config else "is not in it"
                raise UserError(f"ignore_keys={key}: the key {why} ({where}): leave it out")
        for key, allowed in self.only.items():
            if key in config and not _says_one_of(config[key], allowed):
                values = " or ".join(map(repr, allowed))
                raise UserError(f"{where}: {key}={shown(config[key])} is not supported for {model} (only {values})")
        # A null says that there is no such thing.
        unknown = {k: v for k, v in config.items() if v is not None and not self.knows(k) and k not in ignored}
        for key in unknown:
            if key in self.reasons:
                raise UserError(f"{where}: {key}={shown(unknown[key])} is not supported: {self.reasons[key]}")
        if unknown:
            first = list(unknown)[:_MOST_KEYS]
            named = ", ".join(f"{key}={shown(unknown[key])}" for key in first)
            more = f" and {len(unknown) - len(first)} more" if len(unknown) > len(first) else ""
            raise UserError(
                f"{where}: {named}{more} {'is' if len(unknown) == 1 else 'are'} not known for {model}, and may change what the "
                f"model computes: remove what does not, or name it to the import, as in ignore_keys=[{','.join(first)}]"
            )


def _says_one_of(value: Any, allowed: tuple[Any, ...]) -> bool:
    return value in allowed or (value is None and any(not one for one in allowed))


def whole_number(config: Mapping[str, Any], key: str, where: str, most: int) -> int:
    """A whole number from 1 to `most`. Raises UserError that names the key."""
    value = _there(config, key, where)
    if type(value) is not int or not 1 <= value <= most:
        raise UserError(f"{where}: {key}={shown(value)} must be a whole number from 1 to {most}")
    return value


def number(config: Mapping[str, Any], key: str, where: str) -> float:
    """A finite number above 0. Raises UserError that names the key."""
    value = _there(config, key, where)
    if type(value) not in (int, float) or not 0 < value <= LARGEST:
        raise UserError(f"{where}: {key}={shown(value)} must be a number above 0")
    return float(value)


def truth(config: Mapping[str, Any], key: str, where: str) -> bool:
    """True or false; a null, or no such key, is false. Raises UserError that names the key."""
    value = config.get(key)
    if value is not None and type(value) is not bool:
        raise UserError(f"{where}: {key}={shown(value)} must be true or false")
    return bool(value)


def words(config: Mapping[str, Any], key: str, where: str) -> list[str]:
    """A list of strings; a null, or no such key, is an empty one. Raises UserError that names the key."""
    value = config.get(key)
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        raise UserError(f"{where}: {key}={shown(value)} must be a list of names")
    return value


def mapping(config: Mapping[str, Any], key: str, where: str) -> Mapping[str, Any]:
    """A mapping; a null, or no such key, is an empty one. Raises UserError that names the key."""
    value = config.get(key)
    if value is not None and not isinstance(value, Mapping):
        raise UserError(f"{where}: {key}={shown(value)} must be a mapping")
    return value or {}


def _there(config: Mapping[str, Any], key: str, where: str) -> Any:
    if key not in config:
        raise UserError(f"{where}: {key} is missing")
    return config[key]
