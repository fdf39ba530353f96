"""Every public name stands in the reference, with an example that runs."""

import doctest
import importlib
import inspect
import re

import pytest
from conftest import ROOT
from pages import run_python_of

API = ROOT / "docs" / "api"
MODULES = ("inertia_jax", "inertia_jax.ops", "inertia_jax.nnx")
NAMES = [
    (module, name)
    for module in MODULES
    for name in importlib.import_module(module).__all__
    if f"{module}.{name}" not in MODULES
]


def documented():
    """Yields the public names on the pages of the reference, with their modules."""
    for page in API.glob("*.md"):
        module = ""
        for kind, name in re.findall(r"^\.\. (\S+):: (\S+)$", page.read_text(), re.M):
            if kind == "currentmodule":
                module = name
            elif kind.startswith(("auto", "py:")):
                yield module, name


def example_of(module, name):
    value = getattr(importlib.import_module(module), name)
    # A constant has no docstring of its own; its example is on its page.
    return value.__doc__ if callable(value) else (API / "networks.md").read_text()


def test_the_reference_has_every_public_name_once():
    assert sorted(documented()) == sorted(NAMES)


def test_every_public_name_has_an_example():
    parse = doctest.DocTestParser().get_examples
    assert not [pair for pair in NAMES if not parse(example_of(*pair))]


@pytest.fixture(scope="module")
def shared(one_device):
    """What the first page of the reference makes for all examples."""
    return run_python_of(API / "index.md")[0]


@pytest.mark.slow
@pytest.mark.parametrize(("module", "name"), NAMES)
def test_an_example_shows_what_it_says(module, name, shared, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = inspect.cleandoc(example_of(module, name))
    test = doctest.DocTestParser().get_doctest(text, {**shared}, name, None, None)
    failures = []
    doctest.DocTestRunner(verbose=False).run(test, out=failures.append)
    assert not failures, "".join(failures)
