# make serve   create .venv, install, and serve the demonstration model on port 8000
# make test    the same with the development tools, then the tests
#
# PYTHON chooses the interpreter (3.11 or newer), VENV the environment, and ARGS adds to a command:
#   make serve PYTHON=python3.12 ARGS="Qwen/Qwen3-0.6B --port 9000"
#   make test ARGS="tests/engine -k prefix"

PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
ARGS ?=

BIN := $(VENV)/bin
# A stamp is newer than what it depends on while the installation is up to date.
INSTALLED := $(VENV)/.installed
INSTALLED_DEV := $(VENV)/.installed-dev

.PHONY: help serve install test test-slow lint format clean
.DEFAULT_GOAL := help

help:
	@sed -n 's/^# \{0,1\}//p;/^$$/q' Makefile

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Skyline needs Python 3.11 or newer; name one with: make PYTHON=python3.12 ..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(INSTALLED): pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt -e .
	$(BIN)/skyline kernels --build
	@touch $@

$(INSTALLED_DEV): pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt -e '.[dev]'
	$(BIN)/skyline kernels --build
	@touch $@ $(INSTALLED)

install: $(INSTALLED)

serve: $(INSTALLED)
	$(BIN)/skyline serve $(ARGS)

test: $(INSTALLED_DEV)
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal $(ARGS)

test-slow: $(INSTALLED_DEV)
	$(BIN)/python -m pytest -m slow $(ARGS)

lint: $(INSTALLED_DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(INSTALLED_DEV)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find src tests examples -name __pycache__ -type d -prune -exec rm -rf {} +
