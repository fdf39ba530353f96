"""The choice between a tiled convolution's forms, by platform and transformation."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float

from inertia_jax.ops.conv.dispatch import filters_for_cpu
from inertia_jax.ops.conv.platform import by_platform
from inertia_jax.ops.inertial.tiles import Tiling

# On CPU, images are worked on in chunks of about this many bytes: intermediate results
# then stay in the cache, and in memory that the system has handed out already.
# At [64,32,32,64] with 10% of tiles open, on two cores, chunks of 1 MiB take 14 ms,
# chunks of 2 MiB 18, and all images at once 34.
CHUNK_BYTES = 2**20


class PerImage(NamedTuple):
    """Images, and the friction of their tiles, or None where it is to be computed."""

    x: Float[Array, "n h w c_in"]
    friction: Float[Array, "n rows columns"] | None


# The output map, and the friction of its tiles.
Result = tuple[Array, Array]


def with_ladder(
    dense: Callable[..., Result], sparse: Callable[..., Result], tiling: Tiling
) -> Callable[..., Result]:
    """Returns a function: `dense` under derivatives and vmap, and `sparse` elsewhere.

    `dense` computes every tile, `sparse` the open ones. Both take `PerImage`, the core
    and the threshold; `sparse` also takes Winograd's filters or None, whether it runs
    on CPU, and whether open tiles may be gathered.
    """

    def compute_at_once(
        images: PerImage, core: Array, threshold: Array, *, gathers: bool = True
    ) -> Result:
        return sparse(images, core, threshold, None, on_cpu=False, gathers=gathers)

    # Gathered tiles lie in memory pixel by pixel there. For [256,32,32,64] in bfloat16,
    # XLA estimates 4.57 million cycles on v5e with an eighth of the tiles, without the
    # gather and the scatter, 0.60 for all outputs and the choice, and 0.31 for a dense
    # convolution.
    compute_on_tpu = functools.partial(compute_at_once, gathers=False)

    def compute_in_chunks(images: PerImage, core: Array, threshold: Array) -> Result:
        x = images.x
        filters = filters_for_cpu(x, core, tiling.pads)

        def compute_chunk(chunk: PerImage) -> Result:
            return sparse(chunk, core, threshold, filters, on_cpu=True, gathers=True)

        # Not `map_chunks`: outputs may vary over other devices than the images do.
        n = x.shape[0]
        size = max(1, min(n, CHUNK_BYTES * n // x.nbytes))
        count = n // size
        chunks = jax.tree.map(
            lambda a: a[: count * size].reshape(count, size, *a.shape[1:]), images
        )
        done = jax.tree.map(
            lambda a: a.reshape(count * size, *a.shape[2:]),
            lax.map(compute_chunk, chunks),
        )
        if count * size == n:
            return done
        rest = compute_chunk(jax.tree.map(lambda a: a[count * size :], images))
        return jax.tree.map(lambda *parts: jnp.concatenate(parts), done, rest)

    @jax.custom_batching.custom_vmap
    def ladder(images: PerImage, core: Array, threshold: Array) -> Result:
        return by_platform(
            images,
            core,
            threshold,
            cpu=compute_in_chunks,
            tpu=compute_on_tpu,
            default=compute_at_once,
        )

    @ladder.def_vmap
    def _batched(
        axis_size: int, in_batched: Any, *args: Any
    ) -> tuple[Any, tuple[bool, bool]]:
        axes = jax.tree.map(lambda batched: 0 if batched else None, in_batched)
        y = jax.vmap(dense, tuple(axes), axis_size=axis_size)(*args)
        return y, (True, True)

    differentiable = jax.custom_jvp(ladder)

    @differentiable.defjvp
    def _jvp(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> Any:
        return jax.jvp(dense, primals, tangents)

    return differentiable
