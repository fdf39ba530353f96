"""Probes how far the outputs of a network move when its layers lose energy."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from inertia_jax.calls import Network
from inertia_jax.compression.allocation import Forms, pooled
from inertia_jax.compression.sites import Factorised, leaves_at, with_leaves
from inertia_jax.compression.weighed_kernel import WeighedKernel
from inertia_jax.ops.tucker.tucker import Method
from inertia_jax.plan.specs import Conv
from inertia_jax.progress import Progress, counted

# The lost shares of energy at which a layer's effect on the outputs is measured.
_PROBES = (0.02, 0.05, 0.1, 0.2, 0.35, 0.6)


def with_forms(
    variables: Mapping[str, Any],
    specs: Mapping[str, Conv | Factorised],
    kernels: Mapping[str, WeighedKernel],
    *,
    method: Method,
) -> dict[str, Any]:
    """Returns a dense network's variables with the kernels that factors stand for.

    Nothing compiles anew for them, as it would for the factors.

    Args:
        variables: The variables of the dense network.
        specs: The forms, by path.
        kernels: The convolutions whose forms they are.
        method: The method of `ops.tucker2`.
    """
    changed = {}
    for path, spec in specs.items():
        layer = kernels[path]
        if not isinstance(spec, Conv) and spec != layer.site.spec:
            product = layer.dense_kernel(spec, method=method)
            kernel = jnp.asarray(product, layer.site.kernel.dtype)
            changed[path] = {**leaves_at(variables, path), "kernel": kernel}
    return with_leaves(variables, changed)


def measured_errors(
    dense: Network,
    kernels: Mapping[str, WeighedKernel],
    grids: Mapping[str, Forms],
    divergence: Callable[[Mapping[str, Any]], float],
    progress: Progress | None,
) -> dict[str, Callable[[np.ndarray], Any]]:
    """Returns, for each layer, the outputs' divergence by the share of energy lost.

    One layer at a time changes. Between the probes the divergence is interpolated.

    Args:
        dense: The network with ordinary convolutions alone.
        kernels: The convolutions that may change, by path.
        grids: Their forms, with the shares of energy that they lose.
        divergence: The result of `divergence_of` for the dense network.
        progress: A function that is told how many layers are done, as in `compress`.
    """
    functions: dict[str, Callable[[np.ndarray], Any]] = {}
    for path, layer in counted(kernels.items(), progress, "trying ranks of layers"):
        specs, _, lost = grids[path].hull()
        # A layer without a cheaper form has nothing to probe.
        probes = {int(np.argmin(np.abs(lost - p))) for p in _PROBES if specs}
        points = []
        for i in sorted(probes, key=lambda i: lost[i]):
            # HOSVD is enough: HOOI changes little in which layers matter.
            changed = with_forms(
                dense[1], {path: specs[i]}, {path: layer}, method="hosvd"
            )
            points.append((float(lost[i]), divergence(changed)))
        # A larger loss must not look better than a smaller one, nor as good: then forms
        # between the two would be of no use, and the rest of a budget not be spent.
        x, y = np.array([(0.0, 0.0), *pooled(points)]).T
        if x[-1] < 1:  # beyond the last probe the divergence grows in proportion
            x, y = np.append(x, 1.0), np.append(y, y[-1] / max(x[-1], 1e-12))
        functions[path] = functools.partial(np.interp, xp=x, fp=y)
    return functions
