"""The operations of an inertial convolution, and how they depend on the gates."""

import math
from typing import Any

from inertia_jax.layers.inertial import InertialConv
from inertia_jax.ops.conv.conv import stride_pair
from inertia_jax.ops.inertial.friction import periphery_offsets
from inertia_jax.ops.inertial.tiles import spared_output
from inertia_jax.plan.specs import Fixed, Inertial


def count_inertial(
    layer: InertialConv,
    input_shape: tuple[int, ...],
    output_shape: tuple[int, ...],
    gate_rate: float,
) -> dict[str, Any]:
    """Returns the fields of `LayerCost` that are an inertial layer's own.

    The window reading computes everything whatever the gates do, so its MACs do not
    depend on the rate. In the tiled reading one core evaluation is computed for every
    tile, and n^2 - 1 more for each open one, or n^2 more in bfloat16. (GPUs and TPUs,
    whose products are narrower, compute n^2 in float32 as well; this is not counted.) A
    compiled ladder takes a whole capacity. The one that holds the mean rate is counted,
    though a batch, or on CPU a chunk of one, may need the next. On CPU, a
    ladder whose threshold closes every gate computes no friction; none is counted.
    Inputs have the shape
    [n, h, w, c_in], the output of one image has [h_out, w_out, c_out].
    """
    spec, c_in = layer.spec, input_shape[-1]
    taps = spec.core_size**2 * c_in * layer.core_features
    if spec.reading == "window":
        return _count_window(spec, layer, c_in, output_shape, taps)
    tiling = layer.tiling((input_shape[1], input_shape[2]))
    n, num_tiles = tiling.tile_size, math.prod(tiling.tiles)
    every, core = num_tiles * n**2 * taps, num_tiles * taps
    # MACs that open tiles add to the one evaluation that every tile has.
    spared = spared_output(tiling, layer.dtype or layer.param_dtype) is not None
    opening = every - core if spared else every
    ladder = every
    if spec.capacities is not None:
        steps = (0.0, *spec.capacities)
        held = min(step for step in steps if step >= gate_rate)
        # The last capacity computes every tile once, and low as the mean of those.
        ladder = every if held == 1 else core + math.ceil(held * opening)
    closing = isinstance(spec.threshold, Fixed) and spec.threshold.is_closing
    is_spared = closing and spec.capacities is not None and not spec.relative
    box = 0
    if spec.low == "mean":
        spans = [count * n + spec.core_size - n for count in tiling.tiles]
        box = math.prod(spans) * c_in * n**2
    return {
        "dense_macs": math.prod(output_shape[:2]) * taps,
        "core_macs": core,
        "macs": min(every, core + round(gate_rate * opening)),
        "ladder_macs": ladder,
        "other_ops": box + (0 if is_spared else _friction_ops(spec, num_tiles, c_in)),
    }


def _count_window(
    spec: Inertial,
    layer: InertialConv,
    c_in: int,
    output_shape: tuple[int, ...],
    taps: int,
) -> dict[str, Any]:
    positions, strides = output_shape[:2], stride_pair(layer.strides)
    regions = math.prod(positions)
    m, k = spec.core_size, spec.region_size - spec.core_size
    # Each term takes a product and a sum, or a sum alone where all weigh the same.
    per_term = 2 if spec.combine.startswith("weighted") else 1
    by_input = spec.combine not in ("max", "weighted_channel") and strides != (1, 1)
    if spec.combine == "weighted_periphery" and m > 1:
        macs = regions * (taps + c_in * layer.core_features)
        sums = [(size - 1) * s + 1 for size, s in zip(positions, strides, strict=True)]
        join = math.prod(sums) * c_in * spec.region_size**2 * per_term
    elif by_input or spec.combine == "weighted_input":
        macs = 2 * regions * taps
        spans = [(size - 1) * s + m for size, s in zip(positions, strides, strict=True)]
        join = math.prod(spans) * c_in * (k + 1) ** 2 * per_term
    else:
        spans = [
            (size - 1) * s + 1 + k for size, s in zip(positions, strides, strict=True)
        ]
        macs = math.prod(spans) * taps
        # Sums are taken at stride 1 and then thinned, the maximum where it is needed.
        steps = (1, 1) if spec.combine == "max" else strides
        sums = [(size - 1) * s + 1 for size, s in zip(positions, steps, strict=True)]
        join = math.prod(sums) * layer.core_features * (k + 1) ** 2 * per_term
    region_taps = spec.region_size**2 * c_in * output_shape[-1]
    return {
        "dense_macs": regions * region_taps,
        "core_macs": macs,
        "macs": macs,
        "ladder_macs": macs,
        "other_ops": _friction_ops(spec, regions, c_in) + join,
    }


def _friction_ops(spec: Inertial, num_regions: int, c_in: int) -> int:
    """Counts a difference, a magnitude and a sum for each compared value."""
    if spec.metric == "random":
        return num_regions * c_in
    offsets = periphery_offsets(core_size=spec.core_size, region_size=spec.region_size)
    each = 3 * len(offsets)
    if spec.reference == "core_mean":
        each += 2 * spec.core_size**2 + len(offsets)
    return num_regions * math.ceil(c_in / spec.channel_stride) * each
