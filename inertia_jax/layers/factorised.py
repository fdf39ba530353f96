"""Which layers factors can take the place of."""

import functools
from typing import Any

from flax import linen as nn

from inertia_jax.layers.in_place import own_arithmetic
from inertia_jax.layers.kinds import OTHER_CONVOLUTIONS, OTHER_LINEAR, num_axes
from inertia_jax.layers.opaque import Opaque
from inertia_jax.ops.conv.conv import per_axis
from inertia_jax.ops.conv.dispatch import conv_for_linen


def cannot_factorise(module: Any) -> str | None:
    """Returns why a layer cannot be factorised, or None if it can."""
    if isinstance(module, Opaque):
        return module.why
    if type(module) in (*OTHER_CONVOLUTIONS, *OTHER_LINEAR):
        return f"is an nn.{type(module).__name__}, of which there is no factorised form"
    if type(module) not in (nn.Conv, nn.Dense):
        return f"is a {type(module).__name__}, which may compute anything"
    if type(module) is nn.Dense:
        return own_arithmetic(module)
    if {*per_axis(module.input_dilation or 1, count=num_axes(module))} != {1}:
        return "dilates its input"
    if module.mask is not None:
        return "has a mask"
    convolve = module.conv_general_dilated
    # Factors would not have the options that are bound; `train` is this library's own.
    if isinstance(convolve, functools.partial) and convolve.func is not conv_for_linen:
        return "computes in its own way (conv_general_dilated)"
    return own_arithmetic(module)
