"""The programs that JAX traces, and those inside of them."""

from collections.abc import Iterator
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr


def every_program(jaxpr: Any) -> Iterator[Any]:
    """Yields a program, and all inside of it as often as they are called there."""
    yield jaxpr
    for eqn in jaxpr.eqns:
        for inner in programs_inside(eqn):
            yield from every_program(inner)


def programs_inside(eqn: Any) -> Iterator[Any]:
    """Yields the programs that an operation calls."""
    for value in jax.tree.leaves(list(eqn.params.values()), is_leaf=_is_program):
        if _is_program(value):
            yield getattr(value, "jaxpr", value)


def _is_program(value: Any) -> bool:
    return isinstance(value, (ClosedJaxpr, Jaxpr))
