"""Puts other convolutions into any Linen model, without editing the model."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core import meta

from inertia_jax.intercept import Answer, Wrapper, first_argument
from inertia_jax.layers.factorised import cannot_factorise
from inertia_jax.layers.in_place import standing, with_region_padding
from inertia_jax.layers.inertial import InertialConv
from inertia_jax.layers.kinds import num_axes
from inertia_jax.layers.low_rank import LowRankConv, LowRankDense
from inertia_jax.layers.tucker import Tucker2Conv
from inertia_jax.ops.conv.conv import per_axis
from inertia_jax.plan.plan import Plan, as_glob, plan_of
from inertia_jax.plan.specs import (
    Conv,
    Inertial,
    LowRank,
    Spec,
    Tucker2,
    core_of,
    fields_as,
)


class Planned(Wrapper):
    """A model of `nn.Conv` and `nn.Dense` layers, some of which a plan replaces.

    Variables have the names that the model itself gives them, except in the layers that
    the plan replaces by a `Tucker2Conv`, `LowRankConv`, `InertialConv` or
    `LowRankDense`. Every call of such a layer is intercepted
    (`flax.linen.intercept_methods`).

    An inertial convolution, or core, stands where the layer can hold it, as in `Plan`:
    in an `nn.Conv` of two dimensions without groups, dilation, mask or precision. Other
    layers stay ordinary, and `dropped_rules` lists them. It is in training mode when
    the call says so by one of the arguments `train`, `training`, `is_training`,
    `deterministic` and `use_running_average` that the network takes, or, where it says
    nothing, a field of that name does. A network that has none of them is called with
    `train=True` all the same, which is then the layers' alone. Elsewhere, as for other
    methods of the network:

        nn.apply(call, model, mutable=["batch_stats", "thresholds"])(variables, images)

    where `call(model, images)` uses `with model.inside(train=True) as network:`.

    Attributes:
        unplanned: Any Linen model.
        plan: The forms of its `nn.Conv` layers: `Tucker2`, `LowRank`, `Inertial`, or
            `Conv` for those that stay. A `LowRank` is also the form of an `nn.Dense`
            that its rule matches; other rules leave linear layers alone.
        kept: Pairs of a layer's path and the reason why `compress` left it as it is;
            `count_cost` notes them.

    Raises:
        ValueError: A rule of another kind, or for an `nn.Conv` or `nn.Dense` that
            cannot be factorised. Rules for other layers are not used: `dropped_rules`
            lists them.

    Example:
        >>> from flax import linen as nn
        >>> plan = ij.Plan((("layers_0", ij.Tucker2(2, 2)),))
        >>> network = ij.Planned(
        ...     nn.Sequential([nn.Conv(8, (3, 3)), nn.Conv(8, (3, 3))]), plan
        ... )
        >>> [row.kind for row in ij.count_cost(network, (6, 6, 8)).rows]
        ['tucker2', 'conv']
    """

    # A field `model` would clash with children of that name in the wrapped model.
    unplanned: nn.Module
    plan: Plan = Plan()
    kept: tuple[tuple[str, str], ...] = ()

    @property
    def wrapped(self) -> nn.Module:
        return self.unplanned

    @nn.nowrap
    def make_answer(self, *, train: bool) -> Answer:
        plan = self.plan
        # Replacements whose parts, nn.Conv layers too, are being called.
        replaced: set[tuple[str, ...]] = set()

        def replace(
            module: nn.Module, path: str, call: Any, args: Any, kwargs: Any
        ) -> Any:
            if module.path[:-1] in replaced:
                return call(*args, **kwargs)
            spec = _spec_there(plan.spec(path), module)
            if spec == Conv():
                return call(*args, **kwargs)
            replaced.add(module.path)
            x = first_argument(args, kwargs)
            core = core_of(spec)
            if isinstance(core, Inertial):
                output = _inertial_like(module, spec, core, x, train=train)
            else:
                output = _factorised_like(module, spec, x.shape[-1])(x)
            replaced.remove(module.path)
            return output

        return replace


def with_rules(
    model: nn.Module, specs: Mapping[str, Spec], kept: Mapping[str, str] | None = None
) -> nn.Module:
    """Returns the model with these specs in place of its plan's for the same layers.

    Args:
        model: The model.
        specs: The new specs, by path.
        kept: The reasons why layers stay as they are, by path; None if they are known.
    """
    plan = plan_of(model)
    if plan is None:
        if not specs and not kept:
            return model
        model, plan = Planned(model), Plan()
    if kept is not None and isinstance(model, Planned):
        model = model.clone(kept=tuple(kept.items()))
    if not specs:
        return model
    replaced = {*specs, *map(as_glob, specs)}
    rest = Plan(tuple((g, spec) for g, spec in plan.rules if g not in replaced))
    new = [(as_glob(p), spec) for p, spec in specs.items() if rest.spec(p) != spec]
    return model.clone(plan=Plan((*new, *rest.rules)))


def _spec_there(spec: Spec, module: nn.Module) -> Spec:
    """Returns the spec of a layer: the plan's, or `Conv` for what stays as it is."""
    if type(module) is nn.Dense:
        return spec if isinstance(spec, LowRank) else Conv()
    return standing(spec, module) if type(module) is nn.Conv else Conv()


def _factorised_like(module: Any, spec: Any, c_in: int) -> nn.Module:
    """Returns the layer that takes the place of another, on its scope."""
    path = "/".join(module.path)
    if reason := cannot_factorise(module):
        raise ValueError(f"`plan` has {spec} at {path!r}, which {reason}.")
    cls: type[nn.Module] = Tucker2Conv
    sides = _sides(module)
    if isinstance(spec, LowRank):
        if {*sides} - {1}:
            raise ValueError(
                f"`plan` has {spec} at {path!r}, whose filters are {sides}; must be "
                f"{' x '.join('1' * len(sides))}."
            )
        cls = LowRankConv if sides else LowRankDense
    elif not isinstance(spec, Tucker2) or spec.core != Conv():
        raise ValueError(
            f"`plan` has {spec} at {path!r}; must be a Tucker2, LowRank or Inertial, "
            f"or Conv() for the network's own filters."
        )
    kernel_init = _boxed_alike(module, c_in)
    return _made_like(
        module, cls, kernel_init=kernel_init, **fields_as(type(spec), spec)
    )


def _inertial_like(
    module: Any, spec: Spec, core: Inertial, inputs: Any, *, train: bool
) -> Any:
    """Returns the output of the inertial layer that takes the place of an `nn.Conv`."""
    cls = Tucker2Conv if isinstance(spec, Tucker2) else InertialConv
    fields = fields_as(type(spec), spec)
    side = (core.core_size,) * 2
    if cls is Tucker2Conv:
        fields["kernel_size"] = side
    is_same = cls is InertialConv and _sides(module) == side and core.combine != "stack"
    if not is_same:
        fields["kernel_init"] = _boxed_alike(module, inputs.shape[-1])
    x, fields["padding"] = with_region_padding(module, core, jnp.asarray(inputs))
    return _made_like(module, cls, **fields)(x, train=train)


def _made_like(module: Any, cls: Any, **fields: Any) -> Any:
    """Returns a layer on the scope of another, with its fields where none is given."""
    if module.scope is None:
        path = "/".join(module.path)
        raise ValueError(f"{path!r} must be called inside `apply` or `init`.")
    names = [field.name for field in dataclasses.fields(cls)]
    same = {name: getattr(module, name) for name in names if hasattr(module, name)}
    if "kernel_size" in same:
        # A number would be the side of a square.
        same["kernel_size"] = _sides(module)
    # A layer called twice makes its parts twice, in the same places.
    own = {"parent": module.scope.rewound(), "name": None}
    return cls(**same | fields | own)


def _sides(module: Any) -> tuple[int, ...]:
    """Returns the sides of a layer's filters; a linear layer has none."""
    count = num_axes(module)
    return per_axis(module.kernel_size, count=count) if count else ()


def _boxed_alike(module: Any, c_in: int) -> Any:
    """Returns Flax's own initialiser, in the box that the module's kernel is in.

    The module's initialiser may know the shape of its own kernel alone.
    """
    groups = getattr(module, "feature_group_count", 1)
    shape = (*_sides(module), c_in // groups, module.features)
    init = lambda key: module.kernel_init(key, shape, module.param_dtype)  # noqa: E731
    box = jax.eval_shape(init, jax.random.key(0))
    plain = nn.linear.default_kernel_init
    if not isinstance(box, meta.AxisMetadata):
        return plain
    return lambda *args, **kwargs: box.replace_boxed(plain(*args, **kwargs))
