"""Augmentation beside NumPy and Pillow, for given offsets."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from inertia_jax.images import covering_size, normalise, resize
from inertia_jax.metadata import Preprocessing
from train.config import Data
from train.data import augment

FLOAT32 = jnp.dtype("float32")
RNG = np.random.default_rng(0)
IMAGES = RNG.integers(256, size=(6, 12, 10, 3), dtype=np.uint8)


def test_crop_equals_numpys():
    offsets = np.array([(0, 0), (4, 4), (8, 8), (0, 8), (3, 5), (2, 2)])
    padded = np.pad(IMAGES, ((0, 0), (4, 4), (4, 4), (0, 0)))
    expected = [
        image[top : top + 12, left : left + 10]
        for image, (top, left) in zip(padded, offsets, strict=True)
    ]
    ours = augment.crop(jnp.asarray(IMAGES), jnp.asarray(offsets), padding=4)
    assert ours.dtype == jnp.uint8
    np.testing.assert_array_equal(ours, expected)


@pytest.mark.parametrize("padding", [4, 14])  # less than the image, and more
def test_a_mirrored_crop_equals_numpys(padding):
    offsets = np.array([(0, 0), (4, 4), (8, 8), (0, 8), (3, 5), (2, 2)])
    sides = (padding, padding)
    padded = np.pad(IMAGES, ((0, 0), sides, sides, (0, 0)), mode="reflect")
    expected = [
        image[top : top + 12, left : left + 10]
        for image, (top, left) in zip(padded, offsets, strict=True)
    ]
    ours = augment.crop(
        jnp.asarray(IMAGES), jnp.asarray(offsets), padding=padding, mode="reflect"
    )
    assert ours.dtype == jnp.uint8
    np.testing.assert_array_equal(ours, expected)


def test_flip_equals_numpys():
    mirrored = np.array([True, False, True, False, False, True])
    expected = [i[:, ::-1] if m else i for i, m in zip(IMAGES, mirrored, strict=True)]
    ours = augment.flip(jnp.asarray(IMAGES), jnp.asarray(mirrored))
    np.testing.assert_array_equal(ours, expected)


def test_normalise_equals_numpys():
    mean, std = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
    ours = normalise(jnp.asarray(IMAGES), mean=mean, std=std, dtype=FLOAT32)
    expected = (IMAGES / 255 - np.array(mean)) / np.array(std)
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("stored", "size"), [((12, 10), 20), ((40, 30), 15)])
def test_resize_equals_pillows(stored, size):
    # Smooth, since Pillow rounds its weights and its result to 8 bits.
    image = np.asarray(
        Image.fromarray(IMAGES[0]).resize(stored[::-1], Image.Resampling.BICUBIC)
    )
    crop = size - 2
    height, width = (side * size // min(stored) for side in stored)
    theirs = Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR)
    top, left = round((height - crop) / 2), round((width - crop) / 2)
    theirs = np.asarray(theirs)[top : top + crop, left : left + crop]
    ours = resize(
        jnp.asarray(image[None]), sides=(size, size), output_shape=(crop, crop)
    )
    np.testing.assert_allclose(ours[0], theirs, atol=1.01)


def test_resized_crop_equals_pillows():
    boxes = np.array([(2, 1, 8, 6), (0, 0, 12, 10)], np.float32)
    ours = augment.resized_crop(
        jnp.asarray(IMAGES[:2]), jnp.asarray(boxes), output_shape=(24, 24)
    )
    for image, box, ours_one in zip(IMAGES, boxes, ours, strict=False):
        top, left, height, width = (int(v) for v in box)
        part = Image.fromarray(image[top : top + height, left : left + width])
        theirs = np.asarray(part.resize((24, 24), Image.Resampling.BILINEAR))
        # Inside: at the part's edge Pillow repeats its pixels, we look beyond it.
        np.testing.assert_allclose(ours_one[4:-4, 4:-4], theirs[4:-4, 4:-4], atol=1.01)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stored", "sides"),
    [((32, 32), (24, 24)), ((32, 64), (24, 48)), ((96, 32), (48, 16))],
)
def test_boxes_have_the_stated_area_and_ratio(stored, sides):
    keys = jax.random.split(jax.random.key(0), 2000)
    boxes = augment.draw_boxes(keys, stored, output_shape=sides)
    top, left, height, width = np.asarray(boxes).T
    assert (top >= 0).all() and (left >= 0).all()
    assert (top + height <= stored[0]).all() and (left + width <= stored[1]).all()
    area, ratio = height * width / np.prod(stored), width / height
    ratio *= sides[0] / sides[1]
    # Sides are rounded to a pixel, so small parts leave the range a little.
    assert area.min() > 0.06 and area.max() <= 1
    assert ratio.min() > 0.68 and ratio.max() < 1.5
    assert 0.45 < area.mean() < 0.6


@pytest.mark.parametrize(
    ("stored", "sides", "box"),
    [
        ((9, 300), (24, 24), (0, 144, 9, 12)),
        ((9, 300), (24, 48), (0, 138, 9, 24)),
        ((300, 9), (24, 48), (147, 0, 6, 9)),
    ],
)
def test_the_largest_centred_part_is_taken_where_none_fits(stored, sides, box):
    keys = jax.random.split(jax.random.key(0), 20)
    boxes = np.asarray(augment.draw_boxes(keys, stored, output_shape=sides))
    np.testing.assert_array_equal(boxes, np.broadcast_to(box, (20, 4)))


def make_augmentation(**options):
    preprocessing = Preprocessing((12, 10, 3), (0.5,) * 3, (0.25,) * 3)
    return augment.Augmentation(preprocessing, Data(**options), FLOAT32)


@pytest.mark.slow
def test_training_images_depend_on_their_key_alone():
    augmentation = make_augmentation()
    keys = augment.example_keys(jax.random.key(0), jnp.arange(6))
    whole = augmentation.for_training(jnp.asarray(IMAGES), keys)
    for part in (slice(0, 2), slice(2, 6)):
        alone = augmentation.for_training(jnp.asarray(IMAGES[part]), keys[part])
        np.testing.assert_array_equal(whole[part], alone)


def test_crops_and_flips_are_spread_evenly():
    one = np.zeros((9, 9, 1), np.uint8)
    one[4, 4] = 255
    preprocessing = Preprocessing((9, 9, 1), (0.0,), (1.0,))
    augmentation = augment.Augmentation(preprocessing, Data(crop_padding=2), FLOAT32)
    keys = augment.example_keys(jax.random.key(0), jnp.arange(5000))
    images = augmentation.for_training(jnp.broadcast_to(one, (5000, 9, 9, 1)), keys)
    counts = np.asarray(images)[..., 0].sum(0)[2:7, 2:7]
    # 200 expected of each offset; 5 standard deviations.
    assert np.abs(counts - 200).max() < 5 * np.sqrt(200)


def test_training_images_are_padded_as_said():
    one = jnp.full((50, 12, 10, 3), 255, jnp.uint8)
    keys = augment.example_keys(jax.random.key(0), jnp.arange(50))
    zeros = make_augmentation().for_training(one, keys)
    mirrored = make_augmentation(crop_mode="reflect").for_training(one, keys)
    assert float(zeros.min()) == -2
    np.testing.assert_array_equal(mirrored, 2)


def mirrors_of(images, epoch, seed=0):
    key = jax.random.key(seed)
    mirrors = jax.jit(augment.alternating_mirrors)
    return np.asarray(mirrors(jnp.asarray(images), jnp.int32(epoch), key=key))


def test_alternating_mirrors_take_turns_whatever_the_batch():
    images = RNG.integers(256, size=(4000, 4, 4, 3), dtype=np.uint8)
    first = mirrors_of(images, 0)
    for epoch in range(1, 5):
        np.testing.assert_array_equal(mirrors_of(images, epoch), first ^ (epoch % 2))
    order = RNG.permutation(4000)[:100]
    np.testing.assert_array_equal(mirrors_of(images[order], 0), first[order])
    # Fair coins, and another seed's are others; 5 standard deviations of 4,000.
    for heads in (first, first == mirrors_of(images, 0, seed=1)):
        assert abs(heads.sum() - 2000) < 5 * np.sqrt(1000)


def test_an_alternating_mirror_is_the_top_bit_of_a_weighted_sum():
    images = RNG.integers(256, size=(50, 4, 4, 3), dtype=np.uint8)
    weights = jax.random.bits(jax.random.key(0), images.shape[1:], np.uint32)
    sums = (images.astype(np.uint64) * np.asarray(weights, np.uint64)).sum((1, 2, 3))
    np.testing.assert_array_equal(mirrors_of(images, 0), sums % 2**32 >= 2**31)


def test_given_mirrors_are_taken_in_place_of_drawn_ones():
    augmentation = make_augmentation(crop_padding=0)
    keys = augment.example_keys(jax.random.key(0), jnp.arange(6))
    mirrored = np.array([True, False, True, False, False, True])
    ours = augmentation.for_training(jnp.asarray(IMAGES), keys, jnp.asarray(mirrored))
    images = [i[:, ::-1] if m else i for i, m in zip(IMAGES, mirrored, strict=True)]
    np.testing.assert_array_equal(
        ours, augmentation.for_evaluation(jnp.asarray(np.stack(images)))
    )
    still = make_augmentation(crop_padding=0, flip=False)
    np.testing.assert_array_equal(
        still.for_training(jnp.asarray(IMAGES), keys, jnp.asarray(mirrored)),
        still.for_evaluation(jnp.asarray(IMAGES)),
    )


def test_without_options_training_images_are_evaluations():
    preprocessing = Preprocessing((12, 10, 3), (0.5,) * 3, (0.25,) * 3)
    augmentation = augment.Augmentation.plain(preprocessing, "float32")
    keys = augment.example_keys(jax.random.key(0), jnp.arange(6))
    images = jnp.asarray(IMAGES)
    np.testing.assert_array_equal(
        augmentation.for_training(images, keys), augmentation.for_evaluation(images)
    )


def test_evaluation_resizes_and_cuts_the_centre():
    preprocessing = Preprocessing((8, 8, 3), (0.5,) * 3, (0.25,) * 3, resize=10)
    augmentation = augment.Augmentation.plain(preprocessing, FLOAT32)
    ours = augmentation.for_evaluation(jnp.asarray(IMAGES))
    # The short side is 10 already: rows 2..10, columns 1..9 of 12 x 10.
    expected = (IMAGES[:, 2:10, 1:9] / 255 - 0.5) / 0.25
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("stored", "sides", "covering"),
    [
        ((24, 48), (24, 48), (24, 48)),
        ((48, 96), (24, 48), (24, 48)),
        ((60, 60), (24, 48), (48, 48)),
        ((24, 99), (24, 48), (24, 99)),
        ((7, 9), (24, 48), (37, 48)),  # 7 * 48 / 9 = 37.3
        ((10, 12), (5, 5), (5, 6)),
        ((12, 10), (5, 5), (6, 5)),
    ],
)
def test_images_cover_both_sides_in_their_own_shape(stored, sides, covering):
    assert covering_size(stored, sides) == covering


@pytest.mark.parametrize("resize", [None, (30, 60), 48])
@pytest.mark.parametrize("stored", [(24, 48), (48, 96), (72, 99)])
def test_images_that_are_not_square_keep_their_shape(stored, resize):
    image = Image.fromarray(IMAGES[0]).resize(stored[::-1], Image.Resampling.BICUBIC)
    preprocessing = Preprocessing((24, 48, 3), (0.0,) * 3, (1.0,) * 3, resize)
    augmentation = augment.Augmentation.plain(preprocessing, FLOAT32)
    images, keys = jnp.asarray(image)[None], jax.random.split(jax.random.key(0), 1)
    evaluated = augmentation.for_evaluation(images)
    for ours, sides in (
        (evaluated, preprocessing.resized_sides),
        (augmentation.for_training(images, keys), (24, 48)),
    ):
        height, width = covering_size(stored, sides)
        theirs = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR))
        top, left = round((height - 24) / 2), round((width - 48) / 2)
        expected = theirs[top : top + 24, left : left + 48]
        np.testing.assert_allclose(255 * ours[0], expected, atol=1.01)


@pytest.mark.slow
def test_random_parts_are_brought_to_the_input_size():
    preprocessing = Preprocessing((16, 16, 3), (0.5,) * 3, (0.25,) * 3)
    augmentation = augment.Augmentation(
        preprocessing, Data(resized_crop=True), jnp.dtype(jnp.bfloat16)
    )
    keys = augment.example_keys(jax.random.key(0), jnp.arange(6))
    images = augmentation.for_training(jnp.asarray(IMAGES), keys)
    assert images.shape == (6, 16, 16, 3)
    assert images.dtype == jnp.bfloat16
    assert np.isfinite(np.asarray(images, np.float32)).all()


def test_later_purposes_leave_earlier_keys_alone():
    keys = jax.random.split(jax.random.key(0), 3)
    crops, flips, *_ = augment._image_keys(keys)
    for key, crop_key, flip_key in zip(keys, crops, flips, strict=True):
        expected = jax.random.key_data(jax.random.split(key))
        found = jax.random.key_data(jnp.stack([crop_key, flip_key]))
        np.testing.assert_array_equal(found, expected)
