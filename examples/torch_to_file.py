"""PyTorch's weights become a compressed network in one file, which needs JAX alone.

Run `python examples/torch_to_file.py` on weights that it draws, or `python
examples/torch_to_file.py WEIGHTS.pth` on what `torch.save` wrote of this network:

    torch.nn.Sequential(
        Conv2d(3, 32, 3, padding=1, bias=False), BatchNorm2d(32), ReLU(),
        Conv2d(32, 64, 3, stride=2, padding=1, bias=False), BatchNorm2d(64), ReLU(),
        Conv2d(64, 64, 3, padding=1, bias=False), BatchNorm2d(64), ReLU(),
        AdaptiveAvgPool2d(1), Flatten(), Linear(64, 10),
    )

PyTorch is needed neither to read its files nor to run the result.
"""

import pathlib
import sys
import tempfile

import jax
import numpy as np
from flax import linen as nn

import inertia_jax as ij


class Net(nn.Module):
    """The same network in Linen."""

    @nn.compact
    def __call__(self, x, *, train=False):
        for features, strides in ((32, 1), (64, 2), (64, 1)):
            conv = nn.Conv(features, (3, 3), strides, padding=1, use_bias=False)
            x = nn.relu(nn.BatchNorm(not train, momentum=0.9)(conv(x)))
        return nn.Dense(10)(x.mean((1, 2)))


def draw_weights():
    """Returns weights by PyTorch's names, with its axes, as a `state_dict` has them."""
    rng, weights = np.random.default_rng(0), {}
    for place, c_in, c_out in ((0, 3, 32), (3, 32, 64), (6, 64, 64)):
        kernel = rng.normal(0, (4.5 * c_in) ** -0.5, (c_out, c_in, 3, 3))
        weights[f"{place}.weight"] = kernel
        for name in ("weight", "bias", "running_mean", "running_var"):
            weights[f"{place + 1}.{name}"] = rng.uniform(0.5, 1, c_out)
    weights |= {"11.weight": rng.normal(size=(10, 64)), "11.bias": np.zeros(10)}
    return {name: np.float32(array) for name, array in weights.items()}


def main(path=None):
    """Reads, compresses and exports, and compares the file with the network."""
    images = np.random.default_rng(1).normal(size=(4, 32, 32, 3)).astype(np.float32)
    model = Net()
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)
    match = ij.match_torch(shapes, path or draw_weights())
    print(match)

    small, factors = ij.compress(
        model, match.variables, ranks=ij.Budget(macs=0.5), image_shape=(32, 32, 3)
    )
    print(ij.count_cost(small, (32, 32, 3)))
    folded = ij.fold_batch_norm(small, factors, image_shape=(32, 32, 3))
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder) / "network.ijx"
        ij.save_exported(file, folded, image_shape=(32, 32, 3))
        network = ij.load_exported(file)
        print(f"{file.name} takes {file.stat().st_size:,} bytes")
    error = np.abs(network(images) - small.apply(factors, images)).max()
    print(f"its logits differ from the network's by {error:.0e}")


if __name__ == "__main__":
    main(*sys.argv[1:])
