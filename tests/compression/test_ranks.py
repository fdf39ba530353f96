"""Ranks: by share of energy, by empirical Bayes, and all together for a budget."""

import itertools
import math

import numpy as np
import pytest

import inertia_jax as ij
from inertia_jax import ops
from inertia_jax.compression.allocation import (
    Forms,
    allocate,
    lower_hull,
    make_choices,
    make_grid,
    pooled,
    spend_rest,
)
from inertia_jax.compression.budget import least
from inertia_jax.compression.ranks import rounded
from inertia_jax.compression.sites import Site
from inertia_jax.ops.tucker.rank_selection import kept_energy, mode_spectra


def test_energy_rank_by_hand():
    # The squares are 16, 9 and 0: one keeps 0.64, two keep all.
    values = np.array([4.0, 3.0, 0.0])
    found = [ops.energy_rank(values, share) for share in (0.1, 0.64, 0.65, 1.0)]
    assert found == [1, 1, 2, 2]
    assert ops.energy_rank(np.zeros(3), 0.9) == 1


def planted(short, long, rank, *, noise, seed=0):
    rng = np.random.default_rng(seed)
    left, right = rng.normal(size=(short, rank)), rng.normal(size=(rank, long))
    return left @ right + noise * rng.normal(size=(short, long))


@pytest.mark.parametrize("noise", [0.01, 0.3, 1.0])
@pytest.mark.parametrize(
    ("short", "long", "rank"), [(40, 40, 5), (30, 120, 1), (64, 576, 12), (16, 400, 7)]
)
def test_evbmf_finds_the_planted_rank(short, long, rank, noise):
    matrix = planted(short, long, rank, noise=noise)
    assert ops.evbmf_rank(matrix) == rank
    assert ops.evbmf_rank(matrix.T) == rank
    for scale in (1e-6, 1e5):
        assert ops.evbmf_rank(scale * matrix) == rank


@pytest.mark.parametrize("shape", [(40, 40), (30, 120), (64, 576), (20, 5), (1, 50)])
def test_evbmf_finds_nothing_in_noise(shape):
    for seed in range(5):
        noise = np.random.default_rng(seed).normal(size=shape)
        assert ops.evbmf_rank(noise) == 0


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    ("short", "long", "rank"), [(30, 120, 4), (24, 24, 3), (64, 64, 1), (48, 24, 7)]
)
def test_evbmf_of_exact_low_rank_is_that_rank(short, long, rank, dtype):
    """A compressed kernel is such a matrix: beyond its rank there is only rounding."""
    for seed in range(3):
        matrix = planted(short, long, rank, noise=0.0, seed=seed).astype(dtype)
        assert ops.evbmf_rank(matrix) == rank


def test_evbmf_of_degenerate_matrices():
    assert ops.evbmf_rank(np.zeros((4, 6))) == 0
    diagonal = np.zeros((8, 8))
    diagonal[0, 0] = 1.0
    assert ops.evbmf_rank(diagonal) == 1


def brute_force_evbmf_rank(matrix):
    """Returns the rank of the global solution of EVBMF, with the variance on a grid.

    Nakajima et al., 2013: a component's free energy, minimised over the variational
    solution, is at its stationary point gamma_breve (equation 22) against 0 (Theorem 2,
    with the threshold found as the root of Xi(tau; alpha) = Phi(tau) + Phi(tau/alpha),
    Phi(z) = log(z + 1) / z - 1/2). The variance minimises equation 25 to 28; here by
    a plain search over 5,000 values between bounds wider than those of equation 29.
    """
    matrix = np.asarray(matrix, np.float64)
    if matrix.shape[0] > matrix.shape[1]:
        matrix = matrix.T
    small, large = matrix.shape
    alpha = small / large
    gamma2 = np.linalg.svd(matrix, compute_uv=False) ** 2

    def phi(z):
        return math.log(z + 1) / z - 0.5

    low, high = 1e-6, 1e6  # The function falls; its root lies between.
    for _ in range(200):
        middle = math.sqrt(low * high)
        if phi(middle) + phi(middle / alpha) > 0:
            low = middle
        else:
            high = middle
    tau_least = low
    x_least = (1 + tau_least) * (1 + alpha / tau_least)
    mean = gamma2.sum() / (small * large)
    variances = np.geomspace(1e-8 * mean, 2 * mean, 5_000)
    best, rank = np.inf, None
    for variance in variances:
        x = gamma2 / (large * variance)
        energy = np.sum(x - np.log(x))
        kept = x[x > x_least]
        # tau is the larger root of x = (1 + tau)(1 + alpha / tau).
        b = kept - 1 - alpha
        tau = 0.5 * (b + np.sqrt(b * b - 4 * alpha))
        energy += np.sum(np.log1p(tau) + alpha * np.log1p(tau / alpha) - tau)
        if energy < best:
            best, rank = energy, len(kept)
    return rank


@pytest.mark.slow
@pytest.mark.parametrize(
    ("short", "long", "rank", "noise"),
    [
        (20, 30, 4, 1.5),
        (20, 30, 10, 2.5),
        (12, 12, 6, 0.5),
        (8, 100, 5, 3.0),
        (16, 144, 16, 1.0),
        (27, 16, 9, 2.0),
    ],
)
def test_evbmf_minimises_the_free_energy(short, long, rank, noise):
    for seed in range(3):
        matrix = planted(short, long, rank, noise=noise, seed=seed)
        # Rows of unlike size, as kernels have them, lie between signal and noise.
        matrix *= np.geomspace(1, 0.1, short)[:, None]
        assert ops.evbmf_rank(matrix) == brute_force_evbmf_rank(matrix)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(20, 24), (20, 40), (20, 100)])
def test_evbmf_minimises_the_free_energy_near_its_threshold(shape):
    found, expected = [], []
    for seed in range(30):
        rng = np.random.default_rng(seed)
        left, right = (np.linalg.qr(rng.normal(size=(n, 4)))[0] for n in shape)
        # The strength is one to two times the noise's largest singular value.
        strength = rng.uniform(1, 2, 4) * np.sqrt(shape).sum() / np.sqrt(2)
        matrix = left * strength @ right.T + rng.normal(size=shape)
        found.append(ops.evbmf_rank(matrix))
        expected.append(brute_force_evbmf_rank(matrix))
    assert found == expected
    assert len(set(found)) > 2


def test_evbmf_refuses_what_is_no_matrix(no_shape_checks):
    with pytest.raises(ValueError, match=r"`matrix` \(shape \(3,\)\) must be \[m, n\]"):
        ops.evbmf_rank(np.ones(3))
    with pytest.raises(ValueError, match=r"shape \(0, 3\)"):
        ops.evbmf_rank(np.ones((0, 3)))
    for bad in (np.nan, np.inf):
        with pytest.raises(ValueError, match="`matrix` must be finite"):
            ops.evbmf_rank(np.array([[1.0, bad]]))


def test_mode_spectra_are_those_of_the_unfoldings(x64):
    kernel = np.random.default_rng(0).normal(size=(3, 3, 4, 6))
    s_in, s_out = mode_spectra(kernel)
    unfolded = np.moveaxis(kernel, 2, 0).reshape(4, -1)
    np.testing.assert_allclose(s_in, np.linalg.svd(unfolded, compute_uv=False))
    unfolded = np.moveaxis(kernel, 3, 0).reshape(6, -1)
    np.testing.assert_allclose(s_out, np.linalg.svd(unfolded, compute_uv=False))


def truncated(kernel, r_in, r_out):
    """Returns what HOSVD keeps, by its definition."""
    into, out = (
        np.linalg.svd(np.moveaxis(kernel, axis, 0).reshape(kernel.shape[axis], -1))[0]
        for axis in (2, 3)
    )
    into, out = into[:, :r_in], out[:, :r_out]
    return np.einsum("hwio,ip,oq->hwpq", kernel, into @ into.T, out @ out.T)


def test_kept_energy_is_that_of_every_truncation(x64):
    kernel = np.random.default_rng(0).normal(size=(3, 3, 4, 6))
    kept = kept_energy(ops.tucker2(kernel, rank_in=4, rank_out=6).core)
    assert kept.shape == (4, 6)
    for r_in, r_out in itertools.product(range(1, 5), range(1, 7)):
        share = np.sum(truncated(kernel, r_in, r_out) ** 2) / np.sum(kernel**2)
        np.testing.assert_allclose(kept[r_in - 1, r_out - 1], share, rtol=1e-10)
    np.testing.assert_array_equal(kept_energy(np.zeros((3, 3, 2, 2))), np.ones((2, 2)))


def site(shape, *, groups=1):
    return Site(
        path="conv",
        kernel=np.zeros(shape),
        groups=groups,
        strides=(1, 1),
        padding="SAME",
        dilation=(1, 1),
        calls=(((8, 8, groups * shape[2]), (8, 8, shape[3])),),
        spec=ij.Conv(),
        core=ij.Conv(),
    )


@pytest.mark.parametrize(("shape", "groups"), [((3, 3, 4, 6), 1), ((3, 3, 3, 6), 2)])
def test_a_grid_says_what_every_pair_of_ranks_loses(shape, groups, x64):
    kernel = np.random.default_rng(0).normal(size=shape)
    grid = make_grid(site(shape, groups=groups), kernel, round_to=1)
    pairs = [(spec.rank_in, spec.rank_out) for spec in grid.specs]
    sides = range(1, shape[2] + 1), range(1, shape[3] // groups + 1)
    assert pairs == list(itertools.product(*sides))
    layer = site(shape, groups=groups)
    assert list(grid.costs) == [layer.macs(spec) for spec in grid.specs]
    for (r_in, r_out), error in zip(pairs, grid.errors, strict=True):
        lost = sum(
            np.sum((part - truncated(part, r_in, r_out)) ** 2)
            for part in np.split(kernel, groups, axis=3)
        )
        share = lost / np.sum(kernel**2)
        np.testing.assert_allclose(error, share, atol=1e-10)


@pytest.mark.parametrize("groups", [1, 2])
def test_a_grid_of_two_factors_says_what_every_rank_loses(groups, x64):
    kernel = np.random.default_rng(0).normal(size=(1, 1, 5, 8))
    grid = make_grid(site((1, 1, 5, 8), groups=groups), kernel, round_to=1)
    assert [spec.rank for spec in grid.specs] == list(range(1, 6 - (groups == 2)))
    for spec, error in zip(grid.specs, grid.errors, strict=True):
        spectra = [
            np.linalg.svd(part[0, 0], compute_uv=False)
            for part in np.split(kernel, groups, axis=3)
        ]
        lost = sum(np.sum(spectrum[spec.rank :] ** 2) for spectrum in spectra)
        share = lost / np.sum(kernel**2)
        np.testing.assert_allclose(error, share, atol=1e-10)


def test_a_grid_has_few_steps_that_are_multiples():
    kernel = np.random.default_rng(0).normal(size=(1, 1, 150, 200)).astype(np.float32)
    ranks = [s.rank for s in make_grid(site(kernel.shape), kernel, round_to=1).specs]
    assert ranks == [1, *range(3, 151, 3)]
    ranks = [s.rank for s in make_grid(site(kernel.shape), kernel, round_to=8).specs]
    assert ranks == [*range(8, 145, 8), 150]


def test_rounding_goes_up_to_a_multiple_and_no_further_than_the_most():
    found = [rounded(rank, 20, 8) for rank in (1, 8, 9, 16, 17, 20)]
    assert found == [8, 8, 16, 16, 20, 20]


def hull_by_definition(costs, errors):
    """Points that are the cheapest at some price of error, ties to the least error."""
    hull = []
    for i, (c, e) in enumerate(zip(costs, errors, strict=True)):
        others = [(costs[j], errors[j]) for j in range(len(costs)) if j != i]
        # No other point is as good in both; and none of the chords lies below.
        beaten = any(a <= c and b <= e for a, b in others)
        below = any(
            b0 + (b1 - b0) * (c - a0) / (a1 - a0) <= e
            for (a0, b0), (a1, b1) in itertools.permutations(others, 2)
            if a0 < c < a1
        )
        if not beaten and not below:
            hull.append(i)
    return sorted(hull, key=lambda i: costs[i])


def test_lower_hull_is_that_of_its_definition():
    for seed in range(30):
        rng = np.random.default_rng(seed)
        costs = rng.permutation(40)[:12].astype(float)
        errors = rng.permutation(40)[:12].astype(float)
        assert lower_hull(costs, errors) == hull_by_definition(costs, errors)
    # Points on a line between two others are left out; of equal costs the least error.
    assert lower_hull(np.array([0.0, 1, 2, 2]), np.array([2.0, 1, 0, 5])) == [0, 2]
    assert lower_hull(np.ones(3), np.array([3.0, 2, 4])) == [1]
    assert lower_hull(np.zeros(0), np.zeros(0)) == []


def test_points_that_fall_or_stay_are_pooled_into_ones_that_rise():
    assert pooled([]) == []
    rising = [(0.1, 1.0), (0.2, 3.0), (0.5, 4.0)]
    assert pooled(rising) == rising
    # By hand: 3 and 1 are pooled at 2, with which the next 2 is pooled, too.
    falling = [(0.0, 1.0), (0.2, 3.0), (0.4, 1.0), (0.6, 2.0), (1.0, 5.0)]
    found = np.array(pooled(falling))
    np.testing.assert_allclose(found, [(0.0, 1.0), (0.4, 2.0), (1.0, 5.0)], atol=1e-12)
    for seed in range(20):
        y = np.random.default_rng(seed).normal(size=9)
        found = np.array(pooled(zip(np.arange(9.0), y, strict=True)))
        assert (np.diff(found, axis=0) > 0).all()


def test_choices_begin_with_what_stands_there():
    specs = tuple(ij.LowRank(rank) for rank in (9, 5, 3, 1))
    costs = np.array([9.0, 5, 3, 1])
    # The third lies above the hull.
    choices = make_choices(Forms(specs, costs, np.array([0.0, 1, 8, 9])))
    assert choices.specs == (specs[0], specs[1], specs[3])
    assert list(choices.costs) == [9, 5, 1] and list(choices.errors) == [0, 1, 9]
    # The second loses nothing either: it comes next, and both are kept.
    choices = make_choices(Forms(specs, costs, np.array([0.0, 0, 8, 9])))
    assert choices.specs == (specs[0], specs[1], specs[3])


def random_choices(rng, count):
    """Convex choices of some convolutions, cost falling, error rising from 0."""
    choices = {}
    for n in range(count):
        points = int(rng.integers(1, 5))
        saved = rng.integers(1, 9, points).astype(float)
        slopes = np.sort(rng.uniform(0.01, 1, points))
        costs = saved.sum() + 1 - np.concatenate([[0], saved.cumsum()])
        errors = np.concatenate([[0], (slopes * saved).cumsum()])
        specs = tuple(ij.LowRank(points + 1 - i) for i in range(points + 1))
        choices[f"layer{n}"] = Forms(specs, costs, errors)
    return choices


def totals(choices, specs):
    at = {path: choices[path].specs.index(spec) for path, spec in specs.items()}
    cost = sum(choices[path].costs[i] for path, i in at.items())
    return cost, sum(choices[path].errors[i] for path, i in at.items())


def test_allocation_is_as_good_as_an_exhaustive_search_up_to_a_step():
    optimal = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        choices = random_choices(rng, 4)
        most = sum(forms.costs[0] for forms in choices.values())
        least = sum(forms.costs[-1] for forms in choices.values())
        budget = 3 + rng.uniform(least, most)
        found = allocate(choices, fixed=3.0, budget=budget)
        cost, error = totals(choices, found)
        assert 3 + cost <= budget
        every = [
            totals(choices, dict(zip(choices, specs, strict=True)))
            for specs in itertools.product(*(forms.specs for forms in choices.values()))
        ]
        best = min(e for c, e in every if 3 + c <= budget)
        # No better than the best, and worse by no more than the largest step.
        steps = [np.diff(forms.errors).max() for forms in choices.values()]
        assert best - 1e-9 <= error <= best + max(steps)
        optimal += error < best + 1e-9
    assert optimal > 30  # and mostly just the best


def test_allocation_meets_budgets_at_the_hull_exactly():
    rng = np.random.default_rng(0)
    choices = random_choices(rng, 3)
    steps = sorted(
        ((errors[i] - errors[i - 1]) / (costs[i - 1] - costs[i]), path, i)
        for path, (specs, costs, errors) in choices.items()
        for i in range(1, len(specs))
    )
    at = dict.fromkeys(choices, 0)
    for _, path, i in [(0, "layer0", 0), *steps]:
        at[path] = max(i, at[path])
        expected = {p: choices[p].specs[i] for p, i in at.items()}
        cost, _ = totals(choices, expected)
        assert allocate(choices, fixed=0.0, budget=cost) == expected


def test_allocation_of_what_cannot_be_met_is_refused():
    choices = random_choices(np.random.default_rng(0), 3)
    least = sum(forms.costs[-1] for forms in choices.values())
    allocate(choices, fixed=2.0, budget=least + 2)
    with pytest.raises(ValueError, match="`budget` .* must be at least"):
        allocate(choices, fixed=2.0, budget=least + 1.99)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ij.Ratio(0.0), r"`ratio` \(=0.0\) must be in \(0, 1\]"),
        (lambda: ij.Ratio(1.5), "`ratio`"),
        (lambda: ij.Ratio(True), "`ratio`"),
        (lambda: ij.Ratio("0.2"), "`ratio`"),
        (lambda: ij.Energy(float("nan")), "`share`"),
        (lambda: ij.Energy(-0.1), "`share`"),
        (lambda: ij.Budget(), "one of macs, params and latency"),
        (lambda: ij.Budget(macs=0.5, params=0.5), "one of macs, params and latency"),
        (lambda: ij.Budget(macs=0.0), "`macs`"),
        (lambda: ij.Budget(latency=2), "`latency`"),
        (lambda: ij.Budget(params=0.5, batch_size=0), "`batch_size`"),
    ],
)
def test_rules_refuse_what_is_no_share(make, message, no_shape_checks):
    with pytest.raises(ValueError, match=message):
        make()


def test_rules_compare_and_hash_by_value(no_shape_checks):
    assert ij.Ratio(1) == ij.Ratio(1.0)
    assert len({ij.Budget(macs=0.5), ij.Budget(macs=0.5), ij.Evbmf(), ij.Evbmf()}) == 2
    budget = ij.Budget(params=0.25)
    assert (budget.of, budget.share) == ("params", 0.25)


def test_what_is_left_of_a_budget_is_spent_off_the_hull():
    specs = tuple(ij.Tucker2(rank, rank) for rank in (9, 1, 5, 7))
    # On the hull lie the first and the second alone.
    costs, errors = np.array([10.0, 1.0, 5.0, 8.0]), np.array([0.0, 9.0, 7.0, 6.0])
    forms = Forms(specs, costs, errors)
    assert forms.hull().specs == specs[1::-1]
    few = Forms(specs[:2], costs[:2], np.array([0.0, 1.0]))
    start = {"a": specs[1], "b": specs[1]}

    def spent(rest):
        return spend_rest(start, {"a": forms, "b": few}, rest)

    assert spent(3.9) == start
    assert spent(4.0) == {"a": specs[2], "b": specs[1]}
    assert spent(7.0) == {"a": specs[3], "b": specs[1]}
    assert spent(9.0) == {"a": specs[0], "b": specs[1]}
    assert spent(18.0) == {"a": specs[0], "b": specs[0]}


def test_a_budget_that_is_spent_up_to_rounding_buys_nothing():
    specs = (ij.Tucker2(9, 9), ij.Tucker2(3, 3))
    forms = {"a": Forms(specs, np.array([100.0, 29.0]), np.array([0.0, 0.5]))}
    rest = 0.29 * 100 - 29
    assert rest < 0
    assert spend_rest({"a": specs[1]}, forms, rest) == {"a": specs[1]}


def test_a_choice_whose_outputs_are_not_finite_is_never_the_best():
    nan, infinite = float("nan"), float("inf")
    assert least([nan, 2.0, 1.0]) == 2
    assert least([infinite, 3.0, nan]) == 1
    assert least([1.0, 1.0]) == 0
    with pytest.raises(ValueError, match="`calibration` must leave .* finite"):
        least([nan, infinite])
