"""Pairs layers of two networks that have the same shapes, by what their names say.

Layers whose names differ in numbers alone are a series: `layer1.0.conv1` and
`layer1.0.conv2`, or `Block_0/Conv_0` and `Block_0/Conv_1`. Two series of one length are
paired in the order of their numbers, where no other series could be meant.
"""

import re
from collections.abc import Sequence

from inertia_jax.weights.layout import torch_key

# A number in a series' name, and what stands for it in its words.
_NUMBER = "#"
# Words of one meaning.
_MEANINGS = {
    **dict.fromkeys(("bn", "norm", "normalization"), "norm"),
    **dict.fromkeys(("fc", "linear", "dense", "classifier", "head"), "dense"),
    **dict.fromkeys(("shortcut", "downsample", "skip", "proj", "projection"), "skip"),
    **dict.fromkeys(("layer", "layers", "block", "blocks"), "block"),
}

Words = tuple[str, ...]


def pair_names(
    flax: Sequence[str], torch: Sequence[str], *, is_ordered: bool
) -> dict[str, str] | None:
    """Returns PyTorch's names by those of Flax; None where names leave it open.

    Args:
        flax: Names of layers of Flax.
        torch: As many names of PyTorch's layers, in the order of the network.
        is_ordered: Whether that is an order, so that numbers must follow it.
    """
    if len(flax) == 1:
        return {flax[0]: torch[0]}
    by_key = {torch_key((*name.split("/"), "")).rstrip("."): name for name in flax}
    if by_key.keys() == set(torch):
        return {name: key for key, name in by_key.items()}
    ours, theirs = _series(flax), _series(torch)
    if is_ordered and any(
        sorted(names, key=torch.index) != names for names in theirs.values()
    ):
        return None
    forms = _pair_series(
        {form: len(names) for form, names in ours.items()},
        {form: len(names) for form, names in theirs.items()},
    )
    if forms is None:
        return None
    return {
        name: key
        for form, names in ours.items()
        for name, key in zip(names, theirs[forms[form]], strict=True)
    }


def _series(names: Sequence[str]) -> dict[Words, list[str]]:
    """Returns names by their words, in the order of their numbers."""
    series: dict[Words, list[str]] = {}
    for name in names:
        series.setdefault(_words(name), []).append(name)
    for form in series:
        series[form].sort(key=lambda name: [int(n) for n in re.findall(r"\d+", name)])
    return series


def _words(name: str) -> Words:
    """Returns the words of a name in small letters, numbers as `#`."""
    found = re.findall(r"\d+|[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)
    return tuple(_NUMBER if word.isdigit() else word.lower() for word in found)


def _pair_series(
    ours: dict[Words, int], theirs: dict[Words, int]
) -> dict[Words, Words] | None:
    """Returns the series of PyTorch by those of Flax, or None.

    Args:
        ours: Lengths of the series of Flax.
        theirs: Lengths of those of PyTorch.
    """
    if sorted(ours.values()) != sorted(theirs.values()):
        return None
    words_ours, words_theirs = _distinguishing(ours), _distinguishing(theirs)
    likeness = {
        (a, b): _likeness(words_ours[a], words_theirs[b]) for a in ours for b in theirs
    }

    def is_likely(a: Words, b: Words) -> bool:
        # What is more like a series of another length is none of this one.
        return (
            ours[a] == theirs[b]
            and likeness[a, b] == max(likeness[a, other] for other in theirs)
            and likeness[a, b] == max(likeness[other, b] for other in ours)
        )

    left = {a: {b for b in theirs if is_likely(a, b)} for a in ours}
    pairs: dict[Words, Words] = {}
    while left:
        certain = next((a for a, bs in left.items() if len(bs) == 1), None)
        if certain is None:
            return None
        (pairs[certain],) = left.pop(certain)
        for others in left.values():
            others.discard(pairs[certain])
    return pairs


def _distinguishing(series: dict[Words, int]) -> dict[Words, set[str]]:
    """Returns the words of each series that not all of them have."""
    meant = {form: {_MEANINGS.get(w, w) for w in form} for form in series}
    common = set.intersection(*meant.values())
    return {form: words - common for form, words in meant.items()}


def _likeness(ours: set[str], theirs: set[str]) -> int:
    """Returns how many words of one are, or begin, words of the other."""
    return sum(any(_is_like(a, b) for b in theirs) for a in ours)


def _is_like(a: str, b: str) -> bool:
    short, long = sorted((a, b), key=len)
    return a == b or (len(short) > 2 and long.startswith(short))
