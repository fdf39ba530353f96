"""Smaller and faster convolutional networks in JAX."""

from typing import TYPE_CHECKING

from inertia_jax.lazy import importer

if TYPE_CHECKING:
    from inertia_jax import nnx, ops
    from inertia_jax.checkpoint import (
        CheckpointDamagedError,
        CheckpointWriteError,
        load_checkpoint,
        save_checkpoint,
    )
    from inertia_jax.compression.planned import Planned
    from inertia_jax.compression.ranks import Budget, Energy, Evbmf, Ratio
    from inertia_jax.cost.table import CostTable, LayerCost
    from inertia_jax.deploy.exported import (
        ExportDamagedError,
        ExportedNetwork,
        load_exported,
    )
    from inertia_jax.deploy.fold import Folded
    from inertia_jax.dropped import DroppedRule
    from inertia_jax.functions import (
        compress,
        count_cost,
        decompress,
        dropped_rules,
        fold_batch_norm,
        make_inertial,
        recalibrate_batch_norm,
        reconstruct,
        save_exported,
    )
    from inertia_jax.images import preprocess
    from inertia_jax.interop import load_torch, to_torch
    from inertia_jax.layers.inertial import InertialConv
    from inertia_jax.layers.low_rank import LowRankConv, LowRankDense
    from inertia_jax.layers.tucker import Tucker2Conv
    from inertia_jax.metadata import Metadata, Preprocessing, load_metadata
    from inertia_jax.models.create import create_model, init_variables
    from inertia_jax.models.names import MODEL_NAMES
    from inertia_jax.plan.plan import Plan
    from inertia_jax.plan.specs import (
        Conv,
        Fixed,
        Inertial,
        Learned,
        LowRank,
        Rate,
        Tucker2,
    )
    from inertia_jax.plan.variants import published_variant
    from inertia_jax.weights.match.match import TorchMatch, match_torch


__version__ = "0.1.0"

__all__ = [
    "MODEL_NAMES",
    "Budget",
    "CheckpointDamagedError",
    "CheckpointWriteError",
    "Conv",
    "CostTable",
    "DroppedRule",
    "Energy",
    "Evbmf",
    "ExportDamagedError",
    "ExportedNetwork",
    "Fixed",
    "Folded",
    "Inertial",
    "InertialConv",
    "LayerCost",
    "Learned",
    "LowRank",
    "LowRankConv",
    "LowRankDense",
    "Metadata",
    "Plan",
    "Planned",
    "Preprocessing",
    "Rate",
    "Ratio",
    "TorchMatch",
    "Tucker2",
    "Tucker2Conv",
    "compress",
    "count_cost",
    "create_model",
    "decompress",
    "dropped_rules",
    "fold_batch_norm",
    "init_variables",
    "load_checkpoint",
    "load_exported",
    "load_metadata",
    "load_torch",
    "make_inertial",
    "match_torch",
    "nnx",
    "ops",
    "preprocess",
    "published_variant",
    "recalibrate_batch_norm",
    "reconstruct",
    "save_checkpoint",
    "save_exported",
    "to_torch",
]

__getattr__ = importer(
    __name__,
    {
        "checkpoint": (
            "CheckpointDamagedError",
            "CheckpointWriteError",
            "load_checkpoint",
            "save_checkpoint",
        ),
        "compression.planned": ("Planned",),
        "compression.ranks": (
            "Budget",
            "Energy",
            "Evbmf",
            "Ratio",
        ),
        "cost.table": (
            "CostTable",
            "LayerCost",
        ),
        "deploy.exported": (
            "ExportDamagedError",
            "ExportedNetwork",
            "load_exported",
        ),
        "deploy.fold": ("Folded",),
        "dropped": ("DroppedRule",),
        "functions": (
            "compress",
            "count_cost",
            "decompress",
            "dropped_rules",
            "fold_batch_norm",
            "make_inertial",
            "recalibrate_batch_norm",
            "reconstruct",
            "save_exported",
        ),
        "images": ("preprocess",),
        "interop": (
            "load_torch",
            "to_torch",
        ),
        "layers.inertial": ("InertialConv",),
        "layers.low_rank": (
            "LowRankConv",
            "LowRankDense",
        ),
        "layers.tucker": ("Tucker2Conv",),
        "metadata": (
            "Metadata",
            "Preprocessing",
            "load_metadata",
        ),
        "models.create": ("create_model", "init_variables"),
        "models.names": ("MODEL_NAMES",),
        "plan.plan": ("Plan",),
        "plan.specs": (
            "Conv",
            "Fixed",
            "Inertial",
            "Learned",
            "LowRank",
            "Rate",
            "Tucker2",
        ),
        "plan.variants": ("published_variant",),
        "weights.match.match": (
            "TorchMatch",
            "match_torch",
        ),
    },
)


def __dir__() -> list[str]:
    """Lists the public names: not the modules that they come from."""
    return [*__all__, "__version__"]
