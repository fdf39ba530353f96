"""What reads input from outside: how it is made here, and what may be raised."""

import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import pathlib
import pickle
import struct
import tempfile
import typing
import zipfile
from collections.abc import Callable
from typing import Any

import flax
import hostile
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from hypothesis import strategies as st
from PIL import Image
from saved_weights import (
    NUMBERS,
    call,
    dictionary,
    legacy,
    name,
    old_storage,
    push,
    storage,
    tensor,
)

import inertia_jax as ij
from inertia_jax.checkpoint import verify_checkpoint
from inertia_jax.metadata import load_description
from inertia_jax.weights.files import read_weights_file
from inertia_jax.weights.found import find_weights, weights_by_key
from inertia_jax.weights.numbers import as_numbers
from inertia_jax.weights.pickles import Unknown
from inertia_jax.weights.rebuild import TABLE
from train import config as configuration
from train.compress.rank_rules import parse_ranks
from train.config_file import (
    config_to_json,
    differing_fields,
    fill_defaults,
    flat_config,
    without_places,
)
from train.data.held_out import HeldOut
from train.data.image_files import read_image
from train.data.npz import load_npz
from train.errors import UsageError
from train.options.fit import parse as parse_fit
from train.step.optimizer import make_schedule

MB = 1 << 20


@dataclasses.dataclass(frozen=True)
class Target:
    """A reader of input from outside.

    Attributes:
        inputs: How inputs are made.
        read: Reads one; the second argument is a folder of its own.
        errors: What it may raise.
        share: Its part of the inputs.
        most_bytes: The memory that it may take.
        may_exhaust: Whether asking for more is a documented error, too.
    """

    inputs: st.SearchStrategy
    read: Callable[[Any, pathlib.Path], Any]
    errors: tuple[type[BaseException], ...] = (ValueError,)
    share: float = 1.0
    most_bytes: int = 64 * MB
    may_exhaust: bool = False


# Weights

KEYS = {"conv1.weight": (4, 3, 1, 1), "fc.weight": (2, 4), "fc.bias": (2,)}
ARRAYS = {key: np.ones(shape, np.float32) for key, shape in KEYS.items()}
PARAMS = {"fc": {"kernel": ARRAYS["fc.weight"].T, "bias": ARRAYS["fc.bias"]}}


def take_weights(loaded):
    """Takes weights as a network of `KEYS` does, from a mapping that a file holds."""
    for ema in (False, True):
        try:
            state = find_weights(loaded, KEYS, ema=ema, rename={}).state
        except ValueError:
            state = weights_by_key(loaded, {}).state
        for key, shape in KEYS.items():
            if key in state:
                as_numbers(key, state[key], shape)


def read_weights(content, folder):
    path = folder / "weights"
    path.write_bytes(content)
    loaded = read_weights_file(path)
    if isinstance(loaded, dict):
        take_weights(loaded)


def zipped(members, *, compress=zipfile.ZIP_STORED):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compress) as archive:
        for member, content in members:
            archive.writestr(zipfile.ZipInfo(member), content, compress)
    return buffer.getvalue()


def torch_zip(data, stored=None, order="little"):
    stored = NUMBERS.tobytes() if stored is None else stored
    members = (("a/data.pkl", data), ("a/byteorder", order), ("a/data/0", stored))
    return zipped(members)


ROWS = {"fc.weight": tensor(storage("0", 6), (2, 3), (3, 1))}
ROWS["state"] = call(name("collections", "OrderedDict"))
OLD_ROWS = {"fc.weight": tensor(old_storage("0", 6), (2, 3), (3, 1))}
ARRAY = {"x": pickle.dumps(np.ones((2, 3), np.float32), 2)[2:-1]}

# Pickles that are whole in form: what a file names is called with anything.
plain = st.one_of(
    *(st.none(), st.booleans(), st.integers(-2, 9), st.floats(width=16)),
    *(st.sampled_from((2**31, 2**63, -(2**70))), st.text(max_size=3)),
    st.sampled_from(("storage", "module", "<", "latin1", "f4", "float32", "fc.weight")),
    st.binary(max_size=12),
    st.lists(st.integers(-1, 3), max_size=3),
    st.lists(st.integers(0, 3) | st.just(2**40), max_size=3).map(tuple),
)
pushed = plain.map(push)
kinds = st.sampled_from(("Float", "Double", "Half", "BFloat16", "ComplexHalf", "Odd"))
known = st.sampled_from(sorted(TABLE) + 4 * ["torch.float32", "ml_dtypes.bfloat16"])
classes = (known | st.sampled_from(("os.system", "a.b"))).map(
    lambda dotted: name(*dotted.rpartition(".")[::2])
)
stored = st.builds(
    lambda key, count, kind: storage(key, count, f"{kind}Storage"),
    st.sampled_from(("0", "1", 0, b"0")),
    st.sampled_from((6, 6, 6, 3, 12, 2**40, -1, "6")),
    kinds,
)
sizes = st.lists(st.sampled_from((0, 1, 2, 3, 6, 2**20, 2**61, -1)), max_size=4)
tensors = st.builds(
    lambda held, size, stride, offset, function: tensor(
        held, tuple(size), tuple(stride), offset, function
    ),
    stored,
    *(sizes, sizes, st.sampled_from((0, 0, 1, 5, 6, 2**62, -1))),
    st.sampled_from(("_rebuild_tensor_v2", "_rebuild_tensor_v3", "_rebuild_parameter")),
)
objects = st.recursive(
    st.one_of(pushed, classes, stored, tensors),
    lambda inner: st.one_of(
        st.builds(lambda f, a: call(f, *a), classes, st.lists(inner, max_size=6)),
        st.builds(lambda a, s: a + s + b"b", inner, inner),
        st.lists(inner, max_size=3).map(lambda a: b"(" + b"".join(a) + b"l"),
        st.builds(lambda k, v: b"(" + k + v + b"d", inner, inner),
        st.builds(lambda f, a: f + a + b"\x81", classes, inner),
        st.builds(lambda v, i: v + b"q" + bytes([i]), inner, st.integers(0, 2)),
    ),
    max_leaves=12,
)
opcodes = st.sampled_from(
    [bytes([code]) for code in b"(.012NR]}ste)abdlopQu\x81\x85\x86\x87\x88\x93\x94"]
    + [b"q\0", b"h\0", b"h\1", b"cos\nsystem\n", b"\x8a\x01\x01", b"Va\\u00\n"]
)
programs = st.one_of(
    st.dictionaries(st.sampled_from(sorted(KEYS)), objects, max_size=3).map(
        lambda items: dictionary(**items)
    ),
    st.lists(opcodes | pushed | classes, max_size=25).map(
        lambda parts: b"\x80\x02" + b"".join(parts) + b"."
    ),
    *(hostile.edited_bytes(dictionary(**items)) for items in (ROWS, ARRAY)),
)
torch_zips = st.one_of(
    st.builds(torch_zip, programs),
    st.builds(torch_zip, programs, st.binary(max_size=30), st.just("big")),
    hostile.edited_bytes(torch_zip(dictionary(**ROWS))),
)
torch_legacy = st.one_of(
    hostile.edited_bytes(legacy(dictionary(**OLD_ROWS))),
    st.builds(legacy, programs),
    st.builds(legacy, programs, st.lists(plain, max_size=2)),
)


def safetensors_file(header, data):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


HEADER = {
    "__metadata__": {"format": "pt"},
    "fc.weight": {"dtype": "F32", "shape": [2, 4], "data_offsets": [0, 32]},
    "fc.bias": {"dtype": "BF16", "shape": [2], "data_offsets": [32, 36]},
}
safetensors = st.one_of(
    st.builds(safetensors_file, hostile.edited_json(HEADER), st.just(bytes(36))),
    hostile.edited_bytes(safetensors_file(HEADER, bytes(36))),
)

TREE = {
    "params": PARAMS,
    "batch_stats": {"bn": {"mean": np.ones(2), "var": np.float32(1)}},
    "step": 3,
    "narrow": {"kernel": np.ones(3, ml_dtypes.bfloat16), "c": 1j},
}
small = st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats() | st.text()
chunked = st.fixed_dictionaries(
    {"__msgpack_chunked_array__": st.just(True)},
    optional={
        "shape": st.dictionaries(st.sampled_from("01"), small, max_size=2),
        "chunks": st.dictionaries(st.sampled_from("01"), hostile.arrays(), max_size=2),
    },
)
trees = st.dictionaries(
    st.sampled_from(("params", "fc", "kernel", "value", "opt_state", "", "0")),
    st.recursive(
        small | hostile.arrays() | chunked,
        lambda inner: (
            st.lists(inner, max_size=2)
            | st.dictionaries(st.sampled_from(("fc", "bias", "value")), inner)
        ),
        max_leaves=5,
    ),
    min_size=1,
    max_size=3,
)
msgpack = st.one_of(
    hostile.edited_bytes(flax.serialization.to_bytes(TREE)),
    trees.map(flax.serialization.msgpack_serialize),
)

INDEX = {
    "metadata": {"total_size": 36},
    "weight_map": {"fc.bias": "shard", "fc.weight": "shard"},
}


def read_index(content, folder):
    (folder / "shard").write_bytes(safetensors_file(HEADER, bytes(36)))
    read_weights(content, folder)


words = st.sampled_from(
    [
        *(*KEYS, "module", "_orig_mod", "ema", "model", "state_dict", "params", "0"),
        *("n_averaged", "shadow_params", "decay", "weight", "fc", "", ".", "a" * 500),
    ]
)
keys = st.one_of(words, st.lists(words, max_size=3).map(".".join), st.integers(0, 2))
leaves = st.one_of(
    hostile.arrays(),
    st.sampled_from(sorted(KEYS)).map(ARRAYS.get),
    st.builds(Unknown, st.sampled_from(("a tensor of x", "argparse.Namespace"))),
    *(st.none(), st.text(max_size=3)),
)
mappings = st.dictionaries(
    keys,
    st.recursive(
        leaves,
        lambda inner: (
            st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=4)
        ),
        max_leaves=12,
    ),
    max_size=4,
)

# Sets of images

SPLITS = {
    "x_train": np.zeros((4, 3, 3, 3), np.uint8),
    "y_train": np.arange(4) % 2,
    "x_test": np.zeros((2, 3, 3, 3), np.uint8),
    "y_test": np.arange(2),
}


def npy(array, **fields):
    buffer = io.BytesIO()
    header = np.lib.format.header_data_from_array_1_0(array) | fields
    text = (repr(header) + "\n").encode("utf-8", "replace")
    buffer.write(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text) % 65_536) + text)
    return buffer.getvalue() + array.tobytes()


@st.composite
def npz(draw):
    members = []
    for key, whole in SPLITS.items():
        kind = draw(st.integers(0, 24))
        array = draw(hostile.arrays()) if kind == 0 else whole
        fields = {}
        if kind == 1:
            sides = draw(st.lists(hostile.integers, max_size=5))
            fields["shape"] = draw(st.sampled_from((tuple(sides), sides)))
        if kind == 2:
            kinds = ("|u1", "<i8", "|O", "<U9", "V9", [("a", "u1")], "f2", "M8", "q,q")
            fields["descr"] = draw(st.sampled_from(kinds) | hostile.scalars)
        content = npy(array, **fields)
        if kind == 3:
            content = draw(hostile.edited_bytes(content))
        if kind != 4:
            members.append((f"{key}.npy", content))
    if draw(st.booleans()):
        members.append(("label_names.npy", npy(draw(hostile.arrays()))))
    compress = draw(st.sampled_from((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)))
    content = zipped(members, compress=compress)
    return draw(hostile.edited_bytes(content)) if draw(st.booleans()) else content


def read_npz(given, folder):
    content, share = given
    path = folder / "set.npz"
    path.write_bytes(content)
    load_npz(str(path), HeldOut(test_share=share))


@functools.cache
def pictures():
    rng = np.random.default_rng(0)
    found = []
    for kind in "PNG JPEG GIF BMP TIFF WEBP PPM TGA ICO SGI PCX DDS QOI PSD".split():
        picture = Image.fromarray(rng.integers(256, size=(16, 16, 3), dtype=np.uint8))
        buffer = io.BytesIO()
        try:
            picture.save(buffer, kind)
        except (KeyError, OSError):
            continue  # this Pillow reads it alone
        found.append(buffer.getvalue())
    return found


def read_picture(given, folder):
    content, sides = given
    path = folder / "x.png"
    path.write_bytes(content)
    image = read_image(path, sides)
    assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[-1] == 3
    assert sides is None or image.shape[:2] == sides


# Plans and configurations

SPEC = ij.Inertial(3, 5, reading="tiled", threshold=ij.Rate(0.5))
PLANS = [
    ij.Plan(
        (
            ("layer1_*", ij.Tucker2(2, 3, core=SPEC)),
            ("a/b", ij.LowRank(4)),
            ("[x]*", ij.Inertial(1, 3, combine="weighted", zero_middle=True)),
            ("*", ij.Conv(3)),
        )
    ),
    ij.Plan((("*" * 3, ij.Inertial(2, 4, threshold=ij.Learned(0.1, True))),)),
]
PLAN_JSON = [json.loads(plan.to_json()) for plan in PLANS]


def read_plan(content, _):
    plan = ij.Plan.from_json(content.decode("utf-8", "surrogatepass"))
    assert ij.Plan.from_json(plan.to_json()) == plan
    hash(plan), str(plan), plan.inertial
    plan.without_ladders().with_fixed_thresholds()
    for path in ("layer1_0/conv1", "a/b", "[x]y"):
        plan.gates(path)
    plan.below(("layer1_0", "a")).above(("net",)).spec("net/conv1")


@st.composite
def settings_of(draw, cls):
    """A configuration some of whose fields have any value of their type."""
    hints = typing.get_type_hints(cls)
    chosen = draw(st.lists(st.sampled_from(sorted(hints)), max_size=2, unique=True))
    parts = [name for name, hint in hints.items() if dataclasses.is_dataclass(hint)]
    chosen += [part for part in parts if draw(st.booleans())]
    return cls, {field: draw(value_of(hints[field])) for field in chosen}


def value_of(hint):
    args = typing.get_args(hint)
    if typing.get_origin(hint) is typing.Literal:
        return st.sampled_from((*args, "other"))
    if typing.get_origin(hint) is tuple:
        if args[-1] is Ellipsis:
            return st.lists(value_of(args[0]), max_size=4).map(tuple)
        return st.tuples(*map(value_of, args))
    if args:
        return st.one_of(*map(value_of, args))
    if dataclasses.is_dataclass(hint):
        return settings_of(hint)
    simple = {bool: st.booleans(), int: hostile.integers, type(None): st.none()}
    return {**simple, float: hostile.numbers, str: st.sampled_from(TEXTS)}[hint]


TEXTS = (
    *(t for t in hostile.TEXTS if len(t) < 100),
    "lenet",
    "resnet20",
    "resnet2",
    "npz:a.npz",
    "digits",
    "[]",
)


def make_config(given, _):
    def made(node):
        if not isinstance(node, tuple) or not node or not isinstance(node[0], type):
            return node
        cls, fields = node
        return cls(**{key: made(value) for key, value in fields.items()})

    config = made(given)
    as_json = config_to_json(config)
    flat_config(config)
    assert fill_defaults({}, as_json) == as_json
    default = configuration.Config()
    differing_fields(as_json, config_to_json(default))
    without_places(as_json, has_names=False)
    configuration.check_used(config, default)
    rate = make_schedule(config.optimizer, steps_per_epoch=100, epochs=config.epochs)
    jax.eval_shape(rate, jax.ShapeDtypeStruct((), "int32"))


def compare_configs(given, _):
    """Nothing of a run's JSON is checked before it is compared."""
    here = config_to_json(configuration.Config())
    try:
        there = json.loads(given)
    except (ValueError, RecursionError):
        return
    if isinstance(there, dict):
        there = fill_defaults(there, here)
        assert differing_fields(there, there) == [] or "nan" in repr(there)
        differing_fields(without_places(there), here)


OPTIONS = ["--epochs", "--data.source", "--model.name", "--data.mean", "--data.flip"]
OPTIONS += ["--optimizer.betas", "--batch-size", "--no-flip", "--init", "--model.plan"]
OPTIONS += ["--data.image-size", "--optimizer.milestones", "--seed", "--config", "--"]
option_words = st.lists(
    st.one_of(
        st.sampled_from(OPTIONS),
        st.sampled_from(OPTIONS).map(lambda word: f"{word}=1"),
        st.sampled_from(("1", "-1", "nan", "1e400", "None", "True", "lenet", "[]", "")),
        st.text(max_size=4),
    ),
    max_size=6,
)


def read_options(given, _):
    with contextlib.redirect_stderr(io.StringIO()):
        with contextlib.redirect_stdout(io.StringIO()):
            parse_fit(given)


rank_words = st.one_of(
    st.builds(
        "{}{}".format,
        st.sampled_from(
            ("ratio:", "energy:", "evbmf", "budget:macs=", "budget:", "plan:", "ratios")
        ),
        hostile.numbers.map(str) | st.text(max_size=5) | st.sampled_from(TEXTS),
    ),
    st.text(max_size=12),
)

# Descriptions of checkpoints, and exported networks


@functools.cache
def checkpoint():
    folder = pathlib.Path(tempfile.mkdtemp()) / "checkpoint"
    (folder / "arrays").mkdir(parents=True)
    (folder / "arrays" / "a").write_bytes(b"a")
    model = ij.create_model("lenet", width=0.0625, plan=ij.Plan((("*", ij.Conv()),)))
    preprocessing = ij.Preprocessing((28, 28, 1), (0.1,), (0.3,), (30, 28))
    names = tuple("abcdefghij")
    info = {"step": 7, "evaluation": {"top1": 0.5}, "config": {"data": {}}}
    text = ij.metadata.describe(model, ij.Metadata(preprocessing, names, info))
    return folder, json.loads(text)


def read_description(content, _):
    folder, _ = checkpoint()
    (folder / "metadata.json").write_bytes(content)
    ij.load_metadata(folder)
    load_description(folder)


def read_manifest(content, _):
    folder, description = checkpoint()
    (folder / "metadata.json").write_text(json.dumps(description))
    (folder / "manifest.json").write_bytes(content)
    verify_checkpoint(folder)


@functools.cache
def manifest():
    folder, description = checkpoint()
    (folder / "metadata.json").write_text(json.dumps(description))
    files = ("arrays/a", "metadata.json")
    return {f: hashlib.sha256((folder / f).read_bytes()).hexdigest() for f in files}


@functools.cache
def exported():
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "x.ijx"
        ij.save_exported(path, lambda x: x.mean((1, 2)), image_shape=(8, 8, 3))
        with zipfile.ZipFile(path) as archive:
            network = archive.read("network")
            return path.read_bytes(), network, json.loads(archive.read("metadata.json"))


def with_metadata(text):
    members = [("network", exported()[1]), ("metadata.json", text)]
    return signed(zipped(members) + b"0" * 64)


def signed(content):
    """Gives a file the hash of what it holds: anybody can."""
    return content[:-64] + hashlib.sha256(content[:-64]).hexdigest().encode()


def exported_files():
    return st.one_of(
        hostile.edited_json(exported()[2]).map(with_metadata),
        hostile.edited_bytes(exported()[0]).map(signed),
    )


def read_exported(content, folder):
    path = folder / "x.ijx"
    path.write_bytes(content)
    ij.load_exported(path)


# Operations, on shapes alone: nothing is compiled.

sides = st.integers(-1, 9)
few = st.integers(1, 3)
# What an operation takes by name: as it should be, and as it may be.
CHOICES = {
    "metric": (st.sampled_from(("l1", "l2", "max", "random")), st.just("L1")),
    "reference": (st.sampled_from(("center", "core_mean")), st.none()),
    "combine": (st.sampled_from(("mean", "stack", "max")), st.just("weighted")),
    "low": (st.sampled_from(("mean", "sample")), hostile.scalars),
    "method": (st.sampled_from(("hosvd", "hooi")), st.just("x")),
    "padding": (
        st.sampled_from(("SAME", "VALID", "same", 0, 1, ((0, 1), (2, 0)))),
        st.lists(sides | st.tuples(sides, sides), max_size=3) | hostile.scalars,
    ),
    "threshold": (
        st.sampled_from((0.1, -1.0, float("nan"))),
        st.sampled_from((np.ones(2), np.ones((1, 1)))),
    ),
    "strides": (few | st.tuples(few, few) | st.none(), st.lists(sides, max_size=3)),
    "capacities": (st.none() | st.just((0.5, 1)), st.lists(hostile.numbers)),
    "slope": (st.floats(1, 9), hostile.numbers),
    "region_size": (st.integers(4, 6), sides),
    "gate_gradient": (st.sampled_from(("none", "ste")), st.text()),
    **dict.fromkeys(("core_size", "channel_stride", "dilation"), (few, sides)),
    **dict.fromkeys(("rank", "rank_in", "rank_out", "window"), (few, sides)),
    **dict.fromkeys(("groups", "num_iterations"), (st.just(1), sides)),
}
GATES = ("region_size", "threshold", "metric", "reference", "padding", "slope")
GATES = (*GATES, "channel_stride", "gate_gradient")
REGIONS = ("region_size", "core_size", "strides", "padding", "metric", "reference")
# The number of arrays, and the other arguments.
OPERATIONS = {
    "conv2d": (2, ("strides", "padding", "dilation", "groups")),
    "friction": (1, (*REGIONS, "channel_stride")),
    "inertial_conv": (2, (*GATES, "combine", "strides")),
    "inertial_conv_tiled": (2, (*GATES, "low", "capacities")),
    "max_pool2d": (1, ("window",)),
    "tucker2": (1, ("rank_in", "rank_out", "method", "groups", "num_iterations")),
    "low_rank": (1, ("rank", "groups")),
}


@st.composite
def operations(draw):
    """An operation with at most one array or argument of another form."""
    operation = draw(st.sampled_from(sorted(OPERATIONS)))
    count, names = OPERATIONS[operation]
    wrong = draw(st.sampled_from((None, "shape", "kernel", *names)))
    given = {name: draw(CHOICES[name][name == wrong]) for name in names}
    lead = (
        [1, 1] if operation == "low_rank" else draw(st.sampled_from(([2, 7], [0, 6])))
    )
    shape = [*lead, draw(st.integers(0, 8)), draw(st.sampled_from((0, 1, 3, 4, 6)))]
    if wrong == "shape":
        shape = draw(st.lists(st.integers(0, 8), max_size=5))
    shapes = [shape]
    if count == 2:
        side = draw(few)
        kernel = [side, side, shape[-1] if shape else 1, draw(st.integers(0, 4))]
        shapes.append(draw(hostile.shapes) if wrong == "kernel" else kernel)
    kinds = st.sampled_from(("float32", "float32", "bfloat16", "float16"))
    return operation, [(shape, draw(kinds)) for shape in shapes], given


def trace(given, _):
    operation, arrays, settings = given
    function = functools.partial(getattr(ij.ops, operation), **settings)
    drawn = [jax.ShapeDtypeStruct(shape, jnp.dtype(kind)) for shape, kind in arrays]
    jax.eval_shape(function, *drawn)


TARGETS = {
    "zip": Target(torch_zips, read_weights, share=6),
    "legacy": Target(torch_legacy, read_weights, share=4),
    "safetensors": Target(safetensors, read_weights, share=3),
    "msgpack": Target(msgpack, read_weights, share=3),
    "index": Target(
        hostile.edited_json(INDEX),
        read_index,
        share=1,
        errors=(ValueError, FileNotFoundError),
    ),
    "found": Target(mappings, lambda given, _: take_weights(given), share=3),
    "npz": Target(
        st.tuples(npz(), st.sampled_from((0.0, 0.5))),
        read_npz,
        share=3,
        may_exhaust=True,
    ),
    "images": Target(
        st.deferred(
            lambda: st.tuples(
                st.sampled_from(pictures()).flatmap(hostile.edited_bytes),
                st.sampled_from((None, (4, 4), (9, 5))),
            )
        ),
        read_picture,
        share=5,
        # Pillow's form of 89,478,485 pixels, of four bytes, twice.
        most_bytes=1024 * MB,
    ),
    "plan": Target(
        st.sampled_from(PLAN_JSON).flatmap(hostile.edited_json), read_plan, share=3
    ),
    "config": Target(
        settings_of(configuration.Config), make_config, (UsageError,), share=3
    ),
    "runs": Target(
        hostile.edited_json(config_to_json(configuration.Config())),
        compare_configs,
        share=1,
    ),
    "ranks": Target(rank_words, lambda text, _: parse_ranks(text), (UsageError,)),
    "options": Target(
        option_words,
        read_options,
        (UsageError, SystemExit),
        share=0.02,
    ),
    "metadata": Target(
        st.deferred(lambda: hostile.edited_json(checkpoint()[1])),
        read_description,
        share=2,
    ),
    "manifest": Target(
        st.deferred(lambda: hostile.edited_json(manifest())),
        read_manifest,
        (ij.CheckpointDamagedError,),
        share=1,
    ),
    "exported": Target(st.deferred(exported_files), read_exported, share=2),
    "operations": Target(operations(), trace, share=1),
}
