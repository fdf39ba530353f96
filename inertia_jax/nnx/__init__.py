"""The NNX face of the library: layers, plans and networks for `flax.nnx`."""

from inertia_jax.nnx.forms import apply_plan, plan_of
from inertia_jax.nnx.inertial import InertialConv
from inertia_jax.nnx.linen import as_linen, from_linen
from inertia_jax.nnx.low_rank import LowRankConv, LowRankDense
from inertia_jax.nnx.networks import Network, create_model
from inertia_jax.nnx.tucker import Tucker2Conv
from inertia_jax.nnx.variables import GateThreshold

__all__ = [
    "GateThreshold",
    "InertialConv",
    "LowRankConv",
    "LowRankDense",
    "Network",
    "Tucker2Conv",
    "apply_plan",
    "as_linen",
    "create_model",
    "from_linen",
    "plan_of",
]


def __dir__() -> list[str]:
    """Lists the public names: not the modules that they come from."""
    return list(__all__)
