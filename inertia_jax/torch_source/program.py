"""A traced program as one list of operations on images, without what is constant."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Literal

from inertia_jax.programs import programs_inside

# Operations that are what the program inside of them is.
_CALLS = {
    "jit",
    "pjit",
    "closed_call",
    "core_call",
    "custom_jvp_call",
    "custom_vjp_call",
    "custom_vjp_call_jaxpr",
    "checkpoint",
    "remat",
}
_SAME = {"copy", "copy_p", "name", "optimization_barrier", "stop_gradient"}
# Of a parameter with one axis, these change the shape alone.
_RESHAPES = {"reshape", "squeeze", "expand_dims", "broadcast_in_dim"}


@dataclasses.dataclass(frozen=True, eq=False)
class Known:
    """An array that does not depend on the images.

    Attributes:
        value: The numbers, with a size of 1 where `shape` may repeat them.
        shape: The shape, in which the number of images may be a symbol.
        leaf: The path of the variable whose numbers these are, or None.
    """

    value: np.ndarray
    shape: tuple[Any, ...]
    leaf: tuple[str, ...] | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Unknown:
    """An array that depends on the images."""

    shape: tuple[Any, ...]
    dtype: Any


@dataclasses.dataclass(frozen=True, eq=False)
class Operation:
    """An operation on at least one array that depends on the images."""

    name: str
    params: Mapping[str, Any]
    inputs: tuple[Known | Unknown, ...]
    output: Unknown


@dataclasses.dataclass(frozen=True)
class Program:
    """The operations in order, and what they start from and end with."""

    images: Unknown
    operations: tuple[Operation, ...]
    output: Unknown


def make_program(traced: ClosedJaxpr, variables: Mapping[str, Any]) -> Program:
    """Returns the operations that the output needs.

    Args:
        traced: The program of a function of (variables, images) with one output.
        variables: The variables.

    Raises:
        ValueError: The output does not depend on the images, or an operation on them
            has several outputs.
    """
    leaves = jax.tree_util.tree_leaves_with_path(variables)
    given: list[Known | Unknown] = []
    for path, leaf in leaves:
        names = tuple(str(key.key) for key in path)
        value = np.asarray(leaf)
        given.append(Known(value, value.shape, names))
    last = traced.jaxpr.invars[-1].aval
    images = Unknown(last.shape, last.dtype)
    operations: list[Operation] = []
    outputs = _run(traced, [*given, images], operations)
    if len(outputs) != 1 or not isinstance(outputs[0], Unknown):
        raise ValueError("the network must give one array that depends on the images.")
    needed, kept = {outputs[0]}, []
    for operation in reversed(operations):
        if operation.output in needed:
            kept.append(operation)
            needed.update(x for x in operation.inputs if isinstance(x, Unknown))
    return Program(images, tuple(reversed(kept)), outputs[0])


def _run(
    traced: Any, given: Sequence[Any], operations: list[Operation]
) -> list[Known | Unknown]:
    """Adds a program's operations to the list, and returns its outputs."""
    jaxpr = getattr(traced, "jaxpr", traced)
    env: dict[Any, Any] = dict(zip(jaxpr.invars, given, strict=True))
    for variable, value in zip(
        jaxpr.constvars, getattr(traced, "consts", ()), strict=True
    ):
        env[variable] = Known(np.asarray(value), np.shape(value))

    def read(atom: Any) -> Any:
        if isinstance(atom, Literal):
            aval: Any = atom.aval
            return Known(np.asarray(atom.val, aval.dtype), ())
        return env[atom]

    for eqn in _needed(jaxpr):
        inputs = [read(atom) for atom in eqn.invars]
        name = eqn.primitive.name
        if name in _SAME:
            outputs = inputs
        elif name in _CALLS:
            outputs = _run(_program_of(eqn), inputs, operations)
        elif all(isinstance(x, Known) for x in inputs):
            outputs = list(_computed(eqn, inputs))
        else:
            outputs = [Unknown(v.aval.shape, v.aval.dtype) for v in eqn.outvars]
            made = outputs[0] if len(outputs) == 1 else Unknown((), None)
            if len(outputs) == 1:
                operations.append(Operation(name, eqn.params, tuple(inputs), made))
            # One of several outputs is refused where it is used.
        env.update(zip(eqn.outvars, outputs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _needed(jaxpr: Any) -> list[Any]:
    """Returns the operations that the outputs need, in order."""
    needed, kept = {*_variables(jaxpr.outvars)}, []
    for eqn in reversed(jaxpr.eqns):
        if not needed.isdisjoint(eqn.outvars):
            kept.append(eqn)
            needed.update(_variables(eqn.invars))
    return kept[::-1]


def _variables(atoms: Sequence[Any]) -> Iterator[Any]:
    return (atom for atom in atoms if not isinstance(atom, Literal))


def _program_of(eqn: Any) -> Any:
    for value in eqn.params.values():
        if isinstance(value, ClosedJaxpr):
            return value
    return next(iter(programs_inside(eqn)))


def _computed(eqn: Any, inputs: Sequence[Known]) -> Iterator[Known]:
    """Yields the outputs of an operation whose inputs are known."""
    name, first = eqn.primitive.name, inputs[0] if inputs else None
    shapes = [variable.aval.shape for variable in eqn.outvars]
    # Its axes, but one, have a size of 1.
    is_vector = first is not None and first.value.size in (1, *first.value.shape)
    leaf = first.leaf if first is not None and is_vector else None
    if name == "broadcast_in_dim" and first is not None:
        sizes = [1] * len(shapes[0])
        for axis, size in zip(
            eqn.params["broadcast_dimensions"], first.value.shape, strict=True
        ):
            sizes[axis] = size
        yield Known(first.value.reshape(sizes), shapes[0], leaf)
        return
    compact = [x.value for x in inputs]
    if len({x.shape for x in inputs if x.shape}) <= 1 and _is_elementwise(eqn):
        arrays = [np.asarray(a) for a in np.broadcast_arrays(*compact)]
        if not all(x.shape for x in inputs):
            arrays = [np.asarray(x.value) for x in inputs]
            most = max(a.ndim for a in arrays)
            arrays = [a.reshape((1,) * (most - a.ndim) + a.shape) for a in arrays]
            arrays = [np.asarray(a) for a in np.broadcast_arrays(*arrays)]
    elif all(isinstance(size, int) for x in inputs for size in x.shape):
        arrays = [np.broadcast_to(x.value, x.shape) for x in inputs]
    else:
        raise ValueError(f"{name} of as many zeros or ones as there are images.")
    found = eqn.primitive.bind(*map(jax.numpy.asarray, arrays), **eqn.params)
    found = found if eqn.primitive.multiple_results else [found]
    keeps = name in _RESHAPES and is_vector
    for value, shape in zip(found, shapes, strict=True):
        yield Known(np.asarray(value), shape, leaf if keeps else None)


def _is_elementwise(eqn: Any) -> bool:
    return eqn.primitive.name in _ELEMENTWISE


_ELEMENTWISE = {
    *("add", "sub", "mul", "div", "max", "min", "pow", "rem"),
    *("neg", "abs", "exp", "log", "sqrt", "rsqrt", "tanh", "logistic", "sign", "floor"),
    *("eq", "ne", "lt", "le", "gt", "ge", "and", "or", "not", "select_n"),
    *("convert_element_type", "integer_pow", "square", "is_finite"),
}
