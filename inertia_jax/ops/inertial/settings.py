"""Settings of inertial convolutions: what may be chosen, and checks of the values."""

import difflib
import itertools
from collections.abc import Iterable, Sequence
from typing import Literal, get_args

Metric = Literal["l1", "l2", "max", "random"]
Reference = Literal["center", "core_mean"]
Combine = Literal[
    "mean",
    "sum",
    "max",
    "weighted",
    "weighted_channel",
    "weighted_input",
    "weighted_periphery",
    "stack",
]
Low = Literal["mean", "sample"]
GateGradient = Literal["none", "ste"]

# Thresholds below and above all friction, which is >= 0.
OPEN, CLOSED = -1.0, 1e30
# The least threshold that closes every gate, NaN included: bfloat16 rounds `CLOSED`.
LEAST_CLOSING = CLOSED / 2

# The most capacities that the tiled reading is compiled for.
_MOST_CAPACITIES = 64


def check_choice(name: str, value: object, choices: object) -> None:
    """Raises ValueError unless `value` is one of the `Literal` type `choices`."""
    allowed = get_args(choices)
    # Whatever is no word would be compared in its own way, an array element by element.
    if not isinstance(value, str) or value not in allowed:
        near = near_miss(value, allowed)
        raise ValueError(f"`{name}` (={value!r:.200}) must be one of {allowed}.{near}")


def near_miss(value: object, allowed: Iterable[str]) -> str:
    """Returns " Did you mean ...?" where a word is nearly one that is allowed."""
    word, words = str(value), [*allowed]
    close = difflib.get_close_matches(word, words, n=max(1, len(words)))
    if not close:
        return ""

    def nearness(other: str) -> tuple[float, int]:
        # Of words that share as many letters, the one that begins alike is meant.
        ratio = difflib.SequenceMatcher(None, other, word).ratio()
        alike = itertools.takewhile(bool, map(str.__eq__, other, word))
        return ratio, len([*alike])

    return f" Did you mean {max(close, key=nearness)}?"


def check_sizes(*, core_size: int, region_size: int) -> None:
    """Raises ValueError unless 1 <= `core_size` < `region_size`."""
    if core_size < 1:
        raise ValueError(f"`core_size` (={core_size}) must be >= 1.")
    if region_size <= core_size:
        raise ValueError(
            f"`region_size` (={region_size}) must be greater than `core_size` "
            f"(={core_size})."
        )


def check_slope(slope: float) -> None:
    """Raises ValueError unless `slope` > 0; a traced one cannot be checked."""
    import jax  # which specs and options, that also have a slope, can do without

    if not isinstance(slope, jax.core.Tracer) and not slope > 0:
        raise ValueError(f"`slope` (={slope}) must be > 0.")


def check_capacities(capacities: Sequence[float | int] | None) -> None:
    """Raises ValueError unless `capacities` is None or rises within (0, 1] to 1."""
    if capacities is None:
        return
    try:
        shares = tuple(capacities)
        rising = all(a < b for a, b in itertools.pairwise(shares))
        is_right = shares and rising and 0 < shares[0] and shares[-1] == 1
    except TypeError:
        raise ValueError(
            f"`capacities` (={capacities!r:.200}) must be a sequence of numbers, or "
            f"None."
        ) from None
    if not is_right:
        raise ValueError(
            f"`capacities` (={shares!r:.200}) must rise within (0, 1] and end at 1."
        )
    if len(shares) > _MOST_CAPACITIES:
        raise ValueError(
            f"`capacities` (={shares!r:.200}) must be at most {_MOST_CAPACITIES}, of "
            f"which each is compiled; they are {len(shares):,}."
        )
