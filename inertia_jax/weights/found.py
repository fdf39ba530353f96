"""Finds a network's weights among all that a file holds.

Training programs nest weights, wrap networks, and keep averages of the weights beside
them. All keys are joined by dots, so that each of these is a prefix, and a set of
weights is what has the network's keys after one prefix.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from inertia_jax.weights.names import is_array, named
from inertia_jax.weights.pickles import Unknown
from inertia_jax.weights.shadows import name_averages, unnamed_averages
from inertia_jax.weights.spellings import known_spellings

# Where training programs keep the weights, and words for averages of them.
_USUAL = ("state_dict", "model_state_dict", "model_state", "model", "net", "params")
_AVERAGED = {"ema", "avg", "average", "averaged", "swa", "shadow", "polyak"}


@dataclasses.dataclass(frozen=True)
class FoundWeights:
    """The weights that a network takes.

    Attributes:
        state: The weights by key, without prefix.
        place: The prefix of their keys in the file; "" without one.
        others: Prefixes of further sets of weights that fit.
        left_out: Keys of arrays that belong to no set.
    """

    state: dict[str, Any]
    place: str
    others: tuple[str, ...]
    left_out: tuple[str, ...]

    def note(self, *, takes_ema: bool = True) -> str:
        """Returns what a user should know of the choice; "" if there was none.

        Args:
            takes_ema: Whether the user can ask for averaged weights by `ema`.
        """
        said = []
        if self.others:
            taken = f"the weights at `{self.place}`" if self.place else "the weights"
            listed = _listed([f"`{other}`" for other in self.others])
            hint = "" if takes_ema else "; a mapping of others can be given itself"
            if (
                takes_ema
                and not _is_averaged(self.place)
                and any(map(_is_averaged, self.others))
            ):
                hint = "; `ema` (=True) takes the averaged ones"
            said.append(f"{taken} are taken, not those at {listed}{hint}")
        if self.left_out:
            said.append(f"arrays beside them are left out: {_listed(self.left_out)}")
        return "; ".join(said)


def find_weights(
    loaded: Mapping[Any, Any],
    keys: Collection[str],
    *,
    ema: bool,
    rename: Mapping[str, str],
) -> FoundWeights:
    """Returns the weights that have a network's keys.

    Args:
        loaded: What a file holds.
        keys: The keys of the network.
        ema: Whether averaged weights are taken.
        rename: New names of parts of keys, e.g. `{"fc": "linear"}`.

    Raises:
        ValueError: There are no averaged weights, more than one set of weights, or two
            weights of one key; or a name of `rename` is nowhere in the file.
    """
    values, twice = named(loaded, keys, rename)
    arrays = [name for name, value in values.items() if is_array(value)]
    if not arrays:
        raise ValueError("the weights hold no arrays whose keys are strings.")
    counts = _count_fits(arrays, keys)
    places = [place for place, count in counts.items() if 2 * count >= len(keys)]
    place = _choose(places, counts, ema=ema) if places else _usual_place(values)
    unnamed = unnamed_averages(values, place)
    takes_unnamed = ema and not _is_averaged(place)
    if takes_unnamed and not unnamed:
        raise ValueError(
            "`ema` (=True) needs averaged weights, as at `ema` or `state_dict_ema`; "
            "there are none."
        )
    owners = {name: _owner(name, [*(places or [place]), *unnamed]) for name in values}
    taken = [name for name in values if owners[name] == place]
    if both := sorted(twice.intersection(taken)):
        raise ValueError(f"the weights have two values for {both[0]}.")
    others = {*places, *unnamed} - {place}
    source = place
    if takes_unnamed:
        source = next(iter(unnamed))
        raw = {name: values[name] for name in taken}
        values |= name_averages(source, unnamed[source], raw)
        others = others - {source} | {place}
    state = {_below(place, name): values[name] for name in taken}
    beside = {name: values[name] for name in arrays if owners[name] is None}
    _respell(state, beside, place, keys)
    return FoundWeights(
        state,
        source,
        tuple(sorted(others)),
        # A single number is a best accuracy or a count.
        tuple(name for name, value in beside.items() if math.prod(value.shape) > 1),
    )


def weights_by_key(
    loaded: Mapping[Any, Any], rename: Mapping[str, str]
) -> FoundWeights:
    """Returns the weights of a network whose keys are not known.

    Args:
        loaded: What a file holds: the weights, or a mapping that has them at one of the
            usual places.
        rename: New names of parts of keys, as for `find_weights`.

    Raises:
        ValueError: There are none, two of one key, or a name of `rename` is nowhere.
    """
    values, twice = named(loaded, (), rename)
    if twice:
        raise ValueError(f"the weights have two values for {min(twice)}.")
    is_nested = any(isinstance(value, Mapping) for value in loaded.values())
    place = _usual_place(values) if is_nested else ""
    found = {
        _below(place, name): value
        for name, value in values.items()
        if _owner(name, [place]) is not None
    }
    for name, value in found.items():
        if isinstance(value, Unknown) and "tensor" in value.kind:
            raise ValueError(f"unreadable {name}: {value.kind:.100}.")
    state = {name: value for name, value in found.items() if is_array(value)}
    beside = [
        name
        for name, value in values.items()
        if is_array(value) and _owner(name, [place]) is None
    ]
    counts = _count_fits(beside, state)
    others = [other for other, count in counts.items() if 2 * count >= len(state)]
    left_out = [
        name
        for name in beside
        if _owner(name, others) is None and math.prod(values[name].shape) > 1
    ]
    unnamed = unnamed_averages(values, place)
    return FoundWeights(
        state, place, tuple(sorted({*others, *unnamed})), tuple(left_out)
    )


def _respell(
    state: dict[str, Any], beside: dict[str, Any], place: str, keys: Collection[str]
) -> None:
    """Gives weights of known other spellings the names that the network has for them.

    The last layer may stand beside the others, as `head` beside `backbone.conv1`: it is
    taken out of `beside` and into `state`.
    """
    strange = [name for name in state if name not in keys and is_array(state[name])]
    missing = set(keys).difference(state)
    for name, key in known_spellings(strange, missing).items():
        state[key] = state.pop(name)
    while place:
        place = place.rpartition(".")[0]
        names = {_below(place, name): name for name in beside}
        missing = set(keys).difference(state)
        for name, key in known_spellings(names, missing).items():
            state[key] = beside.pop(names[name])


def _below(place: str, name: str) -> str:
    return name.removeprefix(f"{place}.") if place else name


def _listed(names: Sequence[str]) -> str:
    more = len(names) - 3
    return ", ".join(names[:3]) + (f", {more} more" if more > 0 else "")


def _count_fits(names: list[str], keys: Collection[str]) -> dict[str, int]:
    """Returns how many keys of the network follow each prefix."""
    wanted = set(keys)
    counts: collections.Counter[str] = collections.Counter()
    for name in names:
        parts = name.split(".")
        for i in range(len(parts)):
            if ".".join(parts[i:]) in wanted:
                counts[".".join(parts[:i])] += 1
    return counts


def _choose(places: list[str], counts: Mapping[str, int], *, ema: bool) -> str:
    def rank(place: str) -> tuple[int, bool, int]:
        first = place.partition(".")[0]
        return (-counts[place], first not in ("", *_USUAL), place.count("."))

    fitting = [place for place in places if _is_averaged(place) == ema] or places
    # The shortest of the prefixes of one set.
    first, *others = sorted(
        fitting, key=lambda place: (rank(place), place != "", place)
    )
    if first and others and rank(others[0]) == rank(first):
        raise ValueError(
            f"the weights have several sets that fit, at {_listed(sorted(fitting))}. "
            f"Take one with `rename`, e.g. {first}= (to nothing)."
        )
    return first


def _usual_place(values: Mapping[str, Any]) -> str:
    """Returns the prefix of weights that do not fit."""
    for place in _USUAL:
        if any(name.startswith(f"{place}.") for name in values):
            return place
    return ""


def _owner(name: str, places: list[str]) -> str | None:
    """Returns the longest of the prefixes that a key has."""
    fitting = [p for p in places if not p or name.startswith(f"{p}.")]
    return max(fitting, key=len, default=None)


def _is_averaged(place: str) -> bool:
    snake = re.sub(r"([a-z])([A-Z])", r"\1_\2", place).lower()
    return not _AVERAGED.isdisjoint(re.split(r"[._]", snake))
