"""A network as `export` writes it: from images to logits in float32."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from inertia_jax import fold_batch_norm
from inertia_jax.calls import Network, same_keys
from inertia_jax.metadata import Preprocessing
from train.data.augment import Augmentation
from train.networks import TrainedNetwork, with_dtype


def kernels_in_type(variables: Any, dtype: Any) -> Any:
    """Returns variables with kernels in the type of the computation."""

    def convert(path: Any, leaf: Any) -> Any:
        if not jnp.issubdtype(leaf.dtype, jnp.floating):  # someone's counter
            return jnp.asarray(leaf)
        is_kernel = path[-1] == jax.tree_util.DictKey("kernel")
        return jnp.asarray(leaf, dtype if is_kernel else jnp.float32)

    return jax.tree.map_with_path(convert, variables)


def deployed(network: TrainedNetwork, dtype: str, *, fold: bool) -> Network:
    """Returns a network as `export` writes it: in a type, with BatchNorm folded or not.

    Raises:
        ValueError: The type is float64, or the network cannot have it.
    """
    if dtype == "float64":
        raise ValueError(
            "the checkpoint computes in float64; `dtype` must be float32 or bfloat16."
        )
    model: nn.Module = with_dtype(network.model, jnp.dtype(dtype))
    variables: Any = network.variables
    if fold:
        shape = network.preprocessing.image_shape
        model, variables = fold_batch_norm(model, variables, image_shape=shape)
    return model, kernels_in_type(variables, jnp.dtype(dtype))


def images_to_logits(
    network: Any, variables: Any, preprocessing: Preprocessing, images: str
) -> Callable[[Any], Any]:
    """Returns the function from images to logits in float32.

    Args:
        network: The network, folded or not.
        variables: Its variables.
        preprocessing: The preparation of raw pixels.
        images: `uint8` for raw pixels, `float32` for normalised ones.
    """
    dtype = jnp.dtype(getattr(network, "unfolded", network).dtype)
    augmentation = Augmentation.plain(preprocessing, dtype)

    def function(x: Any) -> Any:
        x = augmentation.for_evaluation(x) if images == "uint8" else x.astype(dtype)
        logits = network.apply(variables, x, rngs=same_keys(jax.random.key(0)))
        return logits.astype(jnp.float32)

    return function
