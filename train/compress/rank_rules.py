"""Rules for ranks from the command line, and plans for records."""

import json
import pathlib
from typing import Any

from inertia_jax import Budget, Energy, Evbmf, Plan, Ratio
from inertia_jax.compression.ranks import RankRule
from inertia_jax.ops.inertial.settings import near_miss
from train.errors import UsageError

# What a budget may be of.
_COSTS = ("macs", "params", "latency")


def parse_ranks(text: str) -> RankRule | Budget:
    """Reads a rule for ranks.

    The forms are `ratio:0.2`, `energy:0.9`, `evbmf`, `budget:macs=0.5` (or `params`,
    `latency`), and `plan:FILE`, whose file holds what `Plan.to_json` writes.

    Raises:
        UsageError: The text has another form, or its value is outside the range.
    """
    kind, _, value = text.partition(":")
    near = near_miss(kind, ("ratio", "energy", "evbmf", "budget", "plan"))
    try:
        if kind == "ratio":
            return Ratio(float(value))
        if kind == "energy":
            return Energy(float(value))
        if kind == "evbmf" and not value:
            return Evbmf()
        if kind == "plan":
            return Plan.from_json(pathlib.Path(value).read_text())
        if kind == "budget":
            name, _, share = value.partition("=")
            if name in _COSTS:
                shares: dict[str, Any] = {name: float(share)}
                return Budget(**shares)
            near = near_miss(name, _COSTS)
    except (ValueError, OSError) as error:
        raise UsageError(f"`ranks` (={text}): {error}") from error
    raise UsageError(
        f"`ranks` (={text}) must be ratio:SHARE, energy:SHARE, evbmf, "
        f"budget:macs=SHARE (or params, latency), or plan:FILE."
        f"{near}"
    )


def plan_to_json(plan: Plan) -> Any:
    """Returns a plan as a JSON value for records."""
    return json.loads(plan.to_json())
