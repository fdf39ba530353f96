"""Averages of weights in a list without names, as torch_ema writes them."""

from collections.abc import Mapping, Sequence
from typing import Any

from inertia_jax.weights.names import is_array

# What PyTorch's networks keep beside their parameters, and no optimiser moves.
_STATISTICS = ("running_mean", "running_var")


def unnamed_averages(values: Mapping[str, Any]) -> dict[str, Sequence[Any]]:
    """Returns the lists of averages, by their keys in the file."""
    return {
        name: value
        for name, value in values.items()
        if name.rpartition(".")[2] == "shadow_params"
        and isinstance(value, list | tuple)
        and value
        and all(map(is_array, value))
    }


def name_averages(
    place: str, averages: Sequence[Any], state: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns averages by the names of the weights that they are averages of.

    Args:
        place: The key of the list of averages.
        averages: One array for each parameter, in the order of the network's.
        state: The network's weights and statistics beside them, in the same order.

    Raises:
        ValueError: They have another number, or other shapes.
    """
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
