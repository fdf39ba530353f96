"""The kinds of layers: the spec, the parts and the kernel of each.

Costs, folding, reconstruction and checkpoints of PyTorch ask here what a layer is made
of. A new kind of layer needs its Linen module and, for a plan to name it, a spec in
`specs.Spec` whose fields are fields of the module under the same names. One entry in
`KINDS` then makes the layer known to all of them; `models.layers.Layers.conv` says how
a plan makes one. `docs/architecture.md` lists what `compress` needs besides.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from flax import linen as nn
from jax.typing import ArrayLike
from jaxtyping import Float

from inertia_jax.layers.inertial import InertialConv
from inertia_jax.layers.low_rank import LowRankConv, LowRankDense
from inertia_jax.layers.pointwise import Pointwise
from inertia_jax.layers.tucker import Tucker2Conv
from inertia_jax.ops.tucker.factors import (
    LowRankFactors,
    Tucker2Factors,
    as_matrix,
    stack_groups,
)
from inertia_jax.ops.tucker.low_rank import low_rank_to_kernel
from inertia_jax.ops.tucker.tucker import tucker2_to_kernel
from inertia_jax.plan.specs import Conv, Inertial, LowRank, Tucker2, core_of, fields_as

KindName = Literal["conv", "inertial", "tucker2", "low_rank", "dense", "other"]


@dataclasses.dataclass(frozen=True)
class Kind:
    """The spec, the parts and the factors of a kind of layer.

    Attributes:
        name: The kind, as the table of costs has it.
        spec: The class of a plan's spec for such a layer, or None for a layer that no
            plan chooses.
        parts: Names of the layers that it consists of, in the order of computation. The
            first and last have one tap, the last has the bias; one between is `core`.
        ranks: Names of its ranks, fields of the spec and of the layer.
        factors: Class of the tuple of its factors, in the order of `parts`.
        to_kernel: Their product as a function, `to_kernel(factors, groups=groups)`.
    """

    name: KindName
    spec: type | None = None
    parts: tuple[str, ...] = ()
    ranks: tuple[str, ...] = ()
    factors: Any = None
    to_kernel: Any = None


_LOW_RANK = Kind(
    "low_rank",
    LowRank,
    parts=("left", "right"),
    ranks=("rank",),
    factors=LowRankFactors,
    to_kernel=low_rank_to_kernel,
)
# Subclasses count as what they derive from.
KINDS: dict[type[nn.Module], Kind] = {
    nn.Conv: Kind("conv", Conv),
    nn.Dense: Kind("dense"),
    InertialConv: Kind("inertial", Inertial),
    Tucker2Conv: Kind(
        "tucker2",
        Tucker2,
        parts=("u_in", "core", "u_out"),
        ranks=("rank_in", "rank_out"),
        factors=Tucker2Factors,
        to_kernel=tucker2_to_kernel,
    ),
    LowRankConv: _LOW_RANK,
    LowRankDense: _LOW_RANK,
}
# Kinds that a plan chooses between.
CONVOLUTIONS = {kind.name for kind in KINDS.values() if kind.spec is not None}
_OTHER = Kind("other")
# Layers of Flax with a kernel that no factors stand for: convolutions of other kinds,
# and linear layers over several axes.
OTHER_CONVOLUTIONS: tuple[type[nn.Module], ...] = (nn.ConvTranspose, nn.ConvLocal)
OTHER_LINEAR: tuple[type[nn.Module], ...] = (nn.DenseGeneral, nn.Einsum)


def kind_of(module: Any) -> Kind:
    """Returns the kind of a layer, or of a spec; `other` for what is not listed."""
    for cls, kind in KINDS.items():
        if isinstance(module, cls) or type(module) is kind.spec:
            return kind
    return _OTHER


def num_axes(module: Any) -> int:
    """Returns the number of axes of an image of a layer; 0 for a linear layer."""
    if isinstance(module, (nn.Dense, LowRankDense, *OTHER_LINEAR)):
        return 0
    if isinstance(module, InertialConv):
        return 2
    if isinstance(module, Pointwise):
        return module.num_axes
    if isinstance(module, (Tucker2Conv, LowRankConv)):
        return len(module.sides)
    # A number is the filter size of a one-dimensional `nn.Conv`.
    return len(module.kernel_size) if np.ndim(module.kernel_size) else 1


def ranks_of(module: Any) -> tuple[int, ...]:
    """Returns the ranks of a layer, or of a spec; () without factors."""
    return tuple(getattr(module, name) for name in kind_of(module).ranks)


def spec_of(module: Any) -> Any:
    """Returns the spec that a plan has for this convolution.

    Raises:
        ValueError: The layer is no convolution.
    """
    spec = kind_of(module).spec
    if spec is None:
        raise ValueError(f"`module` (={type(module).__name__}) must be a convolution.")
    if spec is Conv:
        # A plan does not name the side of the network's own filters.
        return Conv()
    return spec(**fields_as(spec, module))


def output_kernel(module: Any) -> str:
    """Returns the name of the kernel that a scale of the outputs multiplies.

    Outputs are its last axis, and the bias stands beside it.
    """
    return "/".join((*kind_of(module).parts[-1:], "kernel"))


def bias_of(leaves: Mapping[str, Any]) -> Any:
    """Returns a layer's bias from its parameters, or None."""
    names = [name for name in leaves if name.rpartition("/")[2] == "bias"]
    return leaves[names[0]] if names else None


def linear_parts(module: Any) -> tuple[str, ...]:
    """Returns the parts of a convolution that its output is linear in.

    The convolution itself is "", where it has no parts.
    """
    kind = kind_of(module)
    # A subclass of Flax's convolution may compute anything.
    if kind.spec is None or (kind.spec is Conv and type(module) is not nn.Conv):
        return ()
    parts, core = kind.parts or ("",), core_of(spec_of(module))
    if isinstance(core, Inertial):
        # Friction depends on the output of the parts before the core.
        parts = parts[parts.index("core") :] if kind.parts else parts
        return parts[1:] if core.combine == "max" else parts
    return parts


def dense_kernel(
    module: Any, leaves: Mapping[str, Any]
) -> Float[ArrayLike, "*sides c_in c_out"]:
    """Returns the kernel of a convolution, its factors multiplied out.

    The core is an ordinary one. Parameters of the parts are named `PART/kernel`.
    """
    kind = kind_of(module)
    if not kind.parts:
        return leaves["kernel"]
    kernels = [np.asarray(leaves[f"{part}/kernel"]) for part in kind.parts]
    groups = getattr(module, "feature_group_count", 1)
    into, out = stack_groups(kernels[0], groups), as_matrix(kernels[-1]).T
    kernel = kind.to_kernel(kind.factors(into, *kernels[1:-1], out), groups=groups)
    # The core has all sides, and so has every factor where there is none.
    return kernel.reshape(*kernels[-2].shape[:-2], *kernel.shape[-2:])
