"""Optimisers and learning rates beside PyTorch's."""

import dataclasses

import jax
import numpy as np
import optax
import pytest
from helpers import Small, assert_bitwise_equal, make_config, synthetic_set

import inertia_jax as ij
from inertia_jax.checkpoint import load_arrays
from train.config import Optimizer
from train.fit.trainer import Trainer
from train.step.optimizer import make_optimizer, make_schedule, scale_learning_rate
from train.step.state import Update, init_state, training_to_dict
from train.step.trainable import split_params


def their_optimizer(torch, config, parameters):
    if config.name == "adadelta":
        return torch.optim.Adadelta(
            parameters,
            config.learning_rate,
            rho=0.9,
            eps=1e-6,
            weight_decay=config.weight_decay,
        )
    return torch.optim.SGD(
        parameters,
        config.learning_rate,
        config.momentum,
        nesterov=config.nesterov,
        weight_decay=config.weight_decay,
    )


@pytest.mark.parametrize(
    "config",
    [
        Optimizer(milestones=(2, 4)),
        Optimizer(nesterov=True, milestones=(2, 4)),
        Optimizer(momentum=0.0, milestones=(2, 4)),
        Optimizer(
            name="adadelta", learning_rate=1.0, schedule="exponential", decay=0.7
        ),
    ],
    ids=lambda c: f"{c.name}-{c.momentum}-{c.nesterov}",
)
def test_steps_equal_pytorchs_and_thresholds_do_not_decay(config, x64):
    torch = pytest.importorskip("torch", reason="needs PyTorch: the extra `torch`")
    rng = np.random.default_rng(0)
    start, gradients = rng.normal(size=(2, 5)), rng.normal(size=(18, 2, 5))
    theirs = [torch.nn.Parameter(torch.from_numpy(a.copy())) for a in start]
    groups = [{"params": theirs[0]}, {"params": theirs[1], "weight_decay": 0.0}]
    optimizer = their_optimizer(torch, config, groups)
    if config.schedule == "multistep":
        scheduler = torch.optim.lr_scheduler.MultiStepLR(
            optimizer, list(config.milestones), config.decay
        )
    else:
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, config.decay)
    tx = make_optimizer(config, steps_per_epoch=3, epochs=6)

    def tree(kernel, threshold):
        return jax.tree.map(
            jax.numpy.asarray, {"kernel": kernel, "threshold": threshold}
        )

    ours, state = tree(*start), tx.init(tree(*start))
    for step, gradient in enumerate(gradients):
        for parameter, values in zip(theirs, gradient, strict=True):
            parameter.grad = torch.from_numpy(values)
        optimizer.step()
        if step % 3 == 2:
            scheduler.step()
        updates, state = tx.update(tree(*gradient), state, ours)
        ours = optax.apply_updates(ours, updates)
        for value, parameter in zip(ours.values(), theirs, strict=True):
            np.testing.assert_allclose(value, parameter.detach().numpy(), rtol=1e-6)


@pytest.mark.parametrize("betas", [None, (0.8, 0.95)])
def test_adamw_equals_pytorchs(betas, x64):
    torch = pytest.importorskip("torch", reason="needs PyTorch: the extra `torch`")
    start, *gradients = np.random.default_rng(0).normal(size=(7, 5))
    config = Optimizer(
        name="adamw",
        learning_rate=0.02,
        betas=betas,
        weight_decay=0.1,
        milestones=(2, 4),
    )
    theirs = torch.nn.Parameter(torch.from_numpy(start.copy()))
    optimizer = torch.optim.AdamW(
        [theirs], 0.02, betas or (0.9, 0.999), weight_decay=0.1
    )
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 4], 0.1)
    for gradient, ours in zip(gradients, moved(config, start, gradients), strict=True):
        theirs.grad = torch.from_numpy(gradient)
        optimizer.step()
        scheduler.step()
        np.testing.assert_allclose(ours, theirs.detach().numpy(), rtol=1e-6)


def moved(config, start, gradients, name="kernel"):
    """Yields a parameter after each step, an epoch each."""
    tx = make_optimizer(config, steps_per_epoch=1, epochs=10)
    params = {"layer": {name: jax.numpy.asarray(start)}}
    state = tx.init(params)
    for gradient in gradients:
        updates, state = tx.update({"layer": {name: gradient}}, state, params)
        params = optax.apply_updates(params, updates)
        yield np.asarray(params["layer"][name])


def test_lion_equals_the_papers(x64):
    expected, *gradients = np.random.default_rng(0).normal(size=(7, 5))
    momentum = np.zeros(5)
    config = Optimizer(
        name="lion", learning_rate=0.02, weight_decay=0.1, milestones=(99,)
    )
    for gradient, ours in zip(
        gradients, moved(config, expected, gradients), strict=True
    ):
        # Chen et al., 2023, algorithm 2.
        step = np.sign(0.9 * momentum + 0.1 * gradient)
        expected = expected - 0.02 * (step + 0.1 * expected)
        momentum = 0.99 * momentum + 0.01 * gradient
        np.testing.assert_allclose(ours, expected, rtol=1e-6)


@pytest.mark.parametrize("shape", [(3, 3, 2, 4), (5, 6), (3, 2, 4)])
def test_muon_takes_kernels_as_matrices_of_inputs_by_outputs(shape, x64):
    expected, *gradients = np.random.default_rng(0).normal(size=(5, *shape))
    momentum = np.zeros(shape)
    config = Optimizer(
        name="muon", learning_rate=0.02, weight_decay=0.1, milestones=(99,)
    )
    found = moved(config, expected, gradients)
    for step, (gradient, ours) in enumerate(zip(gradients, found, strict=True), 1):
        momentum = 0.95 * momentum + 0.05 * gradient
        # Averages without their start at 0, and a look ahead.
        ahead = 0.95 * momentum / (1 - 0.95 ** (step + 1))
        matrix = (ahead + 0.05 * gradient / (1 - 0.95**step)).reshape(-1, shape[-1])
        # Jordan et al., 2024: five steps of Newton and Schulz, of the smaller side.
        wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
        x = wide / np.linalg.norm(wide)
        for _ in range(5):
            square = x @ x.T
            x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
        x = x if x.shape == matrix.shape else x.T
        # Liu et al., 2025: steps as large as adamw's.
        direction = 0.2 * np.sqrt(max(x.shape)) * x.reshape(shape)
        expected = expected - 0.02 * (direction + 0.1 * expected)
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["bias", "scale", "threshold", "embedding"])
def test_what_is_no_kernel_is_moved_by_adam_in_muon(name, x64):
    start, *gradients = np.random.default_rng(0).normal(size=(5, 6, 4))
    options = {"learning_rate": 0.02, "weight_decay": 0.1, "milestones": (99,)}
    muon, again = (
        [*moved(Optimizer(name="muon", **options), start, gradients, key)]
        for key in (name, "other")
    )
    if name != "threshold":
        np.testing.assert_array_equal(muon, again)
    # Adam with Nesterov's look ahead, as optax's muon has it.
    tx = optax.nadamw(0.02, weight_decay=0.0 if name == "threshold" else 0.1)
    params = jax.numpy.asarray(start)
    state = tx.init(params)
    for gradient, ours in zip(gradients, muon, strict=True):
        updates, state = tx.update(jax.numpy.asarray(gradient), state, params)
        params = optax.apply_updates(params, updates)
        np.testing.assert_allclose(ours, params, rtol=1e-6)


NAMES = ("sgd", "adadelta", "adamw", "lion", "muon")


@pytest.mark.parametrize(
    "trained", [None, frozenset({"fc/kernel"}), frozenset({"bn/bias"})]
)
@pytest.mark.parametrize("name", NAMES)
def test_the_first_state_is_that_of_the_optimiser(name, trained):
    tx = make_optimizer(Optimizer(name=name), steps_per_epoch=1, epochs=1)
    update = Update(tx, trained=trained)
    params = {
        "fc": {"kernel": jax.numpy.ones((2, 3)), "bias": jax.numpy.ones(3)},
        "bn": {"scale": jax.numpy.ones(3), "bias": jax.numpy.ones(3)},
    }
    found = init_state(Small(), update, {"params": params}).opt_state
    moving, _ = split_params(params, trained)
    expected = tx.init(moving)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for ours, theirs in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_saved_state_goes_on_bitwise(name, tmp_path, one_device):
    optimizer = Optimizer(name=name, learning_rate=1e-3, milestones=(99,))
    config = dataclasses.replace(
        make_config("float32", "lenet", 16, 0.2), optimizer=optimizer, epochs=1
    )
    trainer = Trainer(config, synthetic_set(28))

    def after(state, calls):
        for inputs in calls:
            state, _ = trainer.train_call(state, inputs)
        return state

    state = after(trainer.init_state(), [*trainer.inputs(0, 0)][:2])
    ij.save_checkpoint(
        *(tmp_path / "saved", trainer.model, jax.device_get(state.variables)),
        training=jax.device_get(training_to_dict(state)),
    )
    arrays = load_arrays(tmp_path / "saved")
    again = trainer.restore(trainer.abstract_state(), arrays)
    assert_bitwise_equal(*map(jax.device_get, (state, again)))
    rest = [*trainer.inputs(0, 2)]
    assert rest
    straight, resumed = (after(s, rest) for s in (state, again))
    assert_bitwise_equal(*map(jax.device_get, (straight, resumed)))


def test_cosine_ends_at_zero_and_warmup_rises():
    config = Optimizer(schedule="cosine", warmup_epochs=2)
    schedule = make_schedule(config, steps_per_epoch=10, epochs=10)
    rates = [float(schedule(step)) for step in range(101)]
    np.testing.assert_allclose(rates[:21], np.linspace(0, 0.1, 21), atol=1e-7)
    half_way = 0.1 * (1 + np.cos(np.pi / 2)) / 2
    np.testing.assert_allclose(rates[60], half_way, rtol=1e-5)
    np.testing.assert_allclose(rates[100], 0, atol=1e-7)


def test_milestones_count_from_the_start_of_the_warmup():
    config = Optimizer(milestones=(3,), warmup_epochs=2)
    schedule = make_schedule(config, steps_per_epoch=10, epochs=10)
    np.testing.assert_allclose(float(schedule(29)), 0.1)
    np.testing.assert_allclose(float(schedule(31)), 0.01, rtol=1e-6)


@pytest.mark.parametrize("name", ["multistep", "cosine", "exponential", "one_cycle"])
def test_epochs_beyond_all_steps_are_never_reached(name):
    far = {"milestones": (1, 10**9), "decay_epochs": 10**9, "warmup_epochs": 0}
    config = Optimizer(schedule=name, **far)
    schedule = make_schedule(config, steps_per_epoch=100, epochs=10**9)
    assert np.isfinite(float(jax.jit(schedule)(np.int32(2**31 - 2))))


def test_one_cycle_rises_and_falls_by_hand():
    config = Optimizer(learning_rate=0.4, schedule="one_cycle", peak_share=0.2)
    schedule = make_schedule(config, steps_per_epoch=4, epochs=5)
    found = [float(schedule(step)) for step in range(21)]
    # Four steps up to the peak, sixteen down.
    expected = [0, 0.1, 0.2, 0.3, 0.4, *(0.4 - 0.025 * n for n in range(1, 17))]
    np.testing.assert_allclose(found, expected, atol=1e-7)


def test_one_cycle_may_fall_in_a_single_step():
    config = Optimizer(learning_rate=0.4, schedule="one_cycle", peak_share=0.8)
    schedule = make_schedule(config, steps_per_epoch=5, epochs=1)
    assert float(schedule(5)) == 0


def test_one_cycle_of_one_step_is_finite():
    config = Optimizer(schedule="one_cycle", peak_share=0.9)
    schedule = make_schedule(config, steps_per_epoch=1, epochs=1)
    assert float(schedule(0)) == 0


@pytest.mark.parametrize("name", ["sgd", "adamw", "lion", "muon"])
@pytest.mark.parametrize("decayed", [True, False])
def test_norms_and_biases_are_spared_if_asked(decayed, name):
    config = Optimizer(
        name=name,
        learning_rate=1.0,
        momentum=0.0,
        weight_decay=0.1,
        milestones=(100,),
        decay_norm_and_bias=decayed,
    )
    tx = make_optimizer(config, steps_per_epoch=1, epochs=1)
    norm = {"scale": jax.numpy.full(3, 2.0), "bias": jax.numpy.full(3, 2.0)}
    layer = {"kernel": jax.numpy.full((2, 3), 2.0), "bias": jax.numpy.full(3, 2.0)}
    params = {"bn": norm, "fc": layer, "gate": {"threshold": jax.numpy.full((), 2.0)}}
    gradient = jax.tree.map(jax.numpy.zeros_like, params)
    updates, _ = tx.update(gradient, tx.init(params), params)
    spared = 0.0 if not decayed else -0.2
    expected = {
        "bn": {"scale": spared, "bias": spared},
        "fc": {"kernel": -0.2, "bias": spared},
        "gate": {"threshold": 0.0},
    }
    for update, value in zip(*map(jax.tree.leaves, (updates, expected)), strict=True):
        np.testing.assert_allclose(update, value, rtol=1e-6)


def test_the_learning_rate_grows_with_the_batch_if_asked():
    config = Optimizer(learning_rate=0.1, base_batch_size=128)
    scaled = scale_learning_rate(config, batch_size=512)
    assert scaled.learning_rate == pytest.approx(0.4)
    assert scale_learning_rate(scaled, batch_size=512) == scaled
    unscaled = Optimizer(learning_rate=0.1)
    assert scale_learning_rate(unscaled, batch_size=512) == unscaled
