"""Reads and writes PyTorch weights, by renaming and transposing alone."""

import pathlib
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from flax import traverse_util
from jax.typing import DTypeLike

from inertia_jax.layers.inertial import FRICTION_MEAN
from inertia_jax.models.create import (
    abstract_variables,
    init_variables,
    input_shape,
    model_name,
)
from inertia_jax.models.network import Network
from inertia_jax.variables import plain_variables
from inertia_jax.weights.files import naming, read_weights
from inertia_jax.weights.found import find_weights
from inertia_jax.weights.layout import torch_key, torch_shape, transposed
from inertia_jax.weights.misfit import check_keys
from inertia_jax.weights.names import is_array
from inertia_jax.weights.numbers import as_numbers

# Variables of an inertial convolution besides its core, which PyTorch's networks lack.
_INERTIAL_LEAVES = ("threshold", "weights", FRICTION_MEAN)


def load_torch(
    model: nn.Module,
    path_or_state_dict: str | pathlib.Path | Mapping[str, Any],
    *,
    reinitialise: Sequence[str] = (),
    key: jax.Array | None = None,
    image_shape: tuple[int, int, int] | None = None,
    ema: bool = False,
    rename: Mapping[str, str] | None = None,
    dtype: DTypeLike | None = None,
) -> dict[str, Any]:
    """Reads PyTorch weights into variables for `model`.

    Kernels go from OIHW to HWIO, linear weights are transposed; types are kept (float64
    needs JAX's x64 mode). The weights are found wherever they are nested, under
    `state_dict`, `model` or another name, with prefixes such as `module.` (of
    DataParallel), `_orig_mod.` (of torch.compile) and `backbone.`, beside which the
    last layer may stand; `num_batches_tracked` is dropped. What other programs call the
    same layers is known: `fc`, `classifier` or `head` for `linear`, `downsample` for
    `shortcut`, and the other way round. A warning says which weights are taken of
    several. Dense weights fit a network of tiled inertial convolutions with cores of
    the same size; thresholds that the file lacks keep their first values.

    Weights of the same network that Flax has saved are read, too: a file that
    `flax.serialization` wrote, or a tree of orbax, also of a state of training.

    Args:
        model: The network that the weights belong to.
        path_or_state_dict: A file that torch.save, safetensors or Flax wrote, whatever
            its name, the index of several (`model.safetensors.index.json`), a folder of
            orbax, or a mapping of arrays by PyTorch's keys. PyTorch is not needed, and
            what a file holds besides arrays is never run.
        reinitialise: Prefixes of keys to draw anew, e.g. `("fc",)` for a new head. In
            the file these weights may be missing or have another shape.
        key: The key for the layers drawn anew; required with `reinitialise`.
        image_shape: The shape [h, w, c] of an input. None: the one that the network was
            published for. The sizes of `lenet`'s weights depend on it.
        ema: Whether averaged weights (EMA, SWA) are taken, of a file that has both.
        rename: New names of parts of keys, e.g. `{"top": "linear"}`; "" drops a part.
            `*` stands for any characters of one part: `{"conv*_x": "layer*"}`.
        dtype: The type that weights of another are converted to, which a warning says.
            None: they keep their types.

    Returns:
        `{"params": ..., "batch_stats": ...}`, and `thresholds` of an inertial network.

    Raises:
        ValueError: Missing, surplus or misshapen keys, weights that are no finite
            floating-point numbers, a prefix or name that matches nothing, or a file of
            another kind.
        FileNotFoundError: There is no such file.

    Example:
        >>> state_dict = ij.to_torch(model, variables)  # or the path of a file
        >>> loaded = ij.load_torch(
        ...     model, {f"module.{k}": v for k, v in state_dict.items()}
        ... )
        >>> jnp.array_equal(
        ...     loaded["params"]["fc2"]["bias"], state_dict["fc2.bias"]
        ... ).item()
        True
    """
    variables, note = read_torch(
        model,
        path_or_state_dict,
        reinitialise=reinitialise,
        key=key,
        image_shape=image_shape,
        ema=ema,
        rename=rename,
        dtype=dtype,
    )
    if note:
        warnings.warn(f"{note}.", stacklevel=2)
    return variables


def read_torch(
    model: nn.Module,
    path_or_state_dict: str | pathlib.Path | Mapping[str, Any],
    *,
    reinitialise: Sequence[str] = (),
    key: jax.Array | None = None,
    image_shape: tuple[int, int, int] | None = None,
    ema: bool = False,
    rename: Mapping[str, str] | None = None,
    dtype: DTypeLike | None = None,
) -> tuple[dict[str, Any], str]:
    """Returns what `load_torch` does, and what it warns of ("" for nothing)."""
    loaded, path = read_weights(path_or_state_dict)
    shape = image_shape or input_shape(model)
    expected = traverse_util.flatten_dict(abstract_variables(model, shape))
    names = {path: torch_key(path[1:]) for path in expected}
    drawn = [p for p in expected if names[p].startswith(_prefixes(reinitialise))]
    for prefix in reinitialise:
        if not any(name.startswith(_prefixes((prefix,))) for name in names.values()):
            raise ValueError(f"`reinitialise` (={prefix!r}) matches no key.")
    with naming(path):
        found = find_weights(loaded, set(names.values()), ema=ema, rename=rename or {})
    state = found.state
    first = [p for p in expected if p[-1] in _INERTIAL_LEAVES and names[p] not in state]
    taken = {p: leaf for p, leaf in expected.items() if p not in (*drawn, *first)}
    missing = {
        names[p]: torch_shape(leaf.shape)
        for p, leaf in taken.items()
        if names[p] not in state
    }
    surplus = {
        name: tuple(state[name].shape)
        for name in set(state).difference(names.values())
        if is_array(state[name]) and not name.startswith(_prefixes(reinitialise))
    }
    values, problems = {}, []
    for p, leaf in taken.items():
        if names[p] in state:
            try:
                array = as_numbers(names[p], state[names[p]], torch_shape(leaf.shape))
                values[p] = transposed(array, to_torch_layout=False)
            except ValueError as error:
                problems.append(f"{error}")
    with naming(path):
        check_keys(_in_words(model), missing, surplus, problems)
    if drawn and key is None:
        raise ValueError("`key` (=None) must be given with `reinitialise`.")
    if drawn or first:
        key = jax.random.key(0) if key is None else key
        fresh = traverse_util.flatten_dict(init_variables(model, key, shape))
        values |= {path: np.asarray(fresh[path]) for path in (*drawn, *first)}
    arrays = {path: jax.numpy.asarray(values[path]) for path in expected}
    notes = [found.note()]
    if dtype is not None:
        others = {str(leaf.dtype) for leaf in arrays.values() if leaf.dtype != dtype}
        arrays = {path: leaf.astype(dtype) for path, leaf in arrays.items()}
        if others:
            listed = " and ".join(sorted(others))
            notes.append(f"weights of {listed} become {jax.numpy.dtype(dtype).name}")
    return traverse_util.unflatten_dict(arrays), "; ".join(filter(None, notes))


def to_torch(model: nn.Module, variables: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Returns variables as a PyTorch state dict of NumPy arrays.

    Load it with `module.load_state_dict({k: torch.from_numpy(v) ...})`. PyTorch adds
    `num_batches_tracked`, which BatchNorm ignores at a fixed momentum. Types that NumPy
    lacks, such as bfloat16, become float32, which holds their values exactly.

    Gates have no place in PyTorch's layers: a warning names the inertial layers, which
    PyTorch would compute as ordinary convolutions. Their `threshold` is in the state
    dict, so that `load_state_dict` refuses it unless `strict` is False.

    Args:
        model: The network that the variables belong to.
        variables: Variables as `model.init` gives them.

    Raises:
        ValueError: The variables do not belong to `model`.

    Example:
        >>> state_dict = ij.to_torch(model, variables)
        >>> {key: array.shape for key, array in state_dict.items() if "conv2" in key}
        {'conv2.bias': (4,), 'conv2.weight': (4, 2, 3, 3)}
    """
    flat = traverse_util.flatten_dict(plain_variables(variables))
    expected = traverse_util.flatten_dict(abstract_variables(model))
    found, wanted = (
        {(path, _gives(leaf)) for path, leaf in leaves.items()}
        for leaves in (flat, expected)
    )
    if found != wanted:
        differing = sorted({"/".join(path) for path, _ in found ^ wanted})
        raise ValueError(f"`variables` do not belong to `model`: {differing}.")
    gated = sorted({"/".join(p[1:-1]) for p in flat if p[-1] in _INERTIAL_LEAVES})
    if gated:
        warnings.warn(
            f"PyTorch has no inertial layers: with these weights, its convolutions in "
            f"place of {', '.join(gated)} give other outputs.",
            stacklevel=2,
        )
    return {
        torch_key(path[1:]): transposed(_numpy_type(value), to_torch_layout=True)
        for path, value in flat.items()
    }


def _numpy_type(value: Any) -> np.ndarray:
    array = np.asarray(value)
    # The types of ml_dtypes, which torch.from_numpy refuses, are not NumPy's own.
    return array if array.dtype.isbuiltin == 1 else array.astype(np.float32)


def _in_words(model: nn.Module) -> str:
    """Returns a network's name, and the options that decide its keys and shapes."""
    if not isinstance(model, Network):
        return type(model).__name__
    names = ("num_classes", "width", "stem", "shortcut")
    options = [f"`{n}` (={getattr(model, n)})" for n in names if hasattr(model, n)]
    return f"{model_name(model)} with {', '.join(options)}"


def _gives(leaf: Any) -> tuple[int, ...]:
    """Returns a leaf's number of axes, and its outputs: inputs may depend on images."""
    shape = np.shape(leaf)
    return (len(shape), *shape[-1:])


def _prefixes(names: Sequence[str]) -> tuple[str, ...]:
    return tuple(f"{name.rstrip('.')}." for name in names)
