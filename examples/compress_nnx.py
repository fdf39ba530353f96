"""An NNX network of your own is trained, compressed to 0.3 of its MACs, and tuned.

Run it by `python examples/compress_nnx.py`.
"""

import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits

import inertia_jax as ij


class Net(nnx.Module):
    """Three convolutions with BatchNorm, and a linear layer."""

    def __init__(self, *, rngs):
        """Draws the parameters from `rngs`."""
        self.convs, self.norms = nnx.List(), nnx.List()
        for c_in, c_out, strides in ((1, 32, 1), (32, 64, 2), (64, 64, 1)):
            conv = nnx.Conv(c_in, c_out, (3, 3), strides, use_bias=False, rngs=rngs)
            self.convs.append(conv)
            self.norms.append(nnx.BatchNorm(c_out, momentum=0.9, rngs=rngs))
        self.head = nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, x):
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = nnx.relu(norm(conv(x)))
        return self.head(x.mean((1, 2)))


@nnx.jit
def step(model, optimizer, x, y):
    """Takes a step of training; the model and the optimiser change in place."""

    def loss_fn(model):
        return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()

    optimizer.update(model, nnx.grad(loss_fn)(model))


def fit(model, images, labels, *, epochs, learning_rate):
    """Trains a model by Adam."""
    optimizer = nnx.Optimizer(model, optax.adam(learning_rate), wrt=nnx.Param)
    rng = np.random.default_rng(0)
    model.train()
    for _ in range(epochs):
        for i in rng.permutation(len(images)).reshape(-1, 50):
            step(model, optimizer, images[i], labels[i])
    model.eval()


def report(name, model, x, y):
    """Prints what the network costs, and its accuracy."""
    accuracy = (model(x).argmax(-1) == y).mean()
    macs = ij.count_cost(model, (8, 8, 1)).macs
    print(f"{name:12} {macs:9,} MACs an image, {accuracy:.1%} of {len(y)} digits")


def main():
    """Trains, compresses, tunes, and shows what stands at each layer then."""
    digits = load_digits()
    x, x_test = np.split(np.float32(digits.images[..., None] / 16), [1500])
    y, y_test = np.split(digits.target, [1500])
    model = Net(rngs=nnx.Rngs(0))
    fit(model, x, y, epochs=10, learning_rate=3e-3)
    report("dense", model, x_test, y_test)

    # A network of the same class comes back, with other layers and variables in it.
    small = ij.compress(model, ranks=ij.Budget(macs=0.3), calibration=x[:512])
    small = ij.recalibrate_batch_norm(small, x)
    report("compressed", small, x_test, y_test)

    fit(small, x, y, epochs=5, learning_rate=1e-3)
    report("tuned", small, x_test, y_test)
    print(ij.count_cost(small, (8, 8, 1)))


if __name__ == "__main__":
    main()
