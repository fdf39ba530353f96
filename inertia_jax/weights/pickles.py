"""Reads pickles without importing or calling anything that they name.

A pickle is a program, and Python's own reader runs it. This reader knows how to build
lists, dictionaries and numbers. A class or function is a name to it, looked up in a
table of its caller's; what the table lacks becomes an `Unknown`. So no file can run
code here, and none takes more memory than a multiple of its size.
"""

import pickletools
import warnings
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Any

# Types of keys whose hash costs no more than the key.
_KEYS = (str, bytes, int, float, bool, type(None))
# Longer numbers may have one hash, so that a dictionary looks at all of them.
_MAX_KEY_BITS = 60
_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_LIST": list,
    "EMPTY_SET": list,
    "EMPTY_DICT": dict,
    "EMPTY_TUPLE": tuple,
}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_IGNORED = ("PROTO", "FRAME", "READONLY_BUFFER")


class Global(str):
    """The dotted name of a class or function."""


class Unknown(dict[Any, Any]):
    """Stands for an object of a class that is not read: its items and attributes.

    Args:
        kind: What it stands for, e.g. `argparse.Namespace`.
    """

    def __init__(self, kind: str) -> None:  # noqa: D107 (said above)
        super().__init__()
        self.kind = kind

    def __repr__(self) -> str:
        return f"<{self.kind:.100}>"

    # By identity: hashing what a file nests may take for ever.
    __hash__ = object.__hash__  # type: ignore[assignment]
    __eq__ = object.__eq__
    __ne__ = object.__ne__


def as_key(key: Any) -> Hashable:
    """Returns a key of a dictionary, or what stands for one that is costly to hash."""
    is_long = type(key) is int and key.bit_length() > _MAX_KEY_BITS
    return key if type(key) in _KEYS and not is_long else Unknown("key")


def is_text(value: Any, *texts: str) -> bool:
    """Tells whether a value is one of some texts: an array compares all its numbers."""
    return isinstance(value, str) and value in texts


def brief(name: Any) -> str:
    """Returns the start of a name: what is none may take for ever to write out."""
    return name[:100] if isinstance(name, str) else f"a {type(name).__name__}"


class _Machine:
    """The stack machine of pickles, over a table of names."""

    def __init__(
        self,
        known: Mapping[str, Callable[..., Any]],
        persistent: Callable[[Any], Any],
        size: int,
    ) -> None:
        self.known = known
        self.persistent = persistent
        self.size = size
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[Hashable, Any] = {}
        self.copied = 0

    def pop(self, count: int) -> list[Any]:
        """Takes the last `count` objects, none of them below the last mark."""
        start = len(self.stack) - count
        if start < (self.marks[-1] if self.marks else 0):
            raise ValueError("it takes more than it holds")
        taken = self.stack[start:]
        del self.stack[start:]
        return taken

    def pop_mark(self) -> list[Any]:
        return self.pop(len(self.stack) - self.marks.pop())

    def set_items(self, flat: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, dict):
            raise ValueError(f"it sets items of a {type(target).__name__}")
        for key, value in zip(flat[::2], flat[1::2], strict=True):
            target[as_key(key)] = value

    def append(self, values: list[Any]) -> None:
        # What appends to an unknown class adds nothing that could be read.
        if isinstance(self.stack[-1], list):
            self.stack[-1].extend(values)

    def count(self, values: Iterable[Any]) -> None:
        """Counts what is copied: a file may name one long string again and again."""
        sized = (str, bytes, list, tuple, dict)
        self.copied += sum(len(value) for value in values if isinstance(value, sized))
        if self.copied > 4 * self.size:
            raise ValueError("it unfolds into more than it holds")

    def call(self, function: Any, arguments: Any) -> Any:
        if not isinstance(function, Global):
            return Unknown("object")
        if function not in self.known or not isinstance(arguments, tuple):
            return Unknown(function)
        self.count(arguments)
        return self.known[function](*arguments)

    def build(self, state: Any) -> None:
        target = self.stack[-1]
        parts = state if isinstance(state, tuple) else (state,)
        self.count(parts)
        if isinstance(target, Unknown):
            # Attributes, and in a second dictionary what `__slots__` names.
            for part in parts:
                if isinstance(part, dict):
                    target.update(part)
        elif hasattr(target, "set_pickled"):
            target.set_pickled(state)

    def run(self, file: Any) -> Any:
        for opcode, value, _ in pickletools.genops(file):
            name = opcode.name
            if name == "STOP":
                return self.pop(1)[0]
            self.step(name, value)
        raise ValueError("it has no end")

    def step(self, name: str, value: Any) -> None:
        stack = self.stack
        if name in _IGNORED:
            pass
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name]())
        elif name == "MARK":
            self.marks.append(len(stack))
        elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
            self.memo[as_key(int(value))] = stack[-1]
        elif name == "MEMOIZE":
            self.memo[len(self.memo)] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(self.memo[int(value)])
        elif name in _TUPLES:
            stack.append(tuple(self.pop(_TUPLES[name])))
        elif name == "TUPLE":
            stack.append(tuple(self.pop_mark()))
        elif name in ("LIST", "FROZENSET"):
            stack.append(self.pop_mark())
        elif name == "APPEND":
            self.append(self.pop(1))
        elif name in ("APPENDS", "ADDITEMS"):
            self.append(self.pop_mark())
        elif name == "DICT":
            items = self.pop_mark()
            stack.append({})
            self.set_items(items)
        elif name == "SETITEM":
            self.set_items(self.pop(2))
        elif name == "SETITEMS":
            self.set_items(self.pop_mark())
        elif name == "POP":
            self.pop(1)
        elif name == "POP_MARK":
            self.pop_mark()
        elif name == "DUP":
            stack.append(stack[-1])
        elif name == "BUILD":
            self.build(self.pop(1)[0])
        elif name in ("PERSID", "BINPERSID"):
            key = value if name == "PERSID" else self.pop(1)[0]
            stack.append(self.persistent(key))
        elif _pushes_argument(name):
            stack.append(value)
        else:
            self.make(name, value)

    def make(self, name: str, value: Any) -> None:
        """Follows an opcode that names a class or function, or calls one."""
        if name in ("GLOBAL", "STACK_GLOBAL"):
            # The argument has a space between the module and the name.
            names = value.split(" ") if name == "GLOBAL" else self.pop(2)
            if not all(isinstance(part, str) for part in names):
                raise ValueError("it names a class by what is no text")
            self.count(names)
            made: Any = Global(".".join(names))
        elif name in ("REDUCE", "NEWOBJ"):
            made = self.call(*self.pop(2))
        elif name == "NEWOBJ_EX":
            function, arguments, _ = self.pop(3)
            made = self.call(function, arguments)
        elif name == "INST":
            arguments = tuple(self.pop_mark())
            made = self.call(Global(value.replace(" ", ".")), arguments)
        elif name == "OBJ":
            function, *rest = self.pop_mark()
            made = self.call(function, tuple(rest))
        else:
            raise ValueError(f"it has the opcode {name}, which weights do not need")
        self.stack.append(made)


def _pushes_argument(name: str) -> bool:
    """Tells whether an opcode has a number, a string or bytes, and pushes it."""
    return name.rstrip("1248").removeprefix("SHORT_").removeprefix("BIN") in (
        *("INT", "LONG", "FLOAT", "STRING", "UNICODE", "BYTES", "BYTEARRAY"),
    )


def read_pickle(
    file: Any,
    size: int,
    *,
    known: Mapping[str, Callable[..., Any]],
    persistent: Callable[[Any], Any],
) -> Any:
    """Reads one pickle, and leaves the file where it ends.

    Args:
        file: A file or a map of one, whose `read` takes no memory for bytes that are
            not there.
        size: The number of bytes of the file.
        known: What makes an object of the arguments of a class or function, by its
            dotted name. An object with a method `set_pickled` is given its state.
        persistent: What makes an object that the file keeps outside of the pickle.

    Raises:
        ValueError: The pickle is damaged, or made to take more than its size. What
            `known` meets in a damaged one is raised as it is.
    """
    with warnings.catch_warnings():
        # Of backslashes in names, which a damaged file has.
        warnings.simplefilter("ignore", DeprecationWarning)
        return _Machine(known, persistent, size).run(file)
