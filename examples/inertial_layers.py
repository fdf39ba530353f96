"""Inertial layers stand in a network and a training loop of your own.

Each cuts its image into tiles of 2x2 pixels. Where a tile is smooth, one value, its
mean, is computed in place of its four outputs.

Run it by `python examples/inertial_layers.py`.
"""

import jax
import numpy as np
import optax
from flax import linen as nn
from sklearn.datasets import load_digits

import inertia_jax as ij


class Net(nn.Module):
    """An ordinary convolution, and two inertial ones."""

    @nn.compact
    def __call__(self, x, *, train):
        x = nn.relu(nn.Conv(32, (3, 3))(x))
        for _ in range(2):
            # Two fifths of the tiles, those with most friction, are computed in detail.
            tiles = {"reading": "tiled", "threshold": ij.Rate(0.4)}
            x = nn.relu(ij.InertialConv(32, (3, 3), **tiles)(x, train=train))
        return nn.Dense(10)(x.mean((1, 2)))


def main():
    """Trains; prints losses, accuracies, the shares of open gates, and the cost."""
    digits = load_digits()
    x, x_test = np.split(np.float32(digits.images[..., None] / 16), [1500])
    y, y_test = np.split(digits.target, [1500])
    # A `Rate` threshold follows the friction of the batches. It is no parameter, but a
    # variable that calls in training move, as the statistics of BatchNorm are.
    model, tx = Net(), optax.adam(3e-3)
    variables = model.init(jax.random.key(0), x[:1], train=False)
    opt_state = tx.init(variables["params"])

    @jax.jit
    def step(variables, opt_state, x, y):
        def loss_fn(params):
            inside = {**variables, "params": params}
            logits, moved = model.apply(inside, x, train=True, mutable=["thresholds"])
            loss = optax.softmax_cross_entropy_with_integer_labels(logits, y)
            return loss.mean(), moved

        params = variables["params"]
        (loss, moved), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        updates, opt_state = tx.update(grads, opt_state)
        return (
            {"params": optax.apply_updates(params, updates), **moved},
            opt_state,
            loss,
        )

    @jax.jit
    def evaluate(variables, x):
        return model.apply(variables, x, train=False, mutable=["intermediates"])

    rng = np.random.default_rng(0)
    for epoch in range(1, 13):
        for i in rng.permutation(1500).reshape(30, 50):
            variables, opt_state, loss = step(variables, opt_state, x[i], y[i])
        logits, sown = evaluate(variables, x_test)
        accuracy = (logits.argmax(-1) == y_test).mean()
        gates = {
            layer: float(values["gate_rate"][0].mean())
            for layer, values in sown["intermediates"].items()
        }
        shares = ", ".join(f"{rate:.2f}" for rate in gates.values())
        print(f"{epoch:2}: loss {loss:.3f}, {accuracy:.1%}, open gates {shares}")
    print(ij.count_cost(model, (8, 8, 1), gate_rates=gates))


if __name__ == "__main__":
    main()
