"""A Linen network of your own is trained, compressed to 0.3 of its MACs, and tuned.

Run it by `python examples/compress_linen.py`.
"""

import jax
import numpy as np
import optax
from flax import linen as nn
from sklearn.datasets import load_digits

import inertia_jax as ij


class Net(nn.Module):
    """Three convolutions with BatchNorm, and a linear layer."""

    @nn.compact
    def __call__(self, x, *, train):
        for features, strides in ((32, 1), (64, 2), (64, 1)):
            x = nn.Conv(features, (3, 3), strides=strides, use_bias=False)(x)
            x = nn.relu(nn.BatchNorm(not train, momentum=0.9)(x))
        return nn.Dense(10)(x.mean((1, 2)))


def fit(model, variables, images, labels, *, epochs, learning_rate):
    """Returns the variables after some epochs of Adam."""
    tx = optax.adam(learning_rate)

    @jax.jit
    def step(variables, opt_state, x, y):
        def loss_fn(params):
            inside = {**variables, "params": params}
            logits, moved = model.apply(inside, x, train=True, mutable=["batch_stats"])
            loss = optax.softmax_cross_entropy_with_integer_labels(logits, y)
            return loss.mean(), moved

        grads, moved = jax.grad(loss_fn, has_aux=True)(variables["params"])
        updates, opt_state = tx.update(grads, opt_state)
        params = optax.apply_updates(variables["params"], updates)
        return {"params": params, **moved}, opt_state

    opt_state, rng = tx.init(variables["params"]), np.random.default_rng(0)
    for _ in range(epochs):
        for i in rng.permutation(len(images)).reshape(-1, 50):
            variables, opt_state = step(variables, opt_state, images[i], labels[i])
    return variables


def report(name, model, variables, x, y):
    """Prints what the network costs, and its accuracy."""
    accuracy = (model.apply(variables, x, train=False).argmax(-1) == y).mean()
    macs = ij.count_cost(model, (8, 8, 1)).macs
    print(f"{name:12} {macs:9,} MACs an image, {accuracy:.1%} of {len(y)} digits")


def main():
    """Trains, compresses, tunes, and shows what stands at each layer then."""
    digits = load_digits()
    x, x_test = np.split(np.float32(digits.images[..., None] / 16), [1500])
    y, y_test = np.split(digits.target, [1500])
    model = Net()
    variables = model.init(jax.random.key(0), x[:1], train=False)
    variables = fit(model, variables, x, y, epochs=10, learning_rate=3e-3)
    report("dense", model, variables, x_test, y_test)

    # The network comes back with other layers inside, and its class was not edited.
    small, factors = ij.compress(
        model, variables, ranks=ij.Budget(macs=0.3), calibration=x[:512]
    )
    factors = ij.recalibrate_batch_norm(small, factors, x)
    report("compressed", small, factors, x_test, y_test)

    factors = fit(small, factors, x, y, epochs=5, learning_rate=1e-3)
    report("tuned", small, factors, x_test, y_test)
    print(ij.count_cost(small, (8, 8, 1)))


if __name__ == "__main__":
    main()
