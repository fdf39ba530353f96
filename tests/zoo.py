"""Models as people write them: small, and none of them made for this library."""

import functools

import jax
import jax.numpy as jnp
from flax import linen as nn


class Residual(nn.Module):
    """A ResNet whose norms are named by its author."""

    @nn.compact
    def __call__(self, x, train: bool = False):
        norm = functools.partial(nn.BatchNorm, use_running_average=not train)
        x = nn.relu(norm(name="bn_in")(nn.Conv(8, (3, 3), use_bias=False)(x)))
        for i, (features, strides) in enumerate([(8, 1), (12, 2)]):
            y = nn.Conv(features, (3, 3), strides, use_bias=False, name=f"conv{i}a")(x)
            y = nn.relu(norm(name=f"bn{i}a")(y))
            y = nn.Conv(features, (3, 3), use_bias=False, name=f"conv{i}b")(y)
            y = norm(name=f"bn{i}b", scale_init=nn.initializers.ones)(y)
            if x.shape != y.shape:
                x = nn.Conv(features, (1, 1), strides, name=f"proj{i}")(x)
            x = nn.relu(x + y)
        return nn.Dense(5)(x.mean((1, 2)))


class UNet(nn.Module):
    """Down by pooling, up by a transposed convolution, with a skip."""

    @nn.compact
    def __call__(self, x):
        down = nn.gelu(nn.Conv(6, (3, 3))(x))
        x = nn.gelu(nn.Conv(12, (3, 3))(nn.max_pool(down, (2, 2), (2, 2))))
        x = nn.ConvTranspose(6, (2, 2), strides=(2, 2))(x)
        x = nn.gelu(nn.Conv(6, (3, 3))(jnp.concatenate([x, down], -1)))
        return nn.Conv(2, (1, 1))(x)


class Inception(nn.Module):
    """Branches of several sides, one after another pool."""

    @nn.compact
    def __call__(self, x):
        one = nn.Conv(4, (1, 1))(x)
        three = nn.Conv(6, (3, 3))(nn.relu(nn.Conv(4, (1, 1))(x)))
        row = nn.Conv(4, (3, 1))(nn.relu(nn.Conv(4, (1, 3))(x)))
        pooled = nn.Conv(4, (1, 1))(nn.avg_pool(x, (3, 3), (1, 1), "SAME"))
        x = nn.relu(jnp.concatenate([one, three, row, pooled], -1))
        return nn.Dense(5)(x.max((1, 2)))


class InvertedResidual(nn.Module):
    features: int
    strides: int = 1
    expand: int = 2

    @nn.compact
    def __call__(self, x, train):
        norm = functools.partial(nn.BatchNorm, use_running_average=not train)
        hidden = x.shape[-1] * self.expand
        y = nn.relu6(norm()(nn.Conv(hidden, (1, 1), use_bias=False)(x)))
        y = nn.Conv(
            hidden,
            (3, 3),
            (self.strides,) * 2,
            feature_group_count=hidden,
            use_bias=False,
        )(y)
        y = norm()(nn.Conv(self.features, (1, 1), use_bias=False)(nn.relu6(norm()(y))))
        return x + y if x.shape == y.shape else y


class MobileNet(nn.Module):
    """MobileNetV2."""

    @nn.compact
    def __call__(self, x, training=False):
        x = nn.Conv(8, (3, 3), strides=2, use_bias=False)(x)
        for features, strides in ((8, 1), (12, 2), (12, 1)):
            x = InvertedResidual(features, strides)(x, training)
        return nn.Dense(5)(x.mean((1, 2)))


class EfficientNet(nn.Module):
    """A depthwise block with squeeze and excitation, by 1x1 convolutions."""

    @nn.compact
    def __call__(self, x, is_training=False):
        x = nn.swish(nn.Conv(8, (3, 3), padding=((0, 1), (0, 1)), strides=2)(x))
        y = nn.swish(nn.Conv(16, (1, 1), name="expand")(x))
        y = nn.swish(nn.Conv(16, (5, 5), feature_group_count=16, name="depthwise")(y))
        gate = nn.swish(
            nn.Conv(2, (1, 1), name="reduce")(y.mean((1, 2), keepdims=True))
        )
        y = y * nn.sigmoid(nn.Conv(16, (1, 1), name="excite")(gate))
        y = nn.BatchNorm(not is_training)(nn.Conv(8, (1, 1), name="project")(y))
        return nn.Dense(5)((x + y).mean((1, 2)))


class ConvNeXt(nn.Module):
    """A patch stem, depthwise 7x7, LayerNorm, linear layers, a scale for each layer."""

    @nn.compact
    def __call__(self, x, deterministic=True):
        x = nn.LayerNorm()(nn.Conv(8, (2, 2), (2, 2), padding="VALID")(x))
        for i in range(2):
            y = nn.Conv(8, (7, 7), feature_group_count=8)(x)
            y = nn.Dense(8)(nn.gelu(nn.Dense(16)(nn.LayerNorm()(y))))
            gamma = self.param(f"gamma{i}", nn.initializers.ones, (1, 1, 1, 8))
            x += nn.Dropout(0.1)(gamma * y, deterministic=deterministic)
        return nn.Dense(5)(nn.LayerNorm()(x.mean((1, 2))))


class Vae(nn.Module):
    """It draws its code, and returns the image, its mean and its variance."""

    def setup(self):
        self.encoder = nn.Sequential(
            [nn.Conv(6, (3, 3), 2), nn.relu, nn.Conv(8, (3, 3))]
        )
        self.decoder = [nn.ConvTranspose(6, (3, 3), (2, 2)), nn.Conv(4, (3, 3))]

    def __call__(self, x):
        mean, log_variance = jnp.split(self.encoder(x), 2, -1)
        noise = jax.random.normal(self.make_rng("noise"), mean.shape)
        x = mean + jnp.exp(log_variance / 2) * noise
        for layer in self.decoder:
            x = layer(nn.relu(x))
        return x, {"mean": mean, "log_variance": log_variance}


class WaveNet(nn.Module):
    """Gated causal convolutions of rising dilation over a signal."""

    @nn.compact
    def __call__(self, x):
        x, total = nn.Conv(8, kernel_size=1)(x), 0
        for i in range(3):
            conv = functools.partial(
                nn.Conv, 8, (2,), padding="CAUSAL", kernel_dilation=2**i
            )
            y = jnp.tanh(conv(name=f"filter{i}")(x)) * nn.sigmoid(
                conv(name=f"gate{i}")(x)
            )
            total += nn.Conv(6, (1,), name=f"skip{i}")(y)
            x += nn.Conv(8, (1,), name=f"residual{i}")(y)
        return nn.Conv(4, (1,))(nn.relu(total))


class Audio(nn.Module):
    """Strided convolutions over a signal, then a linear layer."""

    @nn.compact
    def __call__(self, x, train=False):
        for features in (8, 12):
            x = nn.Conv(features, (5,), strides=2, padding="REFLECT")(x)
            x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
        return nn.Dense(5)(x.mean(1))


class Video(nn.Module):
    """A convolution over space and time, then one over each."""

    @nn.compact
    def __call__(self, x, train: bool = False):
        x = nn.relu(nn.Conv(6, (3, 3, 3), strides=(1, 2, 2))(x))
        x = nn.Conv(8, (1, 3, 3), use_bias=False)(x)
        x = nn.Conv(8, (3, 1, 1), padding="VALID")(nn.BatchNorm(not train)(x))
        return nn.Dense(5)(nn.relu(x).mean((1, 2, 3)))


class Block(nn.Module):
    features: int = 8

    @nn.compact
    def __call__(self, x, _=None):
        y = nn.Conv(self.features, (3, 3), name="a")(nn.relu(x))
        return x + nn.Conv(self.features, (3, 3), name="b")(nn.relu(y)), None


class Scanned(nn.Module):
    """Blocks with their kernels in one array."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(8, (3, 3), name="stem")(x)
        blocks = nn.scan(
            Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=2
        )
        return nn.Conv(3, (1, 1), name="head")(blocks(name="blocks")(x, None)[0])


Rematerialised = nn.remat(Block)
Compiled = nn.jit(Block)


class Checkpointed(nn.Module):
    """Blocks that are computed again for the gradient."""

    block: type = Rematerialised

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(8, (3, 3))(x)
        for _ in range(2):
            x, _ = self.block()(x)
        return x.mean((1, 2))


class Siamese(nn.Module):
    """One tower for two images."""

    def setup(self):
        self.tower = [nn.Conv(8, (3, 3)), nn.Conv(8, (3, 3), strides=2)]

    def __call__(self, left, right):
        for conv in self.tower:
            left, right = nn.relu(conv(left)), nn.relu(conv(right))
        return jnp.sum((left - right) ** 2, axis=(1, 2, 3))


class Clinical(nn.Module):
    """An image and a table beside it."""

    @nn.compact
    def __call__(self, inputs, *, train=False):
        x = nn.relu(nn.Conv(8, (3, 3))(inputs["image"]))
        x = nn.Conv(8, (3, 3), strides=2)(x).mean((1, 2))
        sex = nn.Embed(2, 4)(inputs["sex"][:, 0])
        x = jnp.concatenate([x, nn.relu(nn.Dense(6)(inputs["table"])), sex], -1)
        return nn.Dense(5)(nn.Dropout(0.5, deterministic=not train)(x))


class Detector(nn.Module):
    """A dictionary of maps, of several sizes."""

    @nn.compact
    def __call__(self, x):
        fine = nn.relu(nn.Conv(8, (3, 3))(x))
        coarse = nn.relu(nn.Conv(12, (3, 3), strides=2)(fine))
        head = nn.Conv(6, (3, 3), name="head_coarse")
        return {
            "boxes": [head(coarse), nn.Conv(6, (3, 3), name="head_fine")(fine)],
            "scores": nn.Conv(3, (1, 1), name="scores")(coarse),
        }


class DenseNet(nn.Module):
    """Each layer sees all before it."""

    @nn.compact
    def __call__(self, x, train=False):
        for _ in range(3):
            y = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
            x = jnp.concatenate([x, nn.Conv(4, (3, 3), use_bias=False)(y)], -1)
        x = nn.avg_pool(nn.Conv(8, (1, 1), name="transition")(x), (2, 2), (2, 2))
        return nn.Dense(5)(x.mean((1, 2)))


class GroupNormNet(nn.Module):
    """GroupNorm and weights of several groups (ResNeXt)."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(8, (3, 3))(x)
        for _ in range(2):
            y = nn.Conv(8, (3, 3), feature_group_count=2)(nn.silu(nn.GroupNorm(4)(x)))
            x += nn.Conv(8, (1, 1))(nn.silu(nn.GroupNorm(4)(y)))
        return nn.Dense(5)(x.mean((1, 2)))


class Vit(nn.Module):
    """Patches, attention and linear layers."""

    @nn.compact
    def __call__(self, x, *, deterministic=True):
        x = nn.Conv(8, (4, 4), strides=(4, 4), padding="VALID", name="embed")(x)
        x = x.reshape(x.shape[0], -1, 8)
        x += self.param("positions", nn.initializers.normal(0.02), (1, *x.shape[1:]))
        x += nn.MultiHeadDotProductAttention(2, deterministic=deterministic)(
            nn.LayerNorm()(x)
        )
        x += nn.Dense(8)(nn.gelu(nn.Dense(16)(nn.LayerNorm()(x))))
        return nn.Dense(5)(x.mean(1))


class Aspp(nn.Module):
    """Dilated branches over one map (DeepLab)."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(8, (3, 3), padding="CIRCULAR")(x))
        branches = [nn.Conv(4, (3, 3), kernel_dilation=d)(x) for d in (1, 2, 4)]
        pooled = nn.Conv(4, (1, 1))(x.mean((1, 2), keepdims=True))
        branches.append(jnp.broadcast_to(pooled, branches[0].shape))
        x = nn.Conv(8, (1, 1))(nn.relu(jnp.concatenate(branches, -1)))
        return jax.image.resize(x, (*x.shape[:1], 16, 16, 8), "bilinear")


class Xception(nn.Module):
    """Separable convolutions, layers in a dictionary."""

    def setup(self):
        depth = functools.partial(nn.Conv, 8, (3, 3), feature_group_count=8)
        self.stem = nn.Conv(8, (3, 3), strides=2)
        self.blocks = {n: [depth(), nn.Conv(8, (1, 1))] for n in ("entry", "exit")}

    def __call__(self, x):
        x = self.stem(x)
        for depthwise, pointwise in self.blocks.values():
            x = nn.relu(x + pointwise(depthwise(nn.relu(x))))
        return x.mean((1, 2))


class PreActivation(nn.Module):
    """Norm and activation first, and dropout told by a field."""

    deterministic: bool = True

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(8, (3, 3))(x)
        for _ in range(2):
            y = nn.Conv(8, (3, 3))(nn.relu(nn.LayerNorm()(x)))
            y = nn.Dropout(0.2, deterministic=self.deterministic)(y)
            x += nn.Conv(8, (3, 3))(nn.relu(nn.LayerNorm()(y)))
        return nn.Dense(5)(nn.relu(x).mean((1, 2)))


class Ensemble(nn.Module):
    """Two networks side by side, with kernels of their own."""

    @nn.compact
    def __call__(self, x):
        twins = nn.vmap(
            Block,
            in_axes=None,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            axis_size=2,
        )
        x = nn.Conv(8, (3, 3), name="stem")(x)
        return twins(name="twins")(x)[0].mean((0, 2, 3))


class Masked(nn.Module):
    """A causal image model: the kernel's later half is masked."""

    @nn.compact
    def __call__(self, x):
        mask = jnp.ones((3, 3, 4, 8)).at[2:].set(0)
        x = nn.relu(nn.Conv(8, (3, 3), mask=mask, name="masked")(x))
        return nn.Conv(8, (3, 3), name="after")(x)


class Local(nn.Module):
    """A kernel for each place, and a linear layer over all axes."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(6, (3, 3), strides=4)(x))
        x = nn.ConvLocal(6, (2, 2), padding="VALID")(x)
        return nn.Einsum((6, 5), "nhwc,cd->nd")(nn.DenseGeneral(6, axis=-1)(x))


IMAGE = (16, 16, 4)
# The models, and the shapes of their inputs.
MODELS = {
    "residual": (Residual(), IMAGE),
    "unet": (UNet(), IMAGE),
    "inception": (Inception(), IMAGE),
    "mobilenet": (MobileNet(), IMAGE),
    "efficientnet": (EfficientNet(), IMAGE),
    "convnext": (ConvNeXt(), IMAGE),
    "vae": (Vae(), IMAGE),
    "wavenet": (WaveNet(), (24, 4)),
    "audio": (Audio(), (32, 2)),
    "video": (Video(), (4, 8, 8, 3)),
    "scanned": (Scanned(), IMAGE),
    "rematerialised": (Checkpointed(), IMAGE),
    "compiled": (Checkpointed(Compiled), IMAGE),
    "siamese": (Siamese(), {"left": IMAGE, "right": IMAGE}),
    "clinical": (
        Clinical(),
        {
            "image": IMAGE,
            "table": (3,),
            "sex": jax.ShapeDtypeStruct((1,), jnp.int32),
        },
    ),
    "detector": (Detector(), IMAGE),
    "densenet": (DenseNet(), IMAGE),
    "groupnorm": (GroupNormNet(), IMAGE),
    "vit": (Vit(), IMAGE),
    "aspp": (Aspp(), IMAGE),
    "xception": (Xception(), IMAGE),
    "preactivation": (PreActivation(), IMAGE),
    "ensemble": (Ensemble(), IMAGE),
    "masked": (Masked(), IMAGE),
    "local": (Local(), IMAGE),
}
# How those are called that take more than one argument.
CALLS = {
    "siamese": lambda model, images, train: model(images["left"], images["right"]),
}
