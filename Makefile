# One environment in .venv, made on first use; `make help` lists the targets.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
UV := $(BIN)/python -m uv
LOCK := requirements.lock
export UV_NO_PROGRESS := 1

.DEFAULT_GOAL := help
.PHONY: help demo test test-all test-kernels bench bench-peers lint lock clean

help:  ## Show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

$(VENV)/.ready: pyproject.toml $(LOCK)
	@echo "Installing into $(VENV) (about 6 GB with torch; a minute or two)"
	@$(PYTHON) -c 'import sys; sys.exit(not ((3,11) <= sys.version_info < (3,14)))' || \
		{ echo "error: $$($(PYTHON) --version) found, Python 3.11 to 3.13 is needed: run make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check 'uv>=0.5,<1'
	@VIRTUAL_ENV=$(CURDIR)/$(VENV) $(UV) pip install --quiet --compile-bytecode --requirement $(LOCK)
	@VIRTUAL_ENV=$(CURDIR)/$(VENV) $(UV) pip install --quiet --no-deps --editable .
	@touch $@

demo: $(VENV)/.ready  ## Tune FedMPT across three simulated sites (embedded pictures, CPU)
	@$(BIN)/fedmpt demo

test: $(VENV)/.ready  ## Run the tests, without those that take long and prove more of the same
	@$(BIN)/python -m pytest -q -n 2 --dist loadgroup -m "not thorough"

test-all: $(VENV)/.ready  ## Run all tests
	@$(BIN)/python -m pytest -q -n 2 --dist loadgroup --durations=20

KERNELS := tests/unit/privacy/test_gradients.py tests/unit/privacy/test_placement.py
test-kernels: $(VENV)/.ready  ## Run the gradients' tests with the arithmetic of other processors
	@ATEN_CPU_CAPABILITY=default $(BIN)/python -m pytest -q $(KERNELS) & \
		MKL_CBWR=COMPATIBLE $(BIN)/python -m pytest -q $(KERNELS); \
		status=$$?; wait $$! && exit $$status

bench: $(VENV)/.ready  ## Measure speed and memory (ratios of two things timed in one run)
	@$(BIN)/python -m tests.bench

bench-peers: $(VENV)/.ready  ## Measure secure aggregation beside Flower's SecAgg+ (installs it apart)
	@test -x .venv-peers/bin/python || $(PYTHON) -m venv .venv-peers
	@VIRTUAL_ENV=$(CURDIR)/.venv-peers $(UV) pip install --quiet 'flwr==1.41.0' numpy cryptography
	@$(BIN)/python -m tests.bench peers

lint: $(VENV)/.ready  ## Style, which room may import which, types
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/lint-imports --no-cache && $(BIN)/pyright --pythonpath $(BIN)/python

lock: $(VENV)/.ready  ## Renew the lock file from pyproject.toml
	@$(UV) pip compile --quiet --universal --python-version 3.11 --all-extras --no-emit-index-url \
		--no-header --output-file $(LOCK) pyproject.toml

clean:  ## Remove the environment and all results
	@rm -rf $(VENV) .venv-peers runs exported .pytest_cache .ruff_cache .hypothesis
