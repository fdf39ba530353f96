"""Eight simulated devices, strict ranks, shapes checked at run time."""

import contextlib
import os
import pathlib

import jax
import jaxtyping
import pytest

ROOT = pathlib.Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"

# Test processes side by side, each with a thread a core, get in each other's way.
if worker := os.environ.get("PYTEST_XDIST_WORKER"):
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(worker[2:]) % len(cores)]})

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
# Most of the tests' time is compilation, and many compile the same.
jax.config.update("jax_compilation_cache_dir", str(ROOT / ".pytest_cache" / "jax"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)

# Before anything of the library is imported.
jaxtyping.install_import_hook(
    [
        *(f"inertia_jax.{name}" for name in ("checkpoint", "cost", "interop")),
        *(f"inertia_jax.{name}" for name in ("layers", "models", "ops")),
        *(f"inertia_jax.{name}" for name in ("inertial_cost", "recalibrate")),
        *(f"inertia_jax.{name}" for name in ("calibration", "compress", "factorise")),
        *(f"inertia_jax.{name}" for name in ("factorised", "planned", "ranks")),
        *(f"inertia_jax.{name}" for name in ("sites", "budget", "latency")),
        "inertia_jax.allocation",
        *(f"inertia_jax.{name}" for name in ("exported", "fold", "fold_trace")),
        *(f"train.{name}" for name in ("augment", "distill", "feed", "step")),
    ],
    "beartype.beartype",
)


@pytest.fixture
def x64():
    """Float64 for the length of a test."""
    with jax.enable_x64(True):
        yield


@contextlib.contextmanager
def _compiled_quickly():
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def quick_compile():
    """For whole networks that run once: compiling them is what takes the time."""
    with _compiled_quickly():
        yield


@pytest.fixture(scope="module")
def one_device():
    """For what trains only to have something trained: eight devices take longer.

    Compiled in half the time, too; other tests train as users do.
    """
    with pytest.MonkeyPatch.context() as patch, _compiled_quickly():
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
    return {**env, "JAX_COMPILATION_CACHE_DIR": cache, "PYTHONWARNINGS": "default"}


def shared_file(name: str) -> pathlib.Path:
    """Returns a file beside the checkout, or skips the test, saying so."""
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"needs {name}, which lies beside the checkout of the developers")
    return path
