"""The published variants of the inertial convolution, by name."""

import dataclasses
from typing import Any, Literal

from inertia_jax.ops.inertial.friction import periphery_offsets
from inertia_jax.ops.inertial.settings import check_choice, check_sizes
from inertia_jax.plan.specs import Fixed, Inertial, Learned, Threshold

Variant = Literal[
    "original", "mod1", "mod2", "mod5", "mod6", "spconv2d", "mod7", "mod8", "mod9"
]


def published_variant(
    name: Variant,
    *,
    in_channels: int,
    core_size: int = 1,
    region_size: int = 3,
    threshold: float = 0.1,
    slope: float = 10.0,
    **changes: Any,
) -> Inertial:
    """Returns the spec of a published variant.

    Their friction is a sum over P and channels where this library takes the mean, so
    that threshold and slope are converted here by |P| `in_channels`.

        original, mod1       l1, detail is the mean; fixed threshold
        mod2                 l2, detail is the mean; straight-through
        mod5                 l2, detail is a weighted sum over P; straight-through
        mod6, spconv2d       mod5 with a hard gate and a fixed threshold
        mod7, mod8, mod9     mod6 with a threshold an output channel, a parameter

    The weighted sum has a weight for each of the |P| = d^2 - m^2 pixels of the
    periphery, to which the middle tap of the core is applied; the middle of the region
    takes no part. The published code of mod2 misplaces the detail by a reshape; that
    mistake is not repeated.

    Where the gate is straight-through, the threshold is learned; behind a hard gate it
    has no gradient, as published (`gate_gradient="ste"` among the changes gives one).
    A gradient step on the threshold of the mean is one (|P| `in_channels`)^2 times as
    large on the threshold of the sum: learning rates differ from the published ones.

    Args:
        name: The variant's name.
        in_channels: Number of channels of the layer's input, >= 1.
        core_size: Side m of the core.
        region_size: Side d of the region.
        threshold: Threshold of the summed friction; if learned, its first value.
        slope: Slope of the straight-through sigmoid over the summed friction.
        **changes: Fields of `Inertial` that differ from the published ones.

    Raises:
        ValueError: An unknown name, or an argument outside its range.

    Example:
        >>> spec = ij.published_variant("mod5", in_channels=64)
        >>> spec.metric, spec.combine, spec.gate_gradient
        ('l2', 'weighted_periphery', 'ste')
    """
    check_choice("name", name, Variant)
    if in_channels < 1:
        raise ValueError(f"`in_channels` (={in_channels}) must be >= 1.")
    check_sizes(core_size=core_size, region_size=region_size)
    offsets = periphery_offsets(core_size=core_size, region_size=region_size)
    terms = len(offsets) * in_channels
    mean_threshold: Threshold = Fixed(threshold / terms)
    if name not in ("original", "mod1", "mod6", "spconv2d"):
        per_channel = name in ("mod7", "mod8", "mod9")
        mean_threshold = Learned(threshold / terms, per_channel=per_channel)
    is_weighted = name not in ("original", "mod1", "mod2")
    spec = Inertial(
        core_size,
        region_size,
        metric="l1" if name in ("original", "mod1") else "l2",
        combine="weighted_periphery" if is_weighted else "mean",
        threshold=mean_threshold,
        gate_gradient="ste" if name in ("mod2", "mod5") else "none",
        slope=slope * terms,
    )
    return dataclasses.replace(spec, **changes)
