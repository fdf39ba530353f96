"""Eight simulated devices, strict ranks, shapes checked at run time."""

import contextlib
import os
import pathlib

import jax
import jaxtyping
import pytest

# What fails in a helper is shown as what fails in a test.
pytest.register_assert_rewrite("helpers", "outcomes")

ROOT = pathlib.Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"

# Test processes side by side, each with a thread a core, get in each other's way.
if worker := os.environ.get("PYTEST_XDIST_WORKER"):
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(worker[2:]) % len(cores)]})

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
# Most of the tests' time is compilation. Without XLA's expensive passes it takes half
# the time. Programs that tests start have them, but for those of several processes, and
# modules of tests that ask for `optimised`: those of operations, of the inertial layer,
# of folding, of steps over devices, and of networks beside PyTorch's.
jax.config.update("jax_disable_most_optimizations", True)
# Many compile the same.
jax.config.update("jax_compilation_cache_dir", str(ROOT / ".pytest_cache" / "jax"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)

# Types and shapes are not checked at run time in these, for these reasons.
UNCHECKED = {
    "inertia_jax.plan": "makes its own types of what people write, such as lists",
    "train.config": "says itself what is wrong with an option",
    "train.options": "passes MISSING of tyro where an argument must be given",
}
# Before anything of the library is imported.
jaxtyping.install_import_hook(
    sorted(
        {
            f"{package}.{path.stem}"
            for package in ("inertia_jax", "train")
            for path in (ROOT / package).iterdir()
        }.difference(UNCHECKED)
    ),
    "typechecks.checked",
)


# Files whose slow tests start programs and environments, or go through a hundred cases.
LONG = {
    "test_augmentation.py",
    "test_browser.py",
    "test_benchmark.py",
    "test_compress_verb.py",
    "test_dispatch.py",
    "test_examples.py",
    "test_extras.py",
    "test_faults.py",
    "test_forms.py",
    "test_nnx_zoo.py",
    "test_pages.py",
    "test_pipeline.py",
    "test_processes.py",
    "test_scaling.py",
    "test_sides.py",
    "test_streams.py",
    "test_study.py",
    "test_sweep.py",
    "test_winograd.py",
    "test_zoo.py",
}


def pytest_addoption(parser):
    parser.addoption(
        "--one-a-file",
        action="store_true",
        help="of slow tests, the first of each file, and none of the longest",
    )


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--one-a-file"):
        return
    if gone := LONG - {file.name for file in (ROOT / "tests").rglob("test_*.py")}:
        raise pytest.UsageError(f"`LONG` names files that are gone: {gone}")
    kept, others, seen = [], [], set()
    for item in items:
        if item.get_closest_marker("slow") is None:
            kept.append(item)
            continue
        is_left_out = item.path in seen or item.path.name in LONG
        (others if is_left_out else kept).append(item)
        seen.add(item.path)
    config.hook.pytest_deselected(items=others)
    items[:] = kept


@pytest.fixture
def x64():
    """Float64 for the length of a test."""
    with jax.enable_x64(True):
        yield


@contextlib.contextmanager
def _compiled(*, quickly: bool):
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", quickly)
    jax.clear_caches()  # which do not know of the setting
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", before)
        jax.clear_caches()


@pytest.fixture(scope="module")
def optimised():
    """XLA with its expensive passes, as users have it."""
    with _compiled(quickly=False):
        yield


@pytest.fixture
def quick_compile():
    """For whole networks that run once, among tests that are `optimised`."""
    with _compiled(quickly=True):
        yield


@pytest.fixture(scope="module", autouse=True)
def few_programs():
    """Gives programs back where they take many of the maps that a process may have.

    Without any left, which is 65,530 on Linux, XLA's compiler ends the process.
    """
    yield
    maps = pathlib.Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 20_000:
        jax.clear_caches()


@pytest.fixture(scope="module")
def one_device():
    """For what trains only to have something trained: eight devices take longer."""
    with pytest.MonkeyPatch.context() as patch:
        first = jax.devices()[:1]
        patch.setattr(jax, "devices", lambda: first)
        yield


@pytest.fixture
def no_shape_checks():
    """What a user meets: run-time checks of types and shapes are for tests."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="session")
def subprocess_env():
    """The environment of a program run as a user would: no simulated devices."""
    hidden = ("XLA_FLAGS", "JAX_ENABLE_X64")
    env = {k: v for k, v in os.environ.items() if k not in hidden}
    cache = str(ROOT / ".pytest_cache" / "jax")
    return env | {
        "JAX_COMPILATION_CACHE_DIR": cache,
        # As the program sets it for a cache of its own: all starts compile the same.
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "PYTHONWARNINGS": "default",
    }


def shared_file(name: str) -> pathlib.Path:
    """Returns a file beside the checkout, or skips the test, saying so."""
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"needs {name}, which lies beside the checkout of the developers")
    return path
