"""Inertial convolution, tiled reading: one region per tile of outputs."""

import functools
import math
from collections.abc import Callable, Sequence

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike
from jaxtyping import Float

from inertia_jax.ops.conv.chunks import varying_as
from inertia_jax.ops.conv.conv import Padding, conv2d, in_one_type, pad_image
from inertia_jax.ops.conv.dispatch import conv2d_to_apply
from inertia_jax.ops.conv.replaced import is_replaced
from inertia_jax.ops.conv.winograd import Planes, convolve_transformed
from inertia_jax.ops.inertial.friction import friction as region_friction
from inertia_jax.ops.inertial.gates import is_closing, is_open, select
from inertia_jax.ops.inertial.ladder import PerImage, Result, with_ladder
from inertia_jax.ops.inertial.settings import (
    GateGradient,
    Low,
    Metric,
    Reference,
    check_capacities,
    check_choice,
    check_slope,
)
from inertia_jax.ops.inertial.tiles import (
    Tiling,
    fill_low,
    fill_open,
    make_tiling,
    spread,
    tile_means,
)
from inertia_jax.ops.inertial.window import InertialOutput, as_friction, check_core
from inertia_jax.ops.inertial.winograd_tiles import (
    fill_by_winograd,
    fits,
    open_by_winograd,
)
from inertia_jax.ops.precision import at_least_float32


def inertial_conv_tiled(
    x: Float[ArrayLike, "n h w c_in"],
    core: Float[ArrayLike, "m m c_in c_out"],
    *,
    region_size: int,
    threshold: Float[ArrayLike, ""],
    metric: Metric = "l1",
    reference: Reference = "center",
    low: Low = "mean",
    padding: Padding = "SAME",
    capacities: Sequence[float | int] | None = (1 / 8, 1 / 4, 1 / 2, 1),
    gate_gradient: GateGradient = "none",
    slope: float = 10.0,
    channel_stride: int = 1,
    friction: Float[ArrayLike, "n rows columns"] | None = None,
) -> InertialOutput:
    """Computes tiles of n x n outputs in detail only where friction is high.

    The outputs are those of the m x m convolution at stride 1. Tile (i, j) holds the
    outputs from (n i, n j) on, which see its input region of side d = m + n - 1.

        friction <= threshold    the tile is filled with one value: the mean of its n^2
                                 outputs, which is the core on the box mean of the
                                 region (`low="mean"`), or the output at
                                 ((n - 1) // 2, (n - 1) // 2) (`low="sample"`)
        elsewhere                the tile has its n^2 outputs, also for NaN, unless the
                                 threshold closes every gate (`Fixed.CLOSED`)

    With every gate open this is the ordinary convolution. Where n does not divide the
    map, zeros fill the image on the right and below, and the mean is over all n^2
    outputs.

    Args:
        x: Images.
        core: Filters of side m.
        region_size: Side d of the region, > m.
        threshold: Friction above which a tile opens.
        metric: Measure of friction, as `friction` takes it.
        reference: Reference of friction, as `friction` takes it.
        low: Value that fills a closed tile, `mean` or `sample`.
        padding: Padding of the m x m convolution.
        capacities: Shares of tiles, rising to 1, that detail is compiled for. The
            smallest that holds the open tiles of the batch (on CPU, of a chunk) is run,
            so that results depend on them by rounding alone. (On CPU, where Winograd's
            form does not pay, one output of an open tile comes from the tile's mean:
            its rounding is relative to the tile's largest output, and it is not finite
            if the mean is not.) None computes
            every tile and then selects, as derivatives and `vmap` always do. On TPU,
            where gathered tiles take longer than all, every tile is computed unless
            none is open.
        gate_gradient: Gradient through the gate, `none` or `ste`, as `select` takes it.
        slope: Steepness of `ste`, per unit of friction, > 0.
        channel_stride: Step over the channels that friction reads, >= 1.
        friction: Friction of each tile where it is known already; None computes it.

    Returns:
        `InertialOutput(y, gate, friction)`, with the gate and friction of each tile.

    Raises:
        ValueError: The core is not square or not smaller than the region, capacities do
            not rise to 1, or another argument is out of range.

    Example:
        >>> edge = jnp.zeros((1, 4, 4, 1)).at[:, :, 3:].set(1)
        >>> out = ij.ops.inertial_conv_tiled(
        ...     edge, jnp.ones((1, 1, 1, 1)), region_size=2, threshold=0.1
        ... )
        >>> out.gate[0].tolist()
        [[False, True], [False, True]]
        >>> out.y[0, 0, :, 0]
        Array([0., 0., 0., 1.], dtype=float32)
    """
    x, core, threshold = jnp.asarray(x), jnp.asarray(core), jnp.asarray(threshold)
    check_core(x, core, region_size=region_size)
    check_choice("low", low, Low)
    check_choice("gate_gradient", gate_gradient, GateGradient)
    check_capacities(capacities)
    check_slope(slope)
    if threshold.shape != ():
        raise ValueError(f"`threshold` (shape {threshold.shape}) must be one number.")
    x, core = in_one_type(x, core)
    tiling = make_tiling(
        (x.shape[1], x.shape[2]),
        core_size=core.shape[0],
        region_size=region_size,
        padding=padding,
        low=low,
    )
    measure = functools.partial(
        region_friction,
        region_size=region_size,
        core_size=core.shape[0],
        strides=tiling.tile_size,
        padding="VALID",
        metric=metric,
        reference=reference,
        channel_stride=channel_stride,
    )
    if friction is not None:
        friction = as_friction(friction, (x.shape[0], *tiling.tiles))
    # Every form compares in this one type, so that all of them see the same gates.
    threshold = threshold.astype(
        at_least_float32(x.dtype) if friction is None else friction.dtype
    )
    dense: Callable[..., Result] = functools.partial(
        _compute_all,
        tiling=tiling,
        measure=measure,
        gate_gradient=gate_gradient,
        slope=slope,
    )
    compute = dense
    if capacities is not None and not is_replaced() and x.size and core.size:
        sparse = functools.partial(
            _compute_open, tiling=tiling, measure=measure, capacities=tuple(capacities)
        )
        compute = with_ladder(dense, sparse, tiling)
    y, friction = compute(PerImage(x, friction), core, threshold)
    rows, columns = tiling.output_size
    return InertialOutput(y[:, :rows, :columns], is_open(friction, threshold), friction)


def _compute_all(
    images: PerImage,
    core: Float[Array, "m m c_in c_out"],
    threshold: Float[Array, ""],
    *,
    tiling: Tiling,
    measure: Callable[[Array], Array],
    gate_gradient: GateGradient,
    slope: float,
) -> Result:
    """Computes every tile in detail, and fills the closed ones from their outputs."""
    convolve = conv2d if is_replaced() else conv2d_to_apply
    high = convolve(images.x, core, strides=(1, 1), padding=tiling.pads)
    friction = images.friction
    if friction is None:
        friction = measure(pad_image(images.x, tiling.pads))
    y = select(
        high,
        spread(tile_means(high, tiling), tiling.tile_size),
        spread(friction[..., None], tiling.tile_size),
        threshold.reshape(1, 1, 1, 1),
        gate_gradient=gate_gradient,
        slope=slope,
    )
    return y, friction


def _compute_open(
    images: PerImage,
    core: Float[Array, "m m c_in c_out"],
    threshold: Float[Array, ""],
    filters: Planes | None,
    *,
    tiling: Tiling,
    measure: Callable[[Array], Array],
    capacities: tuple[float | int, ...],
    on_cpu: bool,
    gathers: bool,
) -> Result:
    """Computes open tiles alone, up to the smallest capacity that holds them.

    Unless it `gathers` them, it computes no tile, or all.
    """
    x, n = images.x, tiling.tile_size
    padded = pad_image(x, tiling.pads)
    if images.friction is not None:
        compared = friction = images.friction
    elif not on_cpu:
        compared = friction = measure(padded)
    else:
        closes, shape = is_closing(threshold), (x.shape[0], *tiling.tiles)

        def zeros(padded: Array) -> Array:
            return varying_as(jnp.zeros(shape, at_least_float32(x.dtype)), padded)

        # A layer that stays closed has no use for friction. Unless the caller has, the
        # compiler leaves the second of these out.
        compared = lax.cond(closes, zeros, measure, padded)
        friction = lax.cond(closes, measure, lambda padded: compared, padded)
    gate = is_open(compared, threshold)
    num_open, num_tiles = gate.sum(), gate.size

    def closed() -> Array:
        return spread(fill_low(padded, core, tiling), n).astype(x.dtype)

    def up_to(capacity: int) -> Array:
        if filters is not None and fits(tiling):
            return fill_by_winograd(padded, filters, gate, tiling, capacity=capacity)
        low = fill_low(padded, core, tiling)
        if filters is not None:
            return open_by_winograd(
                padded, filters, low, gate, tiling, capacity=capacity
            )
        return fill_open(
            padded, core, low, gate, tiling, capacity=capacity, is_exact=on_cpu
        )

    def opened() -> Array:
        if filters is not None:
            return convolve_transformed(x, filters, padding=tiling.pads)
        return conv2d(x, core, padding=tiling.pads)

    def selected() -> Array:
        high = opened()
        means = spread(tile_means(high, tiling), n)
        return select(
            high, means, spread(compared[..., None], n), threshold.reshape(1, 1, 1, 1)
        )

    shares = capacities[:-1] if gathers else ()
    sizes = [0, *(math.ceil(share * num_tiles) for share in shares)]
    rung = sum((num_open > size).astype(jnp.int32) for size in sizes)
    rung = jnp.where(num_open == num_tiles, len(sizes) + 1, rung)
    steps: list[Callable[[], Array]] = [
        closed,
        *(functools.partial(up_to, size) for size in sizes[1:]),
        selected,
        opened,
    ]
    return lax.switch(rung, steps), friction
