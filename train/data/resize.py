"""Images of any size brought to one, when a set is decoded."""

from typing import Any

import numpy as np

from inertia_jax.images import covering_size


def resize_and_crop(image: np.ndarray, sides: tuple[int, int]) -> np.ndarray:
    """Resizes an image to cover two sides (bilinear) and cuts the centre out.

    Args:
        image: uint8 [h, w, c], c being 1 or 3.
        sides: Height and width of the result, in pixels.

    Returns:
        uint8 [*sides, c].
    """
    from PIL import Image

    channels = image.shape[-1]
    picture = Image.fromarray(image[..., 0] if channels == 1 else image)
    return np.asarray(cropped(picture, sides)).reshape(*sides, channels)


def cropped(picture: Any, sides: tuple[int, int]) -> Any:
    """Resizes an `Image` of Pillow's to cover two sides and cuts the centre out."""
    from PIL import Image

    height, width = covering_size((picture.height, picture.width), sides)
    picture = picture.resize((width, height), Image.Resampling.BILINEAR)
    top, left = (height - sides[0]) // 2, (width - sides[1]) // 2
    return picture.crop((left, top, left + sides[1], top + sides[0]))
