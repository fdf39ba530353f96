"""Settings made before JAX starts: the compilation cache, and flags for XLA on CPU."""

import os
import pathlib

import jax
import jaxlib

# Each entry: a flag for XLA on CPU; a word in the user's XLA_FLAGS that means "leave
# this alone"; the first jaxlib that knows the flag; the first that does not.
_CPU_FLAGS = (
    # XLA gives convolutions to YNNPACK, which runs those of 64 channels on one core. On
    # two cores, ResNet18 at batch 64 is evaluated in 293 ms with it and in 224 without.
    # Sums stay with YNNPACK: without it, BatchNorm takes 200 ms of a step's 1,300.
    # Later versions use all cores.
    (
        "--xla_cpu_experimental_ynn_fusion_type=LIBRARY_FUSION_TYPE_REDUCE",
        "_ynn_",
        (0, 10, 0),
        (0, 11, 0),
    ),
    # This order of operations needs the least memory; the default lets the most of them
    # run side by side. A step of ResNet18 at batch 128 has 583 MB of buffers
    # instead of 981, and is no slower on two cores.
    (
        "--xla_cpu_scheduler_type=CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED",
        "_scheduler",
        (0, 10, 0),
        (0, 13, 0),
    ),
)


def use_compilation_cache() -> None:
    """Keeps compiled programs in the user's cache directory, unless the user chose.

    `JAX_COMPILATION_CACHE_DIR` names another place, `JAX_ENABLE_COMPILATION_CACHE=0`
    turns it off.
    """
    if jax.config.values["jax_compilation_cache_dir"] is None:
        home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        place = pathlib.Path(home).expanduser() / "inertia_jax" / "compiled"
        jax.config.update("jax_compilation_cache_dir", str(place))
        # In bytes. The least recently used programs are deleted first.
        jax.config.update("jax_compilation_cache_max_size", 2 << 30)
        # Programs that compile quickly are kept, too: a start compiles dozens of them.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def choose_cpu_flags() -> None:
    """Sets XLA's flags for CPU, unless the user did; call before any computation."""
    for flag, theirs, least, below in _CPU_FLAGS:
        flags = os.environ.get("XLA_FLAGS", "")
        is_known = least <= jaxlib.version.__version_info__ < below
        if is_known and theirs not in flags:
            os.environ["XLA_FLAGS"] = f"{flags} {flag}".strip()
