"""Kernels that factors stand for, and what is lost of the ones before."""

import numpy as np
import pytest

from inertia_jax.cost.table import CostTable, LayerCost
from train.report.kernels import compare_kernels, product


@pytest.mark.parametrize("groups", [1, 2])
def test_the_product_of_three_factors_is_that_of_each_group(groups):
    rng = np.random.default_rng(0)
    into = rng.standard_normal((1, 1, 4 // groups, groups * 2))
    core = rng.standard_normal((3, 5, 2, groups * 3))
    out = rng.standard_normal((1, 1, 3, 8))
    found = product([into, core, out], (2, 3))
    assert found.shape == (3, 5, 4 // groups, 8)
    for g, mine in enumerate(np.split(found, groups, axis=-1)):
        first = into[0, 0][:, 2 * g : 2 * g + 2]
        middle = core[..., 3 * g : 3 * g + 3]
        last = np.split(out[0, 0], groups, axis=-1)[g]
        for place in np.ndindex(3, 5):
            expected = first @ middle[place] @ last
            np.testing.assert_allclose(mine[place], expected, rtol=1e-12)


def test_the_energy_of_two_factors_is_worked_out_by_hand():
    dense = {"params": {"fc": {"kernel": np.diag([3.0, 4.0])}}}
    # The smaller direction is left out: 9 of 25 are missed.
    left, right = np.array([[0.0], [1.0]]), np.array([[0.0, 4.0]])
    parts = {"left": {"kernel": left}, "right": {"kernel": right}}
    row = LayerCost("fc", "low_rank", (2,), params=4, macs=4, ranks=(1,))
    other = LayerCost("bn", "other", (), params=4, macs=0)
    (found,) = compare_kernels(
        dense, {"params": {"fc": parts}}, CostTable((row, other))
    )
    assert (found.path, found.shape, found.ranks) == ("fc", (2, 2), (1,))
    np.testing.assert_allclose(found.energy, 16 / 25, rtol=1e-12)


def test_a_network_without_the_kernel_is_refused():
    row = LayerCost("fc", "low_rank", (2,), params=4, macs=4, ranks=(1,))
    parts = {"left": {"kernel": np.ones((2, 1))}, "right": {"kernel": np.ones((1, 3))}}
    for fc in ({"kernel": np.ones((2, 2))}, {}):
        with pytest.raises(ValueError, match="fc must have a kernel of shape"):
            compare_kernels(
                {"params": {"fc": fc}}, {"params": {"fc": parts}}, CostTable((row,))
            )
