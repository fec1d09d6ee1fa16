# Needs Python >= 3.11 and make; everything else is installed into .venv at the versions of .ci/constraints.txt.
#
#   make demo    FedAvg, C2M3 and C2M3 + REPAIR on Flower's simulation engine; table, JSON and picture in results/demo
#   make test    lint, types, floors and the fast tests
#   make slow    the marked tests: slow ones, real Flower processes, data sets where they are found
#   make bench   the benchmarks
#   make mnist   the MNIST comparison of the README, three seeds (needs C2M3_DATA or a download)

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
SOURCES := c2m3_fl simulations tests

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test lint types floors fast slow bench mnist wheel clean
.DEFAULT_GOAL := test

$(READY): pyproject.toml .ci/constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "needs Python 3.11 or newer, found " + sys.version)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c .ci/constraints.txt -e '.[dev]'
	@touch $@

demo: $(READY)
	$(BIN)/c2m3-fl compare --preset demo --engine flwr --output results/demo

test: lint types floors fast

lint: $(READY)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/ruff check $(SOURCES)

types: $(READY)
	$(BIN)/mypy

floors: $(READY)
	$(BIN)/lint-imports

fast: $(READY)
	$(BIN)/pytest -m 'not slow and not data and not process'

slow: $(READY)
	$(BIN)/pytest -m 'slow or data or process' -rs

bench: $(READY)
	$(BIN)/pytest tests/benchmarks --benchmark-only
	$(BIN)/python -m tests.benchmarks.solver
	$(BIN)/python -m tests.benchmarks.solver --growth
	$(BIN)/python -m tests.benchmarks.rounds --identity --many 100
	$(BIN)/python -m tests.benchmarks.rounds --many 1000 --network mlp
	$(BIN)/python -m tests.benchmarks.quality

mnist: $(READY)
	$(BIN)/c2m3-fl compare --preset mnist --partition iid --seeds 0,1,2 --output results/mnist-iid
	$(BIN)/c2m3-fl compare --preset mnist --partition dirichlet --alpha 0.1 --seeds 0,1,2 --output results/mnist-dirichlet

wheel: $(READY)
	$(BIN)/python -m build --wheel

clean:
	rm -rf $(VENV) build dist results .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
