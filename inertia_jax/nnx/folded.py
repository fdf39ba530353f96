"""NNX modules whose kernels contain their BatchNorm."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import Array

from inertia_jax.layers.kinds import kind_of
from inertia_jax.nnx.equals import find_layers, output_type
from inertia_jax.nnx.graph import Path, become


class FoldedBatchNorm(nnx.Module):
    """What is left of a BatchNorm that a kernel contains: the type of its outputs.

    It is called as the BatchNorm is, and has none of its variables.

    Args:
        norm: The BatchNorm.

    Raises:
        ValueError: The layer is called in training mode.
    """

    def __init__(self, norm: nnx.BatchNorm) -> None:
        """Keeps the types that decide that of the outputs."""
        self.use_running_average = True
        self.dtype = norm.dtype
        # Without inputs: the type that they are promoted with.
        self.promoted_with = output_type(norm, jnp.bool_)

    def __call__(
        self, x: Array, use_running_average: bool | None = None, *, mask: Any = None
    ) -> Array:
        is_given = use_running_average is not None
        if not (use_running_average if is_given else self.use_running_average):
            raise ValueError(
                "`use_running_average` (=False) must be True: this BatchNorm is folded "
                "into a kernel; train the module that was folded, or call `eval()`."
            )
        return x.astype(self.dtype or jnp.result_type(x, self.promoted_with))


def fold_into(module: nnx.Module, folded: Sequence[tuple[str, str]]) -> None:
    """Takes out every BatchNorm of a module that a layer's kernel contains.

    Args:
        module: The module, which is changed, and is in evaluation mode from now on.
        folded: Pairs of paths, a layer and the BatchNorm merged into it.
    """
    found = find_layers(module)
    layers: dict[str, Any] = {"/".join(p): layer.node for p, layer in found.items()}
    for layer, norm in folded:
        # The others are those of Linen models inside of the module.
        if layer in layers:
            _give_bias(layers[layer])
        if norm in layers:
            become(layers[norm], FoldedBatchNorm(layers[norm]))
    if folded:
        module.eval()


def pairs_below(
    folded: Sequence[tuple[str, str]], path: Path
) -> tuple[tuple[str, str], ...]:
    """Returns the pairs of a Linen model at a path, by the paths that it knows.

    Of a pair that has one layer elsewhere, the other is not in the model's way.
    """
    above = "".join(f"{name}/" for name in path)

    def below(layer: str) -> str:
        return layer.removeprefix(above) if layer.startswith(above) else f"/{layer}"

    return tuple(
        (below(layer), below(norm))
        for layer, norm in folded
        if layer.startswith(above) or norm.startswith(above)
    )


def _give_bias(node: Any) -> None:
    """Lets a layer, or the last of its parts, have a bias, if it has none."""
    parts = kind_of(getattr(node, "spec", None)).parts
    for owner in (node, *(getattr(node, part) for part in parts[-1:])):
        owner.use_bias = True
    if owner.bias is None:
        owner.bias = nnx.Param(jnp.zeros(owner.kernel.shape[-1], owner.param_dtype))
