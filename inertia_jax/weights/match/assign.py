"""Pairs all layers of two networks, or says which ones cannot be paired."""

import fnmatch
import re
from collections.abc import Mapping, Sequence

from inertia_jax.weights.match.layers import Layer, Signature, in_words, shortened
from inertia_jax.weights.match.pairing import pair_names

# Names that say which kind of convolution a layer is.
_TRANSPOSED = re.compile(r"transpose|deconv", re.IGNORECASE)
_PLAIN = re.compile(r"conv[_\d]*", re.IGNORECASE)
_MAX_LINES = 12


def assign(
    ours: Mapping[str, Layer],
    theirs: Mapping[str, Layer],
    *,
    pairs: Mapping[str, str],
    transposed: Sequence[str] | None,
    is_ordered: bool,
) -> tuple[dict[str, str], set[str]]:
    """Returns PyTorch's layers by those of Flax, and which of these are transposed.

    Args:
        ours: The layers of Flax by name.
        theirs: PyTorch's by name, in the order of the network.
        pairs: What the user knows: modules of PyTorch by those of Flax.
        transposed: Globs of transposed convolutions, or None.
        is_ordered: Whether the order of PyTorch's layers is that of the network.

    Raises:
        ValueError: Layers are left over, or more than one pairing is possible.
    """
    for name, names, separator in (
        *((name, ours, "/") for name in pairs),
        *((name, theirs, ".") for name in pairs.values()),
    ):
        if not any(_is_within(other, name, separator) for other in names):
            raise ValueError(f"`pairs` has {name!r}, which names no layers.")
    for glob in transposed or ():
        if not fnmatch.filter(ours, glob):
            raise ValueError(f"`transposed` has {glob!r}, which matches no layer.")
    buckets: dict[tuple[int, Signature], tuple[list[str], list[str]]] = {}
    for name, layer in theirs.items():
        region = _region(name, list(pairs.values()), ".")
        buckets.setdefault((region, layer.signature()), ([], []))[1].append(name)
    there = set(buckets)
    flipped, squares = set(), []
    for name, layer in ours.items():
        region = _region(name, list(pairs), "/")
        plain, other = layer.signature(), layer.signature(transposed=True)
        if plain == other:
            squares.append(name)
        is_transposed = _is_named(name, transposed)
        said, unsaid = (other, plain) if is_transposed else (plain, other)
        if (region, said) not in there and (region, unsaid) in there:
            # The shapes show that it is not what its name says.
            is_transposed, said = not is_transposed, unsaid
        if layer.kernel is not None and is_transposed:
            flipped.add(name)
        buckets.setdefault((region, said), ([], []))[0].append(name)
    problems = []
    if transposed is None:
        problems += _square_doubts(ours, squares, flipped)
    within = [f" (within {a} and {b})" for a, b in pairs.items()] + [""]
    assigned: dict[str, str] = {}
    for (region, signature), (flax, torch) in buckets.items():
        found = None
        if len(flax) == len(torch):
            found = pair_names(flax, torch, is_ordered=is_ordered)
        if found is None:
            problems.append(
                f"{in_words(signature)}: {shortened(flax) or 'none'} of Flax, "
                f"{shortened(torch) or 'none'} of PyTorch{within[region]}"
            )
        assigned |= found or {}
    if problems:
        more = len(problems) - _MAX_LINES
        shown = problems[:_MAX_LINES] + (
            [f"and {more} more like these"] if more > 0 else []
        )
        listed = "\n  ".join(shown)
        raise ValueError(
            f"it is not clear which layer is which. Say it with `pairs`, e.g. "
            f"{{'Block_0': 'layer1.0'}}, or with `rename`, or delete surplus weights "
            f"from the state dict. These layers have the same shapes:\n  {listed}"
        )
    return assigned, flipped


def _is_within(name: str, module: str, separator: str) -> bool:
    return name == module or name.startswith(f"{module}{separator}")


def _region(name: str, modules: Sequence[str], separator: str) -> int:
    """Returns the place of the innermost module that a layer is in, -1 for none."""
    holding = [
        (len(module), i)
        for i, module in enumerate(modules)
        if _is_within(name, module, separator)
    ]
    return max(holding, default=(0, -1))[1]


def _is_named(name: str, transposed: Sequence[str] | None) -> bool:
    """Tells whether a layer is called a transposed convolution."""
    if transposed is None:
        return _TRANSPOSED.search(name.rpartition("/")[2]) is not None
    return any(fnmatch.fnmatchcase(name, glob) for glob in transposed)


def _square_doubts(
    ours: Mapping[str, Layer], squares: Sequence[str], flipped: set[str]
) -> list[str]:
    """Returns sentences on kernels of as many inputs as outputs, of either kind."""
    doubts = []
    for name in squares:
        sides = (ours[name].kernel or ())[:-2]
        is_said = name in flipped or _PLAIN.fullmatch(name.rpartition("/")[2])
        # Transposed convolutions have even sides more often than others.
        is_even = bool(sides) and all(side % 2 == 0 for side in sides)
        if sides and not is_said and (flipped or is_even):
            doubts.append(
                f"{name} may be a transposed convolution: say those with `transposed`, "
                f"e.g. [{name!r}], or [] for none"
            )
    return doubts
