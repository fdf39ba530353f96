"""NNX modules as people write them: small, and none of them made for this library."""

import functools

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx


class BasicBlock(nnx.Module):
    def __init__(self, c_in: int, c_out: int, stride: int, *, rngs: nnx.Rngs):
        conv = functools.partial(nnx.Conv, use_bias=False, rngs=rngs)
        self.conv1 = conv(c_in, c_out, kernel_size=(3, 3), strides=stride)
        self.bn1 = nnx.BatchNorm(c_out, rngs=rngs)
        self.conv2 = conv(c_out, c_out, kernel_size=(3, 3))
        self.bn2 = nnx.BatchNorm(c_out, momentum=0.9, rngs=rngs)
        if stride != 1 or c_in != c_out:
            self.shortcut = nnx.Sequential(
                conv(c_in, c_out, (1, 1), strides=stride),
                nnx.BatchNorm(c_out, rngs=rngs),
            )
        else:
            self.shortcut = lambda x: x

    def __call__(self, x):
        y = nnx.relu(self.bn1(self.conv1(x)))
        return nnx.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class Residual(nnx.Module):
    """A ResNet of blocks in a list."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.stem = nnx.Conv(4, 8, (3, 3), use_bias=False, rngs=rngs)
        self.blocks = nnx.List(
            [BasicBlock(8, 8, 1, rngs=rngs), BasicBlock(8, 12, 2, rngs=rngs)]
        )
        self.fc = nnx.Linear(12, 5, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.stem(x))
        for block in self.blocks:
            x = block(x)
        return self.fc(jnp.mean(x, axis=(1, 2)))


class UNet(nnx.Module):
    """Down by pooling, up by transposed convolutions, with skips."""

    def __init__(self, *, rngs: nnx.Rngs):
        conv = functools.partial(nnx.Conv, kernel_size=(3, 3), rngs=rngs)
        self.down = nnx.List([conv(4, 6), conv(6, 8)])
        self.bottom = conv(8, 12)
        up = functools.partial(
            nnx.ConvTranspose, kernel_size=(2, 2), strides=2, rngs=rngs
        )
        self.up = nnx.List([up(12, 8), up(8, 6)])
        self.merge = nnx.List([conv(16, 8), conv(12, 6)])
        self.out = nnx.Conv(6, 2, (1, 1), rngs=rngs)

    def __call__(self, x):
        skips = []
        for conv in self.down:
            skips.append(nnx.gelu(conv(x)))
            x = nnx.max_pool(skips[-1], (2, 2), strides=(2, 2))
        x = nnx.gelu(self.bottom(x))
        for up, merge in zip(self.up, self.merge, strict=True):
            x = jnp.concatenate([up(x), skips.pop()], axis=-1)
            x = nnx.gelu(merge(x))
        return self.out(x)


class Inception(nnx.Module):
    """Branches of several sides, in a dictionary."""

    def __init__(self, *, rngs: nnx.Rngs):
        conv = functools.partial(nnx.Conv, rngs=rngs)
        self.branches = nnx.Dict(
            one=conv(4, 4, (1, 1)),
            three=nnx.Sequential(conv(4, 4, (1, 1)), nnx.relu, conv(4, 6, (3, 3))),
            row=nnx.Sequential(conv(4, 4, (1, 3)), conv(4, 4, (3, 1))),
            pool=conv(4, 4, (1, 1)),
        )
        self.fc = nnx.Linear(18, 5, rngs=rngs)

    def __call__(self, x):
        pooled = nnx.avg_pool(x, (3, 3), strides=(1, 1), padding="SAME")
        outputs = [
            branch(pooled if name == "pool" else x)
            for name, branch in self.branches.items()
        ]
        return self.fc(nnx.relu(jnp.concatenate(outputs, -1)).max((1, 2)))


class MobileNet(nnx.Module):
    """Inverted residuals of depthwise convolutions (MobileNetV2)."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.stem = nnx.Conv(4, 8, (3, 3), 2, padding=((1, 1), (1, 1)), rngs=rngs)
        self.layers = nnx.List(
            [
                self.block(c_in, c_out, strides, rngs=rngs)
                for c_in, c_out, strides in ((8, 8, 1), (8, 12, 2), (12, 12, 1))
            ]
        )
        self.classifier = nnx.Linear(12, 5, rngs=rngs)

    @staticmethod
    def block(c_in, c_out, strides, *, rngs):
        hidden, conv = 2 * c_in, functools.partial(nnx.Conv, use_bias=False, rngs=rngs)
        return nnx.Sequential(
            conv(c_in, hidden, (1, 1)),
            nnx.BatchNorm(hidden, rngs=rngs),
            nnx.relu6,
            conv(hidden, hidden, (3, 3), strides, feature_group_count=hidden),
            nnx.BatchNorm(hidden, rngs=rngs),
            nnx.relu6,
            conv(hidden, c_out, (1, 1)),
            nnx.BatchNorm(c_out, rngs=rngs),
        )

    def __call__(self, x):
        x = nnx.relu6(self.stem(x))
        for layer in self.layers:
            y = layer(x)
            x = x + y if x.shape == y.shape else y
        return self.classifier(x.mean((1, 2)))


class SqueezeExcite(nnx.Module):
    def __init__(self, features, *, rngs):
        self.reduce = nnx.Conv(features, features // 4, (1, 1), rngs=rngs)
        self.expand = nnx.Conv(features // 4, features, (1, 1), rngs=rngs)

    def __call__(self, x):
        gate = nnx.swish(self.reduce(x.mean((1, 2), keepdims=True)))
        return x * nnx.sigmoid(self.expand(gate))


class EfficientNet(nnx.Module):
    """A block of MBConv with squeeze and excitation, and a drop of whole paths."""

    def __init__(self, drop_rate: float = 0.2, *, rngs: nnx.Rngs):
        self.stem = nnx.Conv(4, 8, (3, 3), strides=(2, 2), rngs=rngs)
        self.expand_conv = nnx.Conv(8, 16, (1, 1), use_bias=False, rngs=rngs)
        self.bn = nnx.BatchNorm(16, rngs=rngs)
        self.depthwise = nnx.Conv(16, 16, (5, 5), feature_group_count=16, rngs=rngs)
        self.se = SqueezeExcite(16, rngs=rngs)
        self.project = nnx.Conv(16, 8, (1, 1), rngs=rngs)
        self.drop_path = nnx.Dropout(drop_rate, broadcast_dims=(1, 2, 3), rngs=rngs)
        self.head = nnx.Linear(8, 5, rngs=rngs)

    def __call__(self, x):
        x = nnx.swish(self.stem(x))
        y = nnx.swish(self.bn(self.expand_conv(x)))
        y = self.project(self.se(nnx.swish(self.depthwise(y))))
        return self.head((x + self.drop_path(y)).mean((1, 2)))


class ConvNeXtBlock(nnx.Module):
    def __init__(self, dim: int, *, rngs: nnx.Rngs):
        self.dwconv = nnx.Conv(dim, dim, (7, 7), feature_group_count=dim, rngs=rngs)
        self.norm = nnx.LayerNorm(dim, epsilon=1e-6, rngs=rngs)
        self.pwconv1 = nnx.Linear(dim, 2 * dim, rngs=rngs)
        self.pwconv2 = nnx.Linear(2 * dim, dim, rngs=rngs)
        self.gamma = nnx.Param(0.5 * jnp.ones((dim,)))

    def __call__(self, x):
        y = self.pwconv2(nnx.gelu(self.pwconv1(self.norm(self.dwconv(x)))))
        return x + jnp.broadcast_to(self.gamma[...], y.shape) * y


class ConvNeXt(nnx.Module):
    """A patch stem, depthwise 7x7, LayerNorm, linear layers, a scale for each layer."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.downsample = nnx.Conv(4, 8, (2, 2), (2, 2), padding="VALID", rngs=rngs)
        self.stages = nnx.Sequential(*[ConvNeXtBlock(8, rngs=rngs) for _ in range(2)])
        self.norm = nnx.LayerNorm(8, rngs=rngs)
        self.head = nnx.Linear(8, 5, rngs=rngs)

    def __call__(self, x):
        x = self.stages(self.downsample(x))
        return self.head(self.norm(x.mean((1, 2))))


class Vae(nnx.Module):
    """It draws its code from a stream of its own, and returns a dictionary besides."""

    def __init__(self, *, rngs: nnx.Rngs):
        conv = functools.partial(nnx.Conv, kernel_size=(3, 3), rngs=rngs)
        self.encoder = nnx.Sequential(conv(4, 6, strides=2), nnx.relu, conv(6, 8))
        self.up = nnx.ConvTranspose(4, 6, (3, 3), strides=(2, 2), rngs=rngs)
        self.out = conv(6, 4)
        self.rngs = rngs.fork()

    def __call__(self, x):
        mean, log_variance = jnp.split(self.encoder(x), 2, axis=-1)
        noise = jax.random.normal(self.rngs.noise(), mean.shape)
        x = mean + jnp.exp(log_variance / 2) * noise
        x = nnx.sigmoid(self.out(nnx.relu(self.up(x))))
        return x, {"mean": mean, "log_variance": log_variance}


class WaveNet(nnx.Module):
    """Gated causal convolutions of rising dilation over a signal."""

    def __init__(self, *, rngs: nnx.Rngs):
        conv = functools.partial(nnx.Conv, rngs=rngs)
        causal = functools.partial(conv, kernel_size=(2,), padding="CAUSAL")
        self.embed = conv(4, 8, kernel_size=1)
        self.layers = nnx.List(
            [
                nnx.Dict(
                    gated=causal(8, 16, kernel_dilation=2**i),
                    residual=conv(8, 8, kernel_size=(1,)),
                    skip=conv(8, 6, kernel_size=(1,)),
                )
                for i in range(3)
            ]
        )
        self.out = conv(6, 4, kernel_size=(1,))

    def __call__(self, x):
        x, total = self.embed(x), 0
        for layer in self.layers:
            a, b = jnp.split(layer.gated(x), 2, axis=-1)
            y = jnp.tanh(a) * nnx.sigmoid(b)
            x, total = x + layer.residual(y), total + layer.skip(y)
        return self.out(nnx.relu(total))


class Speech(nnx.Module):
    """Convolutions over a signal, then a recurrent layer (DeepSpeech)."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.conv1 = nnx.Conv(2, 8, (5,), strides=2, padding="REFLECT", rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.conv2 = nnx.Conv(8, 8, (5,), strides=2, rngs=rngs)
        self.rnn = nnx.RNN(nnx.OptimizedLSTMCell(8, 6, rngs=rngs))
        self.fc = nnx.Linear(6, 5, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.conv1(x)))
        return self.fc(self.rnn(nnx.relu(self.conv2(x))))


class Video(nnx.Module):
    """A convolution over space and time, then one over each."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.conv = nnx.Conv(3, 6, (3, 3, 3), strides=(1, 2, 2), rngs=rngs)
        self.space = nnx.Conv(6, 8, (1, 3, 3), use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.time = nnx.Conv(8, 8, (3, 1, 1), padding="VALID", rngs=rngs)
        self.fc = nnx.Linear(8, 5, rngs=rngs)

    def __call__(self, x):
        x = self.norm(self.space(nnx.relu(self.conv(x))))
        return self.fc(nnx.relu(self.time(x)).mean((1, 2, 3)))


class Block(nnx.Module):
    def __init__(self, features: int = 8, *, rngs: nnx.Rngs):
        self.a = nnx.Conv(features, features, (3, 3), rngs=rngs)
        self.b = nnx.Conv(features, features, (3, 3), rngs=rngs)

    def __call__(self, x):
        return x + self.b(nnx.relu(self.a(nnx.relu(x))))


class Scanned(nnx.Module):
    """Blocks with their kernels in one array, called in a loop."""

    def __init__(self, *, rngs: nnx.Rngs):
        @nnx.split_rngs(splits=2)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def create(rngs):
            return Block(rngs=rngs)

        self.stem = nnx.Conv(4, 8, (3, 3), rngs=rngs)
        self.blocks = create(rngs)
        self.head = nnx.Conv(8, 3, (1, 1), rngs=rngs)

    def __call__(self, x):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def forward(x, block):
            return block(x)

        return self.head(forward(self.stem(x), self.blocks))


class Ensemble(nnx.Module):
    """Two networks side by side, with kernels of their own."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.stem = nnx.Conv(4, 8, (3, 3), rngs=rngs)
        make = nnx.split_rngs(splits=2)(nnx.vmap(lambda rngs: Block(rngs=rngs)))
        self.twins = make(rngs)

    def __call__(self, x):
        call = nnx.vmap(lambda block, x: block(x), in_axes=(0, None))
        return call(self.twins, self.stem(x)).mean((0, 2, 3))


class RematBlock(Block):
    @nnx.remat
    def __call__(self, x):
        return x + self.b(nnx.relu(self.a(nnx.relu(x))))


class Rematerialised(nnx.Module):
    """Blocks that are computed again for the gradient."""

    block = RematBlock

    def __init__(self, *, rngs: nnx.Rngs):
        self.stem = nnx.Conv(4, 8, (3, 3), rngs=rngs)
        self.blocks = nnx.List([self.block(rngs=rngs) for _ in range(2)])

    def __call__(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return x.mean((1, 2))


class JitBlock(Block):
    __call__ = nnx.jit(Block.__call__)


class Compiled(Rematerialised):
    """Blocks that are compiled once for both."""

    block = JitBlock


class CompiledWhole(nnx.Module):
    """Its methods are compiled, with BatchNorm and dropout inside."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.conv = nnx.Conv(4, 8, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.drop = nnx.Dropout(0.1, rngs=rngs)
        self.conv2 = nnx.Conv(8, 8, (3, 3), rngs=rngs)

    @nnx.jit
    def features(self, x):
        return self.drop(nnx.relu(self.norm(self.conv(x))))

    @nnx.jit
    def __call__(self, x):
        return self.conv2(self.features(x)).mean((1, 2))


class Siamese(nnx.Module):
    """One tower for two images."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.tower = nnx.Sequential(
            nnx.Conv(4, 8, (3, 3), rngs=rngs),
            nnx.relu,
            nnx.Conv(8, 8, (3, 3), strides=2, rngs=rngs),
        )

    def __call__(self, left, right):
        return jnp.sum((self.tower(left) - self.tower(right)) ** 2, axis=(1, 2, 3))


class Clinical(nnx.Module):
    """An image and a table beside it."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.conv1 = nnx.Conv(4, 8, (3, 3), rngs=rngs)
        self.conv2 = nnx.Conv(8, 8, (3, 3), strides=2, rngs=rngs)
        self.sex = nnx.Embed(2, 4, rngs=rngs)
        self.table = nnx.Linear(3, 6, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.fc = nnx.Linear(18, 5, rngs=rngs)

    def __call__(self, inputs, *, deterministic: bool | None = None):
        x = self.conv2(nnx.relu(self.conv1(inputs["image"]))).mean((1, 2))
        table = nnx.relu(self.table(inputs["table"]))
        x = jnp.concatenate([x, table, self.sex(inputs["sex"][:, 0])], axis=-1)
        return self.fc(self.drop(x, deterministic=deterministic))


class Detector(nnx.Module):
    """A dictionary of maps, of several sizes."""

    def __init__(self, *, rngs: nnx.Rngs):
        conv = functools.partial(nnx.Conv, kernel_size=(3, 3), rngs=rngs)
        self.fine, self.coarse = conv(4, 8), conv(8, 12, strides=(2, 2))
        self.heads = nnx.data({"fine": conv(8, 6), "coarse": conv(12, 6)})
        self.scores = nnx.Conv(12, 3, (1, 1), rngs=rngs)

    def __call__(self, x):
        fine = nnx.relu(self.fine(x))
        coarse = nnx.relu(self.coarse(fine))
        boxes = [self.heads["coarse"](coarse), self.heads["fine"](fine)]
        return {"boxes": boxes, "scores": self.scores(coarse)}


class DenseNet(nnx.Module):
    """Each layer sees all before it."""

    def __init__(self, growth: int = 4, *, rngs: nnx.Rngs):
        channels = [4 + growth * i for i in range(4)]
        self.norms = nnx.List([nnx.BatchNorm(c, rngs=rngs) for c in channels[:3]])
        self.convs = nnx.List(
            [
                nnx.Conv(c, growth, (3, 3), use_bias=False, rngs=rngs)
                for c in channels[:3]
            ]
        )
        self.transition = nnx.Conv(channels[3], 8, (1, 1), rngs=rngs)
        self.fc = nnx.Linear(8, 5, rngs=rngs)

    def __call__(self, x, use_running_average: bool = True):
        for norm, conv in zip(self.norms, self.convs, strict=True):
            y = conv(nnx.relu(norm(x, use_running_average=use_running_average)))
            x = jnp.concatenate([x, y], axis=-1)
        x = nnx.avg_pool(self.transition(x), (2, 2), strides=(2, 2))
        return self.fc(x.mean((1, 2)))


class ResNeXt(nnx.Module):
    """GroupNorm and weights of several groups."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.stem = nnx.Conv(4, 8, (3, 3), rngs=rngs)
        self.norm1 = nnx.GroupNorm(8, num_groups=4, rngs=rngs)
        self.grouped = nnx.Conv(8, 8, (3, 3), feature_group_count=2, rngs=rngs)
        self.norm2 = nnx.GroupNorm(8, num_groups=4, rngs=rngs)
        self.point = nnx.Conv(8, 8, (1, 1), rngs=rngs)

    def __call__(self, x):
        x = self.stem(x)
        y = self.grouped(nnx.silu(self.norm1(x)))
        return (x + self.point(nnx.silu(self.norm2(y)))).mean((1, 2))


class Vit(nnx.Module):
    """Patches, attention and linear layers."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.embed = nnx.Conv(4, 8, (4, 4), (4, 4), padding="VALID", rngs=rngs)
        self.positions = nnx.Param(0.02 * jax.random.normal(rngs(), (1, 16, 8)))
        self.norm1 = nnx.LayerNorm(8, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)
        self.norm2 = nnx.LayerNorm(8, rngs=rngs)
        self.mlp = nnx.Sequential(
            nnx.Linear(8, 16, rngs=rngs), nnx.gelu, nnx.Linear(16, 8, rngs=rngs)
        )
        self.head = nnx.LinearGeneral(8, (5,), rngs=rngs)

    def __call__(self, x):
        x = self.embed(x)
        x = x.reshape(x.shape[0], -1, 8)
        x = x + jnp.broadcast_to(self.positions[...], x.shape)
        x += self.attention(self.norm1(x))
        x += self.mlp(self.norm2(x))
        return self.head(x.mean(1))


class Aspp(nnx.Module):
    """Dilated branches over one map (DeepLab)."""

    def __init__(self, *, rngs: nnx.Rngs):
        conv = functools.partial(nnx.Conv, rngs=rngs)
        self.stem = conv(4, 8, (3, 3), padding="CIRCULAR")
        self.branches = nnx.List(
            [conv(8, 4, (3, 3), kernel_dilation=d) for d in (1, 2, 4)]
        )
        self.pool = conv(8, 4, (1, 1))
        self.out = conv(16, 8, (1, 1))

    def __call__(self, x):
        x = nnx.relu(self.stem(x))
        outputs = [branch(x) for branch in self.branches]
        pooled = self.pool(x.mean((1, 2), keepdims=True))
        outputs.append(jnp.broadcast_to(pooled, outputs[0].shape))
        x = self.out(nnx.relu(jnp.concatenate(outputs, axis=-1)))
        return jax.image.resize(x, (*x.shape[:1], 16, 16, 8), "bilinear")


class TiedAutoencoder(nnx.Module):
    """Its decoder has the kernels of the encoder."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.stem = nnx.Conv(4, 8, (3, 3), rngs=rngs)
        self.encode = nnx.Conv(8, 12, (3, 3), strides=(2, 2), rngs=rngs)
        self.bias = nnx.Param(jnp.zeros((8,)))

    def __call__(self, x):
        code = nnx.relu(self.encode(nnx.relu(self.stem(x))))
        y = jax.lax.conv_transpose(
            code,
            self.encode.kernel[...].swapaxes(2, 3),
            (2, 2),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return y + jnp.broadcast_to(self.bias[...], y.shape)


class Discriminator(nnx.Module):
    """Convolutions whose kernels are normalised at each call."""

    def __init__(self, *, rngs: nnx.Rngs):
        conv = functools.partial(nnx.Conv, kernel_size=(3, 3), rngs=rngs)
        self.stem = conv(4, 8)
        self.spectral = nnx.SpectralNorm(conv(8, 8), rngs=rngs)
        self.weighted = nnx.WeightNorm(conv(8, 8, strides=2), rngs=rngs)
        self.fc = nnx.Linear(8, 1, rngs=rngs)

    def __call__(self, x):
        x = nnx.leaky_relu(self.spectral(nnx.leaky_relu(self.stem(x))))
        return self.fc(nnx.leaky_relu(self.weighted(x)).mean((1, 2)))


class Recursive(nnx.Module):
    """One convolution again and again, which has two names besides."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.stem = nnx.Conv(4, 8, (3, 3), rngs=rngs)
        self.step = nnx.Conv(8, 8, (3, 3), rngs=rngs)
        self.last = self.step
        self.norms = nnx.List([nnx.InstanceNorm(8, rngs=rngs) for _ in range(2)])

    def __call__(self, x):
        x = self.stem(x)
        for norm in self.norms:
            x = x + nnx.relu(norm(self.step(x)))
        return self.last(x)


class Masked(nnx.Module):
    """A causal image model: the kernel's later half is masked."""

    def __init__(self, *, rngs: nnx.Rngs):
        mask = jnp.ones((3, 3, 4, 8)).at[2:].set(0)
        self.masked = nnx.Conv(4, 8, (3, 3), mask=mask, rngs=rngs)
        self.after = nnx.Conv(8, 8, (3, 3), rngs=rngs)

    def __call__(self, x):
        return self.after(nnx.relu(self.masked(x)))


class Generator(nnx.Module):
    """From a code to an image, by transposed convolutions (DCGAN)."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.project = nnx.Linear(6, 4 * 4 * 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.up = nnx.ConvTranspose(8, 8, (4, 4), (2, 2), padding="SAME", rngs=rngs)
        self.refine = nnx.Conv(8, 8, (3, 3), rngs=rngs)
        self.to_rgb = nnx.Conv(8, 3, (3, 3), padding=1, rngs=rngs)

    def __call__(self, code, train: bool = False):
        x = self.project(code).reshape(-1, 4, 4, 8)
        x = nnx.relu(self.norm(x, use_running_average=not train))
        return jnp.tanh(self.to_rgb(nnx.relu(self.refine(self.up(x)))))


class LinenBackbone(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(8, (3, 3), name="conv1")(x))
        return nn.relu(nn.Conv(8, (3, 3), strides=2, name="conv2")(x))


class Hybrid(nnx.Module):
    """A backbone of Linen, and a head of NNX."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.backbone = nnx.bridge.ToNNX(LinenBackbone(), rngs=rngs)
        self.backbone.lazy_init(jnp.ones((1, 16, 16, 4)))
        # There is a layer of this name inside the backbone, too.
        self.conv1 = nnx.Conv(8, 12, (3, 3), rngs=rngs)
        self.head = nnx.Linear(12, 5, rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.relu(self.conv1(self.backbone(x))).mean((1, 2)))


class LoraConvNet(nnx.Module):
    """Low-rank updates beside a linear layer, as in fine-tuning."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.conv1 = nnx.Conv(4, 8, (3, 3), rngs=rngs)
        self.conv2 = nnx.Conv(8, 8, (3, 3), rngs=rngs)
        self.fc = nnx.LoRALinear(8, 5, lora_rank=2, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.conv2(nnx.relu(self.conv1(x))))
        return self.fc(x.mean((1, 2)))


IMAGE = (16, 16, 4)
# The modules, and the shapes of their inputs.
MODELS = {
    "residual": (Residual, IMAGE),
    "unet": (UNet, IMAGE),
    "inception": (Inception, IMAGE),
    "mobilenet": (MobileNet, IMAGE),
    "efficientnet": (EfficientNet, IMAGE),
    "convnext": (ConvNeXt, IMAGE),
    "vae": (Vae, IMAGE),
    "wavenet": (WaveNet, (24, 4)),
    "speech": (Speech, (32, 2)),
    "video": (Video, (4, 8, 8, 3)),
    "scanned": (Scanned, IMAGE),
    "ensemble": (Ensemble, IMAGE),
    "rematerialised": (Rematerialised, IMAGE),
    "compiled": (Compiled, IMAGE),
    "compiled_whole": (CompiledWhole, IMAGE),
    "siamese": (Siamese, {"left": IMAGE, "right": IMAGE}),
    "clinical": (
        Clinical,
        {
            "image": IMAGE,
            "table": (3,),
            "sex": jax.ShapeDtypeStruct((1,), jnp.int32),
        },
    ),
    "detector": (Detector, IMAGE),
    "densenet": (DenseNet, IMAGE),
    "resnext": (ResNeXt, IMAGE),
    "vit": (Vit, IMAGE),
    "aspp": (Aspp, IMAGE),
    "tied": (TiedAutoencoder, IMAGE),
    "discriminator": (Discriminator, IMAGE),
    "recursive": (Recursive, IMAGE),
    "masked": (Masked, IMAGE),
    "generator": (Generator, (6,)),
    "hybrid": (Hybrid, IMAGE),
    "lora": (LoraConvNet, IMAGE),
}
# How those are called that take more than one argument.
CALLS = {
    "siamese": lambda model, images, train: model(images["left"], images["right"]),
}
