"""Parameters, MACs and numbers of every network, beside PyTorch's."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import inertia_jax as ij
from inertia_jax.models.create import input_shape

# Architecture, options, parameters and MACs at 10 classes (1000 for ImageNet).
TABLE = [
    ("resnet18", {}, 11_173_962, 555_422_720),
    ("vgg16", {}, 14_728_266, 313_201_664),
    ("simpledla", {}, 15_142_970, 913_495_040),
    ("resnet18", {"stem": "imagenet", "num_classes": 1000}, 11_689_512, 1_814_073_344),
    ("resnet20", {}, 269_722, 40_551_040),
    ("resnet20", {"shortcut": "B"}, 272_474, 40_813_184),
    ("lenet", {}, 1_199_882, 11_992_448),
]
# He et al., table 6: 0.46, 0.66 and 0.85 million.
DEPTHS = [("resnet32", 464_154), ("resnet44", 658_586), ("resnet56", 853_018)]


@pytest.mark.parametrize(("name", "options", "params", "macs"), TABLE)
def test_parameters_and_macs_are_the_published_ones(name, options, params, macs):
    model = ij.create_model(name, **options)
    cost = ij.count_cost(model, input_shape(model))
    assert (cost.params, cost.macs) == (params, macs)


@pytest.mark.parametrize(("name", "params"), DEPTHS)
def test_deeper_cifar_resnets_have_the_published_size(name, params):
    assert ij.count_cost(ij.create_model(name), (32, 32, 3)).params == params


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "vgg16", "simpledla", "resnet20"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_narrow_networks_run_in_every_type(name, dtype):
    model = ij.create_model(name, width=0.05, num_classes=7, dtype=dtype)
    variables = ij.init_variables(model, jax.random.key(0))
    leaves = jax.tree.leaves(variables)
    assert all(leaf.dtype == jnp.float32 for leaf in leaves)
    logits = jax.jit(model.apply)(variables, np.zeros((2, 32, 32, 3), np.float32))
    assert logits.shape == (2, 7)
    assert logits.dtype == dtype


def test_initialisation_is_pytorchs():
    model = ij.create_model("lenet", num_classes=1000)
    params = ij.init_variables(model, jax.random.key(0))["params"]
    for name, fan_in in (("conv1", 9), ("conv2", 288), ("fc1", 9216), ("fc2", 128)):
        for leaf in ("kernel", "bias"):
            values = np.asarray(params[name][leaf])
            assert np.abs(values).max() <= fan_in**-0.5
            # Uniform in +-b has deviation b / sqrt(3); few values scatter by more, but
            # the 32 of the first bias not by as much as zeros would.
            spread = 4 / np.sqrt(values.size)
            assert spread < 0.75
            np.testing.assert_allclose(
                values.std(), (3 * fan_in) ** -0.5, rtol=max(0.02, spread)
            )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "resnet19"}, "`name` .*resnet19"),
        ({"name": "vgg16", "num_classes": 0}, "`num_classes`"),
        ({"name": "vgg16", "width": 0.0}, "`width`"),
        ({"name": "vgg16", "stem": "imagenet"}, "`stem`"),
        ({"name": "resnet18", "stem": "s2d"}, "`stem`"),
        ({"name": "resnet20", "shortcut": "C"}, "`shortcut`"),
        ({"name": "vgg16", "dtype": "int8"}, "`dtype`"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        ij.create_model(**arguments)


def test_images_too_small_for_vgg_are_refused():
    model = ij.create_model("vgg16", width=0.05)
    with pytest.raises(ValueError, match="at least 32 x 32"):
        jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 28, 28, 3)))


def _torch_twin(name, dtype):
    torch = pytest.importorskip("torch", reason="needs PyTorch: the extra `torch`")
    from train.benchmark.torch_models import TORCH_MODELS

    torch.manual_seed(0)
    twin = TORCH_MODELS[name]().to(dtype=getattr(torch, dtype))
    for module in twin.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            # As after training: at their initial values they would hide a mix-up.
            with torch.no_grad():
                module.weight.uniform_(0.5, 1.5)
                module.bias.uniform_(-0.2, 0.2)
                module.running_mean.uniform_(-0.2, 0.2)
                module.running_var.uniform_(0.5, 1.5)
    return torch, twin


def _batch(dtype):
    rng = np.random.default_rng(0)
    images = rng.normal(size=(8, 32, 32, 3)).astype(dtype)
    return images, rng.integers(10, size=8)


@pytest.mark.slow
@pytest.mark.usefixtures("optimised")
@pytest.mark.parametrize("name", ["resnet18", "vgg16", "simpledla"])
def test_logits_equal_pytorchs_in_float32(name):
    torch, twin = _torch_twin(name, "float32")
    model = ij.create_model(name)
    variables = ij.load_torch(model, twin.state_dict())
    images, _ = _batch(np.float32)
    theirs_in = torch.from_numpy(images.transpose(0, 3, 1, 2))
    for train in (False, True):
        twin.train(train)
        with torch.no_grad():
            theirs = twin(theirs_in).numpy()
        apply = jax.jit(
            lambda v, x, train=train: model.apply(
                v, x, train=train, mutable=["batch_stats"]
            )[0]
        )
        ours = apply(variables, images)
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4 * abs(theirs).max())


@pytest.mark.slow
@pytest.mark.usefixtures("optimised")
@pytest.mark.parametrize("name", ["resnet18", "vgg16", "simpledla"])
def test_gradients_equal_pytorchs_in_float64(name, x64):
    torch, twin = _torch_twin(name, "float64")
    model = ij.create_model(name, dtype=jnp.float64)
    variables = ij.load_torch(model, twin.state_dict())
    images, labels = _batch(np.float64)
    loss = torch.nn.functional.cross_entropy(
        twin(torch.from_numpy(images.transpose(0, 3, 1, 2))), torch.from_numpy(labels)
    )
    loss.backward()

    @jax.jit
    @jax.grad
    def gradient(params):
        logits, _ = model.apply(
            {**variables, "params": params}, images, train=True, mutable=["batch_stats"]
        )
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.mean()

    grads = gradient(variables["params"])
    ours = ij.to_torch(model, {**variables, "params": grads})
    theirs = {key: p.grad.numpy() for key, p in twin.named_parameters()}
    largest = max(abs(value).max() for value in theirs.values())
    for key, value in theirs.items():
        np.testing.assert_allclose(ours[key], value, rtol=0, atol=1e-7 * largest)


@pytest.mark.slow
def test_dropout_does_not_depend_on_the_split():
    model = ij.create_model("lenet", width=0.25)
    variables = ij.init_variables(model, jax.random.key(0))
    images = np.random.default_rng(0).normal(size=(8, 28, 28, 1)).astype(np.float32)

    def logits(part):
        return model.apply(
            {**variables, "examples": {"position": jnp.arange(8)[part]}},
            images[part],
            train=True,
            rngs={"dropout": jax.random.key(1)},
        )

    whole = logits(slice(None))
    parts = np.concatenate([logits(slice(0, 3)), logits(slice(3, 8))])
    # Other batch sizes round differently; another mask would differ by whole units.
    np.testing.assert_allclose(whole, parts, rtol=1e-4, atol=1e-5)
    assert not np.allclose(whole, model.apply(variables, images), atol=1e-2)
