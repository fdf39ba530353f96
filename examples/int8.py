"""A compressed network computes in int8, by qwix: as it is, and after training so.

It needs `pip install '.[int8]'`. Run `python examples/int8.py` on digits, or `python
examples/int8.py CHECKPOINT IMAGES.npz` on a checkpoint and images of your own.
"""

import sys

import jax
import numpy as np
import optax
import qwix
from sklearn.datasets import load_digits

import inertia_jax as ij

RULES = [qwix.QuantizationRule(weight_qtype=np.int8, act_qtype=np.int8)]


def in_int8(model, variables, x):
    """Returns the network that has kernels in int8, and rounds what meets them."""
    quantised = qwix.quantize_model(model, qwix.PtqProvider(RULES))
    shapes = jax.eval_shape(quantised.init, jax.random.key(0), x[:1])
    params = qwix.quantize_params(jax.device_put(variables["params"]), shapes["params"])
    return quantised, {**variables, "params": params}


def fit(model, variables, x, y, *, steps, learning_rate):
    """Returns trained variables; prints the loss. Running statistics stay."""

    @jax.jit
    def step(params, opt_state, x, y):
        def loss_fn(params):
            logits = model.apply({**variables, "params": params}, x)
            return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

        loss, grads = jax.value_and_grad(loss_fn)(params)
        updates, opt_state = tx.update(grads, opt_state)
        return optax.apply_updates(params, updates), opt_state, loss

    tx, losses = optax.adam(learning_rate), []
    params, opt_state = variables["params"], tx.init(variables["params"])
    for batch in np.random.default_rng(0).integers(len(x), size=(steps, 64)):
        params, opt_state, loss = step(params, opt_state, x[batch], y[batch])
        losses.append(float(loss))
    print("    losses", *(f"{loss:.3f}" for loss in losses[:: steps // 8]))
    return {**variables, "params": params}


def report(name, model, variables, x, y):
    """Prints an accuracy."""
    accuracy = (jax.jit(model.apply)(variables, x).argmax(-1) == y).mean()
    print(f"{name}: {accuracy:.2%} of {len(y):,}")


def main(checkpoint=None, archive=None):
    """Reports a network in float32, in int8, and in int8 after training so."""
    if checkpoint:
        model, variables = ij.load_checkpoint(checkpoint)
        data, scale = np.load(archive), ij.load_metadata(checkpoint).preprocessing
        pixels = (data["x_train"], data["x_test"])
        x, x_test = (np.float32((p / 255 - scale.mean) / scale.std) for p in pixels)
        y, y_test = data["y_train"], data["y_test"]
    else:
        digits = load_digits()
        x, x_test = np.split(np.float32(digits.images[..., None] / 16), [1500])
        y, y_test = np.split(digits.target, [1500])
        model = ij.create_model("lenet", width=0.5)
        variables = ij.init_variables(model, jax.random.key(0), (8, 8, 1))
        variables = fit(model, variables, x, y, steps=300, learning_rate=3e-3)
        model, variables = ij.compress(model, variables, ranks=ij.Ratio(0.5))
    report("float32", model, variables, x_test, y_test)
    report("int8", *in_int8(model, variables, x), x_test, y_test)
    rounding = qwix.quantize_model(model, qwix.QtProvider(RULES))
    variables = fit(rounding, variables, x, y, steps=64, learning_rate=1e-3)
    report("int8, trained so", *in_int8(model, variables, x), x_test, y_test)


if __name__ == "__main__":
    main(*sys.argv[1:])
