"""The one error of all keys that do not fit, and how they may be spelt otherwise."""

import itertools
import re
from collections.abc import Mapping, Sequence

# Lines of an error that anyone reads: guesses, and keys.
_MAX_GUESSES = 10
_MAX_LINES = 20


def check_keys(
    network: str,
    missing: Mapping[str, tuple[int, ...]],
    surplus: Mapping[str, tuple[int, ...]],
    problems: Sequence[str],
) -> None:
    """Raises one error of all keys that do not fit, and how they might be renamed."""
    if not missing and not surplus and not problems:
        return
    renames = _likely_renames(missing, surplus)
    given = {new: old for pairs in renames.values() for new, old in pairs.items()}
    lines = [
        f"likely {old}={new} (`rename`), of {len(pairs)} keys: "
        f"{next(iter(pairs.values()))} is {next(iter(pairs))}"
        for (old, new), pairs in renames.items()
    ]
    others = [f"missing {n} {missing[n]}" for n in missing if n not in given]
    left = set(surplus).difference(given.values())
    others += [f"surplus {name} {surplus[name]}" for name in left]
    others = sorted([*others, *problems])
    if len(others) > _MAX_LINES:
        more = len(others) - _MAX_LINES
        others = [*others[:_MAX_LINES], f"and {more} more like these"]
    listed = "\n  ".join([*lines, *others])
    number = len(missing) + len(surplus) + len(problems)
    raise ValueError(f"the weights do not fit {network} ({number} keys):\n  {listed}")


def _likely_renames(
    missing: Mapping[str, tuple[int, ...]], surplus: Mapping[str, tuple[int, ...]]
) -> dict[tuple[str, str], dict[str, str]]:
    """Returns renames of surplus keys that give missing ones of the same shape.

    Args:
        missing: Shapes by the keys that a network needs.
        surplus: Shapes by the keys that it does not know.

    Returns:
        The missing keys that each rename `(old, new)` gives, and the surplus keys that
        they come from; the most fruitful rename first.
    """
    gives: dict[tuple[str, str], dict[str, str]] = {}
    for new, shape in missing.items():
        for old, other in surplus.items():
            if shape == other and old.rpartition(".")[2] == new.rpartition(".")[2]:
                gives.setdefault(_difference(old, new), {})[new] = old
    found: dict[tuple[str, str], dict[str, str]] = {}
    while gives and len(found) < _MAX_GUESSES:
        # The most fruitful, of these one that keeps the numbers, and the shortest.
        best = max(
            gives,
            key=lambda pair: (
                len(gives[pair]),
                _same_numbers(*next(iter(gives[pair].items()))),
                -len("".join(pair)),
            ),
        )
        found[best] = gives.pop(best)
        used = {*found[best], *found[best].values()}
        for pair, given in list(gives.items()):
            left = {
                new: old for new, old in given.items() if used.isdisjoint((new, old))
            }
            gives[pair] = left
            if not left:
                del gives[pair]
    return found


def _same_numbers(old: str, new: str) -> int:
    """Returns how many numbers two keys begin with in common: blocks, then layers."""
    numbers = [re.findall(r"\d+", key) for key in (old, new)]
    shared = itertools.takewhile(
        lambda pair: pair[0] == pair[1], zip(*numbers, strict=False)
    )
    return len(list(shared))


def _difference(old: str, new: str) -> tuple[str, str]:
    """Returns what two keys differ in, between the parts that they share."""
    old_parts, new_parts = old.split("."), new.split(".")
    shortest = min(len(old_parts), len(new_parts)) - 1
    end = 0
    while end < shortest and old_parts[-1 - end] == new_parts[-1 - end]:
        end += 1
    start = 0
    while start < shortest - end and old_parts[start] == new_parts[start]:
        start += 1
    stop_old, stop_new = len(old_parts) - end, len(new_parts) - end
    return ".".join(old_parts[start:stop_old]), ".".join(new_parts[start:stop_new])
