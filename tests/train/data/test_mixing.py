"""Mixup, CutMix and random erasing beside NumPy, and their draws beside SciPy."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from inertia_jax.metadata import Preprocessing
from train.config import Data
from train.data.augment import Augmentation
from train.data.mixing import (
    cutmix,
    draw_erased,
    draw_patches,
    draw_weights,
    erase,
    mixup,
)
from train.errors import UsageError

RNG = np.random.default_rng(0)
IMAGES, PARTNERS = RNG.normal(size=(2, 5, 8, 6, 3)).astype(np.float32)
KEYS = jax.random.split(jax.random.key(0), 4000)


def test_mixup_equals_numpys():
    weights = np.array([0, 0.25, 0.5, 0.9, 1], np.float32)
    w = weights[:, None, None, None]
    expected = w * IMAGES + (1 - w) * PARTNERS
    ours = mixup(*map(jnp.asarray, (IMAGES, PARTNERS, weights)))
    np.testing.assert_allclose(ours, expected, rtol=1e-6, atol=1e-6)


def test_cutmix_equals_numpys():
    boxes = np.array(
        [(0, 0, 8, 6), (2, 1, 5, 4), (3, 3, 3, 6), (7, 5, 8, 6), (0, 2, 4, 6)]
    )
    expected, weights = IMAGES.copy(), []
    for image, partner, (y1, x1, y2, x2) in zip(expected, PARTNERS, boxes, strict=True):
        image[y1:y2, x1:x2] = partner[y1:y2, x1:x2]
        weights.append(1 - (y2 - y1) * (x2 - x1) / 48)
    ours, found = cutmix(*map(jnp.asarray, (IMAGES, PARTNERS, boxes)))
    np.testing.assert_array_equal(ours, expected)
    np.testing.assert_allclose(found, weights, rtol=1e-6)
    erased = erase(jnp.asarray(IMAGES), jnp.asarray(boxes))
    np.testing.assert_array_equal(erased[1, 2:5, 1:4], 0)
    np.testing.assert_array_equal(erased == 0, ours != IMAGES)


@pytest.mark.parametrize("alpha", [0.2, 1.0])
def test_weights_have_the_distribution_that_is_said(alpha):
    draw = jax.jit(functools.partial(draw_weights, alpha=alpha))
    weights = np.asarray(draw(KEYS))
    assert stats.kstest(weights, stats.beta(alpha, alpha).cdf).pvalue > 0.01


def test_patches_have_the_size_of_their_weight_and_any_place():
    weights = np.linspace(0, 1, 4000, dtype=np.float32)
    draw = jax.jit(functools.partial(draw_patches, shape=(30, 20)))
    patches = draw(KEYS, jnp.asarray(weights))
    top, left, bottom, right = np.asarray(patches).T
    for low, high, side in ((top, bottom, 30), (left, right, 20)):
        assert (low >= 0).all() and (low <= high).all() and (high <= side).all()
        # As in torchvision's CutMix, a half is rounded down before it is doubled.
        half = np.floor(np.sqrt(1 - weights) / 2 * side)
        is_whole = (low > 0) & (high < side)
        np.testing.assert_array_equal((high - low)[is_whole], 2 * half[is_whole])
        assert ((high - low) <= 2 * half).all()
    # Of an empty patch the middle is seen, which is evenly anywhere.
    empty = np.asarray(draw(KEYS, jnp.ones(4000)))
    for places, side in ((empty[:, 0], 30), (empty[:, 1], 20)):
        counts = np.bincount(places, minlength=side)
        assert len(counts) == side
        assert np.abs(counts - 4000 / side).max() < 5 * np.sqrt(4000 / side)


def test_erased_boxes_have_the_area_and_ratio_that_is_said():
    draw = jax.jit(functools.partial(draw_erased, shape=(64, 48), probability=0.25))
    boxes = np.asarray(draw(KEYS))
    top, left, bottom, right = boxes.T
    height, width = bottom - top, right - left
    is_erased = height > 0
    # 1,000 expected; 5 standard deviations of 4,000 draws.
    assert abs(is_erased.sum() - 1000) < 5 * np.sqrt(750)
    assert (boxes[~is_erased] == 0).all()
    assert (top >= 0).all() and (left >= 0).all()
    assert (bottom <= 64).all() and (right <= 48).all()
    height, width = height[is_erased], width[is_erased]
    # Sides are rounded to a pixel, so that small boxes leave the range a little.
    share, ratio = height * width / (64 * 48), height / width
    assert 0.015 < share.min() < 0.03 and 0.3 < share.max() < 0.35
    assert 0.25 < ratio.min() < 0.35 and 2.8 < ratio.max() < 4
    # An image that no box fits into stays.
    assert not np.asarray(draw_erased(KEYS[:9], shape=(1, 1), probability=1.0)).any()


def augmentation(**options):
    preprocessing = Preprocessing((8, 6, 3), (0.0,) * 3, (1.0,) * 3)
    data = Data(crop_padding=0, flip=False, **options)
    return Augmentation(preprocessing, data, jnp.dtype("float32"))


@pytest.mark.slow
def test_with_both_half_of_the_images_are_mixed_each_way():
    images, partners = jnp.zeros((400, 8, 6, 3)), jnp.ones((400, 8, 6, 3))
    both = augmentation(mixup=1.0, cutmix=1.0)
    mixed, weights = jax.jit(both.mixed)(images, partners, KEYS[:400])
    # A pasted image has zeros and ones alone, a blended one a value between.
    values = np.asarray(mixed).reshape(400, -1)
    is_pasted = ((values == 0) | (values == 1)).all(1)
    assert abs(is_pasted.sum() - 200) < 5 * np.sqrt(100)
    np.testing.assert_allclose(1 - values.mean(1), weights, atol=1e-5)
    for name in ("mixup", "cutmix"):
        alone = dataclasses.replace(
            both, data=dataclasses.replace(both.data, **{name: 0})
        )
        other = np.asarray(jax.jit(alone.mixed)(images, partners, KEYS[:400])[0])
        same = np.isclose(other.reshape(400, -1), values, atol=1e-6).all(1)
        np.testing.assert_array_equal(same | (is_pasted == (name == "cutmix")), True)


def test_erasing_comes_after_the_normalisation():
    images = jnp.full((50, 8, 6, 3), 255, jnp.uint8)
    found = np.asarray(
        jax.jit(augmentation(random_erasing=1.0).for_training)(images, KEYS[:50])
    )
    is_erased = (found == 0).all(-1)
    assert (is_erased | (found == 1).all(-1)).all()
    assert 0.02 < is_erased.mean() < 0.33


def test_randaugment_takes_whole_values():
    images = jnp.asarray(RNG.integers(256, size=(6, 12, 12, 3), dtype=np.uint8))
    found = jax.jit(augmentation(rand_augment=1).for_training)(images, KEYS[:6])
    np.testing.assert_allclose(found * 255, np.round(found * 255), atol=1e-4)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"mixup": -1.0}, "`data.mixup` (=-1.0) must be >= 0"),
        ({"cutmix": float("inf")}, "`data.cutmix` (=inf) must be finite"),
        ({"rand_augment": -1}, "`data.rand_augment` (=-1) must be >= 0"),
        ({"rand_augment_magnitude": 31}, "must be in [0, 30]"),
        ({"random_erasing": 1.5}, "`data.random_erasing` (=1.5) must be in [0, 1]"),
    ],
)
def test_bad_strengths_are_errors(options, said):
    with pytest.raises(UsageError) as caught:
        Data(**options)
    assert said in str(caught.value)
