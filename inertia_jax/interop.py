"""Reads and writes PyTorch weights, by renaming and transposing alone."""

import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import ml_dtypes
import numpy as np
from flax import linen as nn
from flax import traverse_util
from safetensors import SafetensorError
from safetensors.flax import load_file

from inertia_jax.calls import plain_variables
from inertia_jax.layers.inertial import FRICTION_MEAN
from inertia_jax.layers.kinds import KINDS
from inertia_jax.models.create import abstract_variables, init_variables, input_shape

_LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}
# The parts of a factorised convolution, which is a Sequential in PyTorch.
_PARTS = {part: str(i) for kind in KINDS.values() for i, part in enumerate(kind.parts)}
# Variables of an inertial convolution besides its core, which PyTorch's networks lack.
_INERTIAL_LEAVES = ("threshold", "weights", FRICTION_MEAN)
# Keys under which training scripts nest a network's weights.
_NESTED = ("state_dict", "model_state_dict", "model", "net")


def torch_key(path: Sequence[str]) -> str:
    """Returns the state-dict key of a variable, e.g. `layer1.0.conv1.weight`.

    Args:
        path: Module names and the variable's name, e.g. `("layer1_0", "conv1",
            "kernel")`; `name_N` stands for PyTorch's `name.N`, and the parts of a
            factorised convolution `name` for `name.0`, `name.1` and `name.2`.
    """
    *modules, leaf = path
    dotted = [re.sub(r"_(\d+)$", r".\1", module) for module in modules]
    # A part owns its leaf. SimpleDLA's blocks `left` and `right` own none.
    dotted[-1:] = [_PARTS.get(name, name) for name in dotted[-1:]]
    return ".".join([*dotted, _LEAVES.get(leaf, leaf)])


def load_torch(
    model: nn.Module,
    path_or_state_dict: str | pathlib.Path | Mapping[str, Any],
    *,
    reinitialise: Sequence[str] = (),
    key: jax.Array | None = None,
    image_shape: tuple[int, int, int] | None = None,
) -> dict[str, Any]:
    """Reads PyTorch weights into variables for `model`.

    Kernels go from OIHW to HWIO, linear weights are transposed; types are kept (float64
    needs JAX's x64 mode). A `module.` prefix (DataParallel) and `num_batches_tracked`
    are dropped; weights nested under `state_dict`, `model_state_dict`, `model` or `net`
    are found. Dense weights fit a network of tiled inertial convolutions with cores of
    the same size; thresholds that the file lacks keep their first values.

    Args:
        model: The network that the weights belong to.
        path_or_state_dict: A `.pth` or `.pt` file (needs PyTorch, and is read with
            `weights_only=True`), a `.safetensors` file, or a mapping of arrays.
        reinitialise: Prefixes of keys to draw anew, e.g. `("fc",)` for a new head. In
            the file these weights may be missing or have another shape.
        key: The key for the layers drawn anew; required with `reinitialise`.
        image_shape: The shape [h, w, c] of an input. None: the one that the network was
            published for. The sizes of `lenet`'s weights depend on it.

    Returns:
        `{"params": ..., "batch_stats": ...}`, and `thresholds` of an inertial network.

    Raises:
        ValueError: Missing, surplus or misshapen keys (all of them listed), a prefix
            that matches nothing, or a file of another kind.
        FileNotFoundError: There is no such file.
        ImportError: A `.pth` file, and no PyTorch to read it.
    """
    state = _read(path_or_state_dict)
    shape = image_shape or input_shape(model)
    expected = traverse_util.flatten_dict(abstract_variables(model, shape))
    names = {path: torch_key(path[1:]) for path in expected}
    drawn = [p for p in expected if names[p].startswith(_prefixes(reinitialise))]
    for prefix in reinitialise:
        if not any(name.startswith(_prefixes((prefix,))) for name in names.values()):
            raise ValueError(f"`reinitialise` (={prefix!r}) matches no key.")

    problems, values = [], {}
    first = [p for p in expected if p[-1] in _INERTIAL_LEAVES and names[p] not in state]
    for path, leaf in expected.items():
        name = names[path]
        if path in drawn or path in first:
            continue
        if name not in state:
            problems.append(f"missing {name} {_torch_shape(leaf.shape)}")
            continue
        value = _transposed(state[name], to_torch_layout=False)
        if value.shape != leaf.shape:
            found = tuple(state[name].shape)
            wanted = _torch_shape(leaf.shape)
            problems.append(f"misshapen {name} {found}, must be {wanted}")
        values[path] = value
    surplus = set(state) - set(names.values())
    surplus = {s for s in surplus if not s.startswith(_prefixes(reinitialise))}
    problems += [f"surplus {name} {tuple(state[name].shape)}" for name in surplus]
    if problems:
        listed = "\n  ".join(sorted(problems))
        raise ValueError(
            f"the weights do not fit {type(model).__name__} "
            f"({len(problems)} keys):\n  {listed}"
        )
    if drawn and key is None:
        raise ValueError("`key` (=None) must be given with `reinitialise`.")
    if drawn or first:
        key = jax.random.key(0) if key is None else key
        fresh = traverse_util.flatten_dict(init_variables(model, key, shape))
        values |= {path: np.asarray(fresh[path]) for path in (*drawn, *first)}
    arrays = {path: jax.numpy.asarray(values[path]) for path in expected}
    return traverse_util.unflatten_dict(arrays)


def to_torch(model: nn.Module, variables: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Returns variables as a PyTorch state dict of NumPy arrays.

    Load it with `module.load_state_dict({k: torch.from_numpy(v) ...}, strict=False)`:
    `num_batches_tracked`, which BatchNorm ignores at a fixed momentum, is left out.

    Args:
        model: The network that the variables belong to.
        variables: Variables as `model.init` gives them.

    Raises:
        ValueError: The variables do not belong to `model`.
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
    return {
        torch_key(path[1:]): _transposed(np.asarray(value), to_torch_layout=True)
        for path, value in flat.items()
    }


def _gives(leaf: Any) -> tuple[int, ...]:
    """Returns a leaf's number of axes, and its outputs: inputs may depend on images."""
    shape = np.shape(leaf)
    return (len(shape), *shape[-1:])


def _prefixes(names: Sequence[str]) -> tuple[str, ...]:
    return tuple(f"{name.rstrip('.')}." for name in names)


def _torch_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(shape[axis] for axis in _axes(len(shape), to_torch_layout=True))


def _axes(ndim: int, *, to_torch_layout: bool) -> tuple[int, ...]:
    if ndim == 4:
        return (3, 2, 0, 1) if to_torch_layout else (2, 3, 1, 0)
    return tuple(reversed(range(ndim)))


def _transposed(value: np.ndarray, *, to_torch_layout: bool) -> np.ndarray:
    axes = _axes(value.ndim, to_torch_layout=to_torch_layout)
    # PyTorch warns of arrays that cannot be written, so this is a copy.
    return np.array(np.transpose(value, axes), order="C")


def _read(source: str | pathlib.Path | Mapping[str, Any]) -> dict[str, np.ndarray]:
    loaded = source if isinstance(source, Mapping) else _read_file(pathlib.Path(source))
    for name in _NESTED:
        if isinstance(loaded.get(name), Mapping):
            loaded = loaded[name]
    bad = [key for key, value in loaded.items() if not hasattr(value, "shape")]
    if bad:
        raise ValueError(f"the weights hold {bad[:5]}, which must be arrays.")
    return {
        name.removeprefix("module."): _to_numpy(value)
        for name, value in loaded.items()
        if not name.endswith("num_batches_tracked")
    }


def _read_file(path: pathlib.Path) -> Mapping[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"there is no weights file at {path}.")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path} is no safetensors file: {error}") from error
    if path.suffix not in (".pth", ".pt"):
        raise ValueError(f"`path` (={path}) must end in .pth, .pt or .safetensors.")
    try:
        import torch
    except ImportError as error:
        raise ImportError(
            f"reading {path} needs PyTorch: pip install 'inertia_jax[torch]', or save "
            f"the weights as .safetensors."
        ) from error
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    # On a damaged file, PyTorch raises whatever error its unpickler meets.
    except Exception as error:
        raise ValueError(f"{path} holds no PyTorch weights: {error}") from error
    if not isinstance(loaded, Mapping):
        raise ValueError(f"{path} holds a {type(loaded).__name__}; must hold a dict.")
    return loaded


def _to_numpy(value: Any) -> np.ndarray:
    if hasattr(value, "detach"):
        import torch

        value = value.detach().cpu().contiguous()
        if value.dtype == torch.bfloat16:  # NumPy has none, ml_dtypes does
            return value.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        return value.numpy()
    return np.asarray(value)
