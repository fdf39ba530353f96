"""Layer-wise reconstruction: kernels fitted to the outputs of the dense layers."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import traverse_util
from jax.typing import ArrayLike
from jaxtyping import Shaped

from inertia_jax.calls import ApplyFn, Network, record_calls
from inertia_jax.compression.calibration import (
    apply_as_trained,
    batch_norm_paths,
)
from inertia_jax.compression.layer_fit import LayerIO, fit_part
from inertia_jax.compression.parameter_uses import find_misused
from inertia_jax.compression.sites import leaves_at, with_leaves
from inertia_jax.inputs import (
    Shape,
    batched,
    num_inputs,
    taken,
)
from inertia_jax.intercept import first_argument, on_calls
from inertia_jax.layers.in_place import own_arithmetic
from inertia_jax.layers.inertial import InertialConv
from inertia_jax.layers.kinds import linear_parts
from inertia_jax.models.create import inputs_of, shape_of_inputs
from inertia_jax.ops.precision import at_least_float32
from inertia_jax.plan.plan import matches, without_ladders
from inertia_jax.progress import Progress, counted
from inertia_jax.variables import plain_variables, subtree

# A quarter is held out, and BatchNorm needs two images.
LEAST_IMAGES = 8
# The most bytes that one program returns for a batch; they are all held at once.
_PROGRAM_BYTES = 1 << 29
# The collection that layers sow their calls into, and the name there.
_CALLS = "inertia_jax calls"


def reconstruct(
    model: nn.Module,
    variables: Mapping[str, Any],
    *,
    dense: Network,
    images: Shaped[ArrayLike, "n *image"] | Mapping[str, Any],
    layers: str = "*",
    iterations: int = 12,
    batch_size: int = 128,
    apply_fn: ApplyFn | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Fits the kernels of a compressed network to the outputs of the dense one.

    Layers are fitted from first to last, by least squares over images and positions:

        W <- argmin_W  sum_i || f(x_i; W) - y_i ||^2

    where y_i are the dense layer's outputs in the dense network, and x_i the inputs of
    the layer in the compressed network. Earlier layers have been fitted already, so a
    layer also makes up for the errors of those before it. The output f is linear in a
    kernel, so that a few steps of conjugate gradients, from the present kernel, remove
    most of the error. A quarter of the images is held out and chooses the number of
    steps; a kernel that no step improves there stays as it is. The factors of a layer
    are fitted one after another. Layers whose gates choose a maximum (`combine="max"`)
    are left as they are, and so are factors before an inertial core, layers whose
    parameters are transformed on the way or also used elsewhere, and layers that
    convolve by a function of their own.

    Labels are not needed. During the fit BatchNorm normalises with the statistics of
    each batch, so call `recalibrate_batch_norm` afterwards. Thresholds and the mean of
    relative friction stay as they are stored. Rates of open gates change a little with
    the layers' inputs.

    Args:
        model: A network that `compress` or `make_inertial` returned.
        variables: Its variables.
        dense: (model, variables) of the network that it was made from.
        images: Some thousand of the network's inputs as in training, at least 8. Those
            held out and the others are cut into batches apart; images that fill no
            whole batch are left out. Inputs and outputs of one layer are in memory for
            all images.
        layers: A glob over the paths of the convolutions that may change. Layers whose
            outputs equal those of the dense layers stay bit for bit.
        iterations: The largest number of conjugate gradient steps per factor, >= 1.
        batch_size: Images per call, >= 2; a quarter of all images if that is less.
        apply_fn: How both networks are called, as in `compress`.
        progress: A function that is told how many layers are done, as in `compress`.

    Returns:
        Variables with other kernels, and biases where layers have them. Those that were
        fitted are float32 or wider, also where they were narrower.

    Raises:
        ValueError: A glob that matches no convolution, a convolution inside `nn.scan`
            or `nn.vmap`, a dense network with other layers, other shapes or BatchNorm
            elsewhere, too few images, or images or outputs that are not finite.

    Example:
        >>> small, factors = ij.compress(model, variables, ranks=ij.Budget(macs=0.5))
        >>> fitted = ij.reconstruct(
        ...     small, factors, dense=(model, variables), images=images, iterations=2
        ... )
        >>> jax.tree.structure(fitted) == jax.tree.structure(factors)
        True

    References:
        Zhang et al., 2016, https://arxiv.org/abs/1505.06798, section 3.3 (asymmetric
        reconstruction)
    """
    if iterations < 1:
        raise ValueError(f"`iterations` (={iterations}) must be >= 1.")
    if batch_size < 2:
        raise ValueError(f"`batch_size` (={batch_size}) must be >= 2.")
    variables, dense = plain_variables(variables), (dense[0], plain_variables(dense[1]))
    images = inputs_of(model, images, "images")
    number = num_inputs(images)
    if number < LEAST_IMAGES:
        raise ValueError(f"`images` (={number}) must be at least {LEAST_IMAGES}.")
    if batch_norm_paths(variables) != batch_norm_paths(dense[1]):
        raise ValueError(
            "`dense` must have BatchNorm where `model` has it; fold after fitting."
        )
    num_held_out = number // 4
    size = min(batch_size, num_held_out)
    fitting = batched(taken(images, None, -num_held_out), size)
    held_out = batched(taken(images, -num_held_out, None), size)

    model, dense = without_ladders(model), (without_ladders(dense[0]), dense[1])
    modules = _modules_to_fit(model, shape_of_inputs(model, images), layers, apply_fn)
    paths, now = tuple(modules), (model, variables)
    calls_on = _recorder(paths, now, dense, fitting[0], apply_fn)
    changed = dict(variables)
    for path, module in counted(modules.items(), progress, "fitting layers"):
        others = {name: subtree(tree, path) for name, tree in changed.items()}
        del others["params"]
        leaves: Mapping[str, Any] = leaves_at(changed, path)
        calls = calls_on(fitting, path, changed)
        calls_held_out = calls_on(held_out, path, changed)
        for part in linear_parts(module):
            leaves = fit_part(
                module, others, leaves, part, calls, calls_held_out, iterations
            )
        changed = with_leaves(changed, {path: leaves})
    return changed


def _modules_to_fit(
    model: nn.Module,
    image_shape: Shape,
    layers: str,
    apply_fn: ApplyFn | None,
) -> dict[str, nn.Module]:
    """Returns the layers that match a glob and can be fitted, in order of their calls.

    Raises:
        ValueError: There is none.
    """
    calls, expected = record_calls(model, image_shape, apply_fn=apply_fn)
    misused = find_misused(model, expected, image_shape, apply_fn)
    inside = {path for path, call in calls.items() if call.is_factorised}
    modules = {
        path: call.module
        for path, call in calls.items()
        if path
        and matches(path, layers)
        and path.rpartition("/")[0] not in inside
        and linear_parts(call.module)
        and not misused.get(path)
        and not own_arithmetic(call.module)
    }
    if not modules:
        raise ValueError(
            f"`layers` (={layers!r}) matches no convolution that can be fitted."
        )
    return modules


def _recorder(
    paths: tuple[str, ...],
    compressed: Network,
    dense: Network,
    batch: Any,
    apply_fn: ApplyFn | None,
) -> Callable[[list[Any], str, Mapping[str, Any]], list[LayerIO]]:
    """Returns a function from batches, a layer and variables to the layer's calls.

    One program serves many layers. It also computes the layers after the wanted one,
    which takes less time than compiling a program for each layer.

    Raises:
        ValueError: The dense network lacks one of the layers, or its outputs have other
            shapes. The function raises it if inputs or outputs are not finite.
    """
    of = functools.partial(_calls_of, apply_fn=apply_fn)
    calls = jax.eval_shape(of(paths, compressed[0]), compressed[1], batch)
    targets = jax.eval_shape(of(paths, dense[0]), dense[1], batch)
    for path in paths:
        own, wanted = ([y.shape for _, y in found[path]] for found in (calls, targets))
        if own != wanted:
            raise ValueError(
                f"`dense` puts out {wanted} at {path!r}; must be {own}, as `model` "
                f"does."
            )
    programs: dict[str, tuple[Any, Any]] = {}
    for group in _groups({path: calls[path] for path in paths}):
        inputs = jax.jit(of(group, compressed[0], which=0))
        outputs = jax.jit(of(group, dense[0], which=1))
        programs |= dict.fromkeys(group, (inputs, outputs))

    def calls_on(
        batches: list[Any], path: str, variables: Mapping[str, Any]
    ) -> list[LayerIO]:
        inputs, outputs = programs[path]
        pairs: list[LayerIO] = []
        for batch in batches:
            x, y = inputs(variables, batch)[path], outputs(dense[1], batch)[path]
            pairs += map(LayerIO, x, y)
        if not all(bool(jnp.isfinite(a).all()) for a in jax.tree.leaves(pairs)):
            raise ValueError(
                f"inputs and outputs of {path!r} must be finite; some are not."
            )
        return pairs

    return calls_on


def _groups(calls: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Returns layers in groups whose calls take at most `_PROGRAM_BYTES` per batch."""
    groups: list[tuple[str, ...]] = []
    held = 0
    for path, pairs in calls.items():
        size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(pairs))
        if not groups or held + size > _PROGRAM_BYTES:
            groups.append(())
            held = 0
        groups[-1] += (path,)
        held += size
    return groups


def _calls_of(
    paths: tuple[str, ...],
    model: nn.Module,
    *,
    which: int | None = None,
    apply_fn: ApplyFn | None,
) -> Callable[[Mapping[str, Any], Any], dict[str, list[Any]]]:
    """Returns a function from variables and a batch to the calls of some layers.

    These are the calls' inputs for `which=0`, their outputs for `which=1`, and pairs of
    both for None, in float32 or wider.
    """

    def calls(variables: Mapping[str, Any], batch: Any) -> dict[str, list[Any]]:
        depth = dict.fromkeys(paths, 0)
        direct: dict[str, list[Any]] = {path: [] for path in paths}
        roots: list[Any] = []

        def record(module: Any, path: str, call: Any, args: Any, kwargs: Any) -> Any:
            root = None if module.scope is None else module.scope.root
            if not roots or not module.path:
                roots[:] = [root]
            if isinstance(module, InertialConv):
                # In evaluation mode no batch moves a threshold.
                kwargs = {**kwargs, "train": False}
            if path not in depth:
                return call(*args, **kwargs)
            # A replacement is called inside the replaced layer, under the same path.
            depth[path] += 1
            output = call(*args, **kwargs)
            depth[path] -= 1
            if not depth[path]:
                x = jnp.asarray(first_argument(args, kwargs))
                wide = at_least_float32(x.dtype)
                pair = (x.astype(wide), output.astype(wide))
                value = pair if which is None else pair[which]
                if module.sow(_CALLS, _CALLS, value):
                    return output
                # Perhaps no collection may change, but nothing is between here and
                # there.
                direct[path].append(value)
                if root is not roots[0]:
                    raise ValueError(
                        f"{path!r} is called inside nn.scan or nn.vmap, where its "
                        f"inputs cannot be seen; leave it out with `layers`."
                    )
            return output

        with on_calls(record):
            _, changed = apply_as_trained(
                model, variables, batch, apply_fn=apply_fn, recorded=[_CALLS]
            )
        # `nn.remat` and `nn.jit` pass on what layers sow.
        sown = traverse_util.flatten_dict(dict(changed.get(_CALLS, {})))
        by_path = {"/".join(place[:-1]): calls for place, calls in sown.items()}
        return {path: [*by_path.get(path, ()), *direct[path]] for path in paths}

    return calls
