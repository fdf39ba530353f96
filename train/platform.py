"""What the program sets before JAX starts: the compilation cache, and XLA on CPU."""

import os
import pathlib

import jax
import jaxlib

# In these versions XLA gives convolutions to YNNPACK, which runs those of 64 channels
# on one core: on two, ResNet18 at batch 64 is evaluated in 293 ms with it and in 224
# without. Sums it should have: without, BatchNorm takes 200 ms of a step's 1,300. Later
# versions use all cores; one that has no such flag would not start.
_SLOW_YNN = ((0, 10, 2), (0, 11, 0))
_YNN_FOR_SUMS = "--xla_cpu_experimental_ynn_fusion_type=LIBRARY_FUSION_TYPE_REDUCE"


def use_compilation_cache() -> None:
    """Keeps compiled programs in the user's cache directory, if nothing else is said.

    `JAX_COMPILATION_CACHE_DIR` names another place, `JAX_ENABLE_COMPILATION_CACHE=0`
    turns it off.
    """
    if jax.config.values["jax_compilation_cache_dir"] is None:
        home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        place = pathlib.Path(home).expanduser() / "inertia_jax" / "compiled"
        jax.config.update("jax_compilation_cache_dir", str(place))
        # The least recently used go first.
        jax.config.update("jax_compilation_cache_max_size", 2 << 30)
        # Also what is quickly compiled: a start compiles some dozens of such.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def choose_cpu_convolutions() -> None:
    """Has XLA use all cores for convolutions on CPU; before anything is computed."""
    least, below = _SLOW_YNN
    flags = os.environ.get("XLA_FLAGS", "")
    if least <= jaxlib.version.__version_info__ < below and "_ynn_" not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {_YNN_FOR_SUMS}".strip()
