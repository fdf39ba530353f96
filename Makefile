# `make quickstart` and `make test` need Python >= 3.11 and make, and set up the rest.
PYTHON ?= python3
VENV ?= .venv
# What `make test` installs; EXTRAS=dev is light: tests of PyTorch and TFDS are skipped.
EXTRAS ?= dev,tfds,torch
TESTS ?= tests
BIN = $(VENV)/bin

.PHONY: quickstart test lint clean

quickstart: $(VENV)/.train
	$(BIN)/python -m train quickstart

test: $(VENV)/.$(EXTRAS) lint
	$(BIN)/python -m pytest -q -n auto --maxprocesses 4 --dist worksteal --durations=10 $(TESTS)

lint: $(VENV)/.$(EXTRAS)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy inertia_jax train

$(VENV)/.%: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q -e '.[$*]'
	touch $@

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache
