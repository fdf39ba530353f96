"""The convolutions of a network that can be factorised, and the cost of each form."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from flax import traverse_util
from flax.core import meta
from jaxtyping import Float

from inertia_jax.calls import record_calls
from inertia_jax.compression.planned import cannot_factorise
from inertia_jax.layers.kinds import dense_kernel, kind_of, spec_of
from inertia_jax.ops.conv.conv import pair
from inertia_jax.plan.plan import Plan, plan_of
from inertia_jax.plan.specs import Conv, Inertial, LowRank, Tucker2, core_of

Factorised = Tucker2 | LowRank


@dataclasses.dataclass(frozen=True)
class Site:
    """A convolution as it stands in a network.

    Attributes:
        path: The layer's path.
        kernel: The dense kernel [kh, kw, c_in / groups, c_out], multiplied out where
            the layer is factorised.
        groups: The number of groups of channels.
        strides: The vertical and the horizontal stride.
        padding: The layer's padding, in the layer's own form.
        dilation: The vertical and the horizontal dilation.
        calls: Shapes of input [h, w, c_in] and output [h_out, w_out, c_out] of every
            call, for one image.
        spec: The form of the layer.
        core: The ordinary convolution of that place, with the filters that the plan
            has for it.
    """

    path: str
    kernel: Float[np.ndarray, "kh kw c_in c_out"]
    groups: int
    strides: tuple[int, int]
    padding: Any
    dilation: tuple[int, int]
    calls: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]
    spec: Conv | Factorised
    core: Conv

    @property
    def is_pointwise(self) -> bool:
        """Whether the filters are 1 x 1, and no plan gave them this size."""
        return self.kernel.shape[:2] == (1, 1) and self.core == Conv()

    @property
    def geometry(self) -> tuple[Any, ...]:
        """Everything that the time of the layer depends on, besides its form."""
        steps = (self.strides, self.dilation, str(self.padding))
        return (self.kernel.shape, self.groups, self.calls, *steps)

    def macs(self, spec: Conv | Factorised) -> int:
        """Returns the multiply-accumulates per image in this form."""
        return sum(
            positions * math.prod(kernel) for positions, kernel in self._parts(spec)
        )

    def params(self, spec: Conv | Factorised) -> int:
        """Returns the number of parameters in this form, without the bias."""
        return sum(math.prod(kernel) for _, kernel in self._parts(spec))

    def kernel_shapes(self, spec: Conv | Factorised) -> list[tuple[int, ...]]:
        """Returns the shapes of the kernels that are applied one after another."""
        return [kernel for _, kernel in self._parts(spec)]

    def _parts(self, spec: Conv | Factorised) -> list[tuple[int, tuple[int, ...]]]:
        """Returns the number of positions and the shape of each kernel in turn."""
        kh, kw, c_in, c_out = self.kernel.shape
        before = sum(math.prod(into[:2]) for into, _ in self.calls)
        after = sum(math.prod(out[:2]) for _, out in self.calls)
        if isinstance(spec, Tucker2):
            r_in, r_out = spec.rank_in, self.groups * spec.rank_out
            return [
                (before, (1, 1, c_in, self.groups * r_in)),
                (after, (kh, kw, r_in, r_out)),
                (after, (1, 1, spec.rank_out, c_out)),
            ]
        if isinstance(spec, LowRank):
            left = (1, 1, c_in, self.groups * spec.rank)
            return [(after, left), (after, (1, 1, spec.rank, c_out))]
        return [(after, (kh, kw, c_in, c_out))]


def find_sites(
    model: nn.Module, variables: Mapping[str, Any], image_shape: tuple[int, ...]
) -> dict[str, Site]:
    """Returns the convolutions that can be factorised, by path, first to last.

    Raises:
        ValueError: A kernel that is not finite, or variables of another network.
    """
    calls, expected = record_calls(model, image_shape)
    expected = meta.unbox(expected)
    plan = plan_of(model) or Plan()
    inside = {path for path, call in calls.items() if call.is_factorised}
    sites = {}
    for path, call in calls.items():
        # A plan has no name for the network itself.
        is_part = path.rpartition("/")[0] in inside
        if not path or is_part or not _has_kernel(call.module):
            continue
        module, leaves = call.module, leaves_at(variables, path)
        for name, leaf in leaves_at(expected, path).items():
            found = np.shape(leaves[name]) if name in leaves else "missing"
            if found != tuple(leaf.shape):
                raise ValueError(
                    f"`variables` do not belong to `model`: {path}/{name} is {found}, "
                    f"must be {tuple(leaf.shape)}."
                )
        kernel = np.asarray(jax.device_get(dense_kernel(module, leaves)))
        if not np.isfinite(kernel).all():
            raise ValueError(f"the kernel of {path!r} must be finite; it is not.")
        core = core_of(plan.spec(path))
        sites[path] = Site(
            path=path,
            kernel=kernel,
            groups=module.feature_group_count,
            strides=pair(module.strides or 1),
            padding=module.padding,
            dilation=pair(getattr(module, "kernel_dilation", None) or 1),
            calls=tuple((c.input_shape[1:], c.output_shape) for c in call.every),
            spec=spec_of(module),
            core=core if isinstance(core, Conv) else Conv(),
        )
    return sites


def subtree(collection: Mapping[str, Any], path: str) -> dict[str, Any]:
    """Returns a layer's variables in one collection, {} if it has none there."""
    node: Any = collection
    for name in path.split("/"):
        node = node.get(name, {}) if isinstance(node, Mapping) else {}
    return dict(node)


def leaves_at(variables: Mapping[str, Any], path: str) -> dict[str, Any]:
    """Returns the parameters of a layer, those of its parts as `PART/kernel`."""
    params = subtree(variables.get("params", {}), path)
    return traverse_util.flatten_dict(params, sep="/")


def with_leaves(
    variables: Mapping[str, Any], changed: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """Returns variables with other parameters (as from `leaves_at`) at some paths."""
    flat = traverse_util.flatten_dict(dict(variables["params"]), sep="/")
    kept = {
        name: leaf
        for name, leaf in flat.items()
        if not any(name.startswith(f"{path}/") for path in changed)
    }
    for path, leaves in changed.items():
        kept |= {f"{path}/{name}": leaf for name, leaf in leaves.items()}
    return {**variables, "params": traverse_util.unflatten_dict(kept, sep="/")}


def _has_kernel(module: Any) -> bool:
    """Returns whether a layer computes what a convolution of one kernel can."""
    if kind_of(module).parts:
        return not isinstance(core_of(spec_of(module)), Inertial)
    return type(module) is nn.Conv and cannot_factorise(module) is None
