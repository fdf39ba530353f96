"""Measurements on calibration images: moments of inputs, divergence of outputs."""

import collections
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util
from jax import Array
from jaxtyping import Float

from inertia_jax.calls import ApplyFn, apply_network, one_array, own_errors, takes_train
from inertia_jax.compression.sites import Site, layer_places
from inertia_jax.intercept import first_argument, on_calls
from inertia_jax.ops.precision import at_least_float32

# The ridge added to the eigenvalues, relative to their mean. Without it, directions
# that inputs hardly use would blow up when the weighing is undone.
_RIDGE = 1e-3
# The collection that sums of inputs' products are in, and their name there.
_MOMENTS, _SUMS = "inertia_jax moments", "inertia_jax sums"


def batch_norm_paths(variables: Mapping[str, Any]) -> set[tuple[str, ...]]:
    """Returns the paths of BatchNorm's running statistics in `batch_stats`.

    They are the `mean` and `var` of a module that has nothing else there. What other
    modules have there, such as spectral normalisation, is none of BatchNorm's.
    """
    stats = traverse_util.flatten_dict(dict(variables.get("batch_stats", {})))
    names: dict[tuple[str, ...], set[str]] = collections.defaultdict(set)
    for *module, name in stats:
        names[tuple(module)].add(name)
    return {path for path in stats if names[path[:-1]] == {"mean", "var"}}


def apply_as_trained(
    model: nn.Module,
    variables: Mapping[str, Any],
    images: Any,
    *,
    train: bool | None = None,
    apply_fn: ApplyFn | None = None,
    recorded: Sequence[str] = (),
) -> tuple[Any, Mapping[str, Any]]:
    """Returns outputs under the batch's own statistics, and all that the call changed.

    BatchNorm's statistics are then those that recalibration will give, so an error that
    only shifts or scales a channel does not count. The call may change all collections
    but `params`; the `intermediates` that layers sowed are returned with them.

    Args:
        model: The network.
        variables: Its variables.
        images: A batch of its inputs.
        train: Whether the model is called in training mode. None: it is if it has
            BatchNorm and can be told.
        apply_fn: How the network is called, as in `compress`.
        recorded: Further collections that the call may make.
    """
    can_train = takes_train(model, apply_fn)
    mutable = ("batch_stats", "thresholds") if can_train else ()
    if train is None:
        # Dropout is on in training mode, so only BatchNorm is a reason for it; the mean
        # friction is none.
        train = can_train and bool(batch_norm_paths(variables))
    with own_errors(model, images):
        return apply_network(
            model,
            variables,
            images,
            train=train,
            apply_fn=apply_fn,
            mutable=(*mutable, "intermediates", *recorded),
        )


def input_moments(
    model: nn.Module,
    variables: Mapping[str, Any],
    sites: Mapping[str, Site],
    batches: Iterable[Any],
    apply_fn: ApplyFn | None,
) -> dict[str, Float[np.ndarray, "g c c"]]:
    """Returns the mean of x x^T over each layer's inputs, for every group of channels.

    The moments are not centred, because an error of the mean is an error too. They are
    summed in a collection of variables, which `nn.remat`, `nn.jit` and `nn.cond` pass
    on. Layers in `nn.scan` and `nn.vmap`, which do not, are left out.

    Raises:
        ValueError: Inputs that are not finite.
    """
    places = layer_places(variables["params"])
    sums = {}
    for path, site in sites.items():
        channels, dtype = site.kernel.shape[-2], at_least_float32(site.kernel.dtype)
        zeros = jnp.zeros((site.groups, channels, channels), dtype)
        sums[*places[path], _SUMS] = (zeros, jnp.zeros((), jnp.int32))
    hidden: set[str] = set()
    direct: dict[str, tuple[Any, Any]] = {}
    roots: list[Any] = []

    def record(module: Any, path: str, call: Any, args: Any, kwargs: Any) -> Any:
        root = None if module.scope is None else module.scope.root
        if not roots or not module.path:
            roots[:] = [root]
        if path in sites:
            x = jnp.asarray(first_argument(args, kwargs))
            groups = sites[path].groups
            rows = x.reshape(-1, groups, x.shape[-1] // groups)
            rows = rows.astype(at_least_float32(rows.dtype))
            products = jnp.einsum("ngi,ngj->gij", rows, rows, precision="highest")
            scope = module.scope
            total, count = scope.get_variable(_MOMENTS, _SUMS, (jnp.zeros(()), 0))
            # A layer may be called more than once, so its calls are summed.
            if scope.is_mutable_collection(_MOMENTS) and total.shape == products.shape:
                total = total + products.astype(total.dtype)
                scope.put_variable(_MOMENTS, _SUMS, (total, count + len(rows)))
            elif root is roots[0]:
                # No collection may change, but nothing is between here and there.
                total, count = direct.get(path, (0.0, 0))
                direct[path] = (total + products, count + len(rows))
            else:
                hidden.add(path)
        return call(*args, **kwargs)

    @jax.jit
    def batch_moments(variables: Any, batch: Any) -> dict[str, Array]:
        start = {_MOMENTS: traverse_util.unflatten_dict(sums)}
        direct.clear()
        roots.clear()
        with on_calls(record):
            _, changed = apply_as_trained(
                model,
                {**variables, **start},
                batch,
                apply_fn=apply_fn,
                recorded=[_MOMENTS],
            )
        found = traverse_util.flatten_dict(dict(changed.get(_MOMENTS, {})))
        seen = {path: found.get((*places[path], _SUMS)) for path in sites} | direct
        return {
            path: total[0] / total[1]
            for path, total in seen.items()
            if total is not None and path not in hidden
        }

    parts = [jax.device_get(batch_moments(variables, batch)) for batch in batches]
    moments = {
        path: np.mean([part[path].astype(np.float64) for part in parts], axis=0)
        for path in parts[0]
    }
    for path, moment in moments.items():
        if not np.isfinite(moment).all():
            raise ValueError(
                f"the inputs of {path!r} on `calibration` must be finite; some are not."
            )
    return moments


def weighing(
    moment: Float[np.ndarray, "g c c"],
) -> tuple[Float[np.ndarray, "g c c"], Float[np.ndarray, "g c c"]]:
    """Returns the square root of each second moment, and the inverse of that root."""
    values, vectors = np.linalg.eigh(moment)
    means = np.maximum(values.mean(-1, keepdims=True), np.finfo(np.float64).tiny)
    root = np.sqrt(np.maximum(values, 0) + _RIDGE * means)[:, None]
    transposed = vectors.swapaxes(1, 2)
    return vectors * root @ transposed, vectors / root @ transposed


def output_function(
    model: nn.Module, apply_fn: ApplyFn | None
) -> Callable[[Any, Any], Array]:
    """Returns a compiled function of variables and a batch: the network's outputs.

    They are those of `apply_as_trained`. ValueError is raised unless they are one
    array.
    """

    @jax.jit
    def outputs(variables: Any, batch: Any) -> Array:
        found, _ = apply_as_trained(model, variables, batch, apply_fn=apply_fn)
        return one_array(found)

    return outputs


def reference_outputs(
    outputs: Callable[[Any, Any], Array],
    variables: Mapping[str, Any],
    batches: Sequence[Any],
) -> list[Array]:
    """Returns the result of `output_function` on each batch of calibration images.

    Raises:
        ValueError: Outputs that are not finite, or not one array.
    """
    found = [outputs(variables, batch) for batch in batches]
    if not all(np.isfinite(logits).all() for logits in found):
        raise ValueError("the outputs on `calibration` must be finite; some are not.")
    return found


def divergence(
    reference: Float[Array, "n classes"], logits: Float[Array, "n classes"]
) -> Float[Array, "n"]:
    """Returns the Kullback-Leibler divergence of each image's softmax, in nats.

    KL(p || q) = sum p (log p - log q), p the reference's softmax and q the other's.
    """
    wide = at_least_float32(logits.dtype)
    p = jax.nn.log_softmax(reference.astype(wide))
    q = jax.nn.log_softmax(logits.astype(wide))
    return (jnp.exp(p) * (p - q)).sum(-1)


def divergence_of(
    model: nn.Module,
    variables: Mapping[str, Any],
    batches: list[Any],
    apply_fn: ApplyFn | None = None,
) -> Callable[[Mapping[str, Any]], float]:
    """Returns a function that measures how far other variables move the outputs.

    It returns the mean `divergence` from the outputs under `variables`. Other variables
    of the same shapes compile nothing anew.

    Raises:
        ValueError: Outputs that are not finite, or not one array.
    """
    device_batches = [jax.tree.map(jnp.asarray, batch) for batch in batches]
    outputs = output_function(model, apply_fn)
    reference = reference_outputs(outputs, variables, device_batches)
    mean = jax.jit(lambda *pair: divergence(*pair).mean())

    def measure(changed: Mapping[str, Any]) -> float:
        found = (outputs(changed, batch) for batch in device_batches)
        pairs = zip(reference, found, strict=True)
        return float(np.mean([mean(*pair) for pair in pairs]))

    return measure
