"""The image files of a folder: which files there are images, and their pixels."""

import collections
import functools
import pathlib
import warnings
from typing import Any

import numpy as np

from inertia_jax.images import covering_size
from train.data.resize import cropped

# The raster formats that are read, by Pillow's names; the common ones come first, since
# they are tried in this order. Not among them are those that Pillow has other programs
# draw (EPS by Ghostscript, WMF), opens as whatever lies inside (IPTC), or only writes.
# MPO stands for its suffix; Pillow opens such files as JPEG.
_FORMATS = (
    *("PNG", "JPEG", "MPO", "WEBP", "TIFF", "GIF", "BMP", "PPM", "JPEG2000", "AVIF"),
    *("BLP", "CUR", "DCX", "DDS", "DIB", "FITS", "FLI", "FTEX", "GBR", "ICNS", "ICO"),
    *("IM", "IMT", "MCIDAS", "MSP", "PCD", "PCX", "PIXAR", "PSD", "QOI", "SGI"),
    *("SPIDER", "SUN", "TGA", "XBM", "XPM", "XVTHUMB"),
)

# The bound above which Pillow warns. At four bytes a pixel, an image takes up to a
# gigabyte while it is resized.
_MOST_PIXELS = 89_478_485

# Numbers of files by the reason why they are left out, and by path.
LeftOut = collections.Counter[tuple[str, pathlib.Path]]


@functools.cache
def _formats() -> tuple[str, ...]:
    """Returns the formats of `_FORMATS` that this Pillow reads."""
    from PIL import Image

    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


@functools.cache
def _suffixes() -> frozenset[str]:
    """Returns the suffixes of `_FORMATS`, in lower case."""
    from PIL import Image

    registered = Image.registered_extensions()
    return frozenset(s for s, name in registered.items() if name in _FORMATS)


def list_images(folder: pathlib.Path) -> tuple[list[pathlib.Path], LeftOut]:
    """Returns the images below a folder, sorted, and the files that are left out.

    An image is known by its suffix, as torchvision knows it. Symbolic links are
    followed, but not into a folder that they lie in. The files that are left out are
    counted by reason and path; the path of hidden files may be that of their folder.

    Raises:
        OSError: A folder cannot be read.
    """
    images: list[pathlib.Path] = []
    left_out: LeftOut = collections.Counter()

    def walk(
        folder: pathlib.Path,
        around: frozenset[tuple[int, int]],
        hidden: pathlib.Path | None,
    ) -> None:
        status = folder.stat()
        around |= {(status.st_dev, status.st_ino)}
        for path in folder.iterdir():
            outermost = hidden or (path if path.name.startswith(".") else None)
            if path.is_dir():
                status = path.stat()
                if (status.st_dev, status.st_ino) in around:
                    left_out["links to a folder around them", path] += 1
                else:
                    walk(path, around, outermost)
            elif outermost is not None:
                left_out["hidden", outermost] += 1
            elif path.suffix.lower() not in _suffixes():
                left_out["without the suffix of an image", path] += 1
            elif path.is_file():
                images.append(path)
            else:
                is_broken = path.is_symlink() and not path.exists()
                reason = "links to nothing" if is_broken else "no regular files"
                left_out[reason, path] += 1

    walk(folder, frozenset(), None)
    return sorted(images), left_out


def describe_left_out(root: pathlib.Path, left_out: LeftOut) -> str:
    """Returns a line that counts files below `root` and names them, five a reason."""
    parts = []
    for reason in sorted({reason for reason, _ in left_out}):
        paths = sorted(path for other, path in left_out if other == reason)
        names = [str(path.relative_to(root)) for path in paths[:5]]
        named = ", ".join([*names, "..."] if len(paths) > 5 else names)
        count = sum(left_out[reason, path] for path in paths)
        parts.append(f"{count:,} {reason} ({named})")
    return f"files of {root} that are left out: {', '.join(parts)}"


def read_image(file: pathlib.Path, sides: tuple[int, int] | None = None) -> np.ndarray:
    """Returns an image as RGB, uint8 [h, w, 3], brought to `sides` if they are given.

    Raises:
        ValueError: The file is damaged, no image, has more than 8 bits a pixel and
            channel, or has more than 89,478,485 pixels, as it is or resized.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            # What Pillow warns of is refused, also where it lies inside an icon.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file, formats=_formats()) as opened:
                wrong = _cannot_use(opened, sides)
                if wrong is None:
                    rgb = opened if opened.mode == "RGB" else opened.convert("RGB")
                    return np.asarray(rgb if sides is None else cropped(rgb, sides))
    except UnidentifiedImageError as error:
        raise ValueError(f"cannot read {file}: no image that Pillow knows.") from error
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        wrong = f"has too many pixels; must have at most {_MOST_PIXELS:,}"
    # Pillow's readers raise whatever damaged bytes lead them to: struct.error,
    # IndexError, SyntaxError, zlib.error and more.
    except Exception as error:
        raise ValueError(
            f"cannot read {file}: {type(error).__name__}: {error!s:.300}."
        ) from error
    raise ValueError(f"{file} {wrong}.")


def _cannot_use(picture: Any, sides: tuple[int, int] | None) -> str | None:
    """Returns why the pixels of an image, which are not read yet, are of no use."""
    # Pillow would cut these to 8 bits instead of scaling them.
    if picture.mode == "F" or picture.mode.startswith("I"):
        return f"has pixels of mode {picture.mode!r}; must have 8 bits each"
    size = (picture.height, picture.width)
    for what, (height, width) in (
        ("", size),
        (" when it is resized", size if sides is None else covering_size(size, sides)),
    ):
        if height * width > _MOST_PIXELS:
            return (
                f"has {height:,} x {width:,} pixels{what}; must have at most "
                f"{_MOST_PIXELS:,} in all"
            )
    return None
