"""The image files of a folder: which files there are images, and their pixels."""

import collections
import functools
import pathlib

import numpy as np

from train.data.resize import resize_and_crop

# Formats in Pillow's registry that have no pixels of their own: it only writes them, or
# it has other programs draw them (EPS by Ghostscript), or it opens what lies inside
# (IPTC) as any format, EPS among them.
_WITHOUT_PIXELS = {
    *("BUFR", "EPS", "GRIB", "HDF5", "IPTC", "MPEG", "PALM", "PDF", "WMF"),
}

# Numbers of files by the reason why they are left out, and by path.
LeftOut = collections.Counter[tuple[str, pathlib.Path]]


@functools.cache
def _formats() -> tuple[str, ...]:
    """Returns the raster formats that Pillow reads, the common ones first."""
    from PIL import Image

    Image.init()
    return tuple(name for name in Image.ID if name not in _WITHOUT_PIXELS)


@functools.cache
def _suffixes() -> frozenset[str]:
    """Returns the suffixes of these formats, in lower case."""
    from PIL import Image

    registered = Image.registered_extensions()
    return frozenset(s for s, name in registered.items() if name not in _WITHOUT_PIXELS)


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
        ValueError: The file is damaged, no image, or has more than 8 bits a pixel and
            channel.
    """
    from PIL import Image

    try:
        with Image.open(file, formats=_formats()) as opened:
            mode = opened.mode
            # Pillow would cut these to 8 bits instead of scaling them.
            is_deep = mode == "F" or mode.startswith("I")
            image = None if is_deep else np.asarray(opened.convert("RGB"))
    except Image.UnidentifiedImageError as error:
        raise ValueError(f"cannot read {file}: no image that Pillow knows.") from error
    # Pillow's readers raise whatever damaged bytes lead them to: struct.error,
    # IndexError, SyntaxError, zlib.error and more.
    except Exception as error:
        raise ValueError(
            f"cannot read {file}: {type(error).__name__}: {error}."
        ) from error
    if image is None:
        raise ValueError(f"{file} has pixels of mode {mode!r}; must have 8 bits each.")
    return image if sides is None else resize_and_crop(image, sides)
