"""What damages a file or a document, or makes one that nobody's program writes."""

import copy
import json
import struct

import numpy as np
from hypothesis import strategies as st

# Integers at which counts, sizes and offsets go wrong.
BOUNDARIES = (0, 1, -1, 127, 255, 256, 65_535, 2**31 - 1, 2**31, 2**32 - 1, 2**62)
BOUNDARIES = (*BOUNDARIES, 2**63 - 1, 2**63, -(2**63), 10**12, 10**400)
NUMBERS = (
    0.0,
    0.5,
    1.0,
    -0.5,
    1e-308,
    1e308,
    float("nan"),
    float("inf"),
    -float("inf"),
)
TEXTS = ("", "*", "a/b", "../x", "\0", "\ud800", "x" * 2000, "[" * 50, "*" * 40, "1")

numbers = st.sampled_from(NUMBERS) | st.floats()
integers = st.sampled_from(BOUNDARIES) | st.integers(-3, 40)
scalars = st.one_of(
    *(st.none(), st.booleans(), integers, numbers),
    *(st.sampled_from(TEXTS), st.text(max_size=5)),
)
values = st.one_of(
    scalars,
    st.lists(scalars, max_size=3),
    st.dictionaries(st.sampled_from(TEXTS) | st.text(max_size=3), scalars, max_size=2),
    st.just([[[[]]]]),
)


@st.composite
def edited_bytes(draw, whole: bytes):
    """A file of which some bytes are others, gone, new, or numbers at a boundary."""
    content = bytearray(whole)
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, len(content)))
        kind = draw(st.integers(0, 5))
        if kind <= 1:
            new = draw(st.sampled_from((0, 1, 0x7F, 0x80, 0xFF)) | st.integers(0, 255))
            content[place : place + 1] = bytes([new])
        elif kind == 2:
            number = draw(st.sampled_from(BOUNDARIES)) % 2**64
            form = draw(st.sampled_from(("<B", "<H", ">H", "<I", ">I", "<Q")))
            size = struct.calcsize(form)
            content[place : place + size] = struct.pack(form, number % 2 ** (8 * size))
        elif kind == 3:
            content[place:place] = draw(st.binary(min_size=1, max_size=6))
        elif kind == 4:
            del content[place : place + draw(st.integers(1, 40))]
        else:
            part = content[place : place + draw(st.integers(1, 40))]
            content[place:place] = part * draw(st.integers(1, 3))
    cut = draw(st.booleans()) and draw(st.booleans())
    return bytes(content[: draw(st.integers(0, len(content)))] if cut else content)


def _places(document, place=()):
    yield place
    if isinstance(document, dict):
        for key in document:
            yield from _places(document[key], (*place, key))
    elif isinstance(document, list):
        for index, value in enumerate(document):
            yield from _places(value, (*place, index))


def _near(value):
    """Returns values of the same type."""
    if isinstance(value, bool):
        return st.booleans()
    if isinstance(value, int):
        return st.integers(0, 9)
    if isinstance(value, float):
        return st.floats(0, 1)
    return st.text(max_size=3) if isinstance(value, str) else st.just(value)


@st.composite
def edited(draw, document):
    """A document of JSON some of whose values are others, gone, or doubled."""
    whole = [copy.deepcopy(document)]
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.sampled_from([p for p in _places(whole) if p]))
        parent = whole
        for step in place[:-1]:
            parent = parent[step]
        kind = draw(st.integers(0, 5))
        value = parent[place[-1]]
        if kind <= 1 or len(place) == 1:
            parent[place[-1]] = copy.deepcopy(draw(_near(value) if kind else values))
        elif kind == 2:
            parent[place[-1]] = copy.deepcopy(draw(values))
        elif kind == 3:
            del parent[place[-1]]
        elif isinstance(parent, list):
            parent.append(copy.deepcopy(value))
        else:
            parent[draw(st.sampled_from(TEXTS))] = copy.deepcopy(value)
    return whole[0]


@st.composite
def edited_json(draw, document):
    """The bytes of such a document, or of one whose text is damaged."""
    kind = draw(st.integers(0, 9))
    if kind == 0:
        return b"[" * draw(st.sampled_from((10, 100_000))) + draw(st.binary(max_size=3))
    if kind <= 2:
        return draw(edited_bytes(json.dumps(document).encode()))
    return json.dumps(draw(edited(document))).encode()


shapes = st.lists(st.integers(0, 4), max_size=5).map(tuple)


@st.composite
def arrays(draw):
    """Small arrays of any type, among them NaN and infinities."""
    kind = draw(st.sampled_from(("f4", "f4", "f2", "f8", "i8", "u1", "?", "c8", "S3")))
    array = np.ones(draw(shapes)).astype(kind)
    if array.size and kind == "f8":
        array.flat[0] = draw(st.sampled_from(NUMBERS))
    return array
