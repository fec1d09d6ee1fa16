# Needs Python >= 3.11 and make; everything else is installed into .venv at the versions of .ci/constraints.txt.
#
#   make demo    FedAvg, C2M3 and the deployed model on Flower's simulation engine; table, JSON and picture in results/demo
#   make test    lint, types, floors and the fast tests
#   make slow    the marked tests: slow ones, real Flower processes, data sets where they are found
#   make flwr-newest   the adapters' tests with the newest release of Flower that they are known to pass with
#   make bench   most benchmarks: tables on the terminal, records and pages written again; hours, most of them training for the last two
#   make bench-solver OLDER=FOLDER   its first half: the solver and the round beside an older checkout, and one page of them all
#   make results   the README's table and pictures, measured again: the demo and the digits; about eleven minutes on two cores
#   make mnist   the MNIST comparison of simulations/README.md, three seeds (needs C2M3_DATA or a download)

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
SOURCES := .ci c2m3_fl simulations tests
NEWEST_FLWR := 1.42.0# raise it with every release of Flower; .ci/constraints.txt has the oldest that is supported
BENCH := $(BIN)/python -m tests.benchmarks
PARALLEL := -n auto --dist loadfile # a process per core, with one thread each; what a file's tests share is made once

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test lint types floors fast slow flwr-newest bench bench-solver bench-merging results mnist wheel clean
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
	$(BIN)/pytest $(PARALLEL) -m 'not slow and not data and not process'

# Tests that start processes of Flower's or Ray's run alone.
slow: $(READY)
	$(BIN)/pytest $(PARALLEL) -m '(slow or data) and not process' -rs
	$(BIN)/pytest -m process -rs

# Flower alone, in a folder that comes before the environment's packages: its own requirements stay as they are pinned.
flwr-newest: $(READY)
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target $(VENV)/newest flwr==$(NEWEST_FLWR)
	PYTHONPATH=$(VENV)/newest $(BIN)/python -c 'import flwr; assert flwr.__version__ == "$(NEWEST_FLWR)"'
	PYTHONPATH=$(VENV)/newest $(BIN)/pytest $(PARALLEL) tests/flower -m 'not slow and not data and not process'

bench: bench-solver bench-merging

# The solver and the round, in results/bench.json and on one page, results/bench.md; OLDER=FOLDER is an older checkout.
bench-solver: $(READY)
	$(BENCH).solver $(OLDER)
	$(BENCH).growth
	$(if $(OLDER),$(BENCH).before_after $(OLDER))
	$(BENCH).rounds
	$(BENCH).reheating
	$(BENCH).quality                # trains on scikit-learn's digits
	$(if $(OLDER),$(BENCH).still_rounds $(OLDER))
	$(BENCH).server_costs
	$(BENCH).report

bench-merging: $(READY)
	$(BENCH).recovery
	$(BENCH).exchanges              # random weights and images
	$(BENCH).sequences              # from here on networks are trained, on scikit-learn's digits
	$(BENCH).adapters
	$(BENCH).attacks
	$(BENCH).merging_gallery results/gallery
	$(BENCH).activation_start       # needs C2M3_DATA
	$(BENCH).merging_cases          # needs C2M3_DATA; trains what the four tables below merge
	$(BENCH).merging_table --table recalibration
	$(BENCH).merging_table --table methods
	$(BENCH).merging_table --table shift
	$(BENCH).merging_table --table published

# Into results/ first, where a run that was ended goes on; then in place of this checkout's record and pictures.
results: demo
	$(BIN)/c2m3-fl experiment digits --output results/digits
	cp results/digits/digits.json simulations/results/digits.json
	$(BIN)/c2m3-fl experiment digits --draw
	cp results/demo/accuracy.png .gallery/demo.png

mnist: $(READY)
	$(BIN)/c2m3-fl compare --preset mnist --partition iid --seeds 0,1,2 --output results/mnist-iid
	$(BIN)/c2m3-fl compare --preset mnist --partition dirichlet --alpha 0.1 --seeds 0,1,2 --output results/mnist-dirichlet

wheel: $(READY)
	$(BIN)/python -m build --wheel --no-isolation

clean:
	rm -rf $(VENV) build dist results .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
