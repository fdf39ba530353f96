"""In what variables, and a plan, are not those of a model."""

from collections.abc import Mapping
from typing import Any

from flax import linen as nn
from flax import traverse_util

from inertia_jax.calls import ApplyFn, record_calls
from inertia_jax.dropped import find_convolutions
from inertia_jax.inputs import Shape
from inertia_jax.plan.plan import Plan, matches, plan_of, without_ladders


def differing_from(
    model: nn.Module,
    variables: Mapping[str, Any],
    image_shape: Shape,
    *,
    apply_fn: ApplyFn | None = None,
) -> str:
    """Returns in what a plan and variables do not suit their model; "" if they do.

    Nothing is computed.

    Args:
        model: The model, which has the plan.
        variables: The variables, plain.
        image_shape: The shape of one input.
        apply_fn: How the model is called, as in `compress`.
    """
    try:
        plain = without_ladders(model)
        calls, expected = record_calls(plain, image_shape, apply_fn=apply_fn)
    except ValueError as error:
        return str(error).removesuffix(".")
    layers = find_convolutions(calls)
    differing = [
        f"the plan's {glob!r} matches no convolution"
        for glob, _ in (plan_of(model) or Plan()).rules
        if not any(matches(layer, glob) for layer in layers)
    ]
    given = traverse_util.flatten_dict(dict(variables), sep="/")
    wanted = traverse_util.flatten_dict(expected, sep="/")
    # The parameters come first: they say the most in few words.
    for place, leaf in sorted(
        wanted.items(), key=lambda item: item[0][:7] != "params/"
    ):
        found = tuple(given[place].shape) if place in given else "missing"
        if found != tuple(leaf.shape):
            differing.append(f"{place} is {found}, must be {tuple(leaf.shape)}")
    # Other collections may have what a model makes only in training.
    differing += [
        f"{place} is {tuple(leaf.shape)}, must be missing"
        for place, leaf in given.items()
        if place.startswith("params/") and place not in wanted
    ]
    more = [f"and {len(differing) - 3} more"] if len(differing) > 3 else []
    return "; ".join((*differing[:3], *more))
