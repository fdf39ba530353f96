"""The networks, by name."""

import fnmatch
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from inertia_jax.calls import ApplyFn, init_network, record_calls
from inertia_jax.dropped import find_convolutions, find_dropped
from inertia_jax.inputs import (
    Inputs,
    Shape,
    checked_inputs,
    one_input,
    shape_of_one,
    shown,
)
from inertia_jax.models.lenet import LeNet
from inertia_jax.models.names import check_model_name
from inertia_jax.models.network import Network
from inertia_jax.models.resnet import ResNet18
from inertia_jax.models.resnet_cifar import CifarResNet
from inertia_jax.models.simpledla import SimpleDLA
from inertia_jax.models.vgg import VGG16
from inertia_jax.ops.inertial.settings import check_choice
from inertia_jax.plan.plan import Plan, without_ladders
from inertia_jax.plan.specs import as_python
from inertia_jax.variables import without_boxes

_MODELS: dict[str, Callable[..., nn.Module]] = {
    "resnet18": ResNet18,
    "vgg16": VGG16,
    "simpledla": SimpleDLA,
    "lenet": LeNet,
    **{
        f"resnet{depth}": functools.partial(CifarResNet, depth=depth)
        for depth in (20, 32, 44, 56)
    },
}
_DTYPES = ("bfloat16", "float32", "float64")

# First variables are drawn once, by a program that LLVM would optimise for longer than
# it runs: for 6 s of CPU instead of 1 for ResNet20, to draw in 3 ms instead of 10.
_QUICK = {"xla_backend_optimization_level": 0}


def create_model(
    name: str,
    *,
    num_classes: int = 10,
    width: float = 1.0,
    stem: str = "cifar",
    shortcut: str = "A",
    plan: Plan | None = None,
    dtype: Any = jnp.float32,
    axis_name: str | None = None,
    strict: bool = False,
) -> nn.Module:
    """Makes a network.

    Args:
        name: One of `MODEL_NAMES`.
        num_classes: Number of outputs, >= 1.
        width: Factor of every number of channels, > 0; 1 is the published network.
        stem: `cifar` or `imagenet`; the latter for `resnet18` alone.
        shortcut: `A` (padding) or `B` (1x1 convolution), for `resnet20` to `resnet56`.
        plan: The plan that chooses the convolutions; None means `Conv` everywhere.
        dtype: Type of the computation: bfloat16, float32 or float64.
            Parameters are float32, or float64 with float64.
        axis_name: Mesh axis over which BatchNorm statistics are averaged.
        strict: Whether a layer that cannot be what the plan has for it is refused
            instead of staying dense (`dropped_rules` lists these layers).

    Returns:
        A Linen module: `model.apply(variables, x_nhwc, train=False) -> logits`. With
        `train=True` it has reverse-mode gradients alone.

    Raises:
        ValueError: An argument outside its range, a plan whose glob matches no
            convolution of the network, or, with `strict`, one that falls back.

    Example:
        >>> plan = ij.Plan((("layer3*", ij.Tucker2(8, 8)),))
        >>> small = ij.create_model("resnet20", num_classes=100, plan=plan)
        >>> ij.count_cost(small, (32, 32, 3)).params
        82164
    """
    check_model_name("name", name)
    num_classes = as_python(num_classes)
    if not isinstance(num_classes, int) or num_classes < 1:
        raise ValueError(f"`num_classes` (={num_classes!r}) must be an integer >= 1.")
    if plan is not None and not isinstance(plan, Plan):
        raise ValueError(
            f"`plan` (={plan!r:.200}) must be an inertia_jax.Plan, or None."
        )
    width = as_python(width)
    if not isinstance(width, (int, float)) or not 0 < width < float("inf"):
        raise ValueError(f"`width` (={width!r}) must be a number > 0, and finite.")
    if axis_name is not None and not isinstance(axis_name, str):
        raise ValueError(f"`axis_name` (={axis_name!r}) must be a name, or None.")
    check_choice("stem", stem, Literal["cifar", "imagenet"])
    check_choice("shortcut", shortcut, Literal["A", "B"])
    if stem != "cifar" and name != "resnet18":
        raise ValueError(f"`stem` (={stem!r}) must be cifar for {name}.")
    is_cifar_resnet = name.startswith("resnet") and name != "resnet18"
    if shortcut != "A" and not is_cifar_resnet:
        raise ValueError(f"`shortcut` (={shortcut!r}) must be A for {name}.")
    # An array would be compared element by element.
    is_type = isinstance(dtype, (str, type, np.dtype))
    if not is_type or dtype not in map(jnp.dtype, _DTYPES):
        raise ValueError(f"`dtype` (={dtype!r}) must be one of {', '.join(_DTYPES)}.")
    options = {}
    if name == "resnet18":
        options = {"stem": stem}
    elif is_cifar_resnet:
        options = {"shortcut": shortcut}
    model = _MODELS[name](
        num_classes=num_classes,
        width=width,
        plan=plan or Plan(),
        dtype=jnp.dtype(dtype),
        axis_name=axis_name,
        **options,
    )
    if model.plan.rules:
        check_plan(model, input_shape(model), strict=strict)
    return model


def input_shape(model: nn.Module) -> tuple[int, int, int]:
    """Returns the image shape [h, w, c] that the network was published for."""
    if isinstance(model, LeNet):
        return (28, 28, 1)
    if isinstance(model, ResNet18) and model.stem == "imagenet":
        return (224, 224, 3)
    return (32, 32, 3)


def image_shape_of(model: nn.Module, given: Shape | None) -> Any:
    """Returns `given`, or the shape that a network of this library was published for.

    Raises:
        ValueError: `given` is None and must not be, or has not three entries for a
            network of this library.
    """
    if given is not None:
        if isinstance(model, Network):
            if not isinstance(given, Sequence | np.ndarray) or len(given) != 3:
                raise ValueError(f"`image_shape` (={given}) must be (h, w, c).")
            return tuple(given)
        return given
    if isinstance(model, Network):
        return input_shape(model)
    raise ValueError(
        f"`image_shape` (=None) must be given for {type(model).__name__}, which is "
        f"none of this library's networks."
    )


def inputs_of(model: nn.Module, inputs: Inputs, name: str = "calibration") -> Any:
    """Returns inputs as arrays of NumPy; errors call them `name`.

    Raises:
        ValueError: They are no batch of finite inputs, or no images where the network
            is one of this library.
    """
    arrays = checked_inputs(inputs, name)
    is_images = isinstance(arrays, np.ndarray) and arrays.ndim == 4
    if isinstance(model, Network) and not is_images:
        raise ValueError(f"`{name}` (shape {shown(arrays)}) must be [n, h, w, c].")
    return arrays


def shape_of_inputs(model: nn.Module, inputs: Inputs) -> Any:
    """Returns the shape of one of the inputs that `inputs_of` returns for a model."""
    # Networks of this library take images of any type, and make floats of them.
    return inputs.shape[1:] if isinstance(model, Network) else shape_of_one(inputs)


def known_name(model: nn.Module) -> str | None:
    """Returns the name that `create_model` knows a network by; None for another's."""
    if type(model) is CifarResNet:
        return f"resnet{model.depth}"
    return next((n for n, make in _MODELS.items() if type(model) is make), None)


def model_name(model: nn.Module) -> str:
    """Returns the name that `create_model` knows the network by.

    Raises:
        ValueError: The network is none of this library's.
    """
    name = known_name(model)
    if name is None:
        raise ValueError(
            f"`model` (={type(model).__name__}) must be one that create_model makes."
        )
    return name


def init_variables(
    model: nn.Module,
    key: jax.Array,
    shape: Shape | None = None,
    *,
    apply_fn: ApplyFn | None = None,
) -> dict[str, Any]:
    """Draws a network's first variables, in one compiled call.

    Args:
        model: Any Linen module.
        key: The key that the parameters are drawn with.
        shape: The shape of one input, such as [h, w, c], or of each of several by name;
            None means the one the network was made for.
        apply_fn: How the network is called, as in `inertia_jax.compress`.

    Example:
        >>> first = ij.init_variables(model, jax.random.key(0))
        >>> jax.tree.map(jnp.shape, first["params"]["conv1"])
        {'bias': (2,), 'kernel': (3, 3, 1, 2)}
    """
    # A constant key is no tracer under a transformation, but its copy is.
    key = jax.random.clone(key)
    if isinstance(key, jax.core.Tracer):
        return _jitted(model, shape, apply_fn)(key)
    return drawn_variables(_jitted(model, shape, apply_fn).trace(key), key)


def trace_variables(
    model: nn.Module, key: Any, shape: Shape | None = None
) -> jax.stages.Traced:
    """Traces the program that draws first variables; `out_info` has their shapes.

    Args:
        model: Any Linen module.
        key: A key of the kind that the parameters are drawn with, or its shape.
        shape: The shape of one input, as `init_variables` has it.
    """
    traced: jax.stages.Traced = _jitted(model, shape).trace(key)
    return traced


def drawn_variables(traced: jax.stages.Traced, key: jax.Array) -> dict[str, Any]:
    """Returns the variables that the program of `trace_variables` draws with a key."""
    options = _QUICK if jax.default_backend() == "cpu" else None
    variables: dict[str, Any] = traced.lower().compile(options)(key)
    return variables


def abstract_variables(model: nn.Module, shape: Shape | None = None) -> dict[str, Any]:
    """Returns shapes and types of a network's variables without computing any."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    shapes: dict[str, Any] = trace_variables(model, key, shape).out_info
    return shapes


def _jitted(
    model: nn.Module,
    shape: Shape | None,
    apply_fn: ApplyFn | None = None,
) -> Any:
    # Ladders change no variables, and to trace them takes as long as all else.
    model = without_ladders(model)
    init = functools.partial(_first_variables, model, shape=shape, apply_fn=apply_fn)
    return jax.jit(init)


def _first_variables(
    model: nn.Module,
    key: jax.Array,
    *,
    shape: Shape | None,
    apply_fn: ApplyFn | None = None,
) -> dict[str, Any]:
    one = one_input(input_shape(model) if shape is None else shape)
    images = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), one)
    variables = without_boxes(init_network(model, key, images, apply_fn=apply_fn))
    # Flax starts BatchNorm statistics in float32 and returns float64 after a step.
    dtype = getattr(model, "dtype", None) or jnp.float32

    def widen(leaf: jax.Array) -> jax.Array:
        if not jnp.issubdtype(leaf.dtype, jnp.floating):  # someone's counter, or key
            return leaf
        return leaf.astype(jnp.promote_types(leaf.dtype, dtype))

    if isinstance(model, Network):
        return jax.tree.map(widen, variables)
    names = variables.keys() & {"batch_stats"}  # the rest is as the model has it
    return {**variables, **{n: jax.tree.map(widen, variables[n]) for n in names}}


def check_plan(model: Any, image_shape: tuple[int, ...], *, strict: bool) -> None:
    """Checks that every rule of a model's plan matches a convolution.

    Args:
        model: A model with a plan.
        image_shape: The shape [h, w, c] of an input.
        strict: Whether rules that a layer cannot follow are refused.

    Raises:
        ValueError: A rule matches none, or is refused.
    """
    # The same layers, traced without ladders, which take as long as all else.
    calls, _ = record_calls(without_ladders(model), image_shape)
    convolutions = find_convolutions(calls)
    for glob, _ in model.plan.rules:
        if not fnmatch.filter(convolutions, glob):
            raise ValueError(f"`plan` has {glob!r}, which matches no convolution.")
    fallbacks = [rule for rule in find_dropped(model.plan, convolutions) if rule.path]
    if strict and fallbacks:
        listed = "\n  ".join(map(str, fallbacks))
        raise ValueError(
            f"`plan` does not stand at {len(fallbacks)} layers, as `strict` (=True) "
            f"demands:\n  {listed}"
        )
