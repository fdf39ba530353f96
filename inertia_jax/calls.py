"""How every layer of a network is called: its module, and the shapes it sees."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from inertia_jax.factorised import LowRankConv, Pointwise, Tucker2Conv
from inertia_jax.inertial_layer import InertialConv


@dataclasses.dataclass(frozen=True)
class Call:
    """How a layer is called.

    Attributes:
        module: The layer; None for one whose operations are not counted.
        input_shape: [n, h, w, c_in].
        output_shape: Of one image.
    """

    module: Any
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]

    @property
    def is_factorised(self) -> bool:
        """Whether the layer's parts are layers themselves."""
        return isinstance(self.module, (Tucker2Conv, LowRankConv))


_COUNTED = (nn.Conv, nn.Dense, Pointwise, InertialConv, Tucker2Conv, LowRankConv)


def record_calls(
    model: nn.Module, shape: tuple[int, ...]
) -> tuple[dict[str, Call], Any]:
    """Returns how every layer is called, by path, and the shapes of all variables.

    Nothing is computed.

    Args:
        model: Called as `model(images)`.
        shape: Of one image [h, w, c], or of a batch.
    """
    calls: dict[str, Call] = {}

    def record(
        call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext
    ):
        output = call(*args, **kwargs)
        if context.method_name == "__call__" and context.module.path:
            path = "/".join(context.module.path)
            known = calls.get(path)
            if isinstance(context.module, _COUNTED):
                # What stands in for a layer is recorded before it, at the same path.
                if known is None or not known.is_factorised:
                    x = first_argument(args, kwargs)
                    calls[path] = Call(context.module, x.shape, output.shape[1:])
            else:
                # Keeps the order of the computation; dropped if it owns nothing.
                calls.setdefault(path, Call(None, (), ()))
        return output

    with nn.intercept_methods(record):
        images = jax.ShapeDtypeStruct((1, *shape[-3:]), jnp.float32)
        variables = jax.eval_shape(model.init, jax.random.key(0), images)
    return calls, variables


def first_argument(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Returns what a layer is called on, whether by place or by name."""
    return args[0] if args else next(iter(kwargs.values()))
