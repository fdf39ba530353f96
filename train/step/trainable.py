"""The choice of the trained parameters, by globs over their paths."""

import fnmatch
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from flax import traverse_util

from train.errors import UsageError


def trained_paths(
    params: Mapping[str, Any], *, train_only: Sequence[str], freeze: Sequence[str]
) -> frozenset[str]:
    """Returns the `/` paths of the parameters to train.

    A glob that matches a layer's path takes all parameters of this layer.

    Args:
        params: The parameters, or their shapes.
        train_only: Globs of the parameters to train; none means all.
        freeze: Globs of the parameters that are not trained in any case.

    Raises:
        UsageError: A glob matches no parameter, or nothing is left to train.
    """
    paths = ["/".join(path) for path in traverse_util.flatten_dict(params)]
    for name, globs in (("train_only", train_only), ("freeze", freeze)):
        for glob in globs:
            if not any(_takes(glob, path) for path in paths):
                raise UsageError(
                    f"`{name}` (={glob!r}) must match a parameter or a layer with "
                    f"parameters, such as {paths[0]}; it matches none."
                )
    trained = frozenset(
        path
        for path in paths
        if (not train_only or any(_takes(glob, path) for glob in train_only))
        and not any(_takes(glob, path) for glob in freeze)
    )
    if not trained:
        raise UsageError(
            f"`train_only` (={tuple(train_only)}) and `freeze` (={tuple(freeze)}) must "
            f"leave a parameter to train; none is left."
        )
    return trained


def _takes(glob: str, path: str) -> bool:
    parts = path.split("/")
    ends = range(1, len(parts) + 1)
    return any(fnmatch.fnmatchcase("/".join(parts[:end]), glob) for end in ends)


def split_params(params: Any, trained: frozenset[str] | None) -> tuple[Any, Any]:
    """Returns the parameters that are trained (None: all), and those that are not."""
    if trained is None:
        return params, {}
    flat = traverse_util.flatten_dict(params)
    moving = {path: flat[path] for path in flat if "/".join(path) in trained}
    fixed = {path: flat[path] for path in flat if path not in moving}
    return traverse_util.unflatten_dict(moving), traverse_util.unflatten_dict(fixed)


def join_params(moving: Any, fixed: Any) -> Any:
    """Undoes `split_params`."""
    if not fixed:
        return moving
    flat = traverse_util.flatten_dict(moving) | traverse_util.flatten_dict(fixed)
    return traverse_util.unflatten_dict(flat)


def describe_trained(params: Any, trained: frozenset[str]) -> str:
    """Returns how many parameters are trained, in words."""
    moving, _ = split_params(params, trained)
    counts = (sum(leaf.size for leaf in jax.tree.leaves(t)) for t in (moving, params))
    return "training {:,} of {:,} parameters".format(*counts)
