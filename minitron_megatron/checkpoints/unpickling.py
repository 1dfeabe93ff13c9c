"""Plain data out of a pickle that a stranger may have made: no name in it is looked up, called or built.

A pickle is a program that makes objects. Here the same program makes plain data: a class or a function is a `Name`, an object is
a `Made` that says by which name, from what, and with which state. Whoever reads them decides what they mean.
"""

import io
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

# What Python and torch write of data classes, containers, numbers and strings, in protocols 2 to 5.
_STEPS = """PROTO FRAME STOP MARK MEMOIZE BINPUT LONG_BINPUT BINGET LONG_BINGET GLOBAL STACK_GLOBAL NEWOBJ REDUCE BUILD
    NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE SHORT_BINUNICODE BINUNICODE8
    EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST APPEND APPENDS EMPTY_DICT SETITEM SETITEMS""".split()
_EMPTY_DICTS = (("collections", "OrderedDict"), ("builtins", "dict"))


@dataclass(frozen=True, eq=False, slots=True)
class Name:
    """Stands for a class or a function, as the pickle names it."""

    module: str
    name: str


@dataclass(eq=False, slots=True)
class Made:
    """Stands for an object: the name that makes it, what that was given, and the state that the object was given."""

    by: Name
    arguments: tuple[Any, ...]
    state: Any = None


class _Unpickler(pickle._Unpickler):  # the one written in Python: its steps can be replaced
    def __init__(self, file: io.BytesIO, allowed: Callable[[str, str], bool]) -> None:
        super().__init__(file)
        self.allowed = allowed
        self.names: dict[tuple[str, str], Name] = {}

    def find_class(self, module: str, name: str) -> Name:
        if not self.allowed(module, name):
            raise pickle.UnpicklingError(f"{module}.{name} is not allowed in it")
        return self.names.setdefault((module, name), Name(module, name))

    def load_made(self) -> None:
        arguments, by = self.stack.pop(), self.stack.pop()
        if not isinstance(by, Name) or not isinstance(arguments, tuple):
            raise pickle.UnpicklingError("it calls what is no name")
        is_dict = (by.module, by.name) in _EMPTY_DICTS and not arguments
        self.append({} if is_dict else Made(by, arguments))

    def load_build(self) -> None:
        state, made = self.stack.pop(), self.stack[-1]
        if not isinstance(made, Made):
            raise pickle.UnpicklingError("it gives a state to what is no object")
        made.state = state

    def load_append(self) -> None:
        value = self.stack.pop()
        self._extend([value])

    def load_appends(self) -> None:
        self._extend(self.pop_mark())

    def _extend(self, values: list[Any]) -> None:
        if not isinstance(self.stack[-1], list):
            raise pickle.UnpicklingError("it appends to what is no list")
        self.stack[-1].extend(values)

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set([key, value])

    def load_setitems(self) -> None:
        self._set(self.pop_mark())

    def _set(self, items: list[Any]) -> None:
        target = self.stack[-1]
        # To hash tuples of tuples, each in the next twice, would take for ever.
        if (
            not isinstance(target, dict)
            or len(items) % 2
            or not all(isinstance(k, str | int | Made) for k in items[::2])
        ):
            raise pickle.UnpicklingError("it has a key that is no string, number or object")
        target.update(zip(items[::2], items[1::2], strict=True))

    dispatch: ClassVar[dict[int, Callable[..., None]]] = {
        **{getattr(pickle, name)[0]: pickle._Unpickler.dispatch[getattr(pickle, name)[0]] for name in _STEPS},
        pickle.NEWOBJ[0]: load_made,
        pickle.REDUCE[0]: load_made,
        pickle.BUILD[0]: load_build,
        pickle.APPEND[0]: load_append,
        pickle.APPENDS[0]: load_appends,
        pickle.SETITEM[0]: load_setitem,
        pickle.SETITEMS[0]: load_setitems,
    }


def plain_data(data: bytes, allowed: Callable[[str, str], bool]) -> Any:
    """What a pickle makes, as None, bool, int, float, str, tuple, list, dict, `Name` and `Made`.

    Args:
        data: the pickle.
        allowed: whether it may have the name (module, name) in it.

    Raises:
        pickle.UnpicklingError, or whatever else damaged bytes end in.
    """
    try:
        return _Unpickler(io.BytesIO(data), allowed).load()
    except KeyError as error:  # a step that is not in the table
        raise pickle.UnpicklingError(f"it has a step {error} that no index has") from None
