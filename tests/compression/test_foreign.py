"""Other people's networks: layers that only seem to be plain, and ways of calling."""

import functools

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import inertia_jax as ij
from inertia_jax.compression.latency import site_latencies_ms
from inertia_jax.compression.sites import find_sites
from inertia_jax.models.layers import Layers
from inertia_jax.plan.plan import as_glob

KEY = jax.random.key(0)
SHAPE = (8, 8, 4)
X = np.random.default_rng(0).normal(size=(4, *SHAPE)).astype(np.float32)

conv = functools.partial(nn.Conv, 4, (3, 3))
at_full_rank = functools.partial(
    ij.compress, ranks=ij.Ratio(1.0), only_cheaper=False, image_shape=SHAPE
)


class Two(nn.Module):
    @nn.compact
    def __call__(self, x):
        return conv(name="b")(nn.relu(conv(name="a")(x)))


class Net(nn.Module):
    """An ordinary convolution, and what `make` makes after it."""

    make: object = lambda: conv(name="last")

    @nn.compact
    def __call__(self, x):
        return self.make()(conv(name="plain")(x))


def centred(params):
    def minus_mean(leaf):
        return leaf - leaf.mean((*range(leaf.ndim - 1),), keepdims=True)

    return jax.tree.map(minus_mean, params)


def standardised(cls, **options):
    return nn.map_variables(cls, "params", centred, init=True)(**options)


class Tied(nn.Module):
    """An autoencoder whose decoder is the encoder's kernel."""

    def setup(self):
        self.enc = nn.Conv(8, (1, 1))

    def __call__(self, x):
        return self.enc(x) @ self.enc.variables["params"]["kernel"][0, 0].T


class Merged(nn.Module):
    """A kernel with an addition of low rank, and the layer it is the kernel of."""

    def setup(self):
        self.base = conv()
        self.addition = self.param("lora", nn.initializers.normal(), (3, 3, 4, 4))

    def __call__(self, x):
        y = self.base(x)
        kernel = self.base.variables["params"]["kernel"] + self.addition
        numbers = ("NHWC", "HWIO", "NHWC")
        z = jax.lax.conv_general_dilated(
            x, kernel, (1, 1), "SAME", dimension_numbers=numbers
        )
        return y + z


class ByHand(nn.Module):
    """A layer that makes a kernel, which is centred and convolved by hand."""

    @nn.compact
    def __call__(self, x):
        layer = conv(use_bias=False, name="layer")
        if self.is_initializing():
            return layer(x)
        return layer.clone(parent=None).apply(centred(layer.variables), x)


class Penalised(nn.Module):
    """It returns the kernel, for a penalty."""

    def setup(self):
        self.layer = conv()

    def __call__(self, x):
        return self.layer(x), self.layer.variables["params"]["kernel"]


class Shared(nn.Module):
    """A layer in whose place a second one has its variables."""

    def setup(self):
        self.inner, self.extra = conv(), conv()
        nn.share_scope(self, self.inner)

    def __call__(self, x):
        return self.inner(x) + self.extra(x)


class Repeated(nn.Module):
    """Two layers again and again, with kernels of their own each time or the same."""

    own: bool
    name: str | None = None

    @nn.compact
    def __call__(self, x):
        axes = {"params": 0} if self.own else {}
        scan = nn.scan(
            lambda two, x, _: (two(x), None),
            variable_axes=axes,
            variable_broadcast=False if self.own else "params",
            split_rngs={"params": self.own},
            length=2,
        )
        return scan(Two(name="two"), x, None)[0]


class Looped(nn.Module):
    def setup(self):
        self.layer = conv()

    def __call__(self, x):
        if self.is_initializing():
            return self.layer(x)
        step = lambda self, x: self.layer(x)  # noqa: E731
        return nn.while_loop(lambda self, x: x.sum() > 1e9, step, self, x)


class Subclass(nn.Conv):
    def __call__(self, x):
        return super().__call__(jnp.abs(x))


def each_twice(**options):
    """Two layers with two kernels each, whose outputs are channels."""
    return nn.vmap(
        Two,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=None,
        axis_size=2,
    )(**options)


def by_sign(x, kernel, *args, **options):
    return jax.lax.conv_general_dilated(x, jnp.sign(kernel), *args, **options)


def coarse(*arrays, dtype=None, **options):
    return [None if a is None else jnp.round(4 * a) / 4 for a in arrays]


DIFFER = "parameters that differ, or may, from those stored"
OUTSIDE = "parameters that are also used outside of it"
SEVERAL = "the kernels of several layers, as in nn.scan and nn.vmap"


@pytest.mark.parametrize(
    ("make", "paths", "reason"),
    [
        (lambda: standardised(nn.Conv, features=4, kernel_size=(3, 3)), [""], DIFFER),
        (lambda: standardised(Two, name="two"), ["two/a", "two/b"], DIFFER),
        (lambda: nn.WeightNorm(conv(name="c")), ["c"], DIFFER),
        (
            lambda: lambda x: nn.SpectralNorm(conv(name="c"))(x, update_stats=False),
            ["c"],
            DIFFER,
        ),
        (lambda: Looped(name="loop"), ["loop/layer"], DIFFER),
        (lambda: Tied(name="tied"), ["tied/enc"], OUTSIDE),
        (lambda: Merged(name="lora"), ["lora/base"], OUTSIDE),
        (lambda: ByHand(name="h"), ["h/layer"], "is not called in evaluation"),
        (lambda: Penalised(name="p"), ["p/layer"], OUTSIDE),
        (lambda: Repeated(own=True, name="r"), ["r/two/a", "r/two/b"], SEVERAL),
        (lambda: each_twice(name="v"), ["v/a", "v/b"], SEVERAL),
        (lambda: conv(conv_general_dilated=by_sign, name="c"), ["c"], "in its own way"),
        (
            lambda: conv(
                name="c",
                conv_general_dilated=functools.partial(
                    jax.lax.conv_general_dilated, precision="highest"
                ),
            ),
            ["c"],
            "in its own way",
        ),
        (lambda: conv(promote_dtype=coarse, name="c"), ["c"], "types in its own way"),
        (lambda: Subclass(4, (3, 3), name="c"), ["c"], "is a Subclass, which"),
        (lambda: Shared(name="s"), ["s"], "other layers: extra/bias, extra/kernel"),
    ],
)
def test_layers_that_no_factors_can_stand_for_stay_and_say_why(make, paths, reason):
    model = Net(make)
    variables = model.init(KEY, X)
    small, factors = at_full_rank(model, variables)
    kept = dict(small.kept)
    assert len(kept) == len(paths) and all(reason in why for why in kept.values())
    if paths != [""]:  # a name that Flax chose
        assert [*kept] == paths
    changed = {path for path, _ in small.plan.rules}
    assert "plain" in changed and not changed & {*kept}
    # Full rank loses the rounding of float32 alone.
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=2e-5)
    jax.tree.map(close, small.apply(factors, X), model.apply(variables, X))
    table = ij.count_cost(small, SHAPE)
    assert {row.path: row.note for row in table.rows if row.note} == kept
    assert f"stays dense: {next(iter(kept.values()))}" in str(table)
    back = ij.decompress(small, factors, image_shape=SHAPE)
    jax.tree.map(close, back[0].apply(back[1], X), model.apply(variables, X))


def rounding(params):
    return jax.tree.map(lambda leaf: leaf.astype("bfloat16"), params)


@pytest.mark.parametrize(
    ("make", "loss"),
    [
        (lambda: nn.remat(Two)(name="two"), 1e-5),
        (lambda: nn.jit(Two)(name="two"), 1e-5),
        (lambda: Repeated(own=False, name="r"), 1e-5),
        (
            lambda: nn.vmap(
                Two, variable_axes={"params": None}, split_rngs={"params": False}
            )(name="two"),
            1e-5,
        ),
        # Kernels and factors are rounded to eight bits.
        (
            lambda: nn.map_variables(Two, "params", rounding, init=True)(name="two"),
            2e-2,
        ),
    ],
)
def test_layers_that_are_only_called_in_another_way_are_factorised(make, loss):
    model = Net(make)
    variables = model.init(KEY, X)
    expected = model.apply(variables, X)  # Flax may keep a program of this call
    small, factors = at_full_rank(model, variables)
    assert len(small.plan.rules) == 3 and not small.kept
    difference = np.abs(small.apply(factors, X) - expected).max()
    assert difference < loss * np.abs(expected).max()


class Pair(nn.Module):
    """Two modules of a class, of which Flax traces the first alone if it may."""

    block: type = Two

    @nn.compact
    def __call__(self, x):
        return self.block(name="two")(self.block(name="one")(x))


class OnMethod(nn.Module):
    @nn.jit
    @nn.compact
    def __call__(self, x):
        return conv(name="b")(nn.relu(conv(name="a")(x)))


COMPILED = {
    "class": nn.jit(Two),
    "method": OnMethod,
    "around nn.remat": nn.jit(nn.remat(Two)),
    "inside nn.remat": nn.remat(nn.jit(Two)),
}


@pytest.mark.parametrize("name", COMPILED)
def test_every_module_of_a_compiled_class_is_found(name):
    model = Pair(COMPILED[name])
    variables = model.init(KEY, X)
    expected = model.apply(variables, X)  # Flax keeps a program of this call
    macs = 4 * 8 * 8 * 9 * 4 * 4
    assert ij.count_cost(model, SHAPE).macs == macs
    small, factors = at_full_rank(model, variables, calibration=X)
    paths = ["one/a", "one/b", "two/a", "two/b"]
    assert [path for path, _ in small.plan.rules] == paths and not small.kept
    np.testing.assert_allclose(small.apply(factors, X), expected, rtol=1e-4, atol=1e-5)


def test_modules_of_a_compiled_class_follow_a_plan_each():
    model = Pair(nn.jit(Two))
    variables = model.init(KEY, X)
    # Both layers have a threshold, so that nothing but the plan tells them apart.
    thresholds = {"a": {"threshold": jnp.asarray(1e9)}}
    variables = {**variables, "thresholds": {"one": thresholds, "two": thresholds}}
    closed = ij.Inertial(3, 4, reading="tiled", capacities=None)

    def outputs(model, path):
        planned = ij.Planned(model, ij.Plan(((path, closed),)))
        return jax.jit(planned.apply)(variables, X)

    for path in ("one/a", "two/a"):
        expected = outputs(Pair(), path)
        np.testing.assert_allclose(outputs(model, path), expected, rtol=1e-5, atol=1e-6)


def test_where_nothing_can_change_the_error_says_why():
    model = Tied()
    with pytest.raises(ValueError, match="no convolution .*'enc' has parameters that"):
        at_full_rank(model, model.init(KEY, X))
    model = Net(lambda: nn.WeightNorm(conv(name="c")))
    plan = ij.Plan((("c", ij.Tucker2(1, 1)),))
    with pytest.raises(ValueError, match="`ranks` has 'c', which .*'c' is called with"):
        ij.compress(model, model.init(KEY, X), ranks=plan, image_shape=SHAPE)


@pytest.mark.parametrize(
    ("has_norm", "error"),
    [
        (False, "'plain' cannot say what its friction is"),
        (True, "Cannot update variable"),
    ],
)
def test_where_no_call_can_change_a_collection_the_error_says_why(has_norm, error):
    class Mapped(nn.Module):
        @nn.compact
        def __call__(self, x, train=False):
            x = standardised(nn.Conv, features=4, kernel_size=(3, 3))(x)
            x = conv(name="plain")(x)
            if has_norm:
                x = nn.BatchNorm(use_running_average=not train)(x)
            return x.mean((1, 2))

    model = Mapped()
    variables = model.init(KEY, X)
    with pytest.raises(ValueError, match=f"{error}.*`init=self.is_init"):
        ij.make_inertial(model, variables, macs=0.9, calibration=X)


class Named(nn.Module):
    """Layers whose names mean something to others: to globs, and to paths."""

    @nn.compact
    def __call__(self, x):
        for name in ("conv[0]*", "conv0x", "a/b", "c?"):
            x = nn.relu(conv(name=name)(x))
        return nn.WeightNorm(nn.Dense(3))(
            x
        )  # its scale is named "Dense_0/kernel/scale"


def test_names_of_layers_are_no_globs_and_no_paths():
    model = Named()
    variables = model.init(KEY, X)
    small, factors = at_full_rank(model, variables)
    assert len(small.plan.rules) == 4
    found, expected = small.apply(factors, X), model.apply(variables, X)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert factors["params"]["WeightNorm_0"] == variables["params"]["WeightNorm_0"]
    one, _ = at_full_rank(model, variables, layers=as_glob("conv[0]*"))
    assert one.plan.spec("conv[0]*") == ij.Tucker2(4, 4)
    assert one.plan.spec("conv0x") == ij.Conv()
    again, _ = ij.compress(small, factors, ranks=ij.Ratio(0.5), image_shape=SHAPE)
    assert [spec for _, spec in again.plan.rules] == [ij.Tucker2(2, 2)] * 4
    back, dense = ij.decompress(small, factors, image_shape=SHAPE)
    assert {spec for _, spec in back.plan.rules} <= {ij.Conv()}
    assert jax.tree.map(jnp.shape, dense) == jax.tree.map(jnp.shape, variables)
    # Whoever copies a path into a plan means this layer.
    assert ij.Plan((("conv[0]*", ij.Tucker2(1, 1)),)).spec("conv[0]*") != ij.Conv()


def test_an_initialiser_of_one_shape_is_none_of_the_factors():
    kernel = jax.random.normal(KEY, (3, 3, 4, 4))
    model = Net(lambda: conv(kernel_init=nn.initializers.constant(kernel)))
    variables = model.init(KEY, X)
    small, factors = at_full_rank(model, variables)
    found, expected = small.apply(factors, X), model.apply(variables, X)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_networks_that_write_in_evaluation_are_compressed():
    class Counting(nn.Module):
        @nn.compact
        def __call__(self, x):
            count = self.variable("state", "count", lambda: jnp.zeros(()))
            count.value += 1
            x = nn.SpectralNorm(nn.Dense(4))(conv(name="own")(x), update_stats=True)
            return x.mean((1, 2))

    model = Counting()
    variables = model.init(KEY, X)
    small, factors = at_full_rank(model, variables, calibration=X)
    assert [path for path, _ in small.plan.rules] == ["own"]
    found, expected = (
        network.apply(values, X, mutable=["state", "batch_stats"])
        for network, values in ((small, factors), (model, variables))
    )
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    jax.tree.map(close, found, expected)
    budget = ij.Budget(latency=1.0, batch_size=2)
    ij.compress(model, variables, ranks=budget, image_shape=SHAPE)


class Frames(nn.Module):
    """Images with an axis of time, then one by one."""

    @nn.compact
    def __call__(self, x):
        frames = jnp.stack([x] * 5, axis=1)
        y = conv(strides=2, name="frames")(frames)
        layer = nn.vmap(
            nn.Conv, variable_axes={"params": None}, split_rngs={"params": False}
        )(4, (3, 3), name="one")
        return layer(x), y


def test_layers_with_other_axes_of_images_cost_what_they_compute():
    model = Frames()
    variables = model.init(KEY, X)
    taps, positions = 9 * 4 * 4, {"frames": 5 * 16, "one": 64}
    expected = {path: count * taps for path, count in positions.items()}
    rows = ij.count_cost(model, SHAPE).rows
    assert {row.path: row.macs for row in rows} == expected
    sites = find_sites(model, variables, SHAPE)
    assert {path: site.macs(ij.Conv()) for path, site in sites.items()} == expected
    # Two factors before the strides, and the core and one after them.
    spec = ij.Tucker2(2, 2)
    assert sites["frames"].macs(spec) == 5 * (64 * 4 * 2 + 16 * (9 * 2 * 2 + 2 * 4))
    for site in sites.values():
        times = site_latencies_ms(site, [ij.Conv(), spec], batch_size=2)
        assert len(times) == 2 and min(times) > 0


def test_a_layer_applied_to_arrays_is_none_of_the_networks():
    class Hyper(nn.Module):
        @nn.compact
        def __call__(self, x):
            kernel = self.param("made", nn.initializers.normal(), (3, 3, 4, 4))
            layer = conv(use_bias=False)
            return conv(name="own")(layer.apply({"params": {"kernel": kernel}}, x))

    model = Hyper()
    variables = model.init(KEY, X)
    small, factors = at_full_rank(model, variables)
    assert [path for path, _ in small.plan.rules] == ["own"] and not small.kept
    found, expected = small.apply(factors, X), model.apply(variables, X)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert ij.count_cost(model, SHAPE).params == 2 * 144 + 4


def normed(x, train, init=nn.linear.default_kernel_init):
    x = conv(kernel_init=init, name="one")(x)
    x = nn.BatchNorm(use_running_average=not train, name="norm")(x)
    x = conv(kernel_init=init, name="two")(nn.relu(x))
    return nn.Dense(5, name="fc")(x.mean((1, 2)))


class Norm(nn.Module):
    """A network that is called as `model(images, train=...)`."""

    box: bool = False

    @nn.compact
    def __call__(self, x, train=False):
        init = nn.linear.default_kernel_init
        if self.box:
            init = nn.with_partitioning(init, (None, None, None, "model"))
        return normed(x, train, init)


@pytest.mark.parametrize("kind", ["boxed", "frozen", "both"])
def test_boxes_and_frozen_dictionaries_are_opened(kind):
    model = Norm(box=kind != "frozen")
    given = model.init(KEY, X)
    assert isinstance(given["params"]["one"]["kernel"], nn.Partitioned) == model.box
    plain = nn.meta.unbox(given)
    if kind != "boxed":
        given = flax.core.freeze(given)
    expected = ij.compress(Norm(), plain, ranks=ij.Ratio(0.5), image_shape=SHAPE)
    small, factors = ij.compress(model, given, ranks=ij.Ratio(0.5), image_shape=SHAPE)
    dense = ij.decompress(small, flax.core.freeze(factors), image_shape=SHAPE)[1]
    assert_equal = functools.partial(jax.tree.map, np.testing.assert_array_equal)
    assert_equal(factors, expected[1])
    assert_equal(dense, ij.decompress(*expected, image_shape=SHAPE)[1])
    assert_equal(
        ij.recalibrate_batch_norm(model, given, X),
        ij.recalibrate_batch_norm(Norm(), plain, X),
    )
    assert_equal(
        ij.fold_batch_norm(model, given, image_shape=SHAPE)[1],
        ij.fold_batch_norm(Norm(), plain, image_shape=SHAPE)[1],
    )
    # The new network's own boxes say how the factors are partitioned.
    made = jax.eval_shape(small.init, KEY, X)["params"]["one"]["u_out"]["kernel"]
    assert not model.box or made.names == (None, None, None, "model")


@pytest.mark.slow
def test_frozen_variables_are_taken_everywhere(tmp_path):
    model = Norm()
    dense = flax.core.freeze(model.init(KEY, X))
    images = np.concatenate([X] * 4)
    small, factors = ij.compress(model, dense, ranks=ij.Ratio(0.5), image_shape=SHAPE)
    options = {"images": images, "iterations": 2}
    fitted = ij.reconstruct(
        small, flax.core.freeze(factors), dense=(model, dense), **options
    )
    expected = ij.reconstruct(
        small, factors, dense=(model, flax.core.unfreeze(dense)), **options
    )
    jax.tree.map(np.testing.assert_array_equal, fitted, expected)

    lenet = ij.create_model("lenet", width=0.05)
    plain = ij.init_variables(lenet, KEY)
    frozen = flax.core.freeze(plain)
    compare = functools.partial(jax.tree.map, np.testing.assert_array_equal)
    compare(ij.to_torch(lenet, frozen), ij.to_torch(lenet, plain))
    ij.save_checkpoint(tmp_path / "frozen", lenet, frozen)
    compare(ij.load_checkpoint(tmp_path / "frozen")[1], plain)
    calibration = np.random.default_rng(0).normal(size=(4, 28, 28, 1))
    options = {"macs": 1.0, "calibration": calibration.astype(np.float32)}
    compare(ij.make_inertial(lenet, frozen, **options)[1], plain)


class Awkward(nn.Module):
    """The network of `Norm` behind other arguments, and no `__call__`."""

    @nn.compact
    def encode(self, x, scale, *, mode):
        noise = 0 * jax.random.normal(self.make_rng("noise"), x.shape)
        return {"logits": normed(x * scale + noise, mode == "fit"), "image": x}


def apply_awkward(model, images, train):
    scale = jnp.ones((len(images), 1, 1, 1))
    return model.encode(images, scale, mode="fit" if train else "use")["logits"]


def everything(model, variables, path, **how):
    """Returns what each function makes of a network."""
    shaped = {"image_shape": SHAPE, **how}
    images = np.concatenate([X] * 4)
    small, factors = ij.compress(
        model, variables, ranks=ij.Budget(macs=0.6), calibration=X, **shaped
    )
    fitted = ij.reconstruct(
        small, factors, dense=(model, variables), images=images, iterations=2, **how
    )
    measured = ij.recalibrate_batch_norm(small, fitted, images, batch_size=4, **how)
    folded, merged = ij.fold_batch_norm(small, measured, **shaped)
    ij.save_exported(path, (folded, merged), image_shape=SHAPE, batch_size=4, **how)
    return (
        *(factors, fitted, measured, merged),
        ij.decompress(small, measured, **shaped)[1],
        ij.load_exported(path)(X),
        (ij.count_cost(small, SHAPE, **how), ij.dropped_rules(small, SHAPE, **how)),
    )


@pytest.mark.slow
def test_one_argument_says_how_any_network_is_called(tmp_path):
    variables = Norm().init(KEY, X)
    expected = everything(Norm(), variables, tmp_path / "plain")
    found = everything(
        Awkward(), variables, tmp_path / "awkward", apply_fn=apply_awkward
    )
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    jax.tree.map(close, found[:-1], expected[:-1])
    assert found[-1] == expected[-1]


class Gated(nn.Module):
    """A network of one's own with a plan, and another argument than `train`."""

    plan: ij.Plan = ij.Plan()
    dtype: object = jnp.float32

    @nn.compact
    def __call__(self, x, *, mode):
        x = jnp.asarray(x)
        layers = Layers(self.plan, self.dtype, None, train=mode == "fit")
        for name in ("one", "two"):
            x = layers.conv(self, name, x, 4, 3, padding=1)
            x = nn.relu(layers.norm(self, f"{name}_norm", x))
        return {"logits": layers.dense(self, "fc", x.mean((1, 2)), 5)}


def apply_gated(model, images, train):
    return model(images, mode="fit" if train else "use")["logits"]


@pytest.mark.slow
def test_a_network_of_ones_own_is_made_inertial():
    model = Gated()
    variables = model.init(KEY, X, mode="use")
    options = {"macs": 0.8, "calibration": X, "apply_fn": apply_gated}
    inertial, changed = ij.make_inertial(model, flax.core.freeze(variables), **options)
    assert {glob for glob, _ in inertial.plan.rules} <= {"one", "two"}
    rates = {path: spec.threshold for path, spec in inertial.plan.rules}
    assert rates and changed["thresholds"].keys() == rates.keys()
    plain = lambda network: ij.count_cost(network, SHAPE, apply_fn=apply_gated)  # noqa: E731
    assert plain(inertial).total_macs <= 0.8 * plain(model).macs
    outputs = inertial.apply(changed, X, mode="use")["logits"]
    assert outputs.shape == (4, 5) and np.isfinite(outputs).all()


def test_a_planned_or_folded_model_may_be_a_part_of_another():
    class Normed(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.BatchNorm(True, name="bn")(conv(name="a")(x))

    class Outer(nn.Module):
        part: nn.Module

        @nn.compact
        def __call__(self, x):
            # A layer of the same name, of which no plan speaks.
            return self.part(conv(name="a")(x))

    model = Normed()
    plan = ij.Plan((("a", ij.Tucker2(2, 2)),))
    planned = ij.Planned(model, plan)
    variables = planned.init(KEY, X)
    folded = ij.fold_batch_norm(planned, variables, image_shape=SHAPE)
    for part, inside in ((planned, variables), folded):
        outer = Outer(part)
        drawn = outer.init(KEY, X)
        assert drawn["params"]["a"].keys() == {"kernel", "bias"}
        given = {name: {"part": tree} for name, tree in inside.items()}
        given["params"] |= {"a": drawn["params"]["a"]}
        expected = part.apply(inside, conv().apply({"params": given["params"]["a"]}, X))
        np.testing.assert_allclose(outer.apply(given, X), expected, atol=1e-6)


@pytest.mark.parametrize(
    "layer",
    [
        lambda: ij.Tucker2Conv(4, 3, rank_in=2, rank_out=3, name="own"),
        lambda: ij.LowRankConv(4, rank=2, name="own"),
    ],
)
def test_factorised_layers_of_the_models_own_stay_and_say_so(layer):
    model = Net(layer)
    variables = model.init(KEY, X)
    for options in ({"image_shape": SHAPE}, {"calibration": X, "layers": "plain"}):
        small, factors = ij.compress(model, variables, ranks=ij.Ratio(0.5), **options)
        assert [glob for glob, _ in small.plan.rules] == ["plain"]
        assert "of the model's own" in dict(small.kept)["own"]
        assert small.apply(factors, X).shape == X.shape
        dense, kernels = ij.decompress(small, factors, image_shape=SHAPE)
        np.testing.assert_allclose(
            dense.apply(kernels, X), small.apply(factors, X), atol=1e-5
        )


def test_a_glob_of_the_plan_does_not_make_a_layer_of_the_models_own_the_plans():
    model = Net(lambda: ij.Tucker2Conv(4, 3, rank_in=2, rank_out=3, name="own"))
    planned = ij.Planned(model, ij.Plan((("*n", ij.Tucker2(3, 3)),)))
    assert ij.Plan(planned.plan.rules).spec("plain") != ij.Plan().spec("plain")
    variables = planned.init(KEY, X)
    for small, factors in (
        ij.compress(planned, variables, ranks=ij.Ratio(0.5), image_shape=SHAPE),
        ij.decompress(planned, variables, image_shape=SHAPE),
    ):
        assert small.apply(factors, X).shape == X.shape


def test_the_stem_is_the_first_convolution_also_where_it_stays_anyway():
    class Own(nn.Conv):
        """May compute anything."""

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = Own(4, (3, 3), name="stem")(x)
            return conv(name="b")(conv(name="a")(x))

    model = Net()
    options = {"ranks": ij.Ratio(0.5), "image_shape": SHAPE, "keep_stem": True}
    small, _ = ij.compress(model, model.init(KEY, X), **options)
    assert [glob for glob, _ in small.plan.rules] == ["a", "b"]
    small, _ = ij.compress(Two(), Two().init(KEY, X), **options)
    assert [glob for glob, _ in small.plan.rules] == ["b"]
    tiled = ij.Inertial(3, 4, reading="tiled")
    planned = ij.Planned(Two(), ij.Plan((("a", tiled),)))
    small, _ = ij.compress(planned, planned.init(KEY, X), **options)
    assert [glob for glob, _ in small.plan.rules] == ["b", "a"]
