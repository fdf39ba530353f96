# All of these need Python >= 3.11 and make, and set up the rest.
PYTHON ?= python3
VENV ?= .venv
# What `make test` installs; EXTRAS=dev is light: tests of the others are skipped.
EXTRAS ?= dev,int8,onnx,tfds,torch
TESTS ?= tests
# What Python does with warnings in the quickstart.
WARNINGS ?= default
BIN = $(VENV)/bin

PYTEST = $(BIN)/python -m pytest -q -n auto --maxprocesses 4 --dist worksteal --durations=10

.PHONY: quickstart test test-all test-floor coverage mutants fuzz faults lint docs \
	release clean

quickstart: $(VENV)/.train
	PYTHONWARNINGS=$(WARNINGS) $(BIN)/python -m train quickstart

# Lint, types, the tests that are not marked slow, and one slow test of each file.
test: lint
	$(PYTEST) --one-a-file $(TESTS)

# All of the slow tests, among them each extra in an environment of its own.
test-all: $(VENV)/.$(EXTRAS)
	$(PYTEST) -m slow $(TESTS)

# `make test` with the oldest versions that pyproject.toml allows, on Python 3.11 or
# 3.12; those that need TensorFlow, PyTorch or qwix are skipped.
test-floor:
	test -x $(VENV)-floor/bin/python || $(PYTHON) -m venv $(VENV)-floor
	sed -n '/^dependencies/,/^tfds/s/^ *"\([^>]*\)>=\([^"]*\)",/\1==\2/p' \
		pyproject.toml > $(VENV)-floor/floor.txt
	$(VENV)-floor/bin/python -m pip install -q -c $(VENV)-floor/floor.txt -e '.[dev]'
	$(MAKE) BIN=$(VENV)-floor/bin -o lint test

# The lines that `make test` and the slow tests of `train` reach, those of the program in
# processes of its own too; and which test runs each, for `make mutants`.
COVERED = $(PYTEST) --cov --cov-append --cov-context=test --cov-report=
coverage: $(VENV)/.$(EXTRAS)
	rm -f .coverage* mutants.jsonl
	$(COVERED) --junitxml=.coverage-quick.xml --one-a-file $(TESTS)
	$(COVERED) --junitxml=.coverage-slow.xml -m slow tests/train
	$(BIN)/python -m coverage report --include='train/*' --fail-under=90
	$(BIN)/python -m coverage report --include='inertia_jax/*' --fail-under=95

# Small changes of the code, and whether the tests notice; after `make coverage`, which
# says what tests run each line. MUTANTS of each part of the code.
MUTANTS ?= 40
mutants: $(VENV)/.$(EXTRAS),mutants
	$(BIN)/python tests/mutation/mutating.py --mutants $(MUTANTS)

lint: $(VENV)/.$(EXTRAS)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy inertia_jax train

# Damaged and made-up inputs for all that reads some, under a limit of memory.
INPUTS ?= 100000
fuzz: $(VENV)/.$(EXTRAS)
	$(BIN)/python tests/fuzz/fuzzing.py --inputs $(INPUTS)

# Kills, signals, full disks, damage and more while the program runs.
FAULTS ?= 200
faults: $(VENV)/.$(EXTRAS)
	$(BIN)/python tests/faults/faulting.py --faults $(FAULTS)

# The documentation as a site, in docs/_build/html. A warning is an error.
docs: $(VENV)/.docs
	$(BIN)/python -m sphinx -q -W --keep-going docs docs/_build/html
	@echo the site begins at docs/_build/html/index.html

# The wheel and the sdist in dist/, checked, and tried in clean environments of Python
# 3.11, 3.12 and 3.13, those that are there.
release: $(VENV)/.release
	rm -rf build dist
	$(BIN)/python -m build
	$(BIN)/python -m twine check --strict dist/*
	$(BIN)/python .ci/try_release.py dist

$(VENV)/.%: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q -e '.[$*]'
	touch $@

clean:
	rm -rf $(VENV) docs/_build .pytest_cache .mypy_cache .ruff_cache
