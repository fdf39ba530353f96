"""Reads files of safetensors, with the types that NumPy lacks."""

import pathlib
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import deserialize

from inertia_jax.weights.pickles import Unknown

# Types of elements by the names that files have for them.
_DTYPES = {
    **{f"F{bits}": np.dtype(f"float{bits}") for bits in (16, 32, 64)},
    **{f"I{bits}": np.dtype(f"int{bits}") for bits in (8, 16, 32, 64)},
    **{f"U{bits}": np.dtype(f"uint{bits}") for bits in (8, 16, 32, 64)},
    **{"BOOL": np.dtype(bool), "BF16": np.dtype(ml_dtypes.bfloat16)},
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
}


def read_safetensors(path: pathlib.Path) -> dict[str, Any]:
    """Returns the arrays of a file by name; an `Unknown` for one of other numbers.

    The names are sorted: the package gives them in another order every time.
    """
    # The package's own readers of arrays know no float8, and read nothing beside it.
    parts = dict(deserialize(path.read_bytes()))
    return {name: _array(**parts[name]) for name in sorted(parts)}


def _array(dtype: str, shape: list[int], data: bytes | bytearray) -> Any:
    if dtype not in _DTYPES:
        return Unknown(f"a tensor of {dtype}")
    return np.frombuffer(data, _DTYPES[dtype]).reshape(shape)
