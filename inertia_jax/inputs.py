"""What a network takes: the shape of one input, and batches of inputs."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# The shape of one input, such as [h, w, c], or that of each of several inputs by name.
# A `jax.ShapeDtypeStruct` says the type, too, where that is not float32.
Shape = Sequence[int] | jax.ShapeDtypeStruct | Mapping[str, Any]
# Inputs with an axis of images before the others, or such of several inputs by name.
Inputs = Any


def one_input(shape: Shape, *, number: int = 1, named: bool = False) -> Any:
    """Returns the shapes and types of a batch of inputs, of one alone by default.

    Args:
        shape: The shape of one input.
        number: The number of inputs.
        named: Whether it is one of several inputs by name, which may be a number each.

    Raises:
        ValueError: A shape that is not made of positive integers.
    """
    if isinstance(shape, Mapping):
        return {
            name: one_input(part, number=number, named=True)
            for name, part in shape.items()
        }
    if isinstance(shape, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct((number, *shape.shape), shape.dtype)
    sizes = tuple(int(size) for size in shape)
    if not (sizes or named) or min(sizes, default=1) < 1:
        raise ValueError(f"the shape of an input (={shape}) must have entries >= 1.")
    return jax.ShapeDtypeStruct((number, *sizes), jnp.float32)


def shape_of_one(inputs: Inputs) -> Any:
    """Returns the shape of one of these inputs, as `one_input` takes it."""
    # Integers stay integers: tokens are looked up.
    if isinstance(inputs, np.ndarray) and not np.issubdtype(inputs.dtype, np.integer):
        return inputs.shape[1:]

    def shape_and_type(leaf: np.ndarray) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape[1:], jnp.asarray(leaf[:0]).dtype)

    return jax.tree.map(shape_and_type, inputs)


def shown(inputs: Inputs) -> str:
    """Returns the shape of inputs, or of each by name, for an error."""
    if isinstance(inputs, Mapping):
        return "; ".join(f"{name} {shown(leaf)}" for name, leaf in inputs.items())
    return str(tuple(inputs.shape))


def num_inputs(inputs: Inputs) -> int:
    """Returns the number of inputs."""
    return len(jax.tree.leaves(inputs)[0])


def taken(inputs: Inputs, start: int | None, stop: int | None) -> Inputs:
    """Returns some of the inputs."""
    return jax.tree.map(lambda leaf: leaf[start:stop], inputs)


def checked_inputs(
    inputs: Inputs, name: str = "calibration", *, named: bool = False
) -> Any:
    """Returns inputs as arrays of NumPy; errors call them `name`.

    Args:
        inputs: The inputs.
        name: Their name.
        named: Whether they are one of several by name, which may be a number each.

    Raises:
        ValueError: They are no batch, differ in number, or are not finite.
    """
    if not isinstance(inputs, Mapping):
        return _checked_array(np.asarray(inputs), name, named)
    arrays = {
        key: checked_inputs(value, f"{name}[{key!r}]", named=True)
        for key, value in inputs.items()
    }
    numbers = {len(leaf) for leaf in jax.tree.leaves(arrays)}
    if len(numbers) != 1:
        raise ValueError(
            f"`{name}` must have arrays of as many inputs each; it has "
            f"{sorted(numbers)}."
        )
    return arrays


def _checked_array(array: np.ndarray, name: str, named: bool) -> np.ndarray:
    if array.ndim < (1 if named else 2) or not len(array):
        least = "" if named else ", at least two"
        raise ValueError(
            f"`{name}` (shape {array.shape}) must be [n, h, w, c], n >= 1, or have "
            f"another number of axes{least}."
        )
    if not np.isfinite(array).all():
        raise ValueError(f"`{name}` must be finite; some of it is not.")
    return array


def batched(inputs: Inputs, batch_size: int) -> list[Any]:
    """Returns whole batches, or all inputs as one batch if they do not fill one."""
    number = num_inputs(inputs)
    size = min(batch_size, number)
    return [taken(inputs, i, i + size) for i in range(0, number - size + 1, size)]
