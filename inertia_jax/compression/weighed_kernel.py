"""A kernel weighed by its layer's inputs, and the parameters of its factors."""

import functools
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
        parts = _split(np.asarray(kernel), self.site.groups)
        return self._joined(np.einsum("gij,gkjo->gkio", matrices, parts, optimize=True))

    def _joined(self, parts: np.ndarray) -> np.ndarray:
        """Returns a kernel from those of its groups, the inverse of `_split`."""
        joined = np.moveaxis(parts, 0, -2).astype(self.kernel.dtype)
        return joined.reshape(*self.kernel.shape[:-2], joined.shape[1], -1)

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
        """Returns the kernel that the factors stand for, up to rounding.

        Those of HOSVD are projections, for which nothing is compiled: a program for
        each pair of ranks takes a second.
        """
        shape = self.site.kernel.shape
        if method == "hosvd":
            product = self._projected(spec)
            if self._inverse is not None:
                product = self._multiplied(self._inverse, product)
            return product.reshape(shape)
        factors, groups = self.factors(spec, method=method), self.site.groups
        kernel = np.asarray(kind_of(spec).to_kernel(factors, groups=groups))
        return kernel.reshape(shape)

    def _projected(self, spec: Factorised) -> np.ndarray:
        """Projects the weighed kernel onto the leading vectors of its unfoldings."""
        parts, (u_in, u_out) = self._parts, self._bases
        if isinstance(spec, LowRank):
            u_in = u_in[..., : spec.rank]
            parts = np.einsum("gir,gjr,gkjo->gkio", u_in, u_in, parts, optimize=True)
        else:
            u_in, u_out = u_in[..., : spec.rank_in], u_out[..., : spec.rank_out]
            parts = np.einsum(
                *("gir,gjr,gkjp,gps,gos->gkio", u_in, u_in, parts, u_out, u_out),
                optimize=True,
            )
        return self._joined(parts)

    @functools.cached_property
    def _parts(self) -> np.ndarray:
        return _split(self.kernel.astype(np.float64), self.site.groups)

    @functools.cached_property
    def _bases(self) -> tuple[np.ndarray, np.ndarray]:
        """Left singular vectors of each group's unfoldings, the leading ones first."""
        parts = self._parts
        grams = (
            np.einsum("gkio,gkjo->gij", parts, parts, optimize=True),
            np.einsum("gkio,gkip->gop", parts, parts, optimize=True),
        )
        u_in, u_out = (np.linalg.eigh(gram)[1][..., ::-1] for gram in grams)
        return u_in, u_out

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


def _split(
    kernel: Float[np.ndarray, "*sides c_in c_out"], groups: int
) -> Float[np.ndarray, "g k c_in c_out_group"]:
    """Returns each group's kernel, its sides as one axis.

    It is NumPy's: on devices, each reshape of each shape would be compiled by itself.
    """
    *_, c_in, c_out = kernel.shape
    parts = kernel.reshape(-1, c_in, groups, c_out // groups)
    return np.moveaxis(parts, 2, 0)
