"""The multiply-accumulates of layers of Flax that no plan chooses."""

import math
from typing import Any

from flax import linen as nn

from inertia_jax.calls import Call


def count_other(call: Call, kernel_shape: tuple[int, ...]) -> int:
    """Returns the MACs of a transposed, a local or a many-axed linear layer.

    A transposed convolution multiplies every input with the whole kernel, also where
    its padding cuts the outputs off. A local one has a tap of its own for every
    product. A linear layer multiplies with its kernel at every index that the kernel
    does not have.
    """
    return sum(math.prod(kernel_shape) * _positions(one) for one in call.every)


def _positions(call: Call) -> int:
    """Returns how often a call uses each number of its kernel."""
    module: Any = call.module
    if isinstance(module, nn.ConvTranspose):
        return math.prod(call.input_shape[:-1])
    if isinstance(module, nn.ConvLocal):
        size = module.kernel_size
        num_axes = 1 if isinstance(size, int) else len(size)
        return math.prod(call.input_shape[: -num_axes - 1])
    if isinstance(module, nn.DenseGeneral):
        axis = module.axis if isinstance(module.axis, int) else tuple(module.axis)
        axes = {axis} if isinstance(axis, int) else {*axis}
        ndim = len(call.input_shape)
        own = {index % ndim for index in (*axes, *module.batch_dims)}
        return math.prod(n for i, n in enumerate(call.input_shape) if i not in own)
    inputs, kernel = module.einsum_str.replace(" ", "").split("->")[0].split(",")
    before, _, after = inputs.partition("...")
    number = len(call.input_shape) - len(before) - len(after)
    letters = [*before, *[""] * number, *after]
    shared = zip(letters, call.input_shape, strict=True)
    return math.prod(n for letter, n in shared if not letter or letter not in kernel)
