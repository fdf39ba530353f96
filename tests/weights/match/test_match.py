"""Weights of any PyTorch network go into any Flax network of the same shapes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx, traverse_util

import inertia_jax as ij
from inertia_jax.weights.pickles import Unknown

torch = pytest.importorskip("torch", reason="needs PyTorch: the extra `torch`")
tnn = torch.nn


def same_numbers(model, match, twin, images, *, channels_last=True):
    """Compares the outputs of both networks; PyTorch's images have channels first."""
    theirs_in = torch.from_numpy(np.array(images))
    if channels_last:
        theirs_in = theirs_in.movedim(-1, 1)
    with torch.no_grad():
        theirs = twin.eval()(theirs_in)
    if channels_last and theirs.ndim > 2:
        theirs = theirs.movedim(1, -1)
    ours = model.apply(match.variables, jnp.asarray(images))
    assert np.abs(theirs.numpy()).max() > 0.01
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-4, atol=1e-5)


def drawn(twin):
    """Gives normalisation other numbers than its first ones."""
    torch.manual_seed(0)
    with torch.no_grad():
        for key, value in twin.state_dict().items():
            if key.endswith(("running_mean", "bias")):
                value.normal_(0, 0.3)
            elif key.endswith("running_var") or value.ndim == 1:
                value.uniform_(0.5, 1.5)
    return twin


def shapes_of(model, *shape, dtype=jnp.float32):
    return jax.eval_shape(model.init, jax.random.key(0), jnp.zeros(shape, dtype))


def images_of(*shape):
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


# A residual network as Flax's examples and as torchvision name it.


class Block(nn.Module):
    features: int
    stride: int = 1

    @nn.compact
    def __call__(self, x):
        norm = lambda name=None: nn.BatchNorm(True, epsilon=1e-5, name=name)  # noqa: E731
        strides, pad = (self.stride, self.stride), ((1, 1), (1, 1))
        y = nn.Conv(self.features, (3, 3), strides, pad, use_bias=False)(x)
        y = nn.relu(norm()(y))
        y = norm()(nn.Conv(self.features, (3, 3), padding=pad, use_bias=False)(y))
        if x.shape != y.shape:
            conv = nn.Conv(
                self.features, (1, 1), strides, use_bias=False, name="conv_proj"
            )
            x = norm("norm_proj")(conv(x))
        return nn.relu(x + y)


class ResNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (3, 3), padding=((1, 1), (1, 1)), use_bias=False)(x)
        x = nn.relu(nn.BatchNorm(True, epsilon=1e-5)(x))
        for features, stride in ((4, 1), (4, 1), (8, 2), (8, 1)):
            x = Block(features, stride)(x)
        return nn.Dense(5)(x.mean((1, 2)))


class TorchBlock(tnn.Module):
    def __init__(self, c_in, c_out, stride=1):
        super().__init__()
        self.conv1 = tnn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)
        self.bn1 = tnn.BatchNorm2d(c_out)
        self.conv2 = tnn.Conv2d(c_out, c_out, 3, 1, 1, bias=False)
        self.bn2 = tnn.BatchNorm2d(c_out)
        self.downsample = None
        if c_in != c_out:
            conv = tnn.Conv2d(c_in, c_out, 1, stride, bias=False)
            self.downsample = tnn.Sequential(conv, tnn.BatchNorm2d(c_out))

    def forward(self, x):
        y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        return (y + (x if self.downsample is None else self.downsample(x))).relu()


class TorchResNet(tnn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = tnn.Conv2d(3, 4, 3, 1, 1, bias=False)
        self.bn1 = tnn.BatchNorm2d(4)
        self.layer1 = tnn.Sequential(TorchBlock(4, 4), TorchBlock(4, 4))
        self.layer2 = tnn.Sequential(TorchBlock(4, 8, 2), TorchBlock(8, 8))
        self.fc = tnn.Linear(8, 5)

    def forward(self, x):
        x = self.bn1(self.conv1(x)).relu()
        return self.fc(self.layer2(self.layer1(x)).mean((2, 3)))


@pytest.mark.parametrize("form", ["state dict", "wrapped file", "sorted"])
def test_a_residual_network_of_flax_takes_torchvisions_weights(form, tmp_path):
    model, twin = ResNet(), drawn(TorchResNet())
    weights = twin.state_dict()
    if form == "wrapped file":
        weights = tmp_path / "x.pth.tar"
        torch.save({"state_dict": tnn.DataParallel(twin).state_dict()}, weights)
    elif form == "sorted":
        weights = dict(sorted(weights.items()))
    match = ij.match_torch(shapes_of(model, 1, 8, 8, 3), weights)
    assert (
        match.pairs["params/Block_2/norm_proj/scale"] == "layer2.0.downsample.1.weight"
    )
    assert match.pairs["batch_stats/Block_1/BatchNorm_0/var"] == (
        "layer1.1.bn1.running_var"
    )
    assert "params/Dense_0/kernel" in str(match)
    if form == "state dict":
        same_numbers(model, match, twin, images_of(2, 8, 8, 3))


class Unnamed(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(4, name="b")(nn.relu(nn.Dense(4, name="a")(x)))


def test_what_names_leave_open_is_refused_and_said_with_pairs():
    model, twin = (
        Unnamed(),
        tnn.Sequential(tnn.Linear(4, 4), tnn.ReLU(), tnn.Linear(4, 4)),
    )
    variables, state = shapes_of(model, 1, 4), twin.state_dict()
    with pytest.raises(ValueError, match=r"weight \(4, 4\): a, b of Flax, 0, 2 of PyT"):
        ij.match_torch(variables, state)
    for pairs in ({"a": "0", "b": "2"}, {"b": "2"}):
        match = ij.match_torch(variables, state, pairs=pairs)
        same_numbers(model, match, twin, images_of(3, 4))
    rename = {"0": "a", "2": "b"}
    match = ij.match_torch(variables, state, rename=rename)
    assert match.pairs["params/b/bias"] == "b.bias"
    with pytest.raises(ValueError, match="`pairs` has 'c', which names no layers"):
        ij.match_torch(variables, state, pairs={"c": "0"})
    with pytest.raises(ValueError, match="`pairs` has '1', which names no layers"):
        ij.match_torch(variables, state, pairs={"a": "1"})


def test_layers_that_are_left_over_are_listed():
    variables = shapes_of(Unnamed(), 1, 4)
    state = tnn.Sequential(tnn.Linear(4, 4), tnn.Linear(4, 3)).state_dict()
    with pytest.raises(ValueError) as error:
        ij.match_torch(variables, state)
    assert "bias (4,), weight (4, 4): a, b of Flax, 0 of PyTorch" in str(error.value)
    assert "bias (3,), weight (3, 4): none of Flax, 1 of PyTorch" in str(error.value)
    with pytest.raises(ValueError, match=r"none of PyTorch \(within a and 1\)"):
        ij.match_torch(variables, state, pairs={"a": "1"})


def test_other_sets_of_weights_in_a_file_are_said():
    model, twin = nn.Dense(3), drawn(tnn.Sequential(tnn.Linear(4, 3)))
    variables, state = shapes_of(model, 1, 4), twin.state_dict()
    averaged = {key: 2 * value for key, value in state.items()}
    loaded = {"state_dict": state, "ema": averaged, "epoch": 3}
    said = "weights at `state_dict` are taken, not those at `ema`; a mapping of others"
    with pytest.warns(UserWarning, match=said):
        match = ij.match_torch(variables, loaded)
    same_numbers(model, match, twin, images_of(2, 4), channels_last=False)
    kernel = ij.match_torch(variables, loaded["ema"]).variables["params"]["kernel"]
    np.testing.assert_array_equal(kernel, averaged["0.weight"].T)
    loaded = {"model": state, "discriminator": {"a.weight": torch.ones(2, 2)}}
    with pytest.warns(UserWarning, match="left out: discriminator.a.weight"):
        ij.match_torch(variables, loaded)


def test_tensors_without_numbers_are_named():
    variables, state = shapes_of(Unnamed(), 1, 4), {"a.bias": torch.ones(4)}
    unread = Unknown("a sparse tensor")
    with pytest.raises(ValueError, match="unreadable a.weight: a sparse tensor"):
        ij.match_torch(variables, state | {"a.weight": unread})


def test_numbers_against_the_order_of_the_network_are_refused():
    class Series(nn.Module):
        @nn.compact
        def __call__(self, x):
            for _ in range(3):
                x = nn.Dense(4)(x)
            return x

    variables = shapes_of(Series(), 1, 4)
    up = {f"up{i}": tnn.Linear(4, 4) for i in (1, 2, 3)}
    down = tnn.ModuleDict({name: up[name] for name in ("up3", "up2", "up1")})
    with pytest.raises(ValueError, match="Dense_0, Dense_1, Dense_2 of Flax, up3, up2"):
        ij.match_torch(variables, down.state_dict())
    match = ij.match_torch(variables, tnn.ModuleDict(up).state_dict())
    assert match.pairs["params/Dense_2/kernel"] == "up3.weight"


# An autoencoder: images become rows and rows images, with transposed convolutions.


class Autoencoder(nn.Module):
    @nn.compact
    def __call__(self, x):
        for features in (4, 6):
            x = nn.relu(nn.Conv(features, (3, 3), (2, 2), ((1, 1), (1, 1)))(x))
        x = nn.relu(nn.Dense(5)(x.reshape(len(x), -1)))
        x = nn.relu(nn.Dense(2 * 3 * 6)(x)).reshape(len(x), 2, 3, 6)
        x = nn.relu(nn.ConvTranspose(6, (2, 2), (2, 2), "VALID")(x))
        return nn.ConvTranspose(3, (2, 2), (2, 2), "VALID")(x)


def torch_autoencoder():
    return drawn(
        tnn.Sequential(
            *(tnn.Conv2d(3, 4, 3, 2, 1), tnn.ReLU(), tnn.Conv2d(4, 6, 3, 2, 1)),
            *(tnn.ReLU(), tnn.Flatten(), tnn.Linear(36, 5), tnn.ReLU()),
            *(tnn.Linear(5, 36), tnn.ReLU(), tnn.Unflatten(1, (6, 2, 3))),
            *(tnn.ConvTranspose2d(6, 6, 2, 2), tnn.ReLU()),
            tnn.ConvTranspose2d(6, 3, 2, 2),
        )
    )


@pytest.mark.parametrize("is_sorted", [True, False])
def test_flattened_images_are_asked_for_and_transposed_kernels_mirrored(is_sorted):
    model, twin = Autoencoder(), torch_autoencoder()
    variables, state = shapes_of(model, 1, 8, 12, 3), twin.state_dict()
    state = dict(sorted(state.items())) if is_sorted else state
    with pytest.raises(ValueError) as error:
        ij.match_torch(variables, state)
    text = str(error.value)
    assert "Dense_0 takes 36 numbers, which may be an image of 6 channels" in text
    assert "Dense_1 gives 36 numbers" in text
    said = {"flattened": {"Dense_0": (2, 3, 6)}, "unflattened": {"Dense_1": (2, 3, 6)}}
    match = ij.match_torch(variables, state, **said)
    same_numbers(model, match, twin, images_of(2, 8, 12, 3))
    with pytest.raises(ValueError, match=r"shape \(7, 6\) for Dense_0; must have 36"):
        ij.match_torch(variables, state, flattened={"Dense_0": (7, 6)})
    with pytest.raises(ValueError, match="`unflattened` has 'Dense', which matches no"):
        ij.match_torch(variables, state, unflattened={"Dense": None})


class RowNorm(nn.Module):
    """BatchNorm of a flattened image, and of a row that becomes an image."""

    @nn.compact
    def __call__(self, x):
        norm = lambda x: nn.BatchNorm(True, epsilon=1e-5)(x)  # noqa: E731
        x = norm(nn.Conv(4, (3, 3), padding=1)(x))
        x = nn.Dense(5)(norm(x.reshape(len(x), -1)))
        x = norm(nn.Dense(2 * 3 * 6)(norm(x))).reshape(len(x), 2, 3, 6)
        return nn.Conv(3, (3, 3), padding=1)(norm(x))


@pytest.mark.parametrize("is_sorted", [True, False])
def test_norms_of_an_image_in_one_row_are_asked_for(is_sorted):
    twin = tnn.Sequential(
        *(tnn.Conv2d(3, 4, 3, 1, 1), tnn.BatchNorm2d(4), tnn.Flatten()),
        *(tnn.BatchNorm1d(24), tnn.Linear(24, 5), tnn.BatchNorm1d(5)),
        *(tnn.Linear(5, 36), tnn.BatchNorm1d(36), tnn.Unflatten(1, (6, 2, 3))),
        *(tnn.BatchNorm2d(6), tnn.Conv2d(6, 3, 3, 1, 1)),
    )
    model, state = RowNorm(), drawn(twin).state_dict()
    state = dict(sorted(state.items())) if is_sorted else state
    variables = shapes_of(model, 1, 2, 3, 3)
    pairs = {"BatchNorm_4": "9", "Conv_1": "10"}
    with pytest.raises(ValueError) as error:
        ij.match_torch(variables, state, pairs=pairs)
    lines = str(error.value).splitlines()[1:]
    doubted = {line.split()[0] for line in lines}
    assert doubted == {"Dense_0", "Dense_1", "BatchNorm_1", "BatchNorm_3"}
    said = {
        "flattened": {"Dense_0": (2, 3, 4)},
        "unflattened": {"Dense_1": (2, 3, 6)},
    }
    with pytest.raises(ValueError, match="BatchNorm_1 gives 24 numbers") as error:
        ij.match_torch(variables, state, pairs=pairs, **said)
    assert "`unflattened={'BatchNorm_3': (h, w, c)}`" in str(error.value)
    said["unflattened"] |= {"BatchNorm_1": (2, 3, 4), "BatchNorm_3": (2, 3, 6)}
    match = ij.match_torch(variables, state, pairs=pairs, **said)
    same_numbers(model, match, twin, images_of(2, 2, 3, 3))


def test_norms_of_images_side_by_side_and_of_linear_layers_are_not_doubted():
    """A densely connected network, whose last row is a mean, and a hidden layer."""

    class Dense(nn.Module):
        @nn.compact
        def __call__(self, x):
            norm = lambda x: nn.BatchNorm(True, epsilon=1e-5)(x)  # noqa: E731
            x = nn.Conv(4, (3, 3), padding=1)(x)
            x = jnp.concatenate([x, nn.Conv(4, (3, 3), padding=1)(norm(x))], -1)
            x = nn.Conv(6, (1, 1))(norm(x))
            x = nn.Dense(12)(x.mean((1, 2)))
            return nn.Dense(3)(norm(x))

    def blocks(x, network):
        x = network[0](x)
        x = torch.cat([x, network[2](network[1](x))], 1)
        x = network[4](network[3](x)).mean((2, 3))
        return network[7](network[6](network[5](x)))

    class Twin(tnn.Sequential):
        def forward(self, x):
            return blocks(x, self)

    twin = drawn(
        Twin(
            *(tnn.Conv2d(3, 4, 3, 1, 1), tnn.BatchNorm2d(4), tnn.Conv2d(4, 4, 3, 1, 1)),
            *(tnn.BatchNorm2d(8), tnn.Conv2d(8, 6, 1)),
            *(tnn.Linear(6, 12), tnn.BatchNorm1d(12), tnn.Linear(12, 3)),
        )
    )
    model = Dense()
    match = ij.match_torch(shapes_of(model, 1, 4, 4, 3), twin.state_dict())
    same_numbers(model, match, twin, images_of(2, 4, 4, 3))


class Heads(nn.Module):
    """Two layers that take one flattened image, and one that takes none."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (3, 3), name="conv")(x).reshape(len(x), -1)
        mean, deviation = nn.Dense(8, name="mean")(x), nn.Dense(8, name="std")(x)
        return nn.Dense(3, name="out")(mean + deviation)


def test_every_layer_that_takes_an_image_is_doubted_and_globs_say_none():
    state = {"conv.weight": torch.ones(4, 3, 3, 3), "conv.bias": torch.ones(4)}
    for name, shape in {"mean": (8, 64), "std": (8, 64), "out": (3, 8)}.items():
        state |= {f"{name}.weight": torch.rand(shape), f"{name}.bias": torch.ones(8)}
    state["out.bias"] = torch.ones(3)
    variables = shapes_of(Heads(), 1, 4, 4, 3)
    with pytest.raises(ValueError, match="layers take or give an image") as error:
        ij.match_torch(variables, state)
    assert "`flattened={'std': (4, 4, 4)}`" in str(error.value)
    match = ij.match_torch(variables, state, flattened={"std": (4, 4, 4), "*": None})
    params = match.variables["params"]
    np.testing.assert_array_equal(params["mean"]["kernel"], state["mean.weight"].T)
    expected = state["std.weight"].reshape(8, 4, 4, 4).movedim(1, -1).reshape(8, 64).T
    np.testing.assert_array_equal(params["std"]["kernel"], expected)


def test_square_kernels_among_transposed_ones_are_asked_for():
    class Up(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.ConvTranspose(4, (3, 3), name="up1")(x)
            return nn.ConvTranspose(2, (3, 3), name="up2")(x)

    # SAME crops one number at each side of a kernel of three.
    twin = drawn(
        tnn.Sequential(
            tnn.ConvTranspose2d(4, 4, 3, 1, 1), tnn.ConvTranspose2d(4, 2, 3, 1, 1)
        )
    )
    model, state = Up(), twin.state_dict()
    variables = shapes_of(model, 1, 5, 5, 4)
    with pytest.raises(ValueError, match="up1 may be a transposed convolution"):
        ij.match_torch(variables, state)
    match = ij.match_torch(variables, state, transposed=["up*"])
    same_numbers(model, match, twin, images_of(1, 5, 5, 4))
    with pytest.raises(ValueError, match="`transposed` has 'down', which matches no"):
        ij.match_torch(variables, state, transposed=["down"])


# Other layers.


class Words(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Embed(11, 6)(x) + self.param("position", nn.initializers.ones, (1, 7, 6))
        x = nn.Conv(8, (3,), padding=((1, 1),), feature_group_count=2)(x)
        x = nn.LayerNorm(epsilon=1e-5)(nn.gelu(x, approximate=False))
        return nn.PReLU()(nn.Dense(4, use_bias=False)(x))


class TorchWords(tnn.Module):
    def __init__(self):
        super().__init__()
        self.place = tnn.Parameter(torch.randn(1, 7, 6))
        self.embed = tnn.Embedding(11, 6)
        self.conv = tnn.Conv1d(6, 8, 3, padding=1, groups=2)
        self.norm = tnn.LayerNorm(8)
        self.out = tnn.Linear(8, 4, bias=False)
        self.slope = tnn.PReLU()

    def forward(self, x):
        x = self.conv((self.embed(x) + self.place).mT).mT
        return self.slope(self.out(self.norm(tnn.functional.gelu(x))))


def test_embeddings_one_dimensional_convolutions_and_parameters_are_matched():
    model, twin = Words(), drawn(TorchWords())
    match = ij.match_torch(
        shapes_of(model, 1, 7, dtype=jnp.int32), {"net": twin.state_dict(), "epoch": 3}
    )
    assert match.pairs["params/position"] == "place"
    tokens = np.random.default_rng(0).integers(11, size=(2, 7))
    same_numbers(model, match, twin, tokens, channels_last=False)


class Video(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (3, 2, 1), padding="VALID")(x)
        return nn.Dense(3)(nn.GroupNorm(2, epsilon=1e-5)(x).mean((1, 2, 3)))


class TorchVideo(tnn.Sequential):
    def __init__(self):
        super().__init__(
            *(tnn.Conv3d(3, 4, (3, 2, 1)), tnn.GroupNorm(2, 4)),
            *(tnn.AdaptiveAvgPool3d(1), tnn.Flatten(), tnn.Linear(4, 3)),
        )


def test_three_dimensional_convolutions_and_types_of_variables_are_kept():
    model, twin = Video(), drawn(TorchVideo())
    variables = model.init(jax.random.key(0), jnp.zeros((1, 4, 4, 4, 3)))
    half = {key: value.half() for key, value in twin.state_dict().items()}
    match = ij.match_torch(variables, half)
    assert jax.tree.structure(match.variables) == jax.tree.structure(variables)
    assert {leaf.dtype for leaf in jax.tree.leaves(match.variables)} == {
        jnp.dtype("float32")
    }
    match = ij.match_torch(variables, twin.state_dict())
    same_numbers(model, match, twin, images_of(2, 4, 4, 4, 3))


def test_modules_of_nnx_are_matched():
    class Net(nnx.Module):
        def __init__(self, rngs):
            conv = nnx.Conv(3, 4, (3, 3), padding=((1, 1), (1, 1)), rngs=rngs)
            self.layers = nnx.List([conv, nnx.BatchNorm(4, epsilon=1e-5, rngs=rngs)])
            self.fc = nnx.Linear(4, 2, rngs=rngs)

        def __call__(self, x):
            for layer in self.layers:
                x = layer(x)
            return self.fc(x.mean((1, 2)))

    twin = drawn(
        tnn.Sequential(
            *(tnn.Conv2d(3, 4, 3, 1, 1), tnn.BatchNorm2d(4)),
            *(tnn.AdaptiveAvgPool2d(1), tnn.Flatten(), tnn.Linear(4, 2)),
        )
    )
    model = Net(nnx.Rngs(0))
    state = nnx.state(model)
    match = ij.match_torch(nnx.to_pure_dict(state), twin.state_dict())
    nnx.replace_by_pure_dict(state, match.variables)
    nnx.update(model, state)
    model.eval()
    images = images_of(2, 5, 5, 3)
    with torch.no_grad():
        theirs = twin.eval()(torch.from_numpy(images).movedim(-1, 1))
    np.testing.assert_allclose(model(images), theirs, rtol=1e-4, atol=1e-5)


def test_networks_of_this_library_are_matched_by_name():
    model = ij.create_model("resnet20", width=0.25, shortcut="B")
    variables = ij.init_variables(model, jax.random.key(0))
    match = ij.match_torch(variables, ij.to_torch(model, variables))
    jax.tree.map(np.testing.assert_array_equal, match.variables, variables)
    assert set(match.pairs) == {
        "/".join(path) for path in traverse_util.flatten_dict(variables)
    }
