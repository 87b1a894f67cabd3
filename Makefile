# Every command of the project; `make help` lists them.
#
#   make serve [MODEL=folder] [ARGS="--port 9000"]    set up and start the daemon
#   make test                                         set up and run lint, types and tests
#
# The set-up is kept in .venv; stamp files make a second call instant.

PYTHON ?= python3
MODEL ?=
ARGS ?=
# On Linux, PyPI's torch is the CUDA build (several GB). For the small CPU build:
#   make serve TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
TORCH := $(shell sed -n '/^torch==/p' constraints.txt)

.DEFAULT_GOAL := help
.PHONY: help serve install dev test lint types unit test-e2e test-slow test-wheel bench bench-long docs format clean

help: ## list the commands
	@sed -n 's/^\([a-z0-9-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 14

serve: install ## start the daemon: MODEL=folder (default: the built-in model), ARGS="--port 9000"
	@exec $(BIN)/latentd serve $(if $(MODEL),"$(MODEL)") $(ARGS)

install: $(VENV)/.runtime ## set up .venv with what the daemon needs

dev: $(VENV)/.dev ## set up .venv with what the tests need as well

test: lint types unit ## everything CI checks

lint: dev ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: dev ## mypy --strict
	$(BIN)/mypy

unit: dev ## the tests, without those marked slow
	$(BIN)/python -m pytest

test-e2e: dev ## only the tests that drive the real process
	$(BIN)/python -m pytest tests/e2e

test-slow: dev ## the tests that take minutes
	$(BIN)/python -m pytest -m slow

test-wheel: dev ## the wheel, installed in an empty environment
	$(BIN)/python -m pytest -m slow tests/test_package.py

bench: dev ## what scheduling and starting cost, against their targets
	$(BIN)/python -m benchmarks.control_plane --check
	$(BIN)/python -m benchmarks.startup --check

bench-long: dev ## a 131,072-token request through the real daemon (minutes)
	$(BIN)/python -m benchmarks.long_context

docs: dev ## write the tables of the documents that follow from the code
	$(BIN)/python -m tools.write_docs

format: dev ## let ruff rewrite what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove .venv and everything that was built
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch comes first: by its exact pin, pip takes the build of that version it can see, and what follows finds it there.
$(VENV)/.torch: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "latentd needs Python 3.11 or newer, and '$(PYTHON)' is not that. Try: make PYTHON=python3.12" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) -c constraints.txt $(TORCH)
	@touch $@

$(VENV)/.runtime: $(VENV)/.torch pyproject.toml
	$(PIP) install --quiet -c constraints.txt -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.runtime
	$(PIP) install --quiet -c constraints.txt -e '.[dev]'
	@touch $@
