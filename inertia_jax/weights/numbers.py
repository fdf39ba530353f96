"""The numbers of a weight, checked."""

from typing import Any

import jax
import ml_dtypes
import numpy as np

from inertia_jax.weights.pickles import Unknown


def as_numbers(name: str, value: Any, shape: tuple[int, ...]) -> np.ndarray:
    """Returns a weight as an array that JAX can compute with.

    Args:
        name: Its key in the state dict.
        value: An array, a tensor of PyTorch, or what stands for something unreadable.
        shape: The shape that it must have.

    Raises:
        ValueError: It has another shape, or no numbers that a network computes with.
    """
    found = getattr(value, "shape", None)
    if found is None:
        kind = value.kind if isinstance(value, Unknown) else type(value).__name__
        raise ValueError(f"unreadable {name}: {kind:.100}; must be an array")
    # A file may make a huge array of one number, so that copies come after this.
    if tuple(found) != shape:
        raise ValueError(f"misshapen {name} {tuple(found)}, must be {shape}")
    array = _as_array(name, value)
    if not jax.numpy.issubdtype(array.dtype, np.floating):
        raise ValueError(f"{name} holds {array.dtype}; must be floating-point numbers")
    with np.errstate(over="ignore"):
        array = array.astype(jax.dtypes.canonicalize_dtype(array.dtype), copy=False)
    leaf = name.rpartition(".")[2]
    # The threshold of a gate that is always open or closed is infinite.
    bad = np.isnan(array) if leaf == "threshold" else ~np.isfinite(array)
    if count := np.count_nonzero(bad):
        raise ValueError(f"{name} holds NaN or infinity {count} times in {array.size}")
    if leaf == "running_var" and (count := np.count_nonzero(array < 0)):
        raise ValueError(f"{name} is negative {count} times; variances must be >= 0")
    return array


def _as_array(name: str, value: Any) -> np.ndarray:
    if not hasattr(value, "detach"):
        return np.asarray(value)
    dtype = str(value.dtype).removeprefix("torch.")
    try:
        if not hasattr(ml_dtypes, dtype):
            return value.numpy(force=True)
        # NumPy has no bfloat16, ml_dtypes does.
        return value.float().numpy(force=True).astype(getattr(ml_dtypes, dtype))
    # What PyTorch raises of sparse, quantised and meta tensors.
    except (TypeError, RuntimeError, NotImplementedError) as error:
        raise ValueError(f"unreadable {name}: {value.layout}, {value.dtype}") from error
