"""Other names that parts of the same networks have, and new names of parts of keys."""

import re
from collections.abc import Collection, Iterable

# What the same layer is called in networks of torchvision and timm, akamaster, kuangliu
# and chenyaofo, and in those that were derived of them.
_SPELLINGS = (
    frozenset({"linear", "fc", "classifier", "head"}),
    frozenset({"shortcut", "downsample"}),
)


def known_spellings(names: Iterable[str], keys: Collection[str]) -> dict[str, str]:
    """Returns keys of a network by the names that mean them.

    Args:
        names: Names, none of which is a key of the network.
        keys: The network's keys that lack a weight.
    """
    by_meaning: dict[object, tuple[list[str], list[str]]] = {}
    for i, spelt in enumerate((names, keys)):
        for name in spelt:
            by_meaning.setdefault(_canonical(name), ([], []))[i].append(name)
    # With a `head` and an `fc`, there is a layer that the other network lacks.
    pairs = [(found, key) for found, key in by_meaning.values()]
    return {f[0]: k[0] for f, k in pairs if len(f) == len(k) == 1}


def _canonical(name: str) -> tuple[object, ...]:
    """Returns the parts of a key, each with all its other spellings."""
    parts = name.split(".")
    return tuple(next((s for s in _SPELLINGS if part in s), part) for part in parts)


def renamed(name: str, old: str, new: str) -> str:
    """Returns a key in which the part `old`, or parts joined by dots, is `new`.

    In `old`, `*` stands for any characters of one part; in `new`, for those that the
    one of the same place stood for.
    """
    literal = map(re.escape, old.split("*"))
    pattern = rf"(?<![^.]){'([^.]*)'.join(literal)}(?![^.])"

    def replace(found: re.Match[str]) -> str:
        stars = iter(found.groups())
        return "".join(next(stars) if c == "*" else c for c in new)

    changed = re.sub(pattern, replace, name)
    return re.sub(r"\.{2,}", ".", changed).strip(".")


def check_rename(old: str, new: str) -> None:
    """Raises ValueError where a new name has more stars than the old one."""
    if new.count("*") > old.count("*"):
        raise ValueError(
            f"`rename` has {old!r}={new!r}; the new name must have at most as many * "
            f"as the old one, whose characters they are."
        )
