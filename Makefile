# The two commands: `make quickstart` and `make test`. Both create what they need and can be run again.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check
PYTEST := $(BIN)/python -m pytest

.PHONY: help quickstart test test-all check format docs lock clean

help:  ## What can be made
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

# The stamp is written last, so an interrupted installation is taken up again by the next `make`.
$(VENV)/.installed: requirements-dev.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' \
	 || { echo "error: $(PYTHON) is not Python 3.11 or 3.12; name one with make PYTHON=python3.11 …" >&2; exit 2; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv --clear $(VENV)
	@echo "[setup] installing the pinned packages into $(VENV) (minutes the first time, nothing after that)"
	@$(PIP) install -qq -r requirements-dev.lock
	@$(PIP) install -qq --no-deps --no-build-isolation -e .
	@touch $@

quickstart: $(VENV)/.installed  ## The main job end to end on this machine: index, train, release, serve, ask, evaluate
	@$(BIN)/metier quickstart

test: $(VENV)/.installed  ## All tests but the long ones
	@$(PYTEST) -m "not ray and not e2e and not fault and not gpu"
	@$(PYTEST) -m "ray and not e2e and not fault and not gpu"

test-all: test  ## ... and the long ones: end to end, faults
	@$(PYTEST) -m "(e2e or fault) and not gpu"

check: $(VENV)/.installed  ## Format, lint, types, architecture
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(PYTEST) -q tests/test_architecture.py

format: $(VENV)/.installed  ## Format and mend what can be mended
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

docs: $(VENV)/.installed  ## Generate docs/configuration.md from the schema
	@$(BIN)/metier config schema --markdown > docs/configuration.md

lock:  ## Resolve pyproject.toml anew into the two lock files
	@$(PYTHON) -m venv --clear .lock && .lock/bin/python -m pip install -qq -e ".[train,serve,evaluation,s3]" \
	 && .lock/bin/python -m pip freeze --exclude-editable | sed 's/+cpu$$//' > requirements.lock \
	 && .lock/bin/python -m pip install -qq -e ".[dev]" -c requirements.lock \
	 && .lock/bin/python -m pip freeze --exclude-editable --all --exclude pip | sed 's/+cpu$$//' > requirements-dev.lock; rm -rf .lock

clean:  ## Remove what quickstart made (not the environment, not the model cache)
	@test ! -x $(BIN)/metier || $(BIN)/metier down
	rm -rf .metier
