"""A per-device function runs on all devices, by `jax.pmap` or `jax.shard_map`."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

AXIS = "data"


@dataclasses.dataclass(frozen=True)
class Parallel:
    """Devices, and the way to run on them.

    Both ways see the same arrays: replicated ones as they are, spread ones with one
    leading entry a device. Functions return replicated values. `devices` are those of
    all processes.
    """

    kind: Literal["pmap", "shard_map"]
    devices: tuple[Any, ...]

    @property
    def num_devices(self) -> int:
        """Number of devices of all processes."""
        return len(self.devices)

    @property
    def mesh(self) -> Mesh:
        """The mesh that arrays lie on; with `pmap` that is each process's own."""
        devices = self.devices
        if self.kind == "pmap":
            local = jax.process_index()
            devices = tuple(d for d in devices if d.process_index == local)
        return Mesh(np.array(devices), (AXIS,))

    def replicate(self, tree: Any) -> Any:
        """Puts a copy of every array on every device; all processes pass the same."""
        # `device_put` would send the whole tree to every process, to compare.
        sharding = NamedSharding(self.mesh, PartitionSpec())
        # An array that lies on the devices of all processes already is read here.
        return jax.make_array_from_process_local_data(
            sharding, jax.tree.map(np.asarray, tree)
        )

    @property
    def own(self) -> tuple[int, ...]:
        """Places of this process's devices among all."""
        local = jax.process_index()
        places = enumerate(d.process_index for d in self.devices)
        return tuple(place for place, process in places if process == local)

    def spread(self, tree: Any) -> Any:
        """Puts row i of host arrays [num_devices, ...] on device i.

        Every process passes the same rows.
        """
        return self.spread_own(jax.tree.map(lambda array: array[[*self.own]], tree))

    def spread_own(self, tree: Any) -> Any:
        """Puts row i of host arrays on this process's device `own[i]`."""
        sharding = NamedSharding(self.mesh, PartitionSpec(AXIS))
        return jax.make_array_from_process_local_data(sharding, tree)

    def wrap(
        self, function: Callable[..., Any], spread: Sequence[bool], donate: bool = False
    ) -> Callable[..., Any]:
        """Compiles a per-device function that may use collectives over `AXIS`.

        Args:
            function: A function of device-local values; all devices must return the
                same.
            spread: Whether each argument is spread, or else replicated.
            donate: Whether the first argument's memory may be taken for the result.
        """
        donated = (0,) if donate else ()
        if self.kind == "pmap":
            return jax.pmap(
                function,
                axis_name=AXIS,
                in_axes=tuple(0 if s else None for s in spread),
                out_axes=None,
                devices=list(self.devices),
                donate_argnums=donated,
            )

        def squeeze(tree: Any, is_spread: bool) -> Any:
            # pmap drops the mapped axis; shard_map leaves it with one entry.
            return jax.tree.map(lambda a: a[0], tree) if is_spread else tree

        def without_leading(*args: Any) -> Any:
            return function(*map(squeeze, args, spread))

        mapped = jax.shard_map(
            without_leading,
            mesh=self.mesh,
            in_specs=tuple(
                PartitionSpec(AXIS) if s else PartitionSpec() for s in spread
            ),
            out_specs=PartitionSpec(),
            # With its default, gradients of replicated parameters are summed twice.
            check_vma=False,
        )
        return jax.jit(mapped, donate_argnums=donated)
