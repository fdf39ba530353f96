"""Pickles run nothing of what they name, and take no more than their size."""

import io
import pickle
import tracemalloc

import pytest

from inertia_jax.weights.pickles import Global, Unknown, as_key, read_pickle
from inertia_jax.weights.rebuild import TABLE


def read(data, known=TABLE):
    return read_pickle(
        io.BytesIO(data), len(data), known=known, persistent=lambda saved: saved
    )


def push(value):
    """Returns the opcodes that push a value of Python's own types."""
    return pickle.dumps(value, 2)[2:-1]


VALUES = [
    *(None, True, False, 0, 255, 65535, -5, 1 << 31, 1 << 70, -(1 << 70), 1.5),
    *("", "é" * 300, [], {}, (), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), [1, [2]]),
    {"a": {"b": [1, 2]}, 0: None, 1.5: "x", None: 1},
]


@pytest.mark.parametrize("protocol", range(6))
def test_what_pickle_writes_is_read(protocol):
    shared = [1]
    value = [*VALUES, shared, shared]
    assert read(pickle.dumps(value, protocol)) == value


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_bytes_are_read(protocol):
    value = [b"", b"x" * 300]
    assert read(pickle.dumps(value, protocol)) == value
    assert read(pickle.dumps([{1, 2}, frozenset([3])], 4)) == [[1, 2], [3]]
    assert read(pickle.dumps(bytearray(b"xy"), 5)) == b"xy"


# Each makes a file when Python's own reader runs it; `%s` is the code that does.
HOSTILE = {
    "REDUCE": b"cos\nsystem\n(S'touch %s'\ntR.",
    "STACK_GLOBAL": b"\x80\x04\x8c\x02os\x8c\x06system\x93(S'touch %s'\ntR.",
    "INST": b"(S'touch %s'\nios\nsystem\n.",
    "OBJ": b"(csubprocess\nPopen\nS'touch %s'\nI-1\nNNNNNI00\nI01\no.",
    "NEWOBJ": b"\x80\x02csubprocess\nPopen\n(S'touch %s'\nt\x81.",
    "eval": b'cbuiltins\neval\n(S\'open("%s", "w")\'\ntR.',
    "exec": b'c__builtin__\nexec\n(S\'open("%s", "w")\'\ntR.',
    "getattr": b"cbuiltins\ngetattr\n(cos\nS'system'\ntR(S'touch %s'\ntR.",
    "map": b"cbuiltins\nlist\n(cbuiltins\nmap\n(cos\nsystem\n(S'touch %s'\nltRtR.",
    "persistent": b"(S'module'\ncos\nsystem\nS'touch %s'\ntQ.",
    "dotted": b"\x80\x04\x8c\x05torch\x8c\x0e_utils.os.call\x93(S'touch %s'\ntR.",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_nothing_that_a_file_names_is_run(name, tmp_path, monkeypatch):
    import os
    import subprocess

    def fail(*_, **__):
        raise AssertionError("it was run")

    for module in (os, subprocess):
        for call in ("system", "popen", "Popen", "run"):
            if hasattr(module, call):
                monkeypatch.setattr(module, call, fail)
    made = tmp_path / "made"
    read(HOSTILE[name] % str(made).encode())
    assert not made.exists()


def test_state_changes_no_class_and_no_function():
    for target in (b"ctorch._utils\n_rebuild_tensor_v2\n", b"cos\nPathLike\n"):
        assert isinstance(read(target + b"}S'__call__'\nI1\nsb."), Global)
    before = dict(vars(Unknown))
    object_ = b"cos\nPathLike\n)R"
    attributes = b"(}S'__class__'\nI1\ns}S'__setstate__'\nI2\nstb."
    built = read(object_ + attributes)
    assert built == built
    assert dict(built) == {"__class__": 1, "__setstate__": 2}
    assert dict(vars(Unknown)) == before


def test_unknown_objects_keep_items_and_attributes():
    import argparse
    import collections

    value = {
        "args": argparse.Namespace(lr=0.1),
        "counts": collections.defaultdict(list, {"a": [1]}),
    }
    loaded = read(pickle.dumps(value, 2))
    assert dict(loaded["args"]) == {"lr": 0.1}
    assert dict(loaded["counts"]) == {"a": [1]}
    assert "Namespace" in repr(read(pickle.dumps(value, 4))["args"])


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x80",
        b"\x80\x02",
        b"(",
        b".",
        b"t.",
        b"R.",
        b"0.",
        b"}a.",
        b"]I1\nI2\ns.",
        b"(I1\nd.",
        b"g5\n.",
        b"h\x05.",
        b"(I1\n(RI2\n.",
        b"I1\n\x86.",
        b"I1\n(\x85.",
        b"\x82\x01.",
        b"\x97.",
        b"\xff.",
        b"I" + b"9" * 5000 + b"\n.",
        b"S'x.",
        b"X\xff\xff\xff\x7fx.",
        b"\x8e\xff\xff\xff\xff\xff\xff\xff\x7fx.",
        b"\x96\xff\xff\xff\xff\xff\xff\xff\x7fx.",
        b"\x96\x00\x00\x00\x00\xff\x00\x00\x00x.",
        b"\x8b\xff\xff\xff\x7fx.",
        b"ccollections\nOrderedDict\n(I1\ntR.",
        b"ctorch._utils\n_rebuild_tensor_v2\n)R.",
    ],
)
def test_damage_is_an_error_and_allocates_nothing(data):
    tracemalloc.start()
    try:
        with pytest.raises((ValueError, LookupError, TypeError)):
            read(data)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_indices_of_the_memo_take_no_memory():
    tracemalloc.start()
    try:
        assert read(b"I1\nr\xff\xff\xff\x7f.") == 1
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("argument", "call"),
    [
        ("x" * 20_000, b"c_codecs\nencode\n(%sS'latin1'\ntR"),
        ({str(i): i for i in range(1000)}, b"cbuiltins\nNamespace\n)R%sb"),
        ([[str(i), i] for i in range(1000)], b"ccollections\nOrderedDict\n(%stR"),
        (tuple((str(i), i) for i in range(1000)), b"ccollections\nOrderedDict\n(%stR"),
        ("x" * 20_000, b"U\x01x%s\x93"),
        ("x" * 20_000, b"cnumpy.core.multiarray\n_reconstruct\n)R(NNNN%stb"),
    ],
)
def test_one_long_argument_is_not_copied_hundreds_of_times(argument, call):
    put, get = b"r\xff\xff\xff\x00", b"j\xff\xff\xff\x00"
    once = b"(" + push(argument) + put
    read(once + call % get + b"l.")
    with pytest.raises(ValueError, match="unfolds into more"):
        read(once + 400 * (call % get) + b"l.")


def test_keys_that_are_costly_to_hash_are_replaced():
    # Hashing the last of these would take 2 ** 60 steps.
    doubled = b"(t" + 60 * b"2\x86"
    (key,) = read(b"}" + doubled + b"I1\ns.")
    assert isinstance(key, Unknown)
    (key,) = read(b"ccollections\nOrderedDict\n(((" + doubled + b"I1\nlltR.")
    assert isinstance(key, Unknown)
    assert as_key("text") == "text"


def test_a_long_name_is_not_copied_for_every_object():
    named = b"(cx\n" + b"x" * 20_000 + b"\n" + b"r\xff\xff\xff\x00"
    tracemalloc.start()
    try:
        assert len(read(named + 400 * b"j\xff\xff\xff\x00)R" + b"l.")) == 401
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_names_that_are_no_text_are_an_error():
    with pytest.raises(ValueError, match="no text"):
        read(b"U\x01x(t" + 17 * b"2\x86" + b"\x93.")


def test_long_numbers_which_may_share_a_hash_are_no_keys():
    for key in ((1 << 60) - 1, 1 - (1 << 60)):
        assert as_key(key) == key
        assert hash(key) == key
    for key in (1 << 60, (1 << 61) - 1, -(1 << 60)):
        assert isinstance(as_key(key), Unknown)
        with pytest.raises(LookupError):
            read(b"I1\np%d\n0g%d\n." % (key, key))


def test_cycles_and_depth_end():
    looped = read(b"]q\x00h\x00a.")
    assert looped[0] is looped
    read(20_000 * b"]" + 19_999 * b"a" + b".")
