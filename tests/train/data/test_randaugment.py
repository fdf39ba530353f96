"""RandAugment's operations beside Pillow's."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from train.data.randaugment import OPERATIONS, operate, rand_augment

RNG = np.random.default_rng(0)
# Of more than 255 pixels, without which Pillow has nothing to equalise.
NOISE = RNG.integers(256, size=(40, 31, 3), dtype=np.uint8)
# Smooth and of few values, as photographs are; not square.
SMOOTH = np.asarray(
    Image.fromarray(RNG.integers(256, size=(4, 4, 3), dtype=np.uint8)).resize(
        (31, 40), Image.Resampling.BICUBIC
    )
)
FAINT = SMOOTH // 3 + 40
ENHANCERS = {
    "brightness": ImageEnhance.Brightness,
    "color": ImageEnhance.Color,
    "contrast": ImageEnhance.Contrast,
    "sharpness": ImageEnhance.Sharpness,
}


def pillows(image, name, sign, magnitude):
    """Applies an operation with the magnitudes of torchvision's RandAugment."""
    height, width = image.shape[:2]
    picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
    level = magnitude / 30
    shear, turn = 0.3 * level * sign, 30 * level * sign
    right = int(150 / 331 * width * level * sign)
    down = int(150 / 331 * height * level * sign)
    warps = {
        "identity": (1, 0, 0, 0, 1, 0),
        "shear_x": (1, shear, 0, 0, 1, 0),
        "shear_y": (1, 0, 0, shear, 1, 0),
        "translate_x": (1, 0, -right, 0, 1, 0),
        "translate_y": (1, 0, 0, 0, 1, -down),
    }
    nearest = Image.Resampling.NEAREST
    if name in warps:
        size, kind = (width, height), Image.Transform.AFFINE
        changed = picture.transform(size, kind, warps[name], nearest)
    elif name in ENHANCERS:
        changed = ENHANCERS[name](picture).enhance(1 + 0.9 * level * sign)
    else:
        changed = {
            "rotate": lambda: picture.rotate(turn, nearest),
            "posterize": lambda: ImageOps.posterize(picture, 8 - round(4 * level)),
            "solarize": lambda: ImageOps.solarize(picture, 255 - 255 * level),
            "autocontrast": lambda: ImageOps.autocontrast(picture),
            "equalize": lambda: ImageOps.equalize(picture),
        }[name]()
    return np.asarray(changed).reshape(image.shape)


@functools.partial(jax.jit, static_argnames="magnitude")
def all_operations(image, signs, *, magnitude):
    places = jnp.arange(len(OPERATIONS))
    one = functools.partial(operate, image, magnitude=magnitude)
    return jax.vmap(lambda s: jax.vmap(lambda place: one(place, s))(places))(signs)


@pytest.mark.parametrize("magnitude", [9, 30])
@pytest.mark.parametrize("channels", [3, 1])
def test_operations_are_pillows(magnitude, channels):
    for image in (NOISE, SMOOTH, FAINT):
        image = image[..., :channels]
        signs = np.array([1, -1])
        found = all_operations(jnp.asarray(image), signs, magnitude=magnitude)
        for sign, of_sign in zip(signs, np.asarray(found), strict=True):
            for name, ours in zip(OPERATIONS, of_sign, strict=True):
                theirs = pillows(image, name, int(sign), magnitude)
                differing = np.abs(ours.astype(int) - theirs.astype(int))
                if name == "autocontrast":
                    # Pillow multiplies by a rounded factor, and cuts: 254.99 is 254.
                    assert differing.max() <= 1, name
                elif name in ENHANCERS:
                    # A blend that is a whole number may be rounded to just below it.
                    assert differing.max() <= 1, name
                    assert (differing > 0).mean() < 0.002, name
                elif name == "rotate":
                    # A place on the edge of two pixels may be either's, by rounding.
                    assert (differing > 0).mean() < 0.02, name
                else:
                    np.testing.assert_array_equal(ours, theirs, err_msg=name)


def test_equalize_leaves_the_pixels_of_the_highest_value_out_as_pillow_does():
    image = np.minimum(SMOOTH, 120)  # which is the value of a third of them
    found = all_operations(jnp.asarray(image), np.array([1]), magnitude=9)[0]
    ours = found[OPERATIONS.index("equalize")]
    np.testing.assert_array_equal(ours, pillows(image, "equalize", 1, 9))


def test_an_image_of_one_colour_has_nothing_to_stretch():
    image = np.full((4, 5, 3), 77, np.uint8)
    found = all_operations(jnp.asarray(image), np.array([1]), magnitude=9)[0]
    for name in ("autocontrast", "equalize", "contrast", "sharpness"):
        np.testing.assert_array_equal(found[OPERATIONS.index(name)], image)


def test_operations_are_drawn_evenly_and_by_each_images_key():
    # Each operation changes it in its own way.
    image = FAINT[::2, ::2]
    images = jnp.broadcast_to(jnp.asarray(image), (700, *image.shape))
    keys = jax.random.split(jax.random.key(0), 700)
    draw = jax.jit(functools.partial(rand_augment, num_operations=1, magnitude=30))
    drawn = np.asarray(draw(images, keys))
    possible = np.asarray(
        all_operations(jnp.asarray(image), np.array([1, -1]), magnitude=30)
    )
    is_same = (drawn[:, None, None] == possible[None]).all((-1, -2, -3))
    assert is_same.any((1, 2)).all()
    for place, name in enumerate(OPERATIONS):
        # 50 expected, or 25 of each sign; 5 standard deviations.
        signs = is_same[:, :, place].sum(0)
        is_signed = (possible[0, place] != possible[1, place]).any()
        expected = 25 if is_signed else 50
        assert np.abs(signs - expected).max() < 5 * expected**0.5, name
    np.testing.assert_array_equal(draw(images, keys[::-1]), drawn[::-1])


@pytest.mark.slow
def test_operations_follow_each_other():
    keys = jax.random.split(jax.random.key(0), 8)
    images = jnp.broadcast_to(jnp.asarray(SMOOTH), (8, *SMOOTH.shape))
    twice = jax.jit(functools.partial(rand_augment, num_operations=2, magnitude=20))
    one = jax.jit(functools.partial(operate, magnitude=20))
    for key, found in zip(keys, twice(images, keys), strict=True):
        image = jnp.asarray(SMOOTH)
        for step_key in jax.random.split(key, 2):
            kind, sign = jax.random.split(step_key)
            operation = jax.random.randint(kind, (), 0, 14)
            sign = 1 - 2 * jax.random.bernoulli(sign).astype(int)
            image = one(image, operation, sign)
        np.testing.assert_array_equal(found, image)
