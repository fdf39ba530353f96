"""Image folders as people have them: what counts, what is left out, what is said."""

import os
import pathlib
import re
import shutil
import struct
import subprocess
import zlib

import numpy as np
import pytest
from PIL import Image

from train.config import Data
from train.data import load_configured, load_data
from train.data.image_files import read_image
from train.errors import UsageError
from train.machine.processes import warn

RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def unsaid():
    """Each test is told anew what is left out."""
    warn.cache_clear()


@pytest.fixture
def root(tmp_path):
    """Two classes of three images each, in training and test."""
    for split in ("train", "test"):
        for name in ("c0", "c1"):
            place = tmp_path / "images" / split / name
            place.mkdir(parents=True)
            for index in range(3):
                save(place / f"{index}.png")
    return tmp_path / "images"


def save(file, **options):
    pixels = RNG.integers(256, size=(6, 7, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, **options)
    return pixels


def load(root):
    return load_data(
        f"imagefolder:{root}", cache_dir=str(root.parent / "cache"), image_size=None
    )


def said(capsys):
    """Returns the lines on standard error that are warnings."""
    lines = capsys.readouterr().err.splitlines()
    return [line for line in lines if line.startswith("warning")]


def counts(root):
    return np.bincount(load(root).train.labels).tolist()


def test_nothing_is_said_where_nothing_is_left_out(root, capsys):
    assert counts(root) == [3, 3]
    assert said(capsys) == []


def test_hidden_files_and_folders_are_no_images(root, capsys):
    for place in ("train/c0/.ipynb_checkpoints", "train/c0/below/.cache/deep"):
        shutil.copytree(root / "train/c1", root / place)
    shutil.copytree(root / "train/c1", root / "test/.Trash")
    shutil.copy(root / "train/c1/0.png", root / "train/c1/._0.png")
    assert counts(root) == [3, 3]
    assert len(load(root).test) == 6  # said once
    assert said(capsys) == [
        f"warning: files of {root} that are left out: 10 hidden "
        "(test/.Trash, train/c0/.ipynb_checkpoints, train/c0/below/.cache, "
        "train/c1/._0.png)"
    ]


def test_every_file_that_is_left_out_is_counted_and_named(root, capsys):
    for name in ("train/c0/labels.txt", "train/c1/Thumbs.db", "test/c1/no_suffix"):
        (root / name).write_bytes(b"no image")
    for index in range(7):
        (root / "train" / f"{index}.heic").write_bytes(b"no image")
    save(root / "train" / "of_no_class.png")
    os.mkfifo(root / "test" / "c0" / "pipe.png")
    assert counts(root) == [3, 3]
    (line,) = said(capsys)
    for words in (
        "1 no regular files (test/c0/pipe.png)",
        "1 outside the folders of classes (train/of_no_class.png)",
        "10 without the suffix of an image (test/c1/no_suffix, train/0.heic, "
        "train/1.heic, train/2.heic, train/3.heic, ...)",
    ):
        assert words in line, line


def test_symbolic_links_are_followed_and_loops_survive(root, tmp_path, capsys):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    save(elsewhere / "a.png")
    save(elsewhere / "b.PNG")
    (root / "train/c0/linked").symlink_to(elsewhere)
    (root / "train/c2").symlink_to(elsewhere)
    (root / "train/c1/3.png").symlink_to(elsewhere / "a.png")
    assert counts(root) == [5, 4, 2]
    assert said(capsys) == []
    (root / "train/c0/up").symlink_to(root / "train")
    (elsewhere / "itself").symlink_to(elsewhere)
    (root / "train/c1/gone.png").symlink_to(tmp_path / "gone.png")
    (root / "train/c1/loop.png").symlink_to(root / "train/c1/loop.png")
    assert counts(root) == [5, 4, 2]
    (line,) = said(capsys)
    assert (
        "3 links to a folder around them (train/c0/linked/itself, train/c0/up, "
        "train/c2/itself)" in line
    )
    assert "2 links to nothing (train/c1/gone.png, train/c1/loop.png)" in line


# What torchvision's `ImageFolder` takes for an image.
THEIRS = ("jpg", "jpeg", "png", "ppm", "bmp", "pgm", "tif", "tiff", "webp")


def test_classes_count_as_torchvisions(root):
    shutil.copytree(root / "train/c0", root / "train/c1/deep/deeper")
    (root / "train/c1/linked").symlink_to(root / "test/c0")
    (root / "train/c0/notes.txt").write_text("no image")
    (root / "train/c0/folder.png").mkdir()
    for suffix in THEIRS:
        save(root / "train" / "c0" / f"other.{suffix.upper()}")
    theirs = [
        sum(
            file.lower().endswith(THEIRS)
            for _, _, files in os.walk(root / "train" / name, followlinks=True)
            for file in files
        )
        for name in ("c0", "c1")
    ]
    assert counts(root) == theirs == [12, 9]


# Lossless ones, by suffix, of which torchvision knows none; then those that are not.
EXACT = ("dib", "apng", "pcx", "tga", "sgi", "qoi", "jp2", "dds", "pnm")
LOSSY = ("jfif", "jpe", "mpo", "gif", "avif")


@pytest.mark.parametrize("suffix", [*EXACT, *LOSSY])
def test_all_that_pillow_reads_is_read(suffix, tmp_path):
    file = tmp_path / f"image.{suffix}"
    rows = np.arange(32, dtype=np.uint8)[:, None, None]
    pixels = np.broadcast_to(4 * rows + 60, (32, 32, 3))
    try:
        Image.fromarray(pixels).save(file)
    except (KeyError, OSError, ValueError) as error:
        pytest.skip(f"this Pillow does not write it: {error}")
    found = read_image(file)
    assert found.dtype == np.uint8
    atol = 0 if suffix in EXACT else 12
    np.testing.assert_allclose(found.astype(int), pixels.astype(int), atol=atol)


def test_postscript_is_never_interpreted(root, monkeypatch, tmp_path):
    def fail(*arguments, **options):
        raise AssertionError("PostScript was interpreted")

    monkeypatch.setattr(subprocess, "check_call", fail)
    eps = tmp_path / "image.eps"
    save(eps)
    # It is no image by its own suffix, under another, or inside a file of IPTC.
    shutil.copy(eps, root / "train/c0/image.eps")
    assert counts(root) == [3, 3]
    shutil.copy(eps, root / "train/c0/image.png")
    with pytest.raises(UsageError, match=r"cannot read .*c0/image\.png: no image that"):
        load(root)
    inside = tmp_path / "inside.png"
    data = eps.read_bytes()[:30000]
    fields = b"\x1c\x03\x3c\x00\x02\x01\x00\x1c\x03\x14\x00\x02\x00\x08"
    fields += b"\x1c\x03\x1e\x00\x02\x00\x08\x1c\x03\x78\x00\x01\x05"
    inside.write_bytes(fields + b"\x1c\x08\x0a" + len(data).to_bytes(2, "big") + data)
    with pytest.raises(ValueError, match=r"cannot read .*inside\.png: no image that"):
        read_image(inside)


def png(height, width):
    """Returns a PNG of this size whose pixels are missing."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    sum_of_it = struct.pack(">I", zlib.crc32(header))
    return b"\x89PNG\r\n\x1a\n\0\0\0\r" + header + sum_of_it + b"\0\0\0\0IDAT"


@pytest.mark.parametrize(
    ("height", "width", "sides", "words"),
    [
        (1, 1_000_000, (32, 32), "has 32 x 32,000,000 pixels when it is resized;"),
        (1_000_000, 1, (32, 32), "has 32,000,000 x 32 pixels when it is resized;"),
        (64, 64, (10_000, 10_000), "has 10,000 x 10,000 pixels when it is resized;"),
        (13_300, 13_300, (32, 32), "has too many pixels;"),  # of which Pillow warns
        (20_000, 20_000, None, "has too many pixels;"),  # which Pillow refuses
    ],
)
def test_large_images_are_refused_before_their_pixels_are_read(
    height, width, sides, words, tmp_path
):
    file = tmp_path / "image.png"
    file.write_bytes(png(height, width))
    with pytest.raises(ValueError, match=rf"image\.png {words} must have at most 89,4"):
        read_image(file, sides)


def test_images_inside_an_icon_are_bounded_too(tmp_path):
    file, inside = tmp_path / "image.ico", png(13_300, 13_300)
    entry = struct.pack("<BBBBHHII", 16, 16, 0, 0, 1, 32, len(inside), 22)
    file.write_bytes(b"\0\0\1\0\1\0" + entry + inside)
    with pytest.raises(ValueError, match=r"image\.ico has too many pixels;"):
        read_image(file, (32, 32))


def test_an_image_within_the_bound_is_read_and_resized(tmp_path):
    file = tmp_path / "image.png"
    Image.new("L", (100_000, 4), 7).save(file)
    assert (read_image(file, (32, 32)) == 7).all()  # 32 x 800,000 before it is cut


def test_a_set_that_memory_cannot_hold_is_refused_by_its_size(root, monkeypatch):
    made = np.empty

    def empty(shape, *args, **options):
        if np.size(shape) == 4:
            raise MemoryError
        return made(shape, *args, **options)

    monkeypatch.setattr(np, "empty", empty)
    with pytest.raises(UsageError, match=r"0\.png has shape \(6, 7, 3\); 6 of these"):
        load(root)


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "bmp", "webp", "tga", "psd"])
def test_every_error_about_an_image_names_its_file(suffix, tmp_path):
    whole = tmp_path / f"whole.{suffix}"
    try:
        save(whole)
    except (KeyError, ValueError):
        whole.write_bytes(b"8BPS" + bytes(40))
    content = whole.read_bytes()
    rng, file = np.random.default_rng(0), tmp_path / f"damaged.{suffix}"
    broken = 0
    for _ in range(60):
        damaged = bytearray(content)
        for place in rng.integers(len(damaged), size=4):
            damaged[place] ^= 1 << rng.integers(8)
        if rng.integers(2):
            damaged = damaged[: rng.integers(len(damaged))]
        file.write_bytes(damaged)
        try:
            read_image(file)
        except ValueError as error:
            broken += 1
            assert str(file) in str(error), error
            assert "\n" not in str(error) and len(str(error)) < 400
    assert broken > 5


def test_names_of_files_need_not_be_utf8(root):
    shutil.copy(root / "train/c0/0.png", os.fsencode(root / "train/c0") + b"/\xe9.png")
    assert counts(root) == [4, 3]


def test_an_image_folder_may_be_here(root, monkeypatch):
    monkeypatch.chdir(root)
    data = load_data("imagefolder:.", cache_dir=str(root.parent), image_size=None)
    assert data.name == "images"


def test_a_damaged_cache_says_what_to_remove(root):
    load(root)
    (kept,) = (root.parent / "cache").iterdir()
    content = (kept / "x_train.npy").read_bytes()
    for damage in (content[:-9], content[:9], b""):
        (kept / "x_train.npy").write_bytes(damage)
        with pytest.raises(UsageError, match=f"{kept} is damaged; remove it"):
            load(root)
    shutil.rmtree(kept)
    assert counts(root) == [3, 3]


def test_errors_about_classes_are_short(root):
    for index in range(1000):
        (root / "test" / f"of_another_set_{index:04d}").mkdir()
    with pytest.raises(UsageError, match="holds classes .* that train/ does not") as e:
        load(root)
    assert len(str(e.value)) < 300 + len(str(root))
    assert pathlib.Path(root).name in str(e.value)


@pytest.mark.parametrize("given", ["..", "train", "train/c0", "nothing"])
def test_a_folder_of_another_level_is_answered_with_the_right_one(root, given):
    place = root.parent if given == ".." else root / given
    with pytest.raises(UsageError, match="needs PATH/train/CLASS") as error:
        load(place)
    assert str(error.value).endswith(f"Did you mean imagefolder:{root}?")


def test_the_folder_that_is_missing_is_the_one_that_is_asked_for(root):
    shutil.rmtree(root / "test")
    with pytest.raises(UsageError, match=f"no folder {re.escape(str(root / 'test'))};"):
        load(root)


def test_two_folders_that_fit_are_not_guessed_between(root):
    shutil.copytree(root, root.with_name("more"))
    with pytest.raises(UsageError, match=r"\(or PATH/val\)\.$"):
        load(root.parent)


def test_classes_that_lie_a_level_too_deep_are_named(root):
    for split in ("train", "test"):
        (root / split).rename(root / "all")
        (root / split).mkdir()
        (root / "all").rename(root / split / "all")
    message = r"one class, 'all', .* are the classes \['c0', 'c1'\].* one level higher"
    data = Data(source=f"imagefolder:{root}", cache_dir=str(root.parent / "cache"))
    with pytest.raises(UsageError, match=message):
        load_configured(data)
    # A network of more classes may be evaluated on images of one.
    assert load(root).class_names == ("all",)
