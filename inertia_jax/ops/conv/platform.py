"""The choice between forms of an operation that give the same, by platform."""

from collections.abc import Callable
from typing import Any

from jax import lax

from inertia_jax.ops.conv.replaced import is_replaced

Form = Callable[..., Any]


def by_platform(
    *args: Any, default: Form, cpu: Form | None = None, tpu: Form | None = None
) -> Any:
    """Returns what the function for this platform, or `default`, makes of the arrays.

    Where convolutions are replaced it is `default`, since no operation may then stand
    in a branch.
    """
    forms = {name: form for name, form in (("cpu", cpu), ("tpu", tpu)) if form}
    if not forms or is_replaced():
        return default(*args)
    return lax.platform_dependent(*args, default=default, **forms)
