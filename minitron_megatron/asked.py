"""What an output was asked for, as its manifest and a run's config.yaml have it, beside what is asked for now.

Two spellings of one path are one value: `model=m` is `model=/home/u/m` where the command was started in /home/u. Each record has
the folder of its start (STARTED_IN), from which its relative paths are meant. Words that are the same are the same in any folder:
whether the files are is told by their digests. So are paths of copies: what a command reads is among its inputs, and where these
are the same, in the same order, a path that names something says nothing more.
"""

import glob
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from minitron_megatron.changing import decisive
from minitron_megatron.config import CommandConfig, options

# In a record of options: the working folder of its command.
STARTED_IN = "started_in"
# What stands before a path in the name of an input; before that of a text stands nothing.
_BEFORE_PATHS = ("file ", "results ")


@dataclass(frozen=True)
class Asked:
    """Options that decide a result, by their dotted names, and digests of inputs by name, both as typed in one folder.

    `started_in` is None where that was not noted.
    """

    options: Mapping[str, Any]
    inputs: Mapping[str, Any]
    started_in: str | None

    @classmethod
    def now(cls, config: Mapping[str, Any], inputs: Mapping[str, str], free: frozenset[str]) -> "Asked":
        """What this process is asked for; `free` options decide nothing (changing.py)."""
        return cls(decisive(config, free), dict(inputs), os.getcwd())

    @classmethod
    def read(cls, record: Mapping[str, Any], free: frozenset[str]) -> "Asked":
        """What a manifest, or another record, says."""
        config, inputs = record.get("config") or {}, record.get("inputs") or {}
        return cls(decisive(config, free), inputs, record.get(STARTED_IN))

    def record(self) -> dict[str, Any]:
        """Plain values that `read` takes."""
        return {STARTED_IN: self.started_in, "inputs": dict(self.inputs), "config": dict(self.options)}

    def as_spelt_in(self, now: "Asked") -> "Asked":
        """The same, each path that `now` has too as it is spelt there; where it reads the same, those of copies as well.

        `now` may have a part of the inputs: those that are known by then.
        """
        options = as_spelt_now(self.options, self.started_in, now.options)
        inputs = _names_of_copies(_names_as_spelt_now(self.inputs, self.started_in, now.inputs), now.inputs)
        if inputs and reads_the_same(inputs, now.inputs):
            options = as_copied(options, now.options)
        return replace(self, options=options, inputs=inputs)

    def fingerprint(self) -> str:
        """Tells options and inputs from others, the same before and after they were written to a file."""
        return hashlib.sha256(f"{_plain(self.options)}{_plain(self.inputs)}".encode()).hexdigest()

    def same_options(self, other: "Asked") -> bool:
        """Whether all options are those of another one."""
        return _plain(self.options) == _plain(other.options)


def _plain(values: Mapping[str, Any]) -> str:
    return json.dumps(values, sort_keys=True, default=str)


def as_spelt_now(before: Mapping[str, Any], started_in: str | None, now: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a record, by dotted names, each path that is the same one now as it is spelt now.

    Args:
        before: the options.
        started_in: the folder that they were typed in; None where that was not noted.
        now: options of this process.
    """
    return {
        name: _respelt(value, started_in, now[name]) if name in now and _names_path(name) else value
        for name, value in before.items()
    }


def _respelt(before: Any, started_in: str | None, now: Any) -> Any:
    if isinstance(before, list | tuple) and isinstance(now, list | tuple) and len(before) == len(now):
        return [_respelt(one, started_in, other) for one, other in zip(before, now, strict=True)]
    if not isinstance(before, str) or not isinstance(now, str) or "" in (before, now):
        return before
    return now if _absolute(before, started_in) == _absolute(now, None) else before


def _names_as_spelt_now(before: Mapping[str, Any], started_in: str | None, now: Mapping[str, Any]) -> dict[str, Any]:
    """Inputs of a record; a name may be a path, as of a text."""
    new = {_input(name, None): name for name in now if name not in before}
    return {name if name in now else new.get(_input(name, started_in), name): v for name, v in before.items()}


def _input(name: str, started_in: str | None) -> tuple[str, str]:
    """What stands before the path in the name of an input, and the path."""
    kind = _kind(name)
    return kind, _absolute(name.removeprefix(kind), started_in)


def _names_of_copies(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """Inputs of a record, those that are named by their path as that of their copies, one by one in their order."""
    old = [name for name in before if name not in now]
    new = [name for name in now if name not in before and _names_file(name)]
    same = len(old) == len(new) and all(
        _kind(a) == _kind(b) and before[a] == now[b] for a, b in zip(old, new, strict=True)
    )
    names = dict(zip(old, new, strict=True)) if same else {}
    return {names.get(name, name): value for name, value in before.items()}


def reads_the_same(before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether all inputs of now are those of a record, which may have more; files in the order in which they are read."""
    files = [name for name in now if _names_file(name)]
    return all(before.get(name) == one for name, one in now.items()) and [n for n in before if n in files] == files


def as_copied(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a record that reads what is read now, by dotted names: each path to something as it is now.

    An output is no input: where it was is compared.
    """
    return {
        name: _copied(value, now[name]) if name in now and name != "output" and _names_path(name) else value
        for name, value in before.items()
    }


def _copied(before: Any, now: Any) -> Any:
    if isinstance(before, list | tuple) and isinstance(now, list | tuple) and len(before) == len(now):
        return [_copied(one, other) for one, other in zip(before, now, strict=True)]
    if not isinstance(before, str) or not isinstance(now, str) or "" in (before, now):
        return before
    same_pattern = glob.has_magic(now) and os.path.basename(before) == os.path.basename(now)
    # The name of a task is no path; adopt_data takes the beginning of two names.
    return now if os.path.exists(now) or os.path.exists(f"{now}.bin") or same_pattern else before


def _names_file(name: str) -> bool:
    """Whether the name of an input is the path of a file, rather than what a command calls it."""
    return bool(_kind(name)) or os.path.exists(name)


def _kind(name: str) -> str:
    """What stands before the path in the name of an input."""
    return next((word for word in _BEFORE_PATHS if name.startswith(word)), "")


def _absolute(path: str, started_in: str | None) -> str:
    # A record that was damaged may have anything there.
    return os.path.abspath(os.path.join(started_in if isinstance(started_in, str) else "", path))


def _names_path(option: str) -> bool:
    """Whether an option names a file or folder: also of a stage (`distill.data.path`), or in a mapping (`models.teacher`)."""
    first, _, rest = option.partition(".")
    return not {option, first, rest}.isdisjoint(_path_options())


@cache
def _path_options() -> frozenset[str]:
    """Options of any command that name files or folders, by their dotted names."""
    found: set[str] = set()
    kinds: list[type[CommandConfig]] = [CommandConfig]
    while kinds:
        kind = kinds.pop()
        kinds += kind.__subclasses__()
        found |= {o.name for o in options(kind) if o.path}
    return frozenset(found)
