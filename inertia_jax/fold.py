"""BatchNorm merged into the convolution before it: the same function, fewer layers."""

import collections
import dataclasses
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import ClosedJaxpr, Jaxpr

from inertia_jax.factorised import LowRankConv, Tucker2Conv
from inertia_jax.inertial_layer import InertialConv
from inertia_jax.models import image_shape_of

# Layers that a scale of their outputs can be merged into, and the kernel that takes it:
# outputs are its last axis, and the bias stands beside it.
_KERNELS: dict[type, str] = {
    nn.Conv: "kernel",
    nn.Dense: "kernel",
    InertialConv: "kernel",
    Tucker2Conv: "u_out/kernel",
    LowRankConv: "right/kernel",
}
_MARK = "inertia_jax.fold"


class Folded(nn.Module):
    """A network in evaluation mode without the BatchNorm that its kernels contain.

    Variables are those of the network, under the same names, but for the parameters and
    statistics of the merged BatchNorm layers, which are gone, and a bias in each layer
    that one was merged into.

    Attributes:
        unfolded: The network.
        folded: Pairs of paths, a layer and the BatchNorm merged into it.
        kept: Pairs of a BatchNorm's path and why it could not be merged.

    Raises:
        ValueError: The network is called in training mode.
    """

    unfolded: nn.Module
    folded: tuple[tuple[str, str], ...] = ()
    kept: tuple[tuple[str, str], ...] = ()

    def setup(self) -> None:
        nn.share_scope(self, self.unfolded)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        layers = {layer for layer, _ in self.folded}
        norms = {norm for _, norm in self.folded}
        if kwargs.get("train"):
            raise ValueError(_no_training(self.unfolded))

        def replace(
            call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext
        ) -> Any:
            module: Any = context.module
            path = "/".join(module.path)
            if context.method_name != "__call__":
                return call(*args, **kwargs)
            if type(module) is nn.BatchNorm and path in norms:
                if not _uses_running_average(module, args, kwargs):
                    raise ValueError(_no_training(self.unfolded))
                return _as_normalised(module, args[0] if args else kwargs["x"])
            if type(module) in _KERNELS and path in layers and not module.use_bias:
                # Made anew in the same place, so that a model's own code, which knows
                # of no bias, need not change.
                layer = module.clone(parent=module.scope.rewound(), use_bias=True)
                return layer(*args, **kwargs)
            return call(*args, **kwargs)

        with nn.intercept_methods(replace):
            return self.unfolded(*args, **kwargs)


def fold_batch_norm(
    model: nn.Module,
    variables: Mapping[str, Any],
    *,
    image_shape: tuple[int, ...] | None = None,
) -> tuple[Folded, dict[str, Any]]:
    """Merges every BatchNorm that directly follows a convolution into its kernel.

    With running mean mu, variance v, scale g and offset h, an output channel becomes

        g (K x + b - mu) / sqrt(v + epsilon) + h = (s K) x + (s (b - mu) + h),
        s = g / sqrt(v + epsilon)

    so that kernel and bias take it in: those of `nn.Conv` and `nn.Dense`, of the last
    factor of a Tucker-2 or low-rank convolution, whatever its core, and of the core of
    an inertial one. Its friction is of the input, so that gates stay as they are (up to
    the rounding of that input), and detail, where it is linear in the core, scales with
    it. A BatchNorm stays, and `model.kept` says why, after

    - an inertial convolution with `combine="max"`, where a scale is negative;
    - one with `combine="stack"`, where two channels share a filter;
    - anything but the output of one such layer that nothing else uses, be it called
      twice, or inside `nn.scan` or `nn.vmap`.

    Nothing of the model is edited: which layer is followed by what is read off its
    trace. Checkpoints are of networks that can be trained on: fold what they give.

    Args:
        model: Called as `model(images)`, with `train=False` where it takes `train`; one
            that is folded comes back as it is.
        variables: Its trained variables; they are not changed.
        image_shape: [h, w, c] of an input; None: the one that a network of this library
            was published for.

    Returns:
        (model, variables) of the same function in evaluation mode, up to rounding.

    Raises:
        ValueError: No `image_shape` where it is needed, or variables that are not the
            model's.
    """
    if isinstance(model, Folded):
        return model, dict(variables)
    shape = image_shape_of(model, image_shape)
    trace = _trace(model, shape)
    flat = {
        (collection, path): value
        for collection, tree in variables.items()
        for path, value in traverse_util.flatten_dict(dict(tree), sep="/").items()
    }
    folded, kept = [], []
    for path, norm in trace.norms.items():
        layer = trace.layer_before(path)
        reason = None if layer is None else _cannot_fold(trace.layers[layer], norm)
        if layer is None:
            reason = "does not follow one layer whose output nothing else uses"
        if reason is None and layer is not None:
            reason = _merge(flat, layer, trace.layers[layer], path, norm)
        if reason is None and layer is not None:
            folded.append((layer, path))
        else:
            kept.append((path, str(reason)))
    merged: dict[str, Any] = {name: {} for name in variables if name != "batch_stats"}
    for (collection, path), value in flat.items():
        merged.setdefault(collection, {})[path] = value
    trees = {
        collection: traverse_util.unflatten_dict(tree, sep="/")
        for collection, tree in merged.items()
    }
    return Folded(model, tuple(folded), tuple(kept)), trees


def _no_training(model: nn.Module) -> str:
    return (
        f"`train` (=True) must be False: BatchNorm of this {type(model).__name__} is "
        f"folded into its kernels; train the network that was folded."
    )


def _uses_running_average(module: nn.BatchNorm, args: Any, kwargs: Any) -> bool:
    given = args[1] if len(args) > 1 else kwargs.get("use_running_average")
    return bool(module.use_running_average if given is None else given)


def _as_normalised(module: nn.BatchNorm, x: jax.Array) -> jax.Array:
    """Returns `x` in the type that BatchNorm would return it in."""
    weights = [module.param_dtype] * (module.use_scale + module.use_bias)
    return x.astype(module.dtype or jnp.result_type(x, *weights))


@dataclasses.dataclass(frozen=True)
class _Trace:
    """What a network's trace says of its layers.

    Attributes:
        layers: Those that a scale can be merged into, by path.
        norms: BatchNorm layers, by path.
        follows: The layer whose output, used nowhere else, a BatchNorm is called on, by
            path; one entry a call.
        calls: How often each path is called.
    """

    layers: dict[str, Any]
    norms: dict[str, nn.BatchNorm]
    follows: dict[str, str]
    calls: collections.Counter[str]

    def layer_before(self, norm: str) -> str | None:
        """Returns the path of the layer whose output only this BatchNorm uses."""
        layer = self.follows.get(norm)
        if layer is None or self.calls[layer] != 1 or self.calls[norm] != 1:
            return None
        return layer


def _trace(model: nn.Module, image_shape: tuple[int, ...]) -> _Trace:
    layers: dict[str, Any] = {}
    norms: dict[str, nn.BatchNorm] = {}
    outputs: dict[str, Any] = {}

    def mark(
        call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext
    ) -> Any:
        module: Any = context.module
        path = "/".join(module.path)
        if context.method_name != "__call__":
            return call(*args, **kwargs)
        if type(module) is nn.BatchNorm:
            x, *rest = args or (kwargs.pop("x"),)
            axis = -1 if module.axis == x.ndim - 1 else module.axis
            norms[path] = module.copy(parent=None, axis=axis)
            return call(checkpoint_name(x, f"{_MARK}:norm:{path}"), *rest, **kwargs)
        output = call(*args, **kwargs)
        # What stands in for a layer is called, and marked, inside it at the same path.
        if type(module) not in _KERNELS or outputs.get(path) is output:
            return output
        layers[path] = module.copy(parent=None)
        outputs[path] = checkpoint_name(output, f"{_MARK}:layer:{path}")
        return outputs[path]

    options: dict[str, Any] = {}
    if "train" in inspect.signature(type(model).__call__).parameters:
        options["train"] = False
    images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    with nn.intercept_methods(mark):
        init = jax.make_jaxpr(lambda key, x: model.init(key, x, **options))
        jaxpr = init(jax.random.key(0), images).jaxpr
    follows: dict[str, str] = {}
    calls: collections.Counter[str] = collections.Counter()
    for inner in _with_subjaxprs(jaxpr):
        uses = collections.Counter(id(v) for eqn in inner.eqns for v in eqn.invars)
        uses.update(id(v) for v in inner.outvars)
        made_by: dict[int, str] = {}
        for eqn in inner.eqns:
            mark_of, kind, path = _read_mark(eqn)
            if mark_of != _MARK:
                continue
            calls[path] += 1
            if kind == "layer":
                made_by[id(eqn.outvars[0])] = path
            elif uses[id(eqn.invars[0])] == 1 and id(eqn.invars[0]) in made_by:
                follows[path] = made_by[id(eqn.invars[0])]
    return _Trace(layers, norms, follows, calls)


def _read_mark(eqn: Any) -> tuple[str, str, str]:
    name = eqn.params.get("name") if eqn.primitive.name == "name" else None
    mark, _, rest = str(name).partition(":")
    kind, _, path = rest.partition(":")
    return mark, kind, path


def _with_subjaxprs(jaxpr: Any) -> Iterator[Any]:
    yield jaxpr
    for eqn in jaxpr.eqns:
        for value in jax.tree.leaves(list(eqn.params.values()), is_leaf=_is_jaxpr):
            if _is_jaxpr(value):
                yield from _with_subjaxprs(getattr(value, "jaxpr", value))


def _is_jaxpr(value: Any) -> bool:
    return isinstance(value, (ClosedJaxpr, Jaxpr))


def _cannot_fold(layer: Any, norm: nn.BatchNorm) -> str | None:
    """Returns why a BatchNorm cannot be merged, its numbers apart; None if it can."""
    if norm.axis != -1:
        return f"normalises axis {norm.axis}, not the channels"
    if isinstance(layer, InertialConv) and layer.combine == "stack":
        return "follows combine='stack', whose filters serve two channels each"
    return None


def _merge(
    flat: dict[tuple[str, str], Any],
    layer_path: str,
    layer: Any,
    norm_path: str,
    norm: nn.BatchNorm,
) -> str | None:
    """Merges a BatchNorm into `flat`, or returns why it cannot be, and changes nothing.

    Raises:
        ValueError: `flat` lacks a variable of either.
    """

    def find(collection: str, path: str) -> Any:
        if (collection, path) not in flat:
            raise ValueError(f"`variables` has no {path!r} in {collection!r}.")
        return flat[collection, path]

    def wide(collection: str, path: str) -> np.ndarray:
        return np.asarray(find(collection, path)).astype(np.float64)

    kernel_path = f"{layer_path}/{_KERNELS[type(layer)]}"
    bias_path = f"{kernel_path.rpartition('/')[0]}/bias"
    mean = wide("batch_stats", f"{norm_path}/mean")
    scale = 1 / np.sqrt(wide("batch_stats", f"{norm_path}/var") + norm.epsilon)
    if norm.use_scale:
        scale = scale * wide("params", f"{norm_path}/scale")
    dtype = find("params", kernel_path).dtype
    kernel = wide("params", kernel_path)
    if scale.ndim != 1:
        return "holds the variables of several layers"
    if isinstance(layer, InertialConv) and layer.combine == "max" and scale.min() < 0:
        return "follows combine='max' and has a negative scale"
    shift = -mean
    if layer.use_bias:
        shift = wide("params", bias_path) - mean
    shift = scale * shift
    if norm.use_bias:
        shift = shift + wide("params", f"{norm_path}/bias")
    flat["params", kernel_path] = jnp.asarray((kernel * scale).astype(dtype))
    flat["params", bias_path] = jnp.asarray(shift.astype(dtype))
    for place in [p for p in flat if p[1].rpartition("/")[0] == norm_path]:
        del flat[place]
    return None
