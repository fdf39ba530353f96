"""A compressed network computes in int8, by qwix: as it is, and after training so.

It needs `.[int8]`, reads digits, or CHECKPOINT IMAGES.npz, and writes int8.ijx.
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


def fit(model, variables, x, y, *, steps=64, learning_rate=1e-3):
    """Returns trained variables. Running statistics stay."""

    @jax.jit
    def step(params, opt_state, x, y):
        def loss_fn(params):
            logits = model.apply({**variables, "params": params}, x)
            return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

        updates, opt_state = tx.update(jax.grad(loss_fn)(params), opt_state)
        return optax.apply_updates(params, updates), opt_state

    tx, params = optax.adam(learning_rate), variables["params"]
    opt_state = tx.init(params)
    for batch in np.random.default_rng(0).integers(len(x), size=(steps, 64)):
        params, opt_state = step(params, opt_state, x[batch], y[batch])
    return {**variables, "params": params}


def main(checkpoint=None, archive=None):
    """Reports a network in float32 and int8: as it is, trained on, and trained so."""
    if checkpoint:
        model, variables = ij.load_checkpoint(checkpoint)
        data, scale = np.load(archive), ij.load_metadata(checkpoint).preprocessing
        pixels = (data["x_train"], data["x_test"])
        x, x_test = (np.float32((p / 255 - scale.mean) / scale.std) for p in pixels)
        y, y_test = data["y_train"], data["y_test"]
    else:
        x, y = load_digits(return_X_y=True)
        x, x_test = np.split(np.float32(x / 16).reshape(-1, 8, 8, 1), [1500])
        y, y_test = np.split(y, [1500])
        model = ij.create_model("lenet", width=0.5)
        variables = ij.init_variables(model, jax.random.key(0), (8, 8, 1))
        variables = fit(model, variables, x, y, steps=300, learning_rate=3e-3)
        model, variables = ij.compress(model, variables, ranks=ij.Ratio(0.5))

    def report(name, model, variables):
        right = (jax.jit(model.apply)(variables, x_test).argmax(-1) == y_test).mean()
        print(f"{name}: {right:.2%} of {len(y_test):,}", flush=True)

    rounding = qwix.quantize_model(model, qwix.QtProvider(RULES))
    networks = {"as it is": None, "trained on": model, "trained so": rounding}
    for name, trained in networks.items():
        tuned = fit(trained, variables, x, y) if trained else variables
        report(f"float32, {name}", model, tuned)
        network = in_int8(model, tuned, x)
        report(f"int8, {name}", *network)
    ij.save_exported("int8.ijx", network, image_shape=x.shape[1:])
    logits = ij.load_exported("int8.ijx")(x_test)
    print(f"from the file int8.ijx: {(logits.argmax(-1) == y_test).mean():.2%}")


if __name__ == "__main__":
    main(*sys.argv[1:])
