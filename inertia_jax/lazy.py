"""Public names of a package, whose modules are imported when one is asked for."""

import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def importer(package: str, homes: Mapping[str, Sequence[str]]) -> Callable[[str], Any]:
    """Returns the `__getattr__` of a package (PEP 562).

    Help, completion and options need nothing that computes: importing JAX, Flax and
    Orbax takes seconds.

    Args:
        package: The package's name.
        homes: The names that each of its modules defines. Other attributes of the
            package are its modules themselves.
    """
    home_of = {name: home for home, names in homes.items() for name in names}

    def find(name: str) -> Any:
        if name in home_of:
            module = importlib.import_module(f"{package}.{home_of[name]}")
            value = getattr(module, name)
        elif name[:1] != "_" and importlib.util.find_spec(f"{package}.{name}"):
            value = importlib.import_module(f"{package}.{name}")
        else:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        setattr(sys.modules[package], name, value)  # asked for once
        return value

    return find
