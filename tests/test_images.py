"""Preprocessing in Python: that of the program's evaluation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import inertia_jax as ij
from train.data.augment import Augmentation

IMAGES = np.random.default_rng(0).integers(256, size=(3, 12, 10, 3), dtype=np.uint8)


def preprocessing(*sides, resize=None):
    return ij.Preprocessing((*sides, 3), (0.4, 0.5, 0.6), (0.2, 0.25, 0.3), resize)


@pytest.mark.parametrize(
    ("sides", "resize"), [((12, 10), None), ((8, 8), None), ((8, 6), (10, 8))]
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_is_what_evaluation_does(sides, resize, dtype):
    own = preprocessing(*sides, resize=resize)
    found = ij.preprocess(IMAGES, own, dtype=dtype)
    assert found.shape == (3, *sides, 3) and found.dtype == dtype
    theirs = Augmentation.plain(own, dtype).for_evaluation(jnp.asarray(IMAGES))
    np.testing.assert_array_equal(found, theirs)
    jitted = jax.jit(ij.preprocess, static_argnames=("preprocessing", "dtype"))
    again = jitted(IMAGES, preprocessing=own, dtype=dtype)
    np.testing.assert_allclose(
        *(a.astype(jnp.float32) for a in (again, found)), rtol=1e-2, atol=1e-5
    )


def test_images_of_the_inputs_size_are_normalised_alone():
    own = preprocessing(12, 10)
    expected = (IMAGES / 255 - np.array(own.mean)) / np.array(own.std)
    np.testing.assert_allclose(
        ij.preprocess(IMAGES, own), expected, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize(
    ("images", "said"),
    [
        (IMAGES.astype(np.float32), "`images` have type float32; must be uint8"),
        (IMAGES[0], "have shape .12, 10, 3.; must be .n, h, w, 3."),
        (IMAGES[..., :1], "have shape .3, 12, 10, 1.; must be .n, h, w, 3."),
    ],
)
def test_what_is_no_batch_of_images_is_refused(images, said, no_shape_checks):
    with pytest.raises(ValueError, match=said):
        ij.preprocess(images, preprocessing(8, 8))


def test_it_is_part_of_the_users_own_program():
    own = preprocessing(8, 8)
    mean = jax.jit(lambda images: ij.preprocess(images, own).mean((1, 2)))
    by_image = [
        functools.partial(ij.preprocess, preprocessing=own)(i[None]) for i in IMAGES
    ]
    np.testing.assert_allclose(
        mean(IMAGES), [m[0].mean((0, 1)) for m in by_image], rtol=1e-4, atol=1e-4
    )
