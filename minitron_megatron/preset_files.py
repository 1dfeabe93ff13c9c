"""Presets from files of one's own: `chain=my.yaml` where a preset of conf/chain could stand, in every group of conf/.

    chain=my.yaml ──read as plain YAML──▶ words such as ++distill.trainer.steps=30 ──checked, before the command line's own

A file has what a preset of its group has, so a copy of one in conf/ is a good beginning. Its keys are checked as options are, and
what the command line says goes over it. Interpolations (`${…}`) are refused and never resolved: a file that was sent to somebody
must not read their environment.
"""

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from minitron_megatron.errors import UserError, in_one_line
from minitron_megatron.plain_files import PlainLoader, parse_yaml
from minitron_megatron.words import quoted

# Groups whose presets are options of the whole command; those of other groups are options of the group's own name.
_GLOBAL = ("chain", "experiment", "benchmark", "suite")
_ENDINGS = (".yaml", ".yml")
# An entry of a preset's `defaults:`, as in "override /model@teacher".
_OVERRIDE = re.compile(r"(?:override )?/(?:(?P<group>\w+)|model@(?P<model>\w+))")
_NAME = re.compile(r"[\w.]+")


def is_preset_file(value: str) -> bool:
    """Whether what follows `GROUP=` is a file rather than the name of a preset."""
    return value.endswith(_ENDINGS) and not os.path.isdir(value)


def words_of_file(group: str, value: str, known: list[str], whole: list[str]) -> list[str]:
    """What a file of one's own sets, as words of a command line.

    Args:
        group: the option that was given, as `chain` or `teacher`.
        value: the file.
        known: every option of the command by its dotted name, and those that are mappings of any keys.
        whole: options whose value is a word and no mapping: models and groups of presets.

    Raises:
        UserError: the file is missing or no mapping, or something in it is not plain.
    """
    where, file = f"{group}={value}", Path(os.path.expanduser(value))
    if not os.path.isfile(file):
        raise UserError(f"{where} does not exist: give a YAML file of your own, or a preset (--help lists them)")
    values = _read(file, where)
    if own := next((key for key in values if str(key).partition(".")[0] == "hydra"), None):
        raise UserError(f"{where}: {own} is of Hydra itself, which a file cannot set: leave it out")
    words = [f"{key}={name}" for key, name in _defaults(values.pop("defaults", []), where)]
    prefix = "" if group in _GLOBAL else f"{group}."
    for key, found in _options(values, prefix, known, where):
        if key in whole and isinstance(found, str) and is_preset_file(found):
            raise UserError(f"{where}: {key}={found}: a file cannot name another file: give both on the command line")
        plain = found if key in whole and isinstance(found, str) and "${" not in found else _text(found, where, key)
        words.append(f"{key}={plain}")
    return words


class _Loader(PlainLoader):
    """Plain YAML as Hydra reads it: 1e-4 is a number, and no key may stand twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        if twice := next((key for key in keys if keys.count(key) > 1), None):
            raise yaml.YAMLError(f"{twice} is there twice")
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9][0-9_]*)[eE][-+]?[0-9]+"),
    list("-+0123456789."),
)


def _read(file: Path, where: str) -> dict[Any, Any]:
    """A file's mapping, without ever building objects. Raises UserError when it is not one."""
    try:
        values = parse_yaml(file.read_text(encoding="utf-8"), _Loader)
    except (OSError, ValueError) as error:
        raise UserError(f"{where} cannot be read ({in_one_line(error, 200)})") from None
    if not isinstance(values, dict):
        raise UserError(f"{where} is not a mapping of keys to values")
    return values


def _defaults(entries: Any, where: str) -> Iterator[tuple[str, str]]:
    """Presets that a file takes itself, by their option."""
    for entry in entries if isinstance(entries, list) else [entries]:
        if entry == "_self_":
            continue
        key, name = next(iter(entry.items())) if isinstance(entry, Mapping) and len(entry) == 1 else ("", None)
        found = _OVERRIDE.fullmatch(str(key))
        if found is None or not isinstance(name, str) or not _NAME.fullmatch(name):
            raise UserError(f"{where}: defaults: {entry!r} cannot be read: write it as in '- override /optim: PRESET'")
        yield found["group"] or found["model"], name


def _options(values: Mapping[Any, Any], prefix: str, known: list[str], where: str) -> Iterator[tuple[str, Any]]:
    """Options with their values: a mapping is taken apart unless it is an option's value itself."""
    for key, value in values.items():
        name = f"{prefix}{key}"
        if not isinstance(key, str) or not _NAME.fullmatch(key):
            raise UserError(f"{where}: {prefix}{key!r} is not the name of an option")
        if isinstance(value, Mapping) and value and name not in known:
            yield from _options(value, f"{name}.", known, where)
        else:
            yield name, value


def _text(value: Any, where: str, key: str) -> str:
    """A plain value in Hydra's grammar."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, str):
        if "${" in value:
            raise UserError(
                f"{where}: {key} has an interpolation (${{…}}), which is not resolved in a file: write the value"
            )
        return quoted(value)
    if isinstance(value, list):
        return f"[{','.join(_text(one, where, key) for one in value)}]"
    if isinstance(value, Mapping):
        odd = next((name for name in value if not isinstance(name, str) or not _NAME.fullmatch(name)), None)
        if odd is not None:
            raise UserError(f"{where}: {key}: {odd!r} is not the name of an option")
        return "{" + ",".join(f"{name}:{_text(one, where, key)}" for name, one in value.items()) + "}"
    raise UserError(f"{where}: {key}={value} is a {type(value).__name__}: put it in quotes, or write a number")


@contextmanager
def naming_files(keys: Mapping[str, list[str]]) -> Iterator[None]:
    """Put a file before a mistake in a value that it set; `keys` are the options of each, by the word that gave the file."""
    try:
        yield
    except UserError as error:
        for where, names in keys.items():
            if any(re.match(rf"{re.escape(name)}(?![\w.])", str(error)) for name in names):
                raise UserError(f"{where}: {error}") from None
        raise
