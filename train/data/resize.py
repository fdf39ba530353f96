"""Images of any size brought to one, when a set is decoded."""

import numpy as np


def resize_square(image: np.ndarray, size: int) -> np.ndarray:
    """Resizes the short side to `size` (bilinear) and cuts the centre out.

    Args:
        image: uint8 [h, w, c], c being 1 or 3.
        size: Side of the result, in pixels.

    Returns:
        uint8 [size, size, c].
    """
    from PIL import Image

    channels = image.shape[-1]
    picture = Image.fromarray(image[..., 0] if channels == 1 else image)
    short = min(picture.size)
    width, height = (side * size // short for side in picture.size)
    picture = picture.resize((width, height), Image.Resampling.BILINEAR)
    left, top = (width - size) // 2, (height - size) // 2
    picture = picture.crop((left, top, left + size, top + size))
    return np.asarray(picture).reshape(size, size, channels)
