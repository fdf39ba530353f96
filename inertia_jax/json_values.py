"""What files say about a network, as JSON."""

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def jsonable(value: Any) -> Any:
    """Returns what JSON has for a value that `json` does not know, such as an array."""
    if isinstance(value, Mapping):
        return dict(value)
    is_array = isinstance(value, (np.generic, np.ndarray, jax.Array))
    # A random key is no number.
    if is_array and not jnp.issubdtype(value.dtype, jax.dtypes.extended):
        return np.asarray(value).tolist()
    return str(value)


def check_class_names(class_names: Iterable[Any]) -> None:
    """Raises ValueError unless every name is text, as the readers of files demand."""
    for name in class_names:
        if not isinstance(name, str):
            raise ValueError(f"`class_names` has {name!r}; each must be a str.")
