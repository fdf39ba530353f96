"""The convolutions of a network that can be factorised, and what each form costs."""

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
from inertia_jax.plan.plan import Plan
from inertia_jax.plan.specs import Conv, Inertial, LowRank, Tucker2, core_of

Factorised = Tucker2 | LowRank


@dataclasses.dataclass(frozen=True)
class Site:
    """A convolution as it stands in a network.

    Attributes:
        path: The layer's path.
        kernel: The dense one [kh, kw, c_in / groups, c_out], multiplied out where the
            layer is factorised.
        groups: Number of groups of channels.
        strides: Vertical and horizontal.
        padding: The layer's padding, in the layer's own form.
        dilation: Vertical and horizontal.
        input_shape: Shape of one image [h, w, c_in].
        output_shape: Its output's shape [h_out, w_out, c_out].
        spec: The form of the layer.
        core: The ordinary convolution of that place, with the filters that the plan
            has for it.
        again: Input and output shape of each further call of the layer.
    """

    path: str
    kernel: Float[np.ndarray, "kh kw c_in c_out"]
    groups: int
    strides: tuple[int, int]
    padding: Any
    dilation: tuple[int, int]
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    spec: Conv | Tucker2 | LowRank
    core: Conv
    again: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...] = ()

    @property
    def is_pointwise(self) -> bool:
        """Whether the filters are 1 x 1, of the network itself."""
        return self.kernel.shape[:2] == (1, 1) and self.core == Conv()

    @property
    def geometry(self) -> tuple[Any, ...]:
        """Everything that the time of the layer depends on, besides its form."""
        shapes = (self.kernel.shape, self.groups, self.input_shape, self.output_shape)
        return (*shapes, self.again, self.strides, self.dilation, str(self.padding))

    @property
    def calls(self) -> tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]:
        """Input and output shape of every call."""
        return ((self.input_shape, self.output_shape), *self.again)

    def macs(self, spec: Conv | Factorised) -> int:
        """Returns the multiply-accumulates of an image in this form."""
        return sum(
            positions * math.prod(kernel) for positions, kernel in self._parts(spec)
        )

    def params(self, spec: Conv | Factorised) -> int:
        """Returns the parameters in this form, without the bias."""
        return sum(math.prod(kernel) for _, kernel in self._parts(spec))

    def kernel_shapes(self, spec: Conv | Factorised) -> list[tuple[int, ...]]:
        """Returns the shapes of the kernels that are applied one after another."""
        return [kernel for _, kernel in self._parts(spec)]

    def _parts(self, spec: Conv | Factorised) -> list[tuple[int, tuple[int, ...]]]:
        """Returns at how many positions each kernel is applied, and its shape."""
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

    Args:
        model: Called as `model(images)`, with `train=False` where it takes `train`.
        variables: Its variables.
        image_shape: [h, w, c].

    Raises:
        ValueError: A kernel that is not finite, or variables of another network.
    """
    calls, expected = record_calls(model, image_shape)
    expected = meta.unbox(expected)
    inside = {path for path, call in calls.items() if call.is_factorised}
    sites = {}
    for path, call in calls.items():
        # A plan has no name for the network itself.
        if not path or path.rpartition("/")[0] in inside:
            continue
        if not _has_kernel(call.module):
            continue
        leaves = leaves_at(variables, path)
        _check_leaves(path, leaves, leaves_at(expected, path))
        module = call.module
        kernel = np.asarray(jax.device_get(dense_kernel(module, leaves)))
        if not np.isfinite(kernel).all():
            raise ValueError(f"the kernel of {path!r} must be finite; it is not.")
        sites[path] = Site(
            path=path,
            kernel=kernel,
            groups=module.feature_group_count,
            strides=pair(module.strides or 1),
            padding=module.padding,
            dilation=pair(getattr(module, "kernel_dilation", None) or 1),
            input_shape=tuple(call.input_shape[1:]),
            output_shape=tuple(call.output_shape),
            spec=spec_of(module),
            core=_core(model, path),
            again=tuple((a.input_shape[1:], a.output_shape) for a in call.again),
        )
    return sites


def _check_leaves(
    path: str, leaves: Mapping[str, Any], expected: Mapping[str, Any]
) -> None:
    """Raises ValueError unless a layer's parameters are there, in its shapes."""
    for name, leaf in expected.items():
        found = np.shape(leaves[name]) if name in leaves else "missing"
        if found != tuple(leaf.shape):
            raise ValueError(
                f"`variables` do not belong to `model`: {path}/{name} is {found}, must "
                f"be {tuple(leaf.shape)}."
            )


def leaves_at(variables: Mapping[str, Any], path: str) -> dict[str, Any]:
    """Returns the parameters of a layer, those of its parts as `PART/kernel`."""
    node: Any = variables.get("params", {})
    for name in path.split("/"):
        node = node.get(name, {}) if isinstance(node, Mapping) else {}
    return traverse_util.flatten_dict(dict(node), sep="/") if node else {}


def with_leaves(
    variables: Mapping[str, Any], changed: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """Returns variables with other parameters at some layers.

    Args:
        variables: Variables as `model.init` gives them.
        changed: By layer path, parameters as `leaves_at` names them.
    """
    flat = traverse_util.flatten_dict(dict(variables["params"]), sep="/")
    kept = {
        name: leaf
        for name, leaf in flat.items()
        if not any(name.startswith(f"{path}/") for path in changed)
    }
    for path, leaves in changed.items():
        kept |= {f"{path}/{name}": leaf for name, leaf in leaves.items()}
    return {**variables, "params": traverse_util.unflatten_dict(kept, sep="/")}


def _core(model: nn.Module, path: str) -> Conv:
    plan = getattr(model, "plan", None)
    spec = plan.spec(path) if isinstance(plan, Plan) else Conv()
    core = core_of(spec)
    return core if isinstance(core, Conv) else Conv()


def _has_kernel(module: Any) -> bool:
    """Returns whether a layer is, or stands in for, a convolution of one kernel."""
    if kind_of(module).parts:
        return not isinstance(core_of(spec_of(module)), Inertial)
    return type(module) is nn.Conv and cannot_factorise(module) is None
