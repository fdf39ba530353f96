"""An inertial convolution in the place of an `nn.Conv`: where it can stand, and how."""

import functools
import operator
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.linen.dtypes import promote_dtype
from flax.linen.linear import canonicalize_padding
from jax import Array, lax
from jaxtyping import Float

from inertia_jax.layers.opaque import Opaque
from inertia_jax.ops.conv.conv import Pads, explicit_padding, pair, stride_pair
from inertia_jax.ops.conv.dispatch import conv_for_linen
from inertia_jax.plan.specs import (
    Inertial,
    Spec,
    core_of,
    stays_dense,
    without_inertia,
)

# How `jnp.pad` calls the paddings of `nn.Conv` that repeat the image.
_REPEATING = {"CIRCULAR": "wrap", "REFLECT": "reflect"}


def cannot_be_inertial(module: Any, spec: Spec) -> str | None:
    """Returns why a layer cannot be as inertial as a plan has it, or None if it can.

    Args:
        module: The ordinary convolution, or the factorised one whose core is ordinary.
        spec: The plan's spec; one that is not inertial can stand here.
    """
    if not isinstance(core_of(spec), Inertial):
        return None
    if isinstance(module, Opaque):
        return module.why
    if isinstance(module, nn.Conv) and type(module) is not nn.Conv:
        return f"is a {type(module).__name__}, which may compute anything"
    size = module.kernel_size
    if isinstance(module, nn.Conv) and np.size(size) != 2:
        return "is not two-dimensional"
    if module.feature_group_count != 1:
        return f"has {module.feature_group_count} groups"
    for name in ("kernel_dilation", "input_dilation"):
        if pair(getattr(module, name, None) or 1) != (1, 1):
            return f"has {name} {getattr(module, name)}"
    if getattr(module, "mask", None) is not None:
        return "has a mask"
    if module.precision is not None:
        return f"has precision {module.precision}"
    if reason := own_arithmetic(module):
        return reason
    strides = max(stride_pair(module.strides))
    return stays_dense(spec, kernel_size=min(pair(size)), strides=strides)


def standing(spec: Spec, module: Any) -> Spec:
    """Returns the spec of a layer: the plan's, or the one that it falls back to."""
    if cannot_be_inertial(module, spec) is None:
        return spec
    return without_inertia(spec)


def own_arithmetic(module: nn.Module) -> str | None:
    """Returns in what a layer of Flax computes otherwise than Flax does, or None."""
    if getattr(module, "promote_dtype", promote_dtype) is not promote_dtype:
        return "promotes types in its own way"
    known = (None, conv_for_linen, lax.conv_general_dilated, lax.dot_general)
    for name in ("conv_general_dilated", "dot_general"):
        function = getattr(module, name, None)
        while isinstance(function, functools.partial):
            function = function.func
        if getattr(module, f"{name}_cls", None) is not None or function not in known:
            return f"computes in its own way ({name})"
    return None


def with_region_padding(
    module: nn.Conv, core: Inertial, x: Float[Array, "*batch h w c"]
) -> tuple[Float[Array, "*batch hp wp c"], Pads]:
    """Returns an input and the zeros around it that keep the convolution's output grid.

    A filter of another side, or a region, has its middle where the convolution has it.

    Args:
        module: The convolution.
        core: The inertial convolution that takes its place.
        x: The input. Where the convolution repeats the image around it (`CIRCULAR`,
            `REFLECT`), the result has this around it.
    """
    size = pair(module.kernel_size)
    side = core.region_size if core.reading == "window" else core.core_size
    padding = canonicalize_padding(module.padding, 2)
    mode = _REPEATING.get(padding) if isinstance(padding, str) else None
    if mode is not None:
        padding = [((k - 1) // 2, k // 2) for k in size]
    strides = stride_pair(module.strides)
    pads = explicit_padding(x.shape[-3:-1], size, strides, padding, (1, 1))
    top, left = (_moved(around, side - k) for around, k in zip(pads, size, strict=True))
    if mode is None:
        return x, (top, left)
    around = [(max(before, 0), max(after, 0)) for before, after in (top, left)]
    repeated = jnp.pad(x, ((0, 0),) * (x.ndim - 3) + (*around, (0, 0)), mode=mode)
    # What is cut off is not repeated.
    top, left = ((min(before, 0), min(after, 0)) for before, after in (top, left))
    return repeated, (top, left)


def _moved(around: Sequence[int], more: int) -> tuple[int, int]:
    """Returns padding for a filter that is larger by `more` pixels."""
    before, after = map(operator.index, around)
    return before + more // 2, after + more - more // 2
