"""The names of all that a file holds: its keys, joined by dots and renamed."""

import collections
import difflib
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from inertia_jax.weights.pickles import Unknown
from inertia_jax.weights.rebuild import NumPyArray
from inertia_jax.weights.spellings import check_rename, renamed

# Parts of keys that name a wrapper, or that stand in a pickled module.
_WRAPPERS = ("module", "_orig_mod", "_modules", "_parameters", "_buffers")
# Counters that a network does without.
_COUNTERS = ("num_batches_tracked", "n_averaged")
# A file may be made to have long keys, and mappings in thousands of others. No network
# has keys as long, is nested as deep, or has as many names of a layer.
_MAX_KEY_LENGTH = 1000
_MAX_DEPTH = 100
_MAX_NAMES = 8


def is_array(value: Any) -> bool:
    """Tells whether a value may be a weight: NumPy's scalars stand beside weights."""
    return hasattr(value, "shape") and not isinstance(value, np.generic)


def named(
    loaded: Mapping[Any, Any], keys: Collection[str], rename: Mapping[str, str]
) -> tuple[dict[str, Any], set[str]]:
    """Returns all values by their joined keys, and the keys that stand for two."""
    for old, new in rename.items():
        check_rename(old, new)
    parts = {part for key in keys for part in key.split(".")}
    dropped = set(_WRAPPERS) - parts
    values: dict[str, Any] = {}
    twice, unused, seen = set(), dict(rename), set()
    for joined, value in _joined(loaded).items():
        name = ".".join(part for part in joined.split(".") if part not in dropped)
        if name.rpartition(".")[2] in _COUNTERS:
            continue
        seen.update(name.split("."))
        for old, new in rename.items():
            before, name = name, renamed(name, old, new)
            if name != before:
                unused.pop(old, None)
        if name in values and is_array(values[name]):
            if is_array(value):
                twice.add(name)
            continue
        values[name] = value
    for old in unused:
        near = difflib.get_close_matches(old, seen, n=1)
        hint = f" Is it {near[0]!r}?" if near else ""
        raise ValueError(f"`rename` has {old!r}, which is part of no key.{hint}")
    return values, twice


def _joined(loaded: Mapping[Any, Any]) -> dict[str, Any]:
    """Returns what nested mappings hold, with keys joined by dots."""
    joined: dict[str, Any] = {}
    # By identity, and held: a mapping may make those that it nests when it is asked.
    times: collections.Counter[int] = collections.Counter()
    held = []
    rest: list[tuple[str, Any, tuple[Any, ...]]] = [("", loaded, ())]
    while rest:
        name, value, above = rest.pop()
        if isinstance(value, NumPyArray):
            value = value.array
        if getattr(value, "is_nested", False):  # it raises where its shape is asked for
            value = Unknown("a nested tensor")
        if not isinstance(value, Mapping) or (isinstance(value, Unknown) and not value):
            joined[name] = value
            continue
        if times[id(value)] == _MAX_NAMES or len(above) == _MAX_DEPTH:
            continue
        if any(value is mapping for mapping in above):
            continue
        times[id(value)] += 1
        held.append(value)
        path = (*above, value)
        children = [
            (f"{name}.{key}" if name else key, child, path)
            for key, child in value.items()
            if isinstance(key, str) and len(name) + len(key) < _MAX_KEY_LENGTH
        ]
        rest.extend(reversed(children))
    return joined
