"""The versions of the program and of what it computes with."""

import importlib.metadata
import platform

import inertia_jax

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def package_versions() -> dict[str, str | None]:
    """Returns versions by package, None for one that is not installed."""
    found: dict[str, str | None] = {"inertia_jax": inertia_jax.__version__}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def found_versions() -> dict[str, str | None]:
    """Returns the versions of the packages and of Python."""
    return package_versions() | {"python": platform.python_version()}


def versions_in_words() -> str:
    """Returns a line for each package, and one for Python."""
    return "\n".join(
        f"{name:<17}{version or 'not installed'}"
        for name, version in found_versions().items()
    )
