"""Programs for a GPU that is not there: XLA says their memory, but no costs."""

import collections
import os
import re
from typing import Any

import jax
from jax.experimental import topologies

# What XLA asks of a GPU before it compiles; from its own list of targets, h100_sxm.
_TARGET = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 84942979072
  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
runtime_version { major: 12 minor: 8 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
NAME, MEMORY_BYTES = "h100", 84942979072
_GPUS_OF_HOST = 8
# Autotuning would run kernels.
OPTIONS = {"xla_gpu_autotune_level": 0}


def gpu_devices(num_devices: int) -> tuple[Any, ...]:
    """Returns GPUs to compile for.

    Args:
        num_devices: The number of GPUs: at most the eight of a host, or some hosts'.

    Raises:
        ValueError: There is no such number, or the packages that compile for GPUs are
            missing.
    """
    hosts, rest = divmod(num_devices, _GPUS_OF_HOST)
    if rest and hosts:
        raise ValueError(
            f"`chips` (={num_devices}) must be at most {_GPUS_OF_HOST}, or a multiple "
            f"of it."
        )
    os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
    jax.config.update("jax_platforms", "cpu")
    try:
        topology = topologies.get_topology_desc(
            platform="cuda",
            target_config=_TARGET,
            # Networks of hosts, hosts of a network, GPUs of a host.
            topology=f"1x{hosts}x{_GPUS_OF_HOST}" if hosts else f"1x1x{rest}",
        )
    except NotImplementedError as error:
        raise ValueError(
            "`device` (=h100) needs XLA's compiler for GPUs: "
            "pip install '.[h100]' in the checkout."
        ) from error
    return tuple(topology.devices)


def read_gpu_program(compiled: Any) -> dict[str, Any]:
    """Returns the memory of a program, its fusions, and its convolutions by place."""
    text, memory = compiled.as_text(), compiled.memory_analysis()
    return {
        "memory_bytes": memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes,
        "num_fusions": len(re.findall(r" fusion\(", text)),
        "cudnn": collections.Counter(re.findall(r'"__cudnn\$(\w+)"', text)),
        "other_convolutions": len(re.findall(r" convolution\(", text)),
    }
