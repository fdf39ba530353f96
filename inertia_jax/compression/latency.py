"""The time of networks, and of a convolution in several forms, measured here."""

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

from inertia_jax.calls import ApplyFn, Network, apply_network
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
from inertia_jax.ops.tucker.low_rank import low_rank_conv
from inertia_jax.plan.specs import Conv, LowRank

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
) -> list[float]:
    """Returns the time of a convolution in several forms, in milliseconds per call.

    Args:
        site: The convolution, whose shapes are used; weights are random.
        specs: The forms.
        batch_size: Images per call.
        dtype: The type of images and weights.
    """
    key = jax.random.key(0)
    images = random_inputs(site, batch_size, dtype)
    calls = []
    for spec in specs:
        kernels = [
            jax.random.normal(key, shape, dtype) for shape in site.kernel_shapes(spec)
        ]
        forward = jax.jit(functools.partial(layer_forward, site, spec))
        calls += [functools.partial(forward, x, kernels) for x in images]
    times = time_interleaved(calls)
    # The time of a layer that is called several times is that of all its calls.
    each = len(images)
    return [sum(times[i : i + each]) for i in range(0, len(times), each)]


def random_inputs(site: Site, batch_size: int, dtype: Any) -> list[jax.Array]:
    """Returns random inputs of each call of a convolution."""
    # Axes before the image are more images.
    count = site.num_axes + 1
    shapes = [
        (batch_size * math.prod(shape[:-count]), *shape[-count:])
        for shape, _ in site.calls
    ]
    return [jax.random.normal(jax.random.key(0), shape, dtype) for shape in shapes]


def padding_of(site: Site) -> Any:
    """Returns a padding by zeros that takes as long as the layer's own.

    The time depends on the width of the padding, not on its values or its side.
    """
    is_same = site.padding in ("CIRCULAR", "REFLECT", "CAUSAL")
    return "SAME" if is_same else site.padding


def layer_forward(
    site: Site, spec: Conv | Factorised, x: jax.Array, kernels: list[jax.Array]
) -> jax.Array:
    """Returns the outputs of a convolution in a form, with that form's kernels."""
    groups = site.groups
    # Layers compute with this function, which differs from `conv2d` on CPU.
    convolve = functools.partial(
        conv_for_linen,
        window_strides=site.strides,
        padding=padding_of(site),
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
    # As `Tucker2Conv` mixes channels in evaluation.
    mix = functools.partial(pointwise, groups=groups, on_tpu="product")
    return mix(convolve(mix(x, as_matrix(first)), core), as_matrix(last))


def network_latencies_ms(
    networks: Sequence[Network],
    image_shape: Shape,
    *,
    batch_size: int,
    apply_fn: ApplyFn | None = None,
    images: Any = None,
) -> list[float]:
    """Returns the time of each network's evaluation, in milliseconds per call.

    Args:
        networks: Networks of the same inputs. Measured, they take turns, so that their
            ratios hold where the machine's speed changes.
        image_shape: The shape of one input.
        batch_size: Images per call.
        apply_fn: How the networks are called, as in `compress`.
        images: The inputs of a call, on which gates depend; None: random ones, of
            this shape and number.
    """

    def forward(model: nn.Module, variables: Any, images: Any) -> Any:
        return apply_network(model, variables, images, apply_fn=apply_fn)[0]

    random = np.random.default_rng(0)

    def draw(shaped: Any) -> jax.Array:
        # Whole numbers are indices, of which 0 is always one.
        is_float = jnp.issubdtype(shaped.dtype, jnp.floating)
        values = random.standard_normal(shaped.shape) * is_float
        return jnp.asarray(values, shaped.dtype)

    if images is None:
        images = jax.tree.map(draw, one_input(image_shape, number=batch_size))
    images = jax.tree.map(jnp.asarray, images)
    return time_interleaved(
        [
            functools.partial(
                jax.jit(functools.partial(forward, model)), variables, images
            )
            for model, variables in networks
        ]
    )
