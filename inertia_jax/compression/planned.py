"""Puts factorised convolutions into any Linen model, without editing the model."""

import dataclasses
from typing import Any

from flax import linen as nn

from inertia_jax.calls import Wrapper, on_calls, on_scope
from inertia_jax.layers.low_rank import LowRankConv
from inertia_jax.layers.tucker import Tucker2Conv
from inertia_jax.ops.conv.conv import pair
from inertia_jax.plan.plan import Plan
from inertia_jax.plan.specs import Conv, LowRank, Tucker2, fields_as


class Planned(Wrapper):
    """A model of `nn.Conv` layers, some of which a plan replaces.

    Variables have the names that the model itself gives them, except in the layers that
    the plan replaces by a `Tucker2Conv` or `LowRankConv`. Every call of such a layer is
    intercepted (`flax.linen.intercept_methods`).

    Attributes:
        unplanned: Any Linen model.
        plan: The forms of its `nn.Conv` layers: `Tucker2` with an ordinary core,
            `LowRank`, or `Conv` for those that stay.

    Raises:
        ValueError: A rule of another kind, or for a layer that cannot be factorised.
    """

    # A field `model` would clash with children of that name in the wrapped model.
    unplanned: nn.Module
    plan: Plan = Plan()

    @property
    def wrapped(self) -> nn.Module:
        return self.unplanned

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        plan = self.plan
        # The parts of a replacement layer are nn.Conv layers too.
        replaced: set[tuple[str, ...]] = set()

        def replace(
            module: nn.Module, path: str, call: Any, args: Any, kwargs: Any
        ) -> Any:
            spec = plan.spec(path)
            is_part = module.path[:-1] in replaced
            if type(module) is not nn.Conv or is_part or spec == Conv():
                return call(*args, **kwargs)
            replaced.add(module.path)
            # The only argument may come by its name in `nn.Conv`, `inputs`.
            return _factorised_like(module, spec)(*args, *kwargs.values())

        with on_calls(replace):
            return on_scope(self.unplanned, self.scope)(*args, **kwargs)


def _factorised_like(module: nn.Conv, spec: Any) -> Tucker2Conv | LowRankConv:
    """Returns the layer that takes the place of an `nn.Conv`, on its scope."""
    path = "/".join(module.path)
    if reason := cannot_factorise(module):
        raise ValueError(f"`plan` has {spec} at {path!r}, which {reason}.")
    if module.scope is None:
        raise ValueError(f"{path!r} must be called inside `apply` or `init`.")
    cls: type[Tucker2Conv] | type[LowRankConv] = Tucker2Conv
    if isinstance(spec, LowRank):
        if pair(module.kernel_size) != (1, 1):
            raise ValueError(
                f"`plan` has {spec} at {path!r}, whose filters are "
                f"{module.kernel_size}; must be 1 x 1."
            )
        cls = LowRankConv
    elif not isinstance(spec, Tucker2) or spec.core != Conv():
        raise ValueError(
            f"`plan` has {spec} at {path!r}; must be a Tucker2 with an ordinary core, "
            f"or a LowRank."
        )
    names = [field.name for field in dataclasses.fields(cls)]
    fields = {name: getattr(module, name) for name in names if hasattr(module, name)}
    # A layer called twice makes its parts twice, in the same places.
    own = {"parent": module.scope.rewound(), "name": None}
    return cls(**fields | fields_as(type(spec), spec) | own)


def cannot_factorise(module: nn.Conv) -> str | None:
    """Returns why a convolution cannot be factorised, or None if it can."""
    # A number is the filter size of a one-dimensional `nn.Conv`.
    if isinstance(module.kernel_size, int) or len(module.kernel_size) != 2:
        return "is not two-dimensional"
    if pair(module.input_dilation or 1) != (1, 1):
        return "dilates its input"
    if module.mask is not None:
        return "has a mask"
    return None
