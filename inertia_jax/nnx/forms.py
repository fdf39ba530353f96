"""The forms of an NNX module's convolutions, as a plan has them."""

import inspect
import warnings
from collections.abc import Mapping
from typing import Any

from flax import linen as nn
from flax import nnx

from inertia_jax.dropped import DroppedRule, find_dropped
from inertia_jax.layers.factorised import cannot_factorise
from inertia_jax.layers.in_place import standing
from inertia_jax.nnx.bridges import bridge_with_plan, find_bridges
from inertia_jax.nnx.equals import PLANNED, Layer, find_layers, linen_layer
from inertia_jax.nnx.graph import become, is_trained, iter_nodes
from inertia_jax.nnx.inertial import InertialConv
from inertia_jax.nnx.low_rank import LowRankConv, LowRankDense
from inertia_jax.nnx.tucker import Tucker2Conv
from inertia_jax.plan.plan import Plan, as_glob, matches
from inertia_jax.plan.plan import plan_of as plan_of_linen
from inertia_jax.plan.specs import Conv, Inertial, LowRank, Spec, Tucker2, fields_as

_CLASSES: dict[type, type[nnx.Module]] = {
    Conv: nnx.Conv,
    Tucker2: Tucker2Conv,
    LowRank: LowRankConv,
    Inertial: InertialConv,
}


def plan_of(module: nnx.Module) -> Plan:
    """Returns the plan of a module: a rule for each layer of a form that a plan has.

    That of a Linen model inside a module, as of `ij.nnx.create_model`, is the model's.

    Example:
        >>> from flax import nnx
        >>> layer = ij.nnx.Tucker2Conv(8, 8, 3, rank_in=2, rank_out=2, rngs=nnx.Rngs(0))
        >>> net = nnx.Sequential(layer)
        >>> ij.nnx.plan_of(net).spec("layers/0").rank_in
        2
    """
    rules: list[tuple[str, Spec]] = [
        (as_glob("/".join(path)), layer.node.spec)
        for path, layer in find_layers(module).items()
        if isinstance(layer.node, PLANNED)
    ]
    for path, bridge in find_bridges(module).items():
        plan = plan_of_linen(bridge.to_nnx__module) or Plan()
        rules += plan.above(path).rules
    return Plan(tuple(rules))


def apply_plan(
    module: nnx.Module, plan: Plan, *, rngs: nnx.Rngs | None = None
) -> nnx.Module:
    """Returns a module whose convolutions have the forms of a plan.

    New layers have new variables, for those of a compressed network to be loaded into:

        module = ij.nnx.apply_plan(Net(rngs=nnx.Rngs(0)), plan)
        nnx.update(module, state)

    Args:
        module: A module; it is not changed.
        plan: The forms of its convolutions: `Tucker2`, `LowRank`, `Inertial`, or `Conv`
            for those that stay. As in `Planned`, an `Inertial` stands where a layer can
            hold it, and a `LowRank` is also the form of a linear layer.
            A warning lists the layers that cannot have the form of their rule.
        rngs: The streams that new variables are drawn from. None: `nnx.Rngs(0)`.

    Returns:
        A module of the same class, in which those convolutions are other layers that
        have another form in the plan. A layer that has several names stays one layer.

    Raises:
        ValueError: A rule that matches no convolution, or one that cannot have this
            form.

    Example:
        >>> from flax import nnx
        >>> net = nnx.Sequential(nnx.Conv(8, 8, (3, 3), rngs=nnx.Rngs(0)))
        >>> small = ij.nnx.apply_plan(net, ij.Plan((("*", ij.Tucker2(2, 2)),)))
        >>> type(small.layers[0]).__name__
        'Tucker2Conv'
    """
    rngs = nnx.Rngs(0) if rngs is None else rngs
    if isinstance(module, nnx.bridge.ToNNX):
        return bridge_with_plan(module, plan, rngs)
    changed = with_forms(module, plan, rngs)
    for path, bridge in find_bridges(changed).items():
        below = plan.below(path)
        if below != plan_of(bridge):
            become(bridge, bridge_with_plan(bridge, below, rngs))
    return changed


def with_forms(module: nnx.Module, plan: Plan, rngs: nnx.Rngs) -> nnx.Module:
    """Returns a module whose own convolutions have the forms of a plan.

    Linen models inside of it have theirs.

    Raises:
        ValueError: What `apply_plan` refuses.
    """
    changed = nnx.clone(module, graph=True)
    bridges = find_bridges(changed)
    convolutions = {
        "/".join(path): layer
        for path, layer in find_layers(changed).items()
        if isinstance(layer.node, (nnx.Conv, nnx.Linear, *PLANNED))
    }
    for glob, spec in plan.rules:
        rule = Plan(((glob, spec),))
        is_below = any(rule.below(path).rules for path in bridges)
        if not is_below and not any(matches(path, glob) for path in convolutions):
            raise ValueError(f"`plan` has {glob!r}, which matches no convolution.")
    if dropped := _dropped(plan, convolutions):
        listed = "\n  ".join(map(str, dropped))
        warnings.warn(f"`plan` does not stand everywhere:\n  {listed}", stacklevel=2)
    trained = is_trained(changed)
    for path, layer in convolutions.items():
        node: Any = layer.node
        spec = _spec_there(plan.spec(path), node)
        if spec != getattr(node, "spec", Conv()):
            become(node, _in_form(path, layer, spec, trained, rngs))
    return changed


def _dropped(plan: Plan, layers: Mapping[str, Layer]) -> list[DroppedRule]:
    """Returns the rules that do not stand at a layer that they match."""
    equals = {path: linen_layer(layer.node, None) for path, layer in layers.items()}
    linear = {path for path, equal in equals.items() if isinstance(equal, nn.Dense)}
    convolutions = {p: equal for p, equal in equals.items() if p not in linear}
    others = {
        path: equals[path]
        for path in linear
        if not isinstance(plan.spec(path), LowRank)
    }
    return [rule for rule in find_dropped(plan, convolutions, others) if rule.path]


def _spec_there(spec: Spec, node: Any) -> Spec:
    """Returns the spec of a layer: the plan's, or `Conv` for what stays as it is."""
    if isinstance(node, nnx.Linear | LowRankDense):
        return spec if isinstance(spec, LowRank) else Conv()
    return standing(spec, linen_layer(node, None))


def _in_form(
    path: str, layer: Layer, spec: Spec, trained: bool, rngs: nnx.Rngs
) -> nnx.Module:
    """Returns a convolution in another form, with new variables like its own.

    Raises:
        ValueError: It cannot have that form.
    """
    node: Any = layer.node
    dense: Any = linen_layer(node, None)
    reason = layer.reason or cannot_factorise(dense)
    is_linear = isinstance(node, nnx.Linear | LowRankDense)
    if isinstance(spec, LowRank) and not is_linear and {*node.kernel_size} != {1}:
        reason = f"has filters of {node.kernel_size}; must be 1 x 1"
    if isinstance(spec, Conv) and spec != Conv():
        reason = "has filters of its own"
    if reason is not None:
        raise ValueError(f"`plan` has {spec} at {path!r}, which {reason}.")
    cls: Any = _CLASSES[type(spec)]
    if is_linear:
        cls = LowRankDense if isinstance(spec, LowRank) else nnx.Linear
    taken = inspect.signature(cls.__init__).parameters
    fields = {name: getattr(node, name) for name in taken if hasattr(node, name)}
    if not isinstance(spec, Conv):
        fields |= fields_as(type(spec), spec)
    if "use_running_average" in taken:
        fields["use_running_average"] = not trained
    made = cls(**fields, rngs=rngs)
    _keep_boxes(node, made)
    return made


def _keep_boxes(node: nnx.Module, made: nnx.Module) -> None:
    """Gives new parameters the classes and the metadata that the layer's own have."""
    own = {
        path[-1]: leaf
        for path, leaf in iter_nodes(node)
        if isinstance(leaf, nnx.Variable)
    }
    for _, part in list(iter_nodes(made)):
        for name in own.keys() & vars(part).keys():
            leaf = getattr(part, name)
            if isinstance(leaf, nnx.Param):
                setattr(part, name, own[name].copy(leaf.get_raw_value()))
