"""Optimisers and learning rates beside PyTorch's."""

import jax
import numpy as np
import optax
import pytest

from train.config import Optimizer
from train.step.optimizer import make_optimizer, make_schedule, scale_learning_rate


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


def test_one_cycle_rises_and_falls_by_hand():
    config = Optimizer(learning_rate=0.4, schedule="one_cycle", peak_share=0.2)
    schedule = make_schedule(config, steps_per_epoch=4, epochs=5)
    found = [float(schedule(step)) for step in range(21)]
    # Four steps up to the peak, sixteen down.
    expected = [0, 0.1, 0.2, 0.3, 0.4, *(0.4 - 0.025 * n for n in range(1, 17))]
    np.testing.assert_allclose(found, expected, atol=1e-7)


def test_one_cycle_of_one_step_is_finite():
    config = Optimizer(schedule="one_cycle", peak_share=0.9)
    schedule = make_schedule(config, steps_per_epoch=1, epochs=1)
    assert float(schedule(0)) == 0


@pytest.mark.parametrize("decayed", [True, False])
def test_norms_and_biases_are_spared_if_asked(decayed):
    config = Optimizer(
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
