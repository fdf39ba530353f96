"""Whether another function stands in the place of JAX's convolution."""

from typing import Any

from jax import lax


def _in_place() -> tuple[Any, Any]:
    # Some put another function into the module, others other code into the function.
    function = lax.conv_general_dilated
    return function, getattr(function, "__code__", None)


_OWN = _in_place()


def is_replaced() -> bool:
    """Whether another function stands in the place of `jax.lax.conv_general_dilated`.

    Quantisation libraries, such as qwix, put theirs there while they call a network.
    They have to see every convolution once, outside loops and branches, with the
    parameter itself as its kernel. Layers then call this one function for each of their
    convolutions, 1x1 factors among them, in place of the forms that are quicker on CPU.

    The whole process has one such place: a network that another thread traces meanwhile
    also computes in this way, and its numbers stay the same up to rounding.
    """
    return _in_place() != _OWN
