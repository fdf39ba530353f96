"""Networks with BatchNorm merged into their kernels: the same function, without it."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import traverse_util

import inertia_jax as ij
from train.benchmark import infer as bench_infer

pytestmark = pytest.mark.usefixtures("optimised")
KEY = jax.random.key(0)
FIXED = ij.Fixed(0.8)
DENSE = ij.Plan()


def random_variables(model, shape, dtype=np.float64, **options):
    """Variables as training leaves them: moved statistics, half the scales < 0."""
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        if path[0] == "batch_stats" and path[-1] in ("var", "friction_mean"):
            return rng.uniform(0.5, 2, leaf.shape).astype(dtype)
        if path[-1] == "threshold":
            return np.full(leaf.shape, 0.8, dtype)
        size = 1 if leaf.ndim < 2 else np.prod(leaf.shape[:-1]) ** -0.5
        return (size * rng.normal(size=leaf.shape)).astype(dtype)

    init = lambda key, x: model.init(key, x, **options)  # noqa: E731
    shapes = jax.eval_shape(init, KEY, jnp.zeros((1, *shape)))
    flat = traverse_util.flatten_dict(shapes)
    return traverse_util.unflatten_dict({k: draw(k, v) for k, v in flat.items()})


def images(shape, dtype=np.float64):
    return np.random.default_rng(1).normal(size=(2, *shape)).astype(dtype)


def norms_in(model, variables, x, **options):
    """How many layers are normalised: each takes one reciprocal root."""
    apply = lambda v, x: model.apply(v, x, **options)  # noqa: E731
    return str(jax.make_jaxpr(apply)(variables, x)).count("rsqrt")


def check(model, shape, *, kept=(), rtol=1e-9, dtype=np.float64, **options):
    """Folds, compares, and returns the folded network and its variables."""
    variables = random_variables(model, shape, dtype, **options)
    before = jax.tree.map(np.copy, variables)
    folded, merged = ij.fold_batch_norm(model, variables, image_shape=shape)
    x = images(shape, dtype)
    expected = jax.jit(lambda v, x: model.apply(v, x, **options))(variables, x)
    found = jax.jit(lambda v, x: folded.apply(v, x, **options))(merged, x)
    assert found.dtype == expected.dtype
    scale = np.abs(np.asarray(expected)).max()
    assert np.asarray(expected).std() > 1e-3 * scale > 0
    np.testing.assert_allclose(found, expected, rtol=0, atol=rtol * scale)
    jax.tree.map(np.testing.assert_array_equal, variables, before)
    assert [path for path, _ in folded.kept] == list(kept)
    assert norms_in(model, variables, x, **options) == len(kept) + len(folded.folded)
    assert norms_in(folded, merged, x, **options) == len(kept)
    assert ("batch_stats" in merged) == bool(kept)
    # The variables are those that the folded network itself would ask for.
    asked = jax.eval_shape(lambda: folded.init(KEY, jnp.asarray(x), **options))
    assert jax.tree.map(np.shape, asked) == jax.tree.map(np.shape, merged)
    return folded, merged


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("name", "options", "side", "count"),
    [
        ("resnet20", {"shortcut": "B"}, 8, 21),
        ("resnet18", {"stem": "imagenet"}, 32, 20),
        ("vgg16", {}, 32, 13),
        ("simpledla", {}, 8, 39),
        ("lenet", {}, 8, 0),
    ],
)
def test_every_network_is_folded_whole(name, options, side, count):
    model = ij.create_model(name, width=0.1, dtype=np.float64, **options)
    folded, _ = check(model, (side, side, 3))
    assert len(folded.folded) == count


def inertial(*args, **kwargs):
    return ij.Inertial(*args, threshold=FIXED, **kwargs)


TILED = inertial(3, 4, reading="tiled")
PLANS = {
    "tucker2": ij.Tucker2(2, 2),
    "window mean": inertial(1, 3),
    "window sum": inertial(1, 3, combine="sum"),
    "window weighted": inertial(1, 3, combine="weighted"),
    "window weighted_channel": inertial(1, 3, combine="weighted_channel"),
    "window weighted_input": inertial(1, 3, combine="weighted_input"),
    "window per channel": ij.Inertial(1, 3, threshold=ij.Learned(0.8, True)),
    "tiled": TILED,
    "tiled sample": inertial(3, 4, reading="tiled", low="sample"),
    "tiled relative": inertial(3, 4, reading="tiled", relative=True, capacities=None),
    "tucker2, tiled core": ij.Tucker2(2, 2, core=TILED),
    "tucker2, max core": ij.Tucker2(2, 2, core=inertial(1, 3, combine="max")),
    "tucker2, stack core": ij.Tucker2(2, 2, core=inertial(1, 3, combine="stack")),
}


class Block(nn.Module):
    """A convolution of every kind, with a neighbour that nothing is merged into."""

    spec: object

    @nn.compact
    def __call__(self, x, train=False):
        plan = ij.Plan((("conv", self.spec),))
        layers = ij.models.layers.Layers(plan, np.float64, None, train)
        y = layers.conv(self, "conv", jnp.asarray(x), 4, 3, padding=1)
        return nn.relu(layers.norm(self, "bn", y))


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("kind", PLANS)
def test_every_kind_of_convolution_is_folded(kind):
    folded, merged = check_block(PLANS[kind])
    assert folded.folded == (("conv", "bn"),)
    assert set(merged["params"]) == {"conv"}


def check_block(spec, kept=()):
    """`check`, where running means of friction are statistics that stay."""
    model = Block(spec)
    shape = (8, 8, 3)
    variables = random_variables(model, shape)
    folded, merged = ij.fold_batch_norm(model, variables, image_shape=shape)
    x = images(shape)
    expected, sown = model.apply(variables, x, mutable=["intermediates"])
    found, sown_after = folded.apply(merged, x, mutable=["intermediates"])
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)
    jax.tree.map(np.testing.assert_array_equal, sown, sown_after)
    rates = [r for r in jax.tree.leaves(sown) if r.ndim == 1]
    # Both readings are met, gate open and gate closed.
    assert all(0 < r < 1 for r in np.ravel(rates))
    assert [path for path, _ in folded.kept] == list(kept)
    assert norms_in(folded, merged, x) == len(kept)
    return folded, merged


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_what_is_not_exact_keeps_its_batch_norm():
    for combine, reason in (("max", "negative scale"), ("stack", "two channels")):
        folded, merged = check_block(inertial(1, 3, combine=combine), kept=["bn"])
        assert reason in folded.kept[0][1]
        assert set(merged["params"]["bn"]) == {"scale", "bias"}
        assert set(merged["batch_stats"]["bn"]) == {"mean", "var"}
    # Positive scales do not change which response is the largest.
    model, shape = Block(inertial(1, 3, combine="max")), (8, 8, 3)
    variables = random_variables(model, shape)
    variables["params"]["bn"]["scale"] = np.abs(variables["params"]["bn"]["scale"])
    folded, merged = ij.fold_batch_norm(model, variables, image_shape=shape)
    assert not folded.kept
    np.testing.assert_allclose(
        folded.apply(merged, images(shape)),
        model.apply(variables, images(shape)),
        atol=1e-12,
    )


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_a_plan_of_many_kinds_is_folded():
    tiled = inertial(3, 4, reading="tiled", capacities=None)  # sooner compiled
    rules = (
        ("layer1_0/conv1", ij.Tucker2(2, 2)),
        ("layer1_0/conv2", tiled),
        ("layer1_1/conv1", inertial(1, 3, combine="max")),
        ("layer2_0/shortcut_0", ij.LowRank(2)),
        ("layer3_0*", ij.Tucker2(3, 3, core=tiled)),
    )
    model = ij.create_model(
        "resnet20", width=0.2, shortcut="B", plan=ij.Plan(rules), dtype=np.float64
    )
    folded, _ = check(model, (8, 8, 3), kept=["layer1_1/bn1"])
    # Costs are counted of the folded network as of any other: 21 biases came in.
    shape = (8, 8, 3)
    cost, before = ij.count_cost(folded, shape), ij.count_cost(model, shape)
    assert cost.macs == before.macs
    norms = sum(row.params for row in before.rows if "bn" in row.path.split("/")[-1])
    assert cost.params < before.params
    assert norms > 0


class Foreign(nn.Module):
    """Someone's network: defaults of Flax, training by default, odd calls."""

    @nn.compact
    def __call__(self, x, train: bool = True):
        norm = lambda **kw: nn.BatchNorm(use_running_average=not train, **kw)  # noqa: E731
        x = nn.relu(norm()(nn.Conv(4, (3, 3), use_bias=False)(x)))
        x = norm(use_scale=False, axis=3)(inputs_by_name(nn.Conv(6, (3, 3)), x))
        grouped = nn.Conv(6, (3, 2), strides=2, feature_group_count=2, padding="VALID")
        x = nn.relu(norm(use_bias=False, epsilon=1e-2)(grouped(x)))
        x = nn.relu(norm()(nn.Dense(5)(x.mean((1, 2)))))
        return nn.Dense(3)(x)


def inputs_by_name(layer, x):
    return layer(inputs=x)


@pytest.mark.usefixtures("x64")
def test_a_foreign_network_is_folded():
    folded, merged = check(Foreign(), (8, 7, 3), train=False)
    layers = [layer for layer, _ in folded.folded]
    assert layers == ["Conv_0", "Conv_1", "Conv_2", "Dense_0"]
    # By default, by place and by name.
    for args, kwargs in (((), {}), ((True,), {}), ((), {"train": True})):
        with pytest.raises(ValueError, match="`train` .* must be False"):
            folded.apply(merged, images((8, 7, 3)), *args, **kwargs)


@pytest.mark.slow
def test_float32_and_bfloat16():
    check(
        ij.create_model("resnet20", width=0.2), (8, 8, 3), dtype=np.float32, rtol=1e-5
    )
    model = Mixed()
    folded, merged = ij.fold_batch_norm(
        model, random_variables(model, (8, 8, 3), np.float32), image_shape=(8, 8, 3)
    )
    # BatchNorm had the last word on the type.
    assert folded.apply(merged, images((8, 8, 3), np.float32)).dtype == jnp.float32
    assert merged["params"]["Conv_0"]["kernel"].dtype == jnp.float32


class Mixed(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (3, 3), dtype=jnp.bfloat16)(x)
        return nn.BatchNorm(use_running_average=True, dtype=jnp.float32)(x)


class Entangled(nn.Module):
    """BatchNorm layers none of which can be merged, but the first."""

    @nn.compact
    def __call__(self, x):
        norm = lambda name, **kw: nn.BatchNorm(True, name=name, **kw)  # noqa: E731
        conv = lambda name: nn.Conv(4, (3, 3), name=name)  # noqa: E731
        x = norm("fine")(conv("first")(x))
        y = conv("also_read")(x)
        x = norm("beside")(y) + y
        x = norm("after_relu")(nn.relu(conv("then_relu")(x)))
        twice = conv("called_twice")
        x = norm("second_call")(twice(twice(x)))
        shared = norm("shared")
        x = shared(conv("left")(x)) + shared(conv("right")(x))
        x = norm("rows", axis=1)(conv("before_rows")(x))
        x = norm("after_norm")(norm("before_norm")(x))
        x = norm("after_other")(nn.ConvTranspose(4, (3, 3), name="other")(x))
        # Its kernel is scaled to a norm of its own, whatever is merged into it.
        x = norm("after_weight_norm")(nn.WeightNorm(conv("weight_normed"))(x))
        each = nn.vmap(
            nn.Conv, variable_axes={"params": 0}, split_rngs={"params": True}
        )
        x = norm("of_several")(each(4, (3, 3), name="several")(x))
        steps = nn.scan(
            Step,
            variable_axes={"params": 0, "batch_stats": 0},
            split_rngs={"params": True},
            length=2,
        )
        return steps(name="steps")(x, None)[0]


class Step(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.BatchNorm(True, name="bn")(nn.Conv(4, (3, 3), name="conv")(x)), None


@pytest.mark.usefixtures("x64")
def test_a_batch_norm_without_a_convolution_of_its_own_stays():
    model, shape = Entangled(), (6, 6, 4)
    variables = random_variables(model, shape)
    folded, merged = ij.fold_batch_norm(model, variables, image_shape=shape)
    assert folded.folded == (("first", "fine"),)
    kept = dict(folded.kept)
    assert "axis 1" in kept.pop("rows")
    assert "several layers" in kept.pop("steps/bn")
    assert "several layers" in kept.pop("of_several")
    assert set(kept) == {
        *("beside", "after_relu", "second_call", "shared"),
        *("before_norm", "after_norm", "after_other", "after_weight_norm"),
    }
    assert all("nothing else uses" in reason for reason in kept.values())
    x = images(shape)[:1]  # variables of `several` are one an image
    np.testing.assert_allclose(
        folded.apply(merged, x), model.apply(variables, x), rtol=1e-9
    )


@pytest.mark.usefixtures("x64")
def test_a_compressed_foreign_network_is_folded_and_a_folded_one_compressed():
    model, shape = Step(), (6, 6, 4)
    wrapped = Unpacked()
    variables = random_variables(wrapped, shape)
    x = images(shape)
    ranks = ij.Plan((("*/conv", ij.Tucker2(4, 4)),))
    compress = lambda *network: ij.compress(  # noqa: E731
        *network, ranks=ranks, image_shape=shape
    )
    planned = compress(wrapped, variables)
    folded = ij.fold_batch_norm(*planned, image_shape=shape)
    assert folded[0].folded == (("step/conv", "step/bn"),)
    assert set(folded[1]["params"]["step"]["conv"]) == {"u_in", "core", "u_out"}
    turned = compress(*ij.fold_batch_norm(wrapped, variables, image_shape=shape))
    expected = wrapped.apply(variables, x)
    for network, merged in (folded, turned):
        assert norms_in(network, merged, x) == 0
        np.testing.assert_allclose(network.apply(merged, x), expected, atol=1e-9)
    assert model is not None


def block(layer, x, name="bn"):
    return nn.relu(nn.BatchNorm(True, name=name)(layer(x)))


def params_of(layer):
    return layer.variables["params"]


class Tied(nn.Module):
    """A decoder with the encoder's kernel, after a block that is as any other."""

    @nn.compact
    def __call__(self, x):
        x = block(nn.Conv(4, (3, 3), name="fine"), x, "fine_bn")
        layer = nn.Conv(4, (1, 1), name="layer")
        return block(layer, x) @ params_of(layer)["kernel"][0, 0].T


class TiedLinear(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = block(nn.Conv(4, (3, 3), name="fine"), x, "fine_bn").mean((1, 2))
        layer = nn.Dense(4, name="layer")
        return block(layer, x) @ params_of(layer)["kernel"].T


class Penalised(nn.Module):
    """Returns its regularisation besides."""

    of: str

    @nn.compact
    def __call__(self, x):
        x = block(nn.Conv(4, (3, 3), name="fine"), x, "fine_bn")
        layer, norm = nn.Conv(4, (3, 3), name="layer"), nn.BatchNorm(True, name="bn")
        x = norm(layer(x))
        if self.of == "mean":
            return x, norm.variables["batch_stats"]["mean"]
        leaves = {"scale": norm, "kernel": layer, "bias": layer}
        return x, jnp.sum(params_of(leaves[self.of])[self.of] ** 2)


class Within(nn.Module):
    """What `make` returns stands between two convolutions."""

    make: object

    @nn.compact
    def __call__(self, x):
        x = block(nn.Conv(4, (3, 3), name="fine"), x, "fine_bn")
        return block(self.make(), x)


class Centred(nn.Module):
    """A convolution whose kernel is centred on the way."""

    @nn.compact
    def __call__(self, x):
        centre = lambda tree: jax.tree.map(lambda k: k - k.mean(), tree)  # noqa: E731
        options = {"init": self.is_initializing(), "mutable": True}
        mapped = nn.map_variables(nn.Conv, "params", centre, **options)
        return mapped(4, (3, 3), use_bias=False, name="layer")(x)


def by_sign(x, kernel, *args, **options):
    return jax.lax.conv_general_dilated(x, jnp.sign(kernel), *args, **options)


class Functional(nn.Module):
    """A convolution with a kernel of its own, which Flax's layer is given."""

    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (3, 3, 4, 4))
        layer = nn.Conv(4, (3, 3), use_bias=False, parent=None)
        return layer.apply({"params": {"kernel": jnp.sign(kernel)}}, x)


class TiedFactors(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = block(nn.Conv(4, (3, 3), name="fine"), x, "fine_bn")
        layer = ij.Tucker2Conv(4, (3, 3), 2, 2, name="layer")
        x = block(layer, x)
        return x @ params_of(layer)["u_out"]["kernel"][0, 0].T


class Rematerialised(nn.Module):
    """Inside `nn.remat`, and read outside of it."""

    @nn.compact
    def __call__(self, x):
        x = block(nn.Conv(4, (3, 3), name="fine"), x, "fine_bn")
        layer = nn.remat(nn.Conv)(4, (1, 1), name="layer")
        return block(layer, x) * params_of(layer)["bias"].reshape(1, 1, 1, 4)


OUTSIDE = "also used outside of it"


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (Tied(), OUTSIDE),
        (TiedLinear(), OUTSIDE),
        (TiedFactors(), OUTSIDE),
        (Rematerialised(), ""),
        *((Penalised(of), OUTSIDE) for of in ("kernel", "bias", "scale", "mean")),
        (Within(lambda: Centred(name="centred")), ""),
        (Within(lambda: nn.Conv(4, (3, 3), conv_general_dilated=by_sign)), "own way"),
        (Within(lambda: Functional(name="layer")), ""),
    ],
    ids=str,
)
def test_variables_that_are_read_elsewhere_or_transformed_stay(model, reason):
    shape = (6, 6, 4)
    variables = random_variables(model, shape)
    folded, merged = ij.fold_batch_norm(model, variables, image_shape=shape)
    assert folded.folded == (("fine", "fine_bn"),)
    ((path, why),) = folded.kept
    assert path == "bn"
    assert reason in why
    x = images(shape)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9)  # noqa: E731
    jax.tree.map(close, folded.apply(merged, x), model.apply(variables, x))


class Unpacked(nn.Module):
    @nn.compact
    def __call__(self, x):
        return Step(name="step")(x, None)[0]


class Given(nn.Module):
    """A network of this library that trains under another name, and a head."""

    layers: nn.Module
    classes: int = 3

    @nn.compact
    def __call__(self, x, training=False):
        network = ij.create_model(
            "resnet20", width=0.1, num_classes=4, dtype=jnp.float64
        )
        return nn.Dense(self.classes)(network(self.layers(x), train=training))


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_modules_that_are_fields_keep_their_paths():
    norm = nn.BatchNorm(use_running_average=True)
    layers = nn.Sequential([nn.Conv(3, (3, 3)), norm, nn.relu])
    folded, merged = check(layers, (6, 5, 3))
    assert folded.folded == (("layers_0", "layers_1"),)
    folded, merged = check(Given(layers), (8, 8, 3))
    assert {"layers/layers_1", "CifarResNet_0/bn1"} < {n for _, n in folded.folded}
    with pytest.raises(ValueError, match="`train` .* must be False.*Given"):
        folded.apply(merged, images((8, 8, 3)), training=True)


def test_errors_say_what_is_wrong(tmp_path):
    model = ij.create_model("resnet20", width=0.1)
    variables = random_variables(model, (8, 8, 3), np.float32)
    folded, merged = ij.fold_batch_norm(model, variables)
    x = images((8, 8, 3), np.float32)
    with pytest.raises(ValueError, match="`train` .* must be False.*CifarResNet"):
        folded.apply(merged, x, train=True)
    with pytest.raises(ValueError, match="to `model`: bn1/mean is missing, must be"):
        ij.fold_batch_norm(model, {"params": variables["params"]})
    with pytest.raises(ValueError, match=r"conv1/kernel is \(3, 3, 3, 2\), must be"):
        ij.fold_batch_norm(model.clone(width=0.2), variables)
    with pytest.raises(ValueError, match="`image_shape` .* must be given for Foreign"):
        ij.fold_batch_norm(Foreign(), variables)
    with pytest.raises(ValueError, match="Folded.* that can be trained further: save"):
        ij.save_checkpoint(tmp_path / "never-made", folded, merged)


@pytest.mark.slow
def test_the_benchmark_compares_equal_networks(monkeypatch, capsys):
    monkeypatch.setattr(bench_infer, "_TUCKER", ("ratio 0.2",))
    monkeypatch.setattr(bench_infer, "_RATES", ())
    torch = importlib.util.find_spec("torch")
    suite = bench_infer.Suite(
        models=("vgg16",),
        batch_size=2,
        width=0.1,
        against=("none" if torch is None else "torch",),
        repeats=1,
    )
    (row,) = suite.rows()
    times, gaps = row["times"]["2"], row["gaps"]["2"]
    ours = {"dense", "dense, folded", "ratio 0.2", "ratio 0.2, folded"}
    theirs = {"PyTorch", "PyTorch, folded"} if torch else set()
    assert set(times) == ours | theirs
    assert set(gaps) == set(times) - {"dense", "ratio 0.2"}
    assert max(gaps.values()) < 1e-5
    for of in times.values():
        assert of["min_ms"] <= of["median_ms"] <= of["max_ms"]
        assert of["images_per_s"] == pytest.approx(2000 / of["median_ms"])
    assert len(capsys.readouterr().out.splitlines()) == 1 + 2 * len(times)


def test_folding_in_pytorch_leaves_no_batch_norm_and_the_same_outputs():
    torch = pytest.importorskip("torch", reason="needs PyTorch")
    from train.benchmark.torch_models import TORCH_MODELS, fold_batch_norm

    for name in ("resnet18", "simpledla"):
        torch.manual_seed(0)
        module = TORCH_MODELS[name](width=0.1).eval()
        for norm in module.modules():
            if isinstance(norm, torch.nn.BatchNorm2d):
                for values in (norm.running_mean, norm.weight.data, norm.bias.data):
                    values.normal_()
        x = torch.randn(2, 3, 32, 32)
        with torch.inference_mode():
            expected = module(x)
            fold_batch_norm(module)
            found = module(x)
        kinds = {type(layer) for layer in module.modules()}
        assert torch.nn.BatchNorm2d not in kinds
        scale = expected.abs().max().item()
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * scale)


def test_batch_norm_that_always_uses_the_batch_stays():
    model = nn.Sequential([nn.Conv(4, (3, 3)), nn.BatchNorm(use_running_average=False)])
    images = np.random.default_rng(0).normal(size=(4, 8, 8, 3)).astype(np.float32)
    variables = model.init(jax.random.key(0), images)
    folded, merged = ij.fold_batch_norm(model, variables, image_shape=(8, 8, 3))
    assert folded.folded == ()
    assert dict(folded.kept) == {
        "layers_1": "normalises by each batch in evaluation, too"
    }
    outputs, _ = model.apply(variables, images, mutable="batch_stats")
    again, _ = folded.apply(merged, images, mutable="batch_stats")
    np.testing.assert_array_equal(again, outputs)
