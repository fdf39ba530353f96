"""Parameters and multiply-accumulates of a network, layer by layer."""

import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import traverse_util

Kind = Literal["conv", "dense", "other"]


@dataclasses.dataclass(frozen=True)
class LayerCost:
    """What one layer costs.

    Attributes:
        path: Where the layer stands, e.g. `layer1_0/conv1`.
        kind: `conv`, `dense`, or `other` for layers counted by parameters alone.
        output_shape: Of one image, without the batch; empty for `other`.
        params: Number of parameters.
        macs: Multiply-accumulates an image, without bias (FLOPs = 2 x MACs).
    """

    path: str
    kind: Kind
    output_shape: tuple[int, ...]
    params: int
    macs: int


@dataclasses.dataclass(frozen=True)
class CostTable:
    """What a network costs; prints as a table.

    Attributes:
        rows: One a layer that has parameters, in the order of the computation.
    """

    rows: tuple[LayerCost, ...]

    @property
    def params(self) -> int:
        """Number of parameters of the network."""
        return sum(row.params for row in self.rows)

    @property
    def macs(self) -> int:
        """Multiply-accumulates an image, of convolutions and linear layers."""
        return sum(row.macs for row in self.rows)

    def __str__(self) -> str:
        header = ("layer", "output", "parameters", "MACs")
        body = [
            (r.path, "x".join(map(str, r.output_shape)), f"{r.params:,}", f"{r.macs:,}")
            for r in self.rows
        ]
        total = ("total", "", f"{self.params:,}", f"{self.macs:,}")
        lines = [header, *body, total]
        widths = [max(len(line[i]) for line in lines) for i in range(4)]
        return "\n".join(
            f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c:>{widths[2]}}  {d:>{widths[3]}}"
            for a, b, c, d in lines
        )


def count_cost(model: nn.Module, input_shape: tuple[int, ...]) -> CostTable:
    """Counts parameters and MACs without running the network.

    A convolution costs `h_out w_out c_out kh kw c_in / groups` MACs an image, a linear
    layer `c_in c_out` a row. Any Linen model whose convolutions are `nn.Conv` and whose
    linear layers are `nn.Dense` is counted; parameters count whatever holds them.

    Args:
        model: Called as `model(images)`.
        input_shape: Of one image [h, w, c], or of a batch [n, h, w, c]; MACs are those
            of one image either way.

    Returns:
        The table.

    Raises:
        ValueError: `input_shape` has neither three nor four positive entries.
    """
    shape = tuple(int(size) for size in input_shape)
    if len(shape) not in (3, 4) or min(shape) < 1:
        raise ValueError(
            f"`input_shape` (={input_shape}) must be (h, w, c) or (n, h, w, c)."
        )
    calls: dict[str, tuple[Kind, tuple[int, ...]]] = {}

    def record(
        call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext
    ):
        output = call(*args, **kwargs)
        if context.method_name == "__call__":
            path = "/".join(context.module.path)
            if isinstance(context.module, nn.Conv):
                calls[path] = ("conv", output.shape[1:])
            elif isinstance(context.module, nn.Dense):
                calls[path] = ("dense", output.shape[1:])
            elif context.module.path:
                # Keeps the order of the computation; dropped below if it owns nothing.
                calls.setdefault(path, ("other", ()))
        return output

    with nn.intercept_methods(record):
        images = jax.ShapeDtypeStruct((1, *shape[-3:]), jnp.float32)
        variables = jax.eval_shape(model.init, jax.random.key(0), images)

    owned: dict[str, dict[str, Any]] = {}
    for (*path, name), value in traverse_util.flatten_dict(variables["params"]).items():
        owned.setdefault("/".join(path), {})[name] = value
    rows = []
    for path in [*calls, *(path for path in owned if path not in calls)]:
        if path not in owned:
            continue
        kind, output_shape = calls.get(path, ("other", ()))
        macs = 0
        if kind != "other":
            # Each output sums over all but the last axis of the kernel [.., c_out].
            macs = math.prod(output_shape) * math.prod(owned[path]["kernel"].shape[:-1])
        params = sum(math.prod(value.shape) for value in owned[path].values())
        rows.append(LayerCost(path, kind, output_shape, params, macs))
    return CostTable(tuple(rows))
