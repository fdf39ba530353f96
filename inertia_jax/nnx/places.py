"""The places in Linen of an NNX module's layers, whose calls are answered there."""

import functools
import types
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, traverse_util
from flax.core import Scope
from flax.core.scope import subtract_filters

from inertia_jax.nnx.graph import Path
from inertia_jax.nnx.variables import CLASSES, iter_variables, put_at, value_at

# The attribute by which a layer knows its place in Linen.
_PLACE = "_inertia_jax_place"
# How the names begin of the variables that a layer has in Linen alone. As attributes of
# the layer they go where it goes, such as into `nnx.jit`, and come back.
_HELD = "_inertia_jax_variable\0"


class Place:
    """The place in Linen of a layer, whose calls it answers."""

    def __init__(self, path: Path, root: Any) -> None:
        """Makes a place at a path below a scope, the root."""
        self._path, self._root = path, root
        # Whether Linen's equal has been called.
        self._is_called = False
        # The places of the first variables that it has made in a scope of its own, on
        # what inputs, and whether they have ended there.
        self._made: set[Path] = set()
        self._inputs: Any = None
        self._is_lost = False
        self._node: Any = None
        self._stored: list[tuple[nnx.Variable[Any], Any]] = []

    def take(self, node: nnx.Module) -> None:
        """Lets a layer's calls be answered from now on."""
        self._node = node
        variables = [leaf for _, leaf in iter_variables(node)]
        self._stored = [(leaf, leaf.get_raw_value()) for leaf in variables]
        vars(node)[_PLACE] = self
        node.__class__ = _answered(type(node))

    def hold(self, place: Path, value: Any) -> nnx.Variable[Any]:
        """Gives the layer a variable of Linen's that it does not have itself."""
        return _hold(self._node, place, value)

    def makes(self, place: Path) -> bool:
        """Returns whether Linen has made a variable below the layer's path itself."""
        return self._is_called and place not in self._made

    def leave(self) -> list[tuple[Path, nnx.Variable[Any]]]:
        """Returns the variables that the layer holds for Linen, and forgets the layer.

        Programs that `nnx.jit` keeps know this place, and would keep the arrays, too.
        """
        own = self._variables(self._node)
        if self._is_lost or not self._made <= own.keys():
            # A transformation has not passed on all that was made inside of it. What
            # is made here is no part of the program, in which calls are counted.
            with jax.ensure_compile_time_eval():
                scope = self._new_scope({}, {"params": jax.random.key(0)})
                inside = scope_at(scope, self._path)
                self._call(self._node, inside, _zeros(self._inputs))
            made = traverse_util.flatten_dict(dict(scope.variables()))
            for place in made.keys() - own.keys():
                _hold(self._node, place, made[place])
        held = list(_iter_held(self._node))
        self._node, self._root, self._stored = None, None, []
        return held

    def answer(self, node: Any, call: Any, args: Any, kwargs: Any) -> Any:
        """Returns a layer's output.

        Args:
            node: The layer, or the copy of it inside a transformation.
            call: Its own call.
            args: The call's arguments.
            kwargs: The call's arguments by name.
        """
        raise NotImplementedError

    def _scope(self, node: Any, x: Any) -> Any:
        """Returns the scope of the variables that a layer has where it is called.

        Inside a transformation, and where the network has changed them, they are not
        those of the root.

        Args:
            node: The layer.
            x: Its input.
        """
        is_outside = self._is_outside(node)
        stored = [leaf.get_raw_value() is value for leaf, value in self._stored]
        if node is self._node and not is_outside and all(stored):
            return scope_at(self._root, self._path)
        variables: dict[str, Any] = {}
        # Linen makes the first variables itself.
        given = {} if self._is_initializing else self._variables(node)
        for place, variable in given.items():
            put_at(variables, place, variable.get_raw_value())
        # What stands outside of a transformation cannot be changed inside of it.
        fixed = {"intermediates"} if is_outside else set()
        for place, variable in _iter_held(node):
            if is_outside or _trace_of(variable.get_raw_value()) is not _trace_of(x):
                fixed.add(place[0])
        scope = self._new_scope(variables, self._root.rngs, fixed)
        return scope_at(scope, self._path)

    def _new_scope(
        self, variables: dict[str, Any], rngs: Any, fixed: Collection[str] = ()
    ) -> Any:
        """Returns a scope like the root, in which some collections cannot change."""
        mutable = subtract_filters(self._root.mutable, {*fixed})
        return Scope(variables, rngs=rngs, mutable=mutable, flags=self._root.flags)

    def _call(self, node: Any, scope: Any, inputs: Any) -> Any:
        """Returns the output of Linen's equal of the layer, on a scope."""
        raise NotImplementedError

    def _answered(self, node: Any, x: Any, inputs: Any) -> Any:
        """Returns what Linen's equal does, and gives the layer what it has changed."""
        scope = self._scope(node, x)
        output = self._call(node, scope, inputs)
        self._is_called = True
        if scope.root is self._root:
            return output
        own = self._variables(node)
        changed = traverse_util.flatten_dict(dict(scope.root.variables()))
        if self._is_initializing:
            self._made, self._inputs = {*changed}, jax.tree.map(_shape_of, inputs)
            self._is_lost = self._is_outside(node)
            if self._is_lost:
                return output
        for place, value in changed.items():
            if place not in own:
                _hold(node, place, value)
            elif value is not own[place].get_raw_value():
                own[place].set_raw_value(value)
        return output

    @property
    def _is_initializing(self) -> bool:
        return bool(self._root.flags.get("initializing", False))

    def _is_outside(self, node: Any) -> bool:
        """Returns whether the layer is not inside of a transformation, but its call."""
        is_inside = Scope({}).trace_level != self._root.trace_level
        return node is self._node and is_inside

    def _variables(self, node: Any) -> dict[Path, nnx.Variable[Any]]:
        """Returns the variables of a layer where it is called, by place."""
        found = dict(_iter_held(node))
        for (collection, *below), variable in iter_variables(node, [()]):
            if not below[0].startswith(_HELD):
                found[(collection, *self._path, *below)] = variable
        return found


class _Bridge(nnx.bridge.ToNNX):
    """A bridge whose place answers its calls, also those of subclasses to `super`."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return vars(self)[_PLACE].answer(self, None, args, kwargs)


@functools.cache
def _answered(cls: type[nnx.Module]) -> type[nnx.Module]:
    """Returns a class of layers whose calls are answered by their places."""

    @functools.wraps(cls.__call__)
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        call = functools.partial(cls.__call__, self)
        return vars(self)[_PLACE].answer(self, call, args, kwargs)

    body: dict[str, Any] = {"__module__": cls.__module__}
    bases: tuple[type, ...] = (cls,)
    if issubclass(cls, nnx.bridge.ToNNX):
        bases = (_Bridge,) if cls is nnx.bridge.ToNNX else (cls, _Bridge)
    else:
        body["__call__"] = __call__
    options = {"pytree": cls._pytree__is_pytree}
    return types.new_class(cls.__name__, bases, options, lambda own: own.update(body))


def leaves_below(variables: Any, path: Path) -> Iterator[tuple[Path, Any]]:
    """Yields the places in all collections below a path, and what stands there."""
    for collection in variables:
        found = value_at(variables, (collection, *path))
        if isinstance(found, Mapping):
            for below, value in traverse_util.flatten_dict(dict(found)).items():
                yield (collection, *path, *below), value


def _hold(node: Any, place: Path, value: Any) -> nnx.Variable[Any]:
    variable = CLASSES.get(place[0], nnx.Variable)(value)
    setattr(node, _HELD + "\0".join(place), variable)
    return variable


def _iter_held(node: Any) -> Iterator[tuple[Path, nnx.Variable[Any]]]:
    """Yields the variables of Linen's that a layer was given, by place."""
    for name, variable in vars(node).items():
        if name.startswith(_HELD):
            yield tuple(name.removeprefix(_HELD).split("\0")), variable


def scope_at(scope: Any, path: Path) -> Any:
    """Returns the scope of a layer, as if nothing had been called there."""
    for name in path:
        scope = scope.push(name, reuse=True)
    return scope.rewound()


def _trace_of(values: Any) -> Any:
    """Returns the trace that an array, or the first of several, belongs to, or None."""
    leaves = jax.tree.leaves(values)
    # JAX has no public name for it.
    return getattr(leaves[0], "_trace", None) if leaves else None


def _shape_of(leaf: Any) -> Any:
    """Returns the shape of an array, and what is none as it is."""
    if not isinstance(leaf, jax.Array | np.ndarray):
        return leaf
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)


def _zeros(inputs: Any) -> Any:
    """Returns arrays of the shapes that `_shape_of` has returned."""
    return jax.tree.map(
        lambda leaf: (
            jnp.zeros(leaf.shape, leaf.dtype)
            if isinstance(leaf, jax.ShapeDtypeStruct)
            else leaf
        ),
        inputs,
    )
