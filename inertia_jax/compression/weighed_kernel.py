"""A kernel weighed by its layer's inputs, and the parameters of its factors."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from inertia_jax.compression.calibration import weighing
from inertia_jax.compression.sites import Factorised, Site
from inertia_jax.layers.kinds import bias_of, kind_of
from inertia_jax.ops.tucker.factors import (
    LowRankFactors,
    Tucker2Factors,
    factor_kernels,
)
from inertia_jax.ops.tucker.low_rank import low_rank, low_rank_to_kernel
from inertia_jax.ops.tucker.tucker import Method, tucker2
from inertia_jax.ops.tucker.unfold import split_groups
from inertia_jax.plan.specs import Conv, LowRank


class WeighedKernel:
    """A convolution with its kernel weighed by the layer's inputs.

    Attributes:
        site: The convolution.
        kernel: M^(1/2) K over the input channels, [*sides, c_in / groups, c_out]. M is
            the second moment of the inputs; without it, the kernel is K itself.
    """

    def __init__(
        self, site: Site, moment: Float[np.ndarray, "g c c"] | None = None
    ) -> None:
        """Weighs the kernel by the second moment of the inputs, if that is known."""
        self.site = site
        dtype = np.promote_types(site.kernel.dtype, np.float32)
        self.kernel = np.asarray(site.kernel, dtype)
        self._inverse: np.ndarray | None = None
        if moment is not None:
            root, self._inverse = weighing(moment)
            self.kernel = self._multiplied(root, self.kernel)

    def _multiplied(self, matrices: np.ndarray, kernel: Any) -> np.ndarray:
        """Multiplies each group's matrix into the input channels."""
        parts = np.asarray(split_groups(kernel, self.site.groups))
        parts = np.einsum("gij,g...jo->...igo", matrices, parts, optimize=True)
        return parts.reshape(*parts.shape[:-2], -1).astype(self.kernel.dtype)

    def factors(
        self, spec: Factorised, *, method: Method = "hosvd"
    ) -> Tucker2Factors | LowRankFactors:
        """Returns the kernel's factors, with the weighing undone.

        Args:
            spec: The form with the factors' ranks.
            method: The method of `ops.tucker2`.
        """
        groups = self.site.groups
        if isinstance(spec, LowRank):
            two = low_rank(self.kernel, rank=spec.rank, groups=groups)
            if self._inverse is None:
                return two
            product = low_rank_to_kernel(
                two, groups=groups, num_axes=self.site.num_axes
            )
            kernel = self._multiplied(self._inverse, product)
            return low_rank(kernel, rank=spec.rank, groups=groups)
        three = tucker2(
            self.kernel,
            rank_in=spec.rank_in,
            rank_out=spec.rank_out,
            method=method,
            groups=groups,
        )
        if self._inverse is None:
            return three
        u_in = np.asarray(three.u_in)
        # U_in is made orthonormal again, so that fine-tuning starts well conditioned.
        q, r = np.linalg.qr(self._inverse @ u_in.reshape(groups, -1, u_in.shape[1]))
        return three._replace(
            u_in=jnp.asarray(q.reshape(-1, q.shape[2]), u_in.dtype),
            core=jnp.asarray(self._multiplied(r, three.core)),
        )

    def dense_kernel(self, spec: Factorised, *, method: Method = "hosvd") -> np.ndarray:
        """Returns the kernel that the factors stand for."""
        factors, groups = self.factors(spec, method=method), self.site.groups
        kernel = np.asarray(kind_of(spec).to_kernel(factors, groups=groups))
        return kernel.reshape(self.site.kernel.shape)

    def parameters(
        self, spec: Conv | Factorised, leaves: Mapping[str, Any], *, method: Method
    ) -> dict[str, Any]:
        """Returns the layer's parameters in another form, by name.

        Args:
            spec: The form.
            leaves: The layer's present parameters, which give the type and the bias.
            method: The method of `ops.tucker2`.
        """
        dtype, bias = next(iter(leaves.values())).dtype, bias_of(leaves)
        parts: tuple[str, ...] = ("",)
        kernels: tuple[Any, ...] = (self.site.kernel,)
        if not isinstance(spec, Conv):
            # On devices, each reshape of each shape would be compiled by itself.
            factors = jax.device_get(self.factors(spec, method=method))
            kernels = factor_kernels(
                factors, groups=self.site.groups, num_axes=self.site.num_axes
            )
            parts = tuple(f"{part}/" for part in kind_of(spec).parts)
        new = {
            f"{part}kernel": jnp.asarray(kernel, dtype)
            for part, kernel in zip(parts, kernels, strict=True)
        }
        if bias is not None:
            new[f"{parts[-1]}bias"] = bias
        return new
