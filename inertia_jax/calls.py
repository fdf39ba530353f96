"""How a network is called, and how every layer of it: its module, and its shapes."""

import collections
import contextlib
import contextvars
import dataclasses
import functools
import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import flax
import jax
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from inertia_jax.inputs import Shape, one_input, shown
from inertia_jax.intercept import (
    MODES,
    Wrapper,
    first_argument,
    mode_names,
    on_calls,
)
from inertia_jax.layers.kinds import (
    KINDS,
    OTHER_CONVOLUTIONS,
    OTHER_LINEAR,
    kind_of,
    num_axes,
)
from inertia_jax.layers.pointwise import Pointwise
from inertia_jax.programs import every_program
from inertia_jax.variables import subtree, without_boxes

# A model and its variables.
Network = tuple[nn.Module, Mapping[str, Any]]

# A function of (model, images, train) that returns logits. The model is bound to its
# variables, as inside `nn.apply`.
ApplyFn = Callable[[Any, Any, bool], Any]

NOTHING_CHANGES = (
    "With `nn.map_variables(init=True)` no call can change a collection; with "
    "`init=self.is_initializing()` calls can."
)

# What `record_calls` has found in a `with` block of `remembered_calls`.
_FOUND: contextvars.ContextVar[list[Any] | None] = contextvars.ContextVar(
    "calls that were found", default=None
)

_TRACES = itertools.count()
# The names of calls in a program, before their numbers.
_CALL = "inertia_jax.calls:"
_COUNTED: tuple[type[nn.Module], ...] = (
    Pointwise,
    *KINDS,
    *OTHER_CONVOLUTIONS,
    *OTHER_LINEAR,
)


@dataclasses.dataclass(frozen=True)
class Call:
    """How a layer is called.

    Attributes:
        module: The layer; None for one whose operations are not counted.
        input_shape: The input's shape, [n, *image, c_in].
        output_shape: The output's shape, of one image.
        again: Further calls of the same layer.
    """

    module: Any
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    again: tuple["Call", ...] = ()

    @property
    def every(self) -> tuple["Call", ...]:
        """All calls of the layer."""
        return (self, *self.again)

    @property
    def is_factorised(self) -> bool:
        """Whether the layer's parts are layers themselves."""
        return bool(kind_of(self.module).parts)


@contextlib.contextmanager
def remembered_calls() -> Iterator[None]:
    """Lets `record_calls` trace equal models once inside a `with` block.

    To trace a network takes longer than all that is then made of its calls, and who
    reads, counts and compares networks asks for the calls of each several times.
    """
    token = _FOUND.set([])
    try:
        yield
    finally:
        _FOUND.reset(token)


def are_equal(one: nn.Module, other: nn.Module) -> bool:
    """Returns whether models are known to be equal."""
    try:
        return bool(one == other)
    except Exception:  # fields of the user's network, as arrays, may raise anything
        return False


def record_calls(
    model: nn.Module, shape: Shape, *, apply_fn: ApplyFn | None = None
) -> tuple[dict[str, Call], dict[str, Any]]:
    """Returns how every layer is called, by path, and the shapes of all variables.

    Nothing is computed.

    Args:
        model: A network.
        shape: The shape of one input.
        apply_fn: How the network is called, as in `apply_network`.

    Raises:
        ValueError: No layer is recognised, although there are parameters.
    """
    known = _FOUND.get()
    key = (shape, apply_fn, jax.config.values["jax_enable_x64"])
    for its_key, its_model, (calls, variables) in known or ():
        if its_key == key and are_equal(its_model, model):
            return dict(calls), variables
    calls, variables = _traced_calls(model, shape, apply_fn)
    if known is not None:
        known.append((key, model, (dict(calls), variables)))
    return calls, variables


def _traced_calls(
    model: nn.Module, shape: Shape, apply_fn: ApplyFn | None
) -> tuple[dict[str, Call], dict[str, Any]]:
    # Calls of each layer that were traced, by their number among all.
    traced: dict[str, dict[int, Call]] = {}
    numbers = itertools.count()

    def record(module: Any, path: str, call: Any, args: Any, kwargs: Any) -> Any:
        before = len(traced.get(path, ()))
        output = call(*args, **kwargs)
        # The entry keeps the order of the computation.
        known = traced.setdefault(path, {})
        # A replacement of the layer may have been recorded inside it.
        if isinstance(module, _COUNTED) and len(known) == before:
            x = first_argument(args, kwargs)
            into, out = x.shape, output.shape
            if x.ndim == num_axes(module) + 1:  # without an axis of images
                into, out = (1, *into), (1, *out)
            if isinstance(module, nn.Einsum) and module.einsum_str is None:
                # The equation was an argument of the call.
                equation = kwargs.get("einsum_str", args[-1])
                module = module.clone(einsum_str=equation, parent=module.scope)
            number = next(numbers)
            known[number] = Call(module, into, out[1:])
            checkpoint_name(x, f"{_CALL}{number}")
        return output

    with on_calls(record):
        images = one_input(shape)
        init = functools.partial(init_network, model, apply_fn=apply_fn)
        key = jax.random.key(0)
        program, shapes = jax.make_jaxpr(init, return_shape=True)(key, images)
    variables = without_boxes(shapes)
    # `nn.scan` and its like trace a layer more than once, and `nn.jit` perhaps less.
    times = collections.Counter(
        eqn.params["name"]
        for inner in every_program(program.jaxpr)
        for eqn in inner.eqns
        if eqn.primitive.name == "name"
    )
    calls = {}
    for path, known in traced.items():
        every = [c for n, c in known.items() for _ in range(times[f"{_CALL}{n}"])]
        first, *again = every or [Call(None, (), ())]
        calls[path] = dataclasses.replace(first, again=tuple(again))
        names = kind_of(first.module).parts or ("kernel",)
        if not subtree(variables.get("params", {}), path).keys() & {*names}:
            # A layer that is applied by itself to arrays is none of the network's.
            calls[path] = dataclasses.replace(first, module=None)
    if variables and not any(call.module is not None for call in calls.values()):
        raise ValueError(
            f"`model` (={type(model).__name__}) has parameters, but no layer that is "
            f"recognised: its convolutions must be `flax.linen.Conv` or this "
            f"library's, its linear layers `flax.linen.Dense`. (Layers of an "
            f"`nnx.Module` cannot be seen through `nnx.bridge.to_linen`.)"
        )
    return calls, variables


def apply_network(
    model: nn.Module,
    variables: Mapping[str, Any],
    images: Any,
    *,
    train: bool = False,
    apply_fn: ApplyFn | None = None,
    mutable: Sequence[str] = (),
) -> tuple[Any, Mapping[str, Any]]:
    """Returns a network's outputs, and the collections that the call has changed.

    Args:
        model: The network.
        variables: Its variables, plain or not.
        images: A batch of its inputs: an array, or a dictionary of arrays.
        train: Whether it is called in training mode.
        apply_fn: How it is called. None: as `model(images)`, with those of the
            arguments `train`, `training`, `is_training`, `deterministic` and
            `use_running_average` that it takes.
        mutable: The collections that it may make. It may change those that it has,
            but for `params`: some networks write to theirs in evaluation, too.

    Raises:
        ValueError: The network is called in another way, or in training mode although
            it takes none of the arguments, and there is no `apply_fn`.
    """
    rngs = same_keys(jax.random.key(0))
    changing = {*variables, *mutable} - {"params"}
    call = _network_call(train, apply_fn)
    try:
        apply = nn.apply(call, model, mutable=sorted({*changing, _fresh_name()}))
        outputs, changed = apply(variables, images, rngs=rngs)
    except flax.errors.ScopeCollectionNotFound:
        # With a collection that may change, `nn.map_variables(init=True)` takes the
        # call for the first one.
        apply = nn.apply(call, model, mutable=[])
        try:
            outputs, changed = apply(variables, images, rngs=rngs)
        except flax.errors.ModifyScopeVariableError as error:
            error.add_note(NOTHING_CHANGES)
            raise
    return outputs, changed


def init_network(
    model: nn.Module, key: jax.Array, images: Any, *, apply_fn: ApplyFn | None = None
) -> Mapping[str, Any]:
    """Returns the first variables of a network, called as by `apply_network`.

    Raises:
        ValueError: It cannot be called on such images; the text has its own error.
    """
    mutable = flax.core.DenyList(("intermediates", _fresh_name()))
    with own_errors(model, images):
        return nn.init(_network_call(False, apply_fn), model, mutable)(key, images)


def _fresh_name() -> str:
    """Returns the name of a collection that nobody has.

    `nn.jit` keeps programs by the collections that may change. With a new one among
    them, it takes none in which the calls of layers were not answered.
    """
    return f"inertia_jax trace {next(_TRACES)}"


@contextlib.contextmanager
def own_errors(model: nn.Module, images: Any) -> Iterator[None]:
    """Says on which images a network could not be called, before its own error."""
    try:
        yield
    except Exception as error:
        while isinstance(model, Wrapper):
            model = model.wrapped
        notes = getattr(error, "__notes__", ())
        # JAX's, on its tracebacks, begin with a line.
        words = [str(error), *(note for note in notes if note[:3] != "---")]
        if not isinstance(error, ValueError):
            words[0] = f"{type(error).__name__}: {error}"
        said = " ".join(f"{word.removesuffix('.')}." for word in words)
        raise ValueError(
            f"{type(model).__name__} cannot be called on images of shape "
            f"{shown(images)}. {said}"
        ) from error


def same_keys(key: jax.Array) -> dict[str, jax.Array]:
    """Returns a key for every random stream that a network may ask for."""
    # Streams of any other name come from that of the parameters.
    return {"params": key, "dropout": key}


def takes_train(model: nn.Module, apply_fn: ApplyFn | None = None) -> bool:
    """Returns whether a network can be called in training mode."""
    while isinstance(model, Wrapper):
        model = model.wrapped
    return apply_fn is not None or bool(_modes(model, train=True))


def one_array(outputs: Any) -> Any:
    """Returns a network's outputs.

    Raises:
        ValueError: They are not one array.
    """
    if not isinstance(outputs, jax.Array):
        raise ValueError(
            f"the network returns a {type(outputs).__name__}; must be one array of "
            f"logits, which `apply_fn` may choose."
        )
    return outputs


def _network_call(train: bool, apply_fn: ApplyFn | None) -> Callable[[Any, Any], Any]:
    """Returns a function of a bound model and images that calls the network."""
    call = call_network if apply_fn is None else apply_fn

    def network_call(model: Any, images: Any) -> Any:
        with contextlib.ExitStack() as stack:
            while isinstance(model, Wrapper):
                model = stack.enter_context(model.inside(train=train))
            return call(model, images, train)

    return network_call


def call_network(model: Any, images: Any, train: bool) -> Any:
    """Calls a network, bound to its variables, by what its signature says.

    Raises:
        ValueError: The signature asks for more, or has no argument for `train`.
    """
    name, modes = type(model).__name__, _modes(model, train=train)
    how = "say how it is called with `apply_fn`, a function of (model, images, train)"
    if train and not modes:
        raise ValueError(
            f"{name} takes none of {', '.join(MODES)}, by which it would be told "
            f"that it is trained; {how}."
        )
    # The first argument takes the images.
    for parameter in list(inspect.signature(model.__call__).parameters.values())[1:]:
        variadic = (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        is_needed = parameter.default is parameter.empty
        if is_needed and parameter.kind not in variadic and parameter.name not in modes:
            raise ValueError(
                f"{name} must be called with {parameter.name!r}, of which nothing is "
                f"known; {how}."
            )
    try:
        return model(images, **modes)
    except TypeError as error:
        error.add_note(f"If {name} is called in another way, {how}.")
        raise


def _modes(model: nn.Module, *, train: bool) -> dict[str, bool]:
    """Returns the keyword arguments that tell a network whether it is trained."""
    return {name: train == MODES[name] for name in mode_names(model)}
