"""The programs of a network as shapes alone: nothing is drawn, and nothing runs."""

import functools
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import NamedSharding, PartitionSpec

from inertia_jax import (
    Conv,
    Fixed,
    Inertial,
    Plan,
    Tucker2,
    count_cost,
    create_model,
    fold_batch_norm,
)
from inertia_jax.compression.sites import find_sites
from inertia_jax.metadata import Preprocessing
from inertia_jax.models.create import abstract_variables, input_shape
from inertia_jax.plan.plan import without_ladders
from train.config import Config
from train.data.augment import Augmentation
from train.evaluate.deployed import images_to_logits, kernels_in_type
from train.evaluate.eval_step import make_eval_call
from train.machine.parallel import AXIS, Parallel
from train.step.objective import Objective
from train.step.optimizer import make_optimizer
from train.step.state import Update, init_state
from train.step.train_step import TrainStep

# The number of training images, which the learning rate depends on: CIFAR-10's.
_TRAINING_IMAGES = 50_000


def dense_model(name: str, **options: Any) -> nn.Module:
    """Returns the network with ordinary convolutions."""
    return create_model(name, **options)


def tucker_model(name: str, share: float = 0.25, **options: Any) -> nn.Module:
    """Returns a network whose 3x3 convolutions have ranks for a share of its MACs.

    Every layer's ranks are the same fraction of its channels, the largest multiple of
    1/64 that keeps to the share. The first convolution stays dense.

    Raises:
        ValueError: The network is too narrow for the share.
    """
    dense = create_model(name, **options)
    shape = input_shape(dense)
    sites = find_sites(dense, zeros_of(dense), shape).items()
    total = count_cost(dense, shape).macs
    for part in range(64, 0, -1):
        macs, rules = total, []
        for path, site in sites:
            side, _, c_in, c_out = site.kernel.shape
            if side > 1 and c_in > 3:
                spec = Tucker2(max(1, c_in * part // 64), max(1, c_out * part // 64))
                macs += site.macs(spec) - site.macs(Conv())
                rules.append((path, spec))
        if macs <= share * total:
            return create_model(name, plan=Plan(tuple(rules)), **options)
    raise ValueError(f"{name} has no ranks for `share` (={share}) of its MACs.")


def tiled_model(name: str, **options: Any) -> nn.Module:
    """Returns a network whose 3x3 convolutions are inertial, in 2x2 tiles."""
    tiled = Inertial(3, 4, reading="tiled", threshold=Fixed(0.1))
    return create_model(name, plan=Plan((("*", tiled),)), **options)


NETWORKS: Mapping[str, Callable[..., nn.Module]] = MappingProxyType(
    {"dense": dense_model, "tucker": tucker_model, "tiled": tiled_model}
)


def zeros_of(model: nn.Module) -> Any:
    """Returns variables of zeros."""
    shapes = abstract_variables(model, input_shape(model))
    return jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)


def training_program(
    model: nn.Module,
    parallel: Parallel,
    *,
    batch_size: int,
    sync_batch_norm: bool = True,
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """Returns a step of the default recipe, from images to new state, and its shapes.

    The images of a batch lie on their devices, as where a set streams.

    Args:
        model: The network.
        parallel: The devices.
        batch_size: The number of images of a step on each device.
        sync_batch_norm: Whether several devices share the statistics of BatchNorm.
    """
    config, devices = Config(), parallel.num_devices
    steps = _TRAINING_IMAGES // (batch_size * devices)
    tx = make_optimizer(
        config.optimizer, steps_per_epoch=max(1, steps), epochs=config.epochs
    )
    is_synchronised = sync_batch_norm and devices > 1
    update = Update(tx)
    step = TrainStep(
        model.clone(axis_name=AXIS if is_synchronised else None),
        update,
        Augmentation(_preprocessing(model), config.data, _dtype(model)),
        Objective(),
        steps_per_epoch=max(1, steps),
        seed=config.seed,
    )
    variables = abstract_variables(model, input_shape(model))
    state = jax.eval_shape(functools.partial(init_state, model, update), variables)
    spread = (False, True, True, True, True)
    images, labels = _batch(model, devices, batch_size)
    indices = jax.ShapeDtypeStruct((devices, 1, batch_size), jnp.int32)
    shapes = (state, images, labels, indices, labels)
    call = parallel.wrap(step.call, spread, donate=True)
    return call, _placed(shapes, spread, parallel)


def evaluation_program(
    model: nn.Module, parallel: Parallel, *, batch_size: int
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """Returns a call of `evaluate` and its shapes, as `training_program` does."""
    augmentation = Augmentation(_preprocessing(model), Config().data, _dtype(model))
    call = make_eval_call(without_ladders(model), augmentation)
    variables = abstract_variables(model, input_shape(model))
    spread = (False, True, True, True)
    images, labels = _batch(model, parallel.num_devices, batch_size)
    shapes = (variables, images, labels, labels)
    return parallel.wrap(call, spread), _placed(shapes, spread, parallel)


def exported_program(
    model: nn.Module, parallel: Parallel, *, batch_size: int
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """Returns the network that `export` writes and its shapes, for one device.

    BatchNorm is folded, the kernels are in the type of the computation, and the input
    is raw pixels.
    """
    shape, zeros = input_shape(model), zeros_of(model)
    folded, merged = fold_batch_norm(model, zeros, image_shape=shape)
    variables = jax.eval_shape(lambda: kernels_in_type(merged, _dtype(model)))
    images = jax.ShapeDtypeStruct((batch_size, *shape), jnp.uint8)

    def call(variables: Any, images: Any) -> Any:
        logits = images_to_logits(folded, variables, _preprocessing(model), "uint8")
        return logits(images)

    placed = _placed((variables, images), (False, False), parallel)
    return jax.jit(call), placed


def _preprocessing(model: nn.Module) -> Preprocessing:
    shape = input_shape(model)
    return Preprocessing(shape, (0.5,) * shape[-1], (0.25,) * shape[-1])


def _dtype(model: nn.Module) -> Any:
    return jnp.dtype(getattr(model, "dtype", jnp.float32))


def _batch(model: nn.Module, devices: int, batch_size: int) -> tuple[Any, Any]:
    """Returns the shapes of raw images and of integers, an integer an image."""
    rows = (devices, batch_size)
    images = jax.ShapeDtypeStruct((*rows, *input_shape(model)), jnp.uint8)
    return images, jax.ShapeDtypeStruct(rows, jnp.int32)


def _placed(
    shapes: tuple[Any, ...], spread: tuple[bool, ...], parallel: Parallel
) -> tuple[Any, ...]:
    """Returns shapes that lie on the devices, spread over them or on each."""

    def place(tree: Any, is_spread: bool) -> Any:
        spec = PartitionSpec(AXIS) if is_spread else PartitionSpec()
        sharding = NamedSharding(parallel.mesh, spec)
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(
                leaf.shape, leaf.dtype, sharding=sharding
            ),
            tree,
        )

    return tuple(map(place, shapes, spread))


PROGRAMS: Mapping[str, Callable[..., Any]] = MappingProxyType(
    {
        "train": training_program,
        "evaluate": evaluation_program,
        "export": exported_program,
    }
)
