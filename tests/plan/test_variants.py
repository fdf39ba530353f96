"""The published variants against their own formulas, sums and all."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import inertia_jax as ij

SHAPE, FEATURES, THRESHOLD, SLOPE = (2, 6, 5, 3), 4, 30.0, 0.05
NAMES = ("original", "mod1", "mod2", "mod5", "mod6", "spconv2d", "mod7", "mod8", "mod9")


def published(name, x, core, weights, threshold):
    """y of a 1x1 core in 3x3 regions, as the formulas have it; friction is a sum."""
    h, w = x.shape[1:3]
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    views = [padded[:, i : i + h, j : j + w] for i in range(3) for j in range(3)]
    differences = [view - x for i, view in enumerate(views) if i != 4]
    power = jnp.abs if name in ("original", "mod1") else jnp.square
    friction = sum(power(d) for d in differences).sum(-1, keepdims=True)
    responses = [jnp.einsum("nhwc,co->nhwo", view, core[0, 0]) for view in views]
    if name in ("original", "mod1", "mod2"):
        detail = sum(responses) / 9
    else:
        shares = weights.reshape(-1)
        if name != "mod5":
            shares = shares.at[4].set(0)
        detail = sum(s * u for s, u in zip(shares, responses, strict=True))
    threshold = jnp.broadcast_to(threshold, (FEATURES,)).reshape(1, 1, 1, FEATURES)
    gate = (friction > threshold).astype(x.dtype)
    if name in ("mod2", "mod5"):
        soft = jax.nn.sigmoid(SLOPE * (friction - threshold))
        gate = gate + soft - jax.lax.stop_gradient(soft)
    return gate * detail + (1 - gate) * responses[4]


def layer(name):
    spec = ij.published_variant(
        name, in_channels=SHAPE[-1], threshold=THRESHOLD, slope=SLOPE
    )
    return ij.InertialConv.from_spec(
        spec, FEATURES, use_bias=False, param_dtype=jnp.float64
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_variant_equals_its_formula_in_value_and_gradient(name, x64):
    rng = np.random.default_rng(0)
    x, cotangent = rng.normal(size=SHAPE), rng.normal(size=(*SHAPE[:3], FEATURES))
    model = layer(name)
    variables = model.init(jax.random.key(0), x)
    scale = 8 * SHAPE[-1]  # |P| C
    params = dict(variables["params"])
    if "weights" in params:
        params["weights"] = jnp.asarray(rng.normal(size=(3, 3)))
    if name in ("mod7", "mod8", "mod9"):
        levels = jnp.linspace(0.6, 1.5, FEATURES) * THRESHOLD
        params["threshold"] = levels / scale
    rest = {k: v for k, v in variables.items() if k != "params"}

    def ours(params, x):
        return (model.apply({"params": params, **rest}, x) * cotangent).sum()

    def theirs(params, x):
        threshold = params.get("threshold", THRESHOLD / scale) * scale
        y = published(name, x, params["kernel"], params.get("weights"), threshold)
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
