"""A network of the user's own, made by a function that the configuration names."""

import importlib
import os
import pathlib
import traceback
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from inertia_jax import InertialConv, Plan, Planned, Tucker2Conv
from inertia_jax.calls import call_network
from inertia_jax.intercept import Answer, mode_names
from inertia_jax.models.create import check_plan
from inertia_jax.ops.inertial.settings import near_miss
from train.errors import UsageError, user_input

# Layers that look at the whole batch.
_OF_THE_BATCH = (nn.BatchNorm, InertialConv, Tucker2Conv)


class OwnNetwork(Planned):
    """A Linen model of the user's own, called and configured as our networks are.

    Attributes:
        factory: Where the function is that makes the model, as MODULE:FUNCTION.
        num_classes: Number of outputs that the function was asked for.
        axis_name: Mesh axis over whose devices BatchNorm and inertial layers take the
            batch together.
    """

    factory: str = ""
    num_classes: int = 10
    axis_name: str | None = None

    @property
    def dtype(self) -> Any:
        """Type of the images that it takes: that of its own field `dtype`, if any."""
        return jnp.dtype(getattr(self.unplanned, "dtype", None) or jnp.float32)

    def __call__(self, images: Array, *, train: bool = False) -> Array:
        """Returns logits; a model that cannot be told that it is trained is not."""
        is_told = train and bool(mode_names(self.unplanned))
        with self.inside(train=train) as network:
            logits = call_network(network, images, is_told)
        if not isinstance(logits, Array):
            raise ValueError(
                f"it returns a {type(logits).__name__}; must be one array of logits."
            )
        return logits

    @nn.nowrap
    def make_answer(self, *, train: bool) -> Answer:
        replace = super().make_answer(train=train)

        def answer(module: Any, path: str, call: Any, args: Any, kwargs: Any) -> Any:
            is_alone = isinstance(module, _OF_THE_BATCH) and module.axis_name is None
            if self.axis_name is None or not is_alone:
                return replace(module, path, call, args, kwargs)
            parent = module.scope.rewound()
            return module.clone(parent=parent, axis_name=self.axis_name)(
                *args, **kwargs
            )

        return answer


def find_factory(name: str) -> Callable[..., Any]:
    """Returns the function that is meant by MODULE:FUNCTION.

    Raises:
        UsageError: There is none, or its module raises an error.
    """
    module_name, _, function_name = name.partition(":")
    said = f"`model.factory` (={name})"
    if not module_name or not function_name:
        raise UsageError(f"{said} must be MODULE:FUNCTION, e.g. mynet:make_model.")
    if module_name.endswith(".py") or "/" in module_name:
        raise UsageError(
            f"{said} must name a module, not a file: "
            f"{_module_of(module_name)}:{function_name}."
        )
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if not f"{module_name}.".startswith(f"{error.name}."):
            raise UsageError(f"{said}: {_where(error)}") from error
        raise UsageError(
            f"{said}: there is no module {error.name} in {os.getcwd()}, nor where "
            f"Python looks for packages (PYTHONPATH); --model.factory MODULE:FUNCTION "
            f"says where the network is made."
        ) from error
    # The module is the user's code, and may raise anything or end the program.
    except (Exception, SystemExit) as error:
        raise UsageError(f"{said}: {_where(error)}") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        near = near_miss(function_name, list(vars(module)))
        raise UsageError(
            f"{said}: {module.__file__} has no function {function_name}.{near}"
        )
    return function


def make_own_network(
    factory: str, *, num_classes: int, plan: Plan | None = None
) -> OwnNetwork:
    """Calls a factory as `function(num_classes=num_classes)`.

    Args:
        factory: Where the function is, as MODULE:FUNCTION. It returns a Linen module
            that is called on images [n, h, w, c] and returns logits [n, num_classes].
        num_classes: The number of classes.
        plan: The plan of its convolutions. None: that of a `Planned` that the function
            returns, or none.

    Raises:
        UsageError: There is no such function, it raises an error, or it returns
            something else.
    """
    function = find_factory(factory)
    said = f"`model.factory` (={factory})"
    try:
        model = function(num_classes=num_classes)
    except (Exception, SystemExit) as error:
        raise UsageError(
            f"{said} cannot be called with num_classes={num_classes}: {_where(error)}"
        ) from error
    if not isinstance(model, nn.Module):
        kind = f"{type(model).__module__}.{type(model).__name__}"
        raise UsageError(f"{said} must return a flax.linen.Module; got a {kind}.")
    given = model if isinstance(model, Planned) else Planned(model)
    return OwnNetwork(
        given.unplanned,
        plan=given.plan if plan is None or not plan.rules else plan,
        kept=given.kept,
        factory=factory,
        num_classes=num_classes,
    )


def check_own_network(
    model: OwnNetwork, image_shape: tuple[int, int, int], *, strict: bool
) -> None:
    """Checks that a network takes the images, and its plan.

    Args:
        model: The network.
        image_shape: The shape [h, w, c] of its input.
        strict: Whether a plan that a layer cannot follow is refused.

    Raises:
        UsageError: It does not, or returns something else than logits.
    """
    said = f"`model.factory` (={model.factory})"
    images = jax.ShapeDtypeStruct((1, *image_shape), model.dtype)
    wanted = (1, model.num_classes)
    try:
        init = model.init_with_output
        logits, _ = jax.eval_shape(init, jax.random.key(0), images)
    except Exception as error:
        raise UsageError(
            f"{said} makes a network that cannot be called on images of shape "
            f"{images.shape}: {_where(error)}"
        ) from error
    if logits.shape != wanted:
        raise UsageError(
            f"{said} makes a network that returns shape {logits.shape} for images of "
            f"shape {images.shape}; must be {wanted}, a logit for each class."
        )
    with user_input():
        if model.plan.rules:
            check_plan(model, image_shape, strict=strict)
    if model.dtype == jnp.float64 and jnp.result_type(float) != jnp.float64:
        raise UsageError(f"{said}, in float64, needs JAX_ENABLE_X64=1.")


def _module_of(file: str) -> str:
    """Returns the name by which Python imports a file from the current directory.

    Of a file that is elsewhere, it is the name from the file's own directory.
    """
    place = pathlib.Path(os.path.relpath(file.removesuffix(".py")))
    parts = place.parts[-1:] if ".." in place.parts else place.parts
    return ".".join(parts)


def _where(error: BaseException) -> str:
    """Returns an error of the user's code in one line, with its place."""
    text = f"{type(error).__name__}: {error}".partition("\n")[0].removesuffix(".")
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if _is_own(f.filename)]
    if not own or isinstance(error, SyntaxError):
        return f"{text}."
    return f"{own[-1].filename}, line {own[-1].lineno}: {text}."


def _is_own(file: str) -> bool:
    """Returns whether code is the user's: no package, and none of this program."""
    here = pathlib.Path(__file__).parents[1]
    path = pathlib.Path(file)
    ours = any(path.is_relative_to(here / name) for name in ("train", "inertia_jax"))
    return not ours and "site-packages" not in path.parts and path.is_file()
