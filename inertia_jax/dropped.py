"""The rules of a plan that are not used at layers that they match, and the reasons."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from flax import linen as nn

from inertia_jax.calls import ApplyFn, Call, record_calls
from inertia_jax.inputs import Shape
from inertia_jax.layers.factorised import cannot_factorise
from inertia_jax.layers.in_place import cannot_be_inertial
from inertia_jax.layers.kinds import (
    CONVOLUTIONS,
    OTHER_CONVOLUTIONS,
    OTHER_LINEAR,
    kind_of,
    num_axes,
)
from inertia_jax.plan.plan import Plan, matches, plan_of, without_ladders
from inertia_jax.plan.specs import Conv, Inertial, LowRank, Spec, Tucker2


@dataclasses.dataclass(frozen=True)
class DroppedRule:
    """A rule of a plan that is not used at a layer that it matches, or at any.

    Attributes:
        glob: The rule's glob.
        spec: The rule's spec.
        path: The layer, which is dense, or has a dense core; "" for a rule that wins at
            none of the layers that it matches.
        reason: The reason why the spec is not used there.

    Example:
        >>> plan = ij.Plan((("conv*", ij.Inertial(5, 6, reading="tiled")),))
        >>> network = ij.create_model("lenet", width=0.0625, plan=plan)
        >>> ij.dropped_rules(network, (28, 28, 1))[0].reason
        'core 5 exceeds kernel 3'
    """

    glob: str
    spec: Spec
    path: str
    reason: str

    def __str__(self) -> str:
        if not self.path:
            return f"the plan's rule {self.glob!r} is not used: {self.reason}"
        return (
            f"{self.path} stays dense: {self.reason}; the plan's rule {self.glob!r} "
            f"has {self.spec}"
        )


def dropped_rules(
    model: nn.Module,
    image_shape: Shape,
    *,
    apply_fn: ApplyFn | None = None,
) -> tuple[DroppedRule, ...]:
    """Returns the rules of a model's plan that are not used at layers they match.

    An inertial convolution falls back to the ordinary one where its core is larger than
    the network's filters, in the tiled reading where the network has strides, and where
    the network has groups, dilation, a mask or a precision. Subclasses of `nn.Conv` and
    convolutions of other kinds, such as `nn.ConvTranspose`, stay as they are, and so do
    linear layers, which are returned for rules that no convolution follows. A rule that
    wins at no layer, since earlier ones match the same layers, is returned once.
    Nothing is computed.

    Args:
        model: A network; one without a plan has dropped nothing. Nor has an NNX module,
            whose plan is read off its layers: `ij.nnx.apply_plan` warns of such rules.
        image_shape: The shape of one input, such as [h, w, c].
        apply_fn: How the network is called, as in `compress`.

    Example:
        >>> plan = ij.Plan((("conv*", ij.Inertial(5, 6, reading="tiled")),))
        >>> network = ij.create_model("lenet", width=0.0625, plan=plan)
        >>> [rule.path for rule in ij.dropped_rules(network, (28, 28, 1))]
        ['conv1', 'conv2']
    """
    plan = plan_of(model)
    if plan is None or not plan.rules:
        return ()
    calls, _ = record_calls(without_ladders(model), image_shape, apply_fn=apply_fn)
    return find_dropped(plan, find_convolutions(calls), find_others(calls))


def find_convolutions(calls: Mapping[str, Call]) -> dict[str, Any]:
    """Returns the convolutions that a plan speaks of, by path: parts are left out."""
    factorised = {path for path, call in calls.items() if call.is_factorised}
    return {
        path: call.module
        for path, call in calls.items()
        if kind_of(call.module).name in CONVOLUTIONS
        and path.rpartition("/")[0] not in factorised
    }


def find_others(calls: Mapping[str, Call]) -> dict[str, Any]:
    """Returns the layers with a kernel that are no convolutions of a plan, by path."""
    others = (nn.Dense, *OTHER_CONVOLUTIONS, *OTHER_LINEAR)
    return {p: call.module for p, call in calls.items() if type(call.module) in others}


def find_dropped(
    plan: Plan, convolutions: Mapping[str, Any], others: Mapping[str, Any] | None = None
) -> tuple[DroppedRule, ...]:
    """Returns a plan's dropped rules.

    Args:
        plan: The plan.
        convolutions: The convolutions of its network by path.
        others: Its other layers with a kernel by path.
    """
    dropped, used, standing = [], set(), set()
    for path, module in convolutions.items():
        rule = plan.rule(path)
        used.add(rule)
        reason = None if rule is None else _reason(rule[1], module)
        if rule is not None and reason is not None:
            dropped.append(DroppedRule(*rule, path, reason))
        else:
            standing.add(rule)
    for path, module in (others or {}).items():
        rule = plan.rule(path)
        is_linear = num_axes(module) == 0
        # What is said of all layers is not meant for linear ones.
        if rule is None or (is_linear and rule in standing):
            continue
        if (reason := _reason_elsewhere(rule[1], module)) is not None:
            dropped.append(DroppedRule(*rule, path, reason))
    reason = "earlier rules win at all layers it matches"
    for rule in plan.rules:
        if rule not in used and any(matches(path, rule[0]) for path in convolutions):
            dropped.append(DroppedRule(*rule, "", reason))
    return tuple(dropped)


def _reason(spec: Spec, module: Any) -> str | None:
    """Returns why a spec does not stand at a convolution; None if it does."""
    if kind_of(module).name == "inertial":
        return None
    # A plan leaves subclasses alone, and says of Flax's own what is wrong.
    is_subclass = kind_of(module).name == "conv" and type(module) is not nn.Conv
    if is_subclass and isinstance(spec, Tucker2 | LowRank):
        return cannot_factorise(module)
    return cannot_be_inertial(module, spec)


def _reason_elsewhere(spec: Spec, module: Any) -> str | None:
    """Returns why a spec does not stand at another layer; None if it does."""
    name = type(module).__name__
    if isinstance(spec, Conv):
        return None
    if isinstance(spec, Inertial):
        return f"is an nn.{name}, of which there is no inertial form"
    if isinstance(spec, Tucker2) and num_axes(module) == 0:
        return f"is an nn.{name}, of which there is no Tucker-2 form"
    return cannot_factorise(module)
