"""JSON and YAML as plain values, whatever is in the text: what cannot be taken in is one kind of error. Text files, whole.

Files that were cut off, sent by somebody or written by another program may be nested a hundred thousand deep, hold numbers of a
thousand digits, or stand for themselves by an alias.
"""

import json
import os
import secrets
from pathlib import Path
from typing import Any

import yaml

# More digits than the largest float has.
_DIGITS = 300
# Values that aliases of a YAML file may add to those that are written.
_BY_ALIASES = 100_000
# What parsers end with, beside their own errors, where a text is too deep, too large or no value of its tag.
_OF_PARSERS = (ValueError, ArithmeticError, LookupError, TypeError, AttributeError, RecursionError, MemoryError)


class Unreadable(ValueError):
    """Text that is no JSON or YAML, or not one to take in; says why in a few words."""


def parse_json(text: str | bytes) -> Any:
    """The value that a JSON text is. Raises Unreadable."""
    try:
        return _JSON.decode(text.decode("utf-8") if isinstance(text, bytes) else text)
    except RecursionError:
        raise Unreadable("it is nested too deep") from None
    except (*_OF_PARSERS, UnicodeDecodeError) as error:
        raise Unreadable(str(error) or type(error).__name__) from None


def parse_yaml(text: str, loader: type[yaml.SafeLoader] | None = None) -> Any:
    """The value that a YAML text is, without ever building objects. Raises Unreadable."""
    try:
        return yaml.load(text, loader or PlainLoader)
    except RecursionError:
        raise Unreadable("it is nested too deep") from None
    except (yaml.YAMLError, *_OF_PARSERS) as error:
        raise Unreadable(str(error) or type(error).__name__) from None


def read_json(file: Path) -> Any:
    """The value in a JSON file. Raises OSError, or ValueError where it cannot be read."""
    return parse_json(file.read_text(encoding="utf-8"))


def read_yaml(file: Path) -> Any:
    """The value in a YAML file. Raises OSError, or ValueError where it cannot be read."""
    return parse_yaml(file.read_text(encoding="utf-8"))


def write_whole(file: Path, text: str) -> None:
    """Write a text file whole or not at all, onto the disk; of jobs side by side that write the same one the last counts."""
    partial = file.with_name(f".{file.name}.{secrets.token_hex(4)}.partial")
    try:
        with open(partial, "w", encoding="utf-8") as out:
            out.write(text)
            out.flush()
            os.fsync(out.fileno())
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)


def _whole_number(digits: str) -> int:
    if len(digits) > _DIGITS:
        raise Unreadable(f"a number has {len(digits)} digits")
    return int(digits)


_JSON = json.JSONDecoder(parse_int=_whole_number)


class PlainLoader(yaml.SafeLoader):
    """YAML of plain values, in which aliases do not multiply."""

    def get_single_node(self) -> yaml.Node | None:
        """The document, before values are made of it."""
        node = super().get_single_node()
        if node is not None:
            sizes: dict[int, int] = {}
            written = self._size(node, sizes)
            if written - len(sizes) > _BY_ALIASES:
                raise Unreadable("its aliases stand for too much")
        return node

    def _size(self, node: yaml.Node, sizes: dict[int, int]) -> int:
        """Values of a node where every alias is written out."""
        size = sizes.get(id(node))
        if size == 0:
            raise Unreadable("an alias stands for what it is part of")
        if size is not None:
            return size
        sizes[id(node)] = 0
        inside = node.value if isinstance(node, yaml.CollectionNode) else []
        parts = [part for one in inside for part in (one if isinstance(one, tuple) else (one,))]
        sizes[id(node)] = 1 + sum(self._size(part, sizes) for part in parts)
        return sizes[id(node)]

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        """A whole number, of a size that can be computed with."""
        value = super().construct_yaml_int(node)
        if abs(value) >= 10**_DIGITS:
            raise Unreadable(f"a number has more than {_DIGITS} digits")
        return value


PlainLoader.add_constructor("tag:yaml.org,2002:int", PlainLoader.construct_yaml_int)
