# `make` lists the targets. Everything is installed into .venv; nothing else on the machine changes,
# except that `make test` installs Chromium and npm with apt-get where it may.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

PEERS := benchmarks/peers
ROUNDS := 3

.PHONY: help setup run check lint test test-ec2 test-tools bench bench-pieces bench-scaling lock clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: $(VENV)/.ready ## make .venv with the locked versions

$(VENV)/.ready: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "fruits_dask needs Python 3.11 or newer: make PYTHON=python3.11 ..."; exit 1; }
	@echo "setting up $(VENV): some 800 MB to download, one to three minutes"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --require-hashes --requirement requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

run: setup ## the main job on generated sample photos; result in fruits-output/
	$(BIN)/python -m fruits_dask run

check: lint ## what every commit must pass: lint, types, fast tests (under 2 minutes)
	$(BIN)/python -m pytest -q -m "not slow and not browser"

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

test: lint test-tools ## lint, types and all tests
	$(BIN)/python -m pytest

test-ec2: setup ## only what rents machines, against EC2 in moto
	$(BIN)/python -m pytest tests/ec2

test-tools: setup
	tools/install-test-tools

bench: setup $(PEERS)/.venv/.ready ## this package against Spark, Ray, tf.data and its own ceiling (45 minutes)
	mkdir -p out
	$(BIN)/python benchmarks/speed.py --rounds $(ROUNDS) --picture out/speed.png --json out/speed.json

$(PEERS)/.venv/.ready: $(PEERS)/requirements.lock
	$(PYTHON) -m venv $(PEERS)/.venv
	$(PEERS)/.venv/bin/python -m pip install --quiet --require-hashes --requirement $<
	touch $@

bench-pieces: setup ## read, decode, featurize, store, reduce, each alone
	$(BIN)/python -m pytest benchmarks --benchmark-enable --benchmark-only

bench-scaling: setup ## a slow store, many workers, many keys, many rows, memory (an hour)
	mkdir -p out
	$(BIN)/python benchmarks/slow_store.py --json out/slow-store.json
	$(BIN)/python benchmarks/plan_keys.py --json out/plan-keys.json
	$(BIN)/python benchmarks/weak_scaling.py --json out/weak-scaling.json
	$(BIN)/python benchmarks/memory.py --engine openvino --json out/memory-openvino.json
	$(BIN)/python benchmarks/memory.py --engine tensorflow --json out/memory-tensorflow.json
	$(BIN)/python benchmarks/reduce_rows.py --json out/reduce-rows.json

lock: setup ## resolve requirements.lock anew
	$(BIN)/uv pip compile pyproject.toml --all-extras --universal --python-version 3.11 --upgrade \
		--generate-hashes --no-emit-index-url --no-emit-find-links --no-header --quiet \
		--output-file requirements.lock

clean: ## remove what was made, except .venv
	rm -rf fruits-output out dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
