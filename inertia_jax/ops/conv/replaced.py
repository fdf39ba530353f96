"""Whether another function stands in the place of JAX's convolution."""

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any

from jax import lax


def _in_place() -> tuple[Any, Any]:
    # Some put another function into the module, others other code into the function.
    function = lax.conv_general_dilated
    return function, getattr(function, "__code__", None)


_OWN = _in_place()
_IN_ONE_FORM = contextvars.ContextVar("in_one_form", default=False)


@contextlib.contextmanager
def in_one_form() -> Iterator[None]:
    """Lets what is traced inside a `with` block call each convolution once.

    The program has the form that `is_replaced` describes, which other compilers read.
    """
    token = _IN_ONE_FORM.set(True)
    try:
        yield
    finally:
        _IN_ONE_FORM.reset(token)


def is_replaced() -> bool:
    """Whether another function stands in the place of `jax.lax.conv_general_dilated`.

    Inside `in_one_form` the answer is yes, too.

    Quantisation libraries, such as qwix, put theirs there while they call a network.
    They have to see every convolution once, outside loops and branches, with the
    parameter itself as its kernel. Layers then call this one function for each of their
    convolutions, 1x1 factors among them, in place of the forms that are quicker on CPU.

    The whole process has one such place: a network that another thread traces meanwhile
    also computes in this way, and its numbers stay the same up to rounding.
    """
    return _IN_ONE_FORM.get() or _in_place() != _OWN
