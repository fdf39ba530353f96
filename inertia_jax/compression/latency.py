"""The time of a convolution in one form or another: measured here, or estimated."""

import dataclasses
import functools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from inertia_jax.calls import ApplyFn, apply_network
from inertia_jax.chips.cache import cached_estimate
from inertia_jax.chips.chip import find_chip
from inertia_jax.chips.compiler import lower_for
from inertia_jax.compression.sites import Factorised, Site
from inertia_jax.inputs import Shape, one_input
from inertia_jax.ops.conv.dispatch import conv_for_linen
from inertia_jax.ops.tucker.factors import (
    LowRankFactors,
    Tucker2Factors,
    as_matrix,
    factor_kernels,
    pointwise,
    stack_groups,
)
from inertia_jax.ops.tucker.joined import core_and_last
from inertia_jax.ops.tucker.low_rank import low_rank_conv
from inertia_jax.plan.specs import Conv, LowRank
from inertia_jax.variables import plain_variables

# Rounds of measurement, after one to warm up.
_REPEATS = 7
# A call is repeated until it takes this long, so that the clock's steps do not matter.
_LEAST_S = 0.002


def time_interleaved(calls: Sequence[Callable[[], Any]]) -> list[float]:
    """Returns the median time of each call, in milliseconds, all called in turn.

    Args:
        calls: Functions that return arrays; the time ends when the arrays are ready.
    """
    counts = []
    for call in calls:
        jax.block_until_ready(call())
        start = time.perf_counter()
        jax.block_until_ready(call())
        once = max(time.perf_counter() - start, 1e-7)
        counts.append(max(1, min(100, round(_LEAST_S / once))))
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(_REPEATS):
        for call, count, found in zip(calls, counts, times, strict=True):
            start = time.perf_counter()
            for _ in range(count):
                result = call()
            jax.block_until_ready(result)
            found.append(1e3 * (time.perf_counter() - start) / count)
    return [statistics.median(found) for found in times]


def site_latencies_ms(
    site: Site,
    specs: Sequence[Conv | Factorised],
    *,
    batch_size: int,
    dtype: Any = jnp.float32,
    device: str | None = None,
) -> list[float]:
    """Returns the time of a convolution in several forms, in milliseconds per call.

    Args:
        site: The convolution, whose shapes are used; weights are random.
        specs: The forms.
        batch_size: Images per call.
        dtype: The type of images and weights, where time is measured.
        device: The chip on which the time is what its compiler estimates, in bfloat16.
            None: it is measured on this machine.
    """
    # Axes before the image are more images.
    count = site.num_axes + 1
    shapes = [
        (batch_size * math.prod(shape[:-count]), *shape[-count:])
        for shape, _ in site.calls
    ]
    if device is not None:
        return [
            sum(
                _estimated_ms(
                    functools.partial(_forward, site, spec),
                    jax.ShapeDtypeStruct(shape, jnp.bfloat16),
                    [
                        jax.ShapeDtypeStruct(kernel, jnp.bfloat16)
                        for kernel in site.kernel_shapes(spec)
                    ],
                    device=device,
                    # The layers around one, whatever they are, agree on a layout.
                    any_layout=True,
                )
                for shape in shapes
            )
            for spec in specs
        ]
    key = jax.random.key(0)
    images = [jax.random.normal(key, shape, dtype) for shape in shapes]
    calls = []
    for spec in specs:
        kernels = [
            jax.random.normal(key, shape, dtype) for shape in site.kernel_shapes(spec)
        ]
        forward = jax.jit(functools.partial(_forward, site, spec))
        calls += [functools.partial(forward, x, kernels) for x in images]
    times = time_interleaved(calls)
    # The time of a layer that is called several times is that of all its calls.
    each = len(images)
    return [sum(times[i : i + each]) for i in range(0, len(times), each)]


def _estimated_ms(
    function: Callable[..., Any], *shapes: Any, device: str, any_layout: bool = False
) -> float:
    """Returns the time of a function on a chip, by the estimate of its compiler."""
    lowered = lower_for(function, *shapes, chip=device, any_layout=any_layout)
    found = cached_estimate(lowered, chip=device)
    return 1e3 * found.cycles / find_chip(device).clock_hz


def _forward(
    site: Site, spec: Conv | Factorised, x: jax.Array, kernels: list[jax.Array]
) -> jax.Array:
    groups = site.groups
    # The time depends on the width of the padding, not on its values or its side.
    is_same = site.padding in ("CIRCULAR", "REFLECT", "CAUSAL")
    # Layers compute with this function, which differs from `conv2d` on CPU.
    convolve = functools.partial(
        conv_for_linen,
        window_strides=site.strides,
        padding="SAME" if is_same else site.padding,
        rhs_dilation=site.dilation,
        feature_group_count=groups,
    )
    if isinstance(spec, Conv):
        if site.is_linear:
            return pointwise(x, kernels[0])
        return convolve(x, kernels[0])
    into, out = stack_groups(kernels[0], groups), as_matrix(kernels[-1]).T
    if isinstance(spec, LowRank):
        return low_rank_conv(
            x, LowRankFactors(into, out), strides=site.strides, groups=groups
        )
    factors = Tucker2Factors(into, kernels[1], out)
    first, core, last = map(jnp.asarray, factor_kernels(factors, groups=groups))
    x = pointwise(x, as_matrix(first), groups=groups)
    return core_and_last(convolve, x, core, last, groups=groups)


def model_latency_ms(
    model: nn.Module,
    variables: Any,
    image_shape: Shape,
    *,
    batch_size: int,
    apply_fn: ApplyFn | None = None,
    device: str | None = None,
) -> float:
    """Returns the time of a network's evaluation, in milliseconds per call.

    Args:
        model: A network.
        variables: Its variables.
        image_shape: The shape of one input.
        batch_size: Images per call.
        apply_fn: How the network is called, as in `compress`.
        device: The chip on which the time is what its compiler estimates, with the
            network and its variables in bfloat16. None: it is measured on this machine.
    """
    shapes = one_input(image_shape, number=batch_size)
    if device is not None:
        if "dtype" in {field.name for field in dataclasses.fields(model)}:
            model = model.clone(dtype=jnp.bfloat16)
        return _estimated_ms(
            lambda v, x: apply_network(model, v, x, apply_fn=apply_fn)[0],
            jax.tree.map(_in_bfloat16, plain_variables(variables)),
            jax.tree.map(_in_bfloat16, shapes),
            device=device,
        )
    random = np.random.default_rng(0)

    def draw(shaped: Any) -> jax.Array:
        # Whole numbers are indices, of which 0 is always one.
        is_float = jnp.issubdtype(shaped.dtype, jnp.floating)
        values = random.standard_normal(shaped.shape) * is_float
        return jnp.asarray(values, shaped.dtype)

    images = jax.tree.map(draw, shapes)
    forward = jax.jit(lambda v, x: apply_network(model, v, x, apply_fn=apply_fn)[0])
    return time_interleaved([lambda: forward(variables, images)])[0]


def _in_bfloat16(leaf: Any) -> jax.ShapeDtypeStruct:
    """Returns the shape of an array, and its type, which is bfloat16 for any float."""
    is_float = jnp.issubdtype(leaf.dtype, jnp.floating)
    return jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16 if is_float else leaf.dtype)
