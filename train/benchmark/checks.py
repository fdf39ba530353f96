"""Numbers of operations and networks on this device, beside those in float64 on CPU."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from inertia_jax import (
    Inertial,
    Plan,
    Ratio,
    compress,
    create_model,
    init_variables,
    ops,
)
from inertia_jax.cost.table import aligned
from train.benchmark.suite import BaseSuite
from train.benchmark.timing import random_images

_SIDE, _CHANNELS, _RANK, _IMAGES = 16, 32, 12, 8
# A gate for each region, some of which open at random images.
_WINDOW: dict[str, Any] = {"region_size": 3, "combine": "mean"}
_TILED: dict[str, Any] = {"region_size": 4, "capacities": None}
_CASES = (
    *("convolution", "strided convolution", "Tucker-2", "window", "tiled", "ladder"),
    *("ResNet18", "ResNet18, Tucker-2", "ResNet18, tiled"),
)
_TYPES = ("float32", "bfloat16")

Function = Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class Suite(BaseSuite):
    """Outputs and gradients on this device, relative to float64 on CPU."""

    width: float = 0.25
    """Width of the networks."""

    def cases(self) -> Iterable[str]:
        return _CASES

    def measure(self, case: str) -> dict[str, Any]:
        """Computes a case in each type, here and on CPU, and in float64 on CPU.

        Gaps are norms of differences relative to the norm of what float64 gives.
        """
        if case.startswith("ResNet18"):
            function, arguments = _network(case, self.width)
        else:
            function, arguments = _operation(case)
        here, cpu = jax.devices()[0], jax.devices("cpu")[0]
        with jax.enable_x64(True):
            expected = _results(function, arguments, cpu, np.float64)
        row: dict[str, Any] = {"case": case, "gaps": {}}
        for dtype in _TYPES:
            row["gaps"][dtype] = {
                name: _gaps(
                    _results(function, arguments, device, jnp.dtype(dtype)), expected
                )
                for name, device in (("device", here), ("cpu", cpu))
            }
        return row

    def describe(self, row: dict[str, Any]) -> str:
        lines = [
            [f"  {dtype}", what, f"{gap:.1e}", f"CPU {gaps['cpu'][what]:.1e}"]
            for dtype, gaps in row["gaps"].items()
            for what, gap in gaps["device"].items()
        ]
        return f"{row['case']}, gap to float64 on CPU\n{aligned(lines, left=2)}"


def _operation(case: str) -> tuple[Function, Any]:
    """Returns a function of (images, kernel), and these."""
    x = random_images(_IMAGES, (_SIDE, _SIDE, _CHANNELS))
    kernel = np.random.default_rng(1).normal(size=(3, 3, _CHANNELS, _CHANNELS)) / 17
    shares = {"window": _WINDOW, "tiled": _TILED, "ladder": {"region_size": 4}}
    if case not in shares:
        strides = 2 if case.startswith("strided") else 1
        if case == "Tucker-2":
            factors = ops.tucker2(kernel, rank_in=_RANK, rank_out=_RANK)
            return ops.tucker2_conv, (x, factors)
        return lambda x, k: ops.conv2d(x, k, strides=strides), (x, kernel)
    if case == "window":
        kernel = kernel[1:2, 1:2]
    tiled = case != "window"
    operation = ops.inertial_conv_tiled if tiled else ops.inertial_conv
    options = shares[case]
    threshold = _between(operation(x, kernel, threshold=0.0, **options).friction)
    return (
        lambda x, k: operation(x, k, threshold=threshold, **options).y,
        (x, kernel),
    )


def _between(friction: Any) -> float:
    """Returns a threshold near the median that rounding moves no friction across."""
    values = np.sort(np.ravel(np.asarray(friction, np.float64)))
    middle = values[len(values) * 2 // 5 : len(values) * 3 // 5]
    widest = int(np.argmax(np.diff(middle)))
    return float(middle[widest : widest + 2].mean())


def _network(case: str, width: float) -> tuple[Function, Any]:
    """Returns a function of (images, variables) in evaluation mode, and these."""
    model: Any = create_model("resnet18", width=width)
    variables = init_variables(model, jax.random.key(0))
    if case.endswith("Tucker-2"):
        model, variables = compress(model, variables, ranks=Ratio(0.5))
    elif case.endswith("tiled"):
        plan = Plan((("*", Inertial(3, 4, reading="tiled", capacities=None)),))
        model = model.clone(plan=plan)
        variables = {**init_variables(model, jax.random.key(0)), **variables}

    def logits(x: Any, variables: Any) -> Any:
        return model.clone(dtype=x.dtype).apply(variables, x)

    return logits, (random_images(_IMAGES, (32, 32, 3)), variables)


def _results(
    function: Function, arguments: Any, device: jax.Device, dtype: Any
) -> dict[str, Any]:
    """Returns outputs, and gradients by all arguments, as float64.

    Outputs are those without a derivative, since ladders have another form under one.
    """

    def loss(arguments: Any) -> Any:
        y = function(*arguments)
        # Weights that do not favour any output.
        weights = jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape)
        return jnp.sum(y * weights.astype(y.dtype))

    arguments = jax.device_put(
        jax.tree.map(lambda leaf: np.asarray(leaf, dtype), arguments), device
    )
    outputs = jax.jit(lambda arguments: function(*arguments))(arguments)
    found = {"outputs": outputs, "gradients": jax.jit(jax.grad(loss))(arguments)}
    return {
        name: np.concatenate(
            [np.ravel(np.float64(leaf)) for leaf in jax.tree.leaves(t)]
        )
        for name, t in found.items()
    }


def _gaps(found: dict[str, Any], expected: dict[str, Any]) -> dict[str, float]:
    return {
        name: float(np.linalg.norm(found[name] - values) / np.linalg.norm(values))
        for name, values in expected.items()
    }
