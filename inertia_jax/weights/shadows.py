"""Averages of weights without the names of the weights: in a list, or without dots."""

from collections.abc import Mapping, Sequence
from typing import Any

from inertia_jax.weights.names import is_array

# What PyTorch's networks keep beside their parameters, and no optimiser moves.
_STATISTICS = ("running_mean", "running_var")


Averages = Sequence[Any] | Mapping[str, Any]


def unnamed_averages(values: Mapping[str, Any], place: str) -> dict[str, Averages]:
    """Returns averages by their places in the file.

    They are lists, as torch_ema writes them, or mappings from the keys of weights. The
    latter are those of latent diffusion, whose keys have no dots: `conv1weight`.

    Args:
        values: What a file holds.
        place: The prefix of the weights' keys.
    """
    lists: dict[str, Averages] = {
        name: value
        for name, value in values.items()
        if name.rpartition(".")[2] == "shadow_params"
        and isinstance(value, list | tuple)
        and value
        and all(map(is_array, value))
    }
    return lists | _averages_without_dots(values, place)


def _averages_without_dots(
    values: Mapping[str, Any], place: str
) -> dict[str, Averages]:
    before = f"{place}." if place else ""
    arrays = {name: value for name, value in values.items() if is_array(value)}
    wanted = {
        name.removeprefix(before).replace(".", ""): name
        for name in arrays
        if name.startswith(before)
    }
    children: dict[str, dict[str, Any]] = {}
    for name, value in arrays.items():
        parent, _, last = name.rpartition(".")
        if value.shape:  # a single number is a count or a decay
            children.setdefault(parent, {})[last] = value
    found: dict[str, Averages] = {}
    for parent, averages in children.items():
        first = next(iter(averages))
        # The network may have a name of its own: `diffusion_modelconv1weight`.
        starts = [first[:i] for i in range(len(first)) if first[i:] in wanted]
        if not parent or not starts:
            continue
        start = starts[0]
        ends = {last.removeprefix(start): last for last in averages}
        has_start = all(last.startswith(start) for last in averages)
        if has_start and ends.keys() <= wanted.keys():
            named = {wanted[end]: averages[last] for end, last in ends.items()}
            # Others are the weights of a layer, of which another has the names.
            if any("." in name.removeprefix(before) for name in named):
                found[parent] = named
    return found


def name_averages(
    place: str, averages: Averages, state: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns averages by the names of the weights that they are averages of.

    Args:
        place: The place of the averages.
        averages: The averages; in a list, one for each parameter, in the order of the
            network's.
        state: The network's weights and statistics beside them, in the same order.

    Raises:
        ValueError: Those of a list have another number, or other shapes.
    """
    if isinstance(averages, Mapping):
        return dict(averages)
    names = [
        name
        for name, value in state.items()
        if is_array(value) and name.rpartition(".")[2] not in _STATISTICS
    ]
    wanted = [tuple(state[name].shape) for name in names]
    if [tuple(array.shape) for array in averages] != wanted:
        raise ValueError(
            f"`ema` (=True): {place} has {len(averages)} averages without names; they "
            f"must have number and shapes of the {len(names)} parameters beside them, "
            f"in order."
        )
    return dict(zip(names, averages, strict=True))
