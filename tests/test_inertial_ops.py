"""Friction, gates and both readings of inertial convolution, beside plain loops."""

import itertools
import math
import sys

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from jax import lax
from jax.test_util import check_grads

from inertia_jax import ops

COMBINES = (
    ("mean", "sum", "max", "stack")  # without weights
    + ("weighted", "weighted_channel", "weighted_input")
)
METRICS = ("l1", "l2", "max")
PADDINGS = ("SAME", "VALID", 1, ((2, 0), (1, 3)), ((0, 1), (-1, 2)))
# float64: only the order of summation differs.
CLOSE = dict(rtol=1e-10, atol=1e-12)


def close(actual, expected, **tolerance):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, **(tolerance or CLOSE)),
        actual,
        expected,
    )


# The definitions, in NumPy.


def pad_pairs(padding, image_size, side, strides):
    """XLA's rule for "SAME": ceil(size / stride) windows, the odd zero after."""
    if padding == "VALID":
        return (0, 0), (0, 0)
    if padding != "SAME":
        return ((padding,) * 2,) * 2 if isinstance(padding, int) else padding
    zeros = [
        max((math.ceil(size / stride) - 1) * stride + side - size, 0)
        for size, stride in zip(image_size, strides, strict=True)
    ]
    return tuple((zero // 2, zero - zero // 2) for zero in zeros)


def zero_pad(x, pads):
    x = np.pad(x, ((0, 0), *((max(a, 0), max(b, 0)) for a, b in pads), (0, 0)))
    rows, columns = (slice(max(-a, 0), min(b, 0) or None) for a, b in pads)
    return x[:, rows, columns]


def windows(x, side, strides):
    """Yields (image, i, j) and the window there, for all that fit."""
    for image, i, j in itertools.product(
        range(len(x)),
        range((x.shape[1] - side) // strides[0] + 1),
        range((x.shape[2] - side) // strides[1] + 1),
    ):
        row, column = i * strides[0], j * strides[1]
        yield (image, i, j), x[image, row : row + side, column : column + side]


def gather(entries):
    """The array whose entries are given as (index, value) pairs."""
    entries = list(entries)
    shape = np.add(entries[-1][0], 1)
    return np.stack([value for _, value in entries]).reshape(*shape, *entries[0][1].shape)


def region_friction(region, m, metric, reference, channel_stride):
    d = len(region)
    region, start = region[..., ::channel_stride], (d - m) // 2
    patch = range(start, start + m)
    r = region[d // 2, d // 2]
    if reference == "core_mean":
        r = np.mean([region[i, j] for i in patch for j in patch], axis=0)
    periphery = [
        region[i, j] - r
        for i in range(d)
        for j in range(d)
        if not (i in patch and j in patch)
    ]
    if metric == "l2":
        return np.mean(np.square(periphery))
    each = [np.mean(np.abs(difference)) for difference in periphery]
    return np.max(each) if metric == "max" else np.mean(each)


def friction_reference(
    padded, d, m, strides, metric="l1", reference="center", channel_stride=1
):
    return gather(
        (at, region_friction(region, m, metric, reference, channel_stride))
        for at, region in windows(padded, d, strides)
    )


def window_reference(padded, core, gate, d, strides, combine, weights=None):
    m, out = len(core), []
    steps = list(itertools.product(range(d - m + 1), repeat=2))
    middle = steps.index(((d - m) // 2,) * 2)
    for at, region in windows(padded, d, strides):
        u = []
        for i, j in steps:
            patch = region[i : i + m, j : j + m]
            if combine == "weighted_input":
                u.append(np.tensordot(patch * weights[i, j], core, 3))
            elif combine.startswith("weighted"):
                u.append(np.tensordot(patch, core, 3) * weights[i, j])
            else:
                u.append(np.tensordot(patch, core, 3))
        center = (slice(d // 2 - 0, None),)  # placeholder
        i, j = steps[middle]
        low = np.tensordot(region[i : i + m, j : j + m], core, 3)
        joins = {"max": np.max, "mean": np.mean, "stack": np.mean}
        high = joins.get(combine, np.sum)(u, axis=0)
        if combine == "stack":
            y = np.concatenate([low, np.where(gate[at], high, 0)])
        else:
            y = np.where(gate[at], high, low)
        out.append((at, y))
    return gather(out)
