"""The published variants against their own formulas, sums and all."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import inertia_jax as ij

SHAPE, FEATURES, THRESHOLD, SLOPE = (2, 6, 5, 3), 4, 30.0, 0.05
NAMES = ("original", "mod1", "mod2", "mod5", "mod6", "spconv2d", "mod7", "mod8", "mod9")


def published(name, x, core, weights, threshold, d):
    """y of an m x m core in d x d regions, as the formulas have it; d - m is even.

    Friction is a sum.
    """
    (h, w), m, k = x.shape[1:3], len(core), d - len(core)
    before, after = (d - 1) // 2, d // 2
    padded = jnp.pad(x, ((0, 0), (before, after), (before, after), (0, 0)))
    views = {
        (i, j): padded[:, i : i + h, j : j + w] for i in range(d) for j in range(d)
    }
    middle = range(k // 2, k // 2 + m)
    periphery = [(i, j) for i, j in views if not (i in middle and j in middle)]
    power = jnp.abs if name in ("original", "mod1") else jnp.square
    differences = [views[at] - views[d // 2, d // 2] for at in periphery]
    friction = sum(power(d) for d in differences).sum(-1, keepdims=True)

    def respond(row, column):
        return sum(
            jnp.einsum("nhwc,co->nhwo", views[row + i, column + j], core[i, j])
            for i in range(m)
            for j in range(m)
        )

    if name in ("original", "mod1", "mod2"):
        shifts = [(i, j) for i in range(k + 1) for j in range(k + 1)]
        detail = sum(respond(*shift) for shift in shifts) / len(shifts)
    else:
        tap = core[m // 2, m // 2]
        detail = sum(
            weight * jnp.einsum("nhwc,co->nhwo", views[at], tap)
            for weight, at in zip(weights, periphery, strict=True)
        )
    threshold = jnp.broadcast_to(threshold, (FEATURES,)).reshape(1, 1, 1, FEATURES)
    gate = (friction > threshold).astype(x.dtype)
    if name in ("mod2", "mod5"):
        soft = jax.nn.sigmoid(SLOPE * (friction - threshold))
        gate = gate + soft - jax.lax.stop_gradient(soft)
    return gate * detail + (1 - gate) * respond(k // 2, k // 2)


def layer(name, m, d):
    spec = ij.published_variant(
        name,
        in_channels=SHAPE[-1],
        core_size=m,
        region_size=d,
        threshold=THRESHOLD * (d * d - m * m) / 8,
        slope=SLOPE,
    )
    return ij.InertialConv.from_spec(
        spec, FEATURES, use_bias=False, param_dtype=jnp.float64
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "m", "d"),
    [*((name, 1, 3) for name in NAMES), ("mod5", 2, 4), ("mod9", 3, 5), ("mod1", 3, 5)],
)
def test_variant_equals_its_formula_in_value_and_gradient(name, m, d, x64):
    rng = np.random.default_rng(0)
    x, cotangent = rng.normal(size=SHAPE), rng.normal(size=(*SHAPE[:3], FEATURES))
    model = layer(name, m, d)
    variables = model.init(jax.random.key(0), x)
    scale = (d * d - m * m) * SHAPE[-1]  # |P| C
    level = THRESHOLD * (d * d - m * m) / 8
    params = dict(variables["params"])
    if "weights" in params:
        assert params["weights"].shape == (d * d - m * m,)
        params["weights"] = jnp.asarray(rng.normal(size=d * d - m * m))
    if name in ("mod7", "mod8", "mod9"):
        levels = jnp.linspace(0.6, 1.5, FEATURES) * level
        params["threshold"] = levels / scale
    rest = {k: v for k, v in variables.items() if k != "params"}

    def ours(params, x):
        return (model.apply({"params": params, **rest}, x) * cotangent).sum()

    def theirs(params, x):
        threshold = params.get("threshold", level / scale) * scale
        y = published(name, x, params["kernel"], params.get("weights"), threshold, d)
        return (y * cotangent).sum()

    # float64: only the order of summation differs.
    expected, gradients = jax.value_and_grad(theirs, (0, 1))(params, x)
    value, found = jax.jit(jax.value_and_grad(ours, (0, 1)))(params, x)
    np.testing.assert_allclose(value, expected, rtol=1e-12)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-10),
        found,
        gradients,
    )
    rate = model.apply({"params": params, **rest}, x, mutable=["intermediates"])[1]
    assert 0.1 < rate["intermediates"]["gate_rate"][0].mean() < 0.9


def test_changes_go_on_top():
    spec = ij.published_variant("mod9", in_channels=2, gate_gradient="ste")
    assert spec.gate_gradient == "ste" and spec.threshold.per_channel


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "mod3", "in_channels": 3}, "`name` .*mod3"),
        ({"name": "mod1", "in_channels": 0}, "`in_channels` .*>= 1"),
    ],
)
def test_bad_variants_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        ij.published_variant(**arguments)
