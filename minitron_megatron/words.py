"""Values as they are typed on a command line, in Hydra's grammar: where text needs quotes, and which."""

import re
from collections.abc import Mapping
from typing import Any

# Of Hydra's own alphabet; anything else goes into its quotes.
PLAIN_VALUE = re.compile(r"[\w./:+-]+", re.ASCII)


def quoted(value: str) -> str:
    """A value in Hydra's quotes, in which a backslash is one except before a quote."""
    value = re.sub(r"(\\*)'", lambda found: 2 * found[1] + r"\'", value)
    return "'" + re.sub(r"(\\+)$", lambda found: 2 * found[1], value) + "'"


def word(value: Any) -> str:
    """A value as it is typed behind `NAME=`. Text alone needs no quotes there (launcher.py); within a list or mapping it may."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return str(int(value))
    if isinstance(value, list | tuple):
        return f"[{','.join(map(_item, value))}]"
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{name}: {_item(one)}" for name, one in value.items()) + "}"
    return str(value)


def _item(value: Any) -> str:
    text = word(value)
    if value is None or isinstance(value, bool | int | float | list | tuple | Mapping) or PLAIN_VALUE.fullmatch(text):
        return text
    return quoted(text)
