"""Layers that stand for calls that no other layer can replace."""

from collections.abc import Callable
from typing import Any

from flax import linen as nn


class Opaque(nn.Module):
    """A layer whose output is that of a function.

    Attributes:
        compute: The function, which takes what the layer is called with.
        why: The reason why nothing can stand in the layer's place.
    """

    compute: Callable[..., Any] = lambda x: x
    why: str = ""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.compute(*args, **kwargs)


# Not by statements: fields of Flax have types that beartype cannot check.
OpaqueConv: type[nn.Module] = type("OpaqueConv", (Opaque, nn.Conv), {})
OpaqueDense: type[nn.Module] = type("OpaqueDense", (Opaque, nn.Dense), {})
OpaqueConvTranspose: type[nn.Module] = type(
    "OpaqueConvTranspose", (Opaque, nn.ConvTranspose), {}
)
OpaqueDenseGeneral: type[nn.Module] = type(
    "OpaqueDenseGeneral", (Opaque, nn.DenseGeneral), {}
)
OpaqueEinsum: type[nn.Module] = type("OpaqueEinsum", (Opaque, nn.Einsum), {})
