"""What becomes of a network of someone: compressed, trained, exported."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx

import inertia_jax as ij
from inertia_jax.calls import apply_network
from inertia_jax.inputs import one_input

KEY = jax.random.key(0)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a network.

    Attributes:
        compressed: The layers that have factors at half the channels.
        kept: Why others cannot have any, by path.
        dearer: The convolutions whose factors would cost more.
        params: The share of parameters that is left.
        full_error: How far outputs move at full rank, and factors multiplied out.
        is_trained: Whether gradients and outputs at half the channels are finite.
        export_error: How far the outputs of the file are from the network's; None if
            the network takes more than one array, which a file does not.
    """

    compressed: tuple[str, ...]
    kept: dict[str, str]
    dearer: tuple[str, ...]
    params: float
    full_error: float
    is_trained: bool
    export_error: float | None


def init_linen(model, shape, call=None):
    """Returns a Linen model with its first variables."""
    first = (lambda m, x: call(m, x, False)) if call else (lambda m, x: m(x))
    init = jax.jit(nn.init(first, model))
    return model, init({"params": KEY, "noise": KEY}, inputs_of(shape))


def init_module(cls):
    """Returns an NNX module in evaluation mode, alone."""
    net = cls(rngs=nnx.Rngs(0))
    net.eval()
    return (net,)


def inputs_of(shape):
    """Random inputs; whole numbers are 0 and 1."""
    rng = np.random.default_rng(0)

    def draw(leaf):
        if jnp.issubdtype(leaf.dtype, jnp.integer):
            return rng.integers(2, size=leaf.shape).astype(leaf.dtype)
        return rng.normal(size=leaf.shape).astype(leaf.dtype)

    return jax.tree.map(draw, one_input(shape, number=2))


def outcome_of(network, shape, path, *, call=None):
    """Returns what becomes of a network.

    Args:
        network: A model and its variables, or a module in evaluation mode alone.
        shape: The shape of one input.
        path: The file that the network is exported to.
        call: How the network is called, if it takes more than one argument.
    """
    x, how = inputs_of(shape), {"apply_fn": call}

    def changed(function, given, **options):
        found = function(*given, image_shape=shape, **how, **options)
        return found if isinstance(found, tuple) else (found,)

    def outputs(given):
        forward, params = _as_function(given, call)
        return jax.jit(forward)(params, x)

    expected = outputs(network)
    full = changed(ij.compress, network, ranks=ij.Ratio(1.0), only_cheaper=False)
    back = changed(ij.decompress, full)
    full_error = max(_distance(outputs(given), expected) for given in (full, back))

    small = changed(ij.compress, network, ranks=ij.Ratio(0.5))
    tables = [ij.count_cost(given[0], shape, **how) for given in (network, full, small)]
    dense, most, half = ({row.path: row for row in table.rows} for table in tables)
    compressed = [p for p, row in half.items() if row.kind in ("tucker2", "low_rank")]
    dearer = [p for p, row in most.items() if row.kind == "tucker2"]
    forward, params = _as_function(small, call)

    def loss(params):
        found = forward(params, x)
        return sum(jnp.sum(y**2) for y in jax.tree.leaves(found)), found

    grads, found = jax.jit(jax.grad(loss, has_aux=True))(params)
    finite = all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((grads, found)))
    export_error = None
    if not isinstance(shape, dict):

        def first_output(x):
            return jax.tree.leaves(forward(params, x))[0]

        options = {"image_shape": shape, "batch_size": 2, "platforms": ("cpu",)}
        ij.save_exported(path, first_output, **options)
        first = jax.tree.leaves(found)[0]
        export_error = _distance(ij.load_exported(path)(x), first)
    return Outcome(
        compressed=tuple(compressed),
        kept={p: row.note for p, row in most.items() if row.note},
        dearer=tuple(p for p in dearer if p not in compressed),
        params=sum(r.params for r in half.values())
        / sum(r.params for r in dense.values()),
        full_error=full_error,
        is_trained=finite,
        export_error=export_error,
    )


def assert_all_the_way(outcome, kept):
    """All went well, but for these layers, which stay for a reason with this word."""
    # Full rank loses the rounding of float32 alone.
    assert outcome.full_error < 1e-4
    assert outcome.kept.keys() == kept.keys()
    assert all(word in outcome.kept[path] for path, word in kept.items())
    assert outcome.compressed and outcome.params < 1
    assert outcome.is_trained
    assert outcome.export_error is None or outcome.export_error < 1e-4


def _as_function(network, call):
    """Returns a network as a function of (params, inputs), and its parameters."""
    if len(network) == 1:
        graphdef, params, rest = nnx.split(network[0], nnx.Param, ...)

        def forward(params, x):
            # A copy, for what a call changes.
            module = nnx.merge(graphdef, params, rest, copy=True)
            return module(x) if call is None else call(module, x, False)

        return forward, params
    model, variables = network
    return (
        lambda params, x: apply_network(
            model, {**variables, "params": params}, x, apply_fn=call
        )[0],
        variables["params"],
    )


def _distance(found, expected):
    """Returns the largest difference of outputs, relative to 1 and their size."""
    shares = jax.tree.map(
        lambda a, b: np.max(np.abs(a - b) / (1 + np.abs(b)), initial=0),
        jax.device_get(found),
        jax.device_get(expected),
    )
    return float(max(jax.tree.leaves(shares)))
